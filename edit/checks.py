"""Checks of an edit's settings, and the parsing of its `word=value` options. No heavy imports."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from backbone.cli.sampling import MOST_EDITS
from backbone.io.console import UserError, notify, quote, refuse_other_encodings, suggest_value

T = TypeVar("T")
# Weight of a word, or of a prompt to compose with: the largest usual one, and the one above which images break
USUAL_WEIGHT, MOST_WEIGHT = 10, 20


def check_count(value: int) -> int:
    """Return the number of images; `UserError` outside 1 … MOST_EDITS."""
    if not 1 <= value <= MOST_EDITS:
        raise UserError(
            f"count is {value}, and an edit gives 1 to {MOST_EDITS} images. For more, edit again with another seed."
        )
    return value


def check_share(name: str, value: float) -> float:
    """Return the value; `UserError` outside 0…1. `name` is its name in the message."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value:g} and must lie between 0 and 1, a share of the whole.")
    return value


def check_interval(name: str, start: float, end: float) -> tuple[float, float]:
    """Return both ends; `UserError` unless 0 ≤ start ≤ end ≤ 1."""
    interval = check_share(name, start), check_share(name, end)
    if start > end:
        raise UserError(f"{name} begins at {start:g} and ends before, at {end:g}. Write {end:g}:{start:g}.")
    return interval


UNCHANGED = "At a strength of 0 nothing is changed: what comes out is the image as the model keeps it."


def check_strength(
    value: float,
    steps: int,
    *,
    unchanged: str = UNCHANGED,
    count: Callable[[int, float], int] = lambda steps, share: int(steps * share + 1e-9),
) -> float:
    """Return the value; `UserError` outside 0…1, and for less than one step by `count`. At 0 `unchanged` is printed."""
    check_share("strength", value)
    if value == 0:
        notify(unchanged)
    if value > 0 and count(steps, value) == 0:
        raise UserError(
            f"A strength of {value:g} is less than one of {steps} steps, so nothing would change. Raise the strength "
            "or the steps."
        )
    return value


def check_not_negative(name: str, value: float) -> float:
    """Return the value; `UserError` below 0 and for NaN."""
    if not value >= 0:
        raise UserError(f"{name} is {value:g} and must not be negative. 1 means no guidance.")
    return value


def check_prompt(text: str, noun: str) -> str:
    """Return the prompt; `UserError` for no text and for an empty one, which the message calls `noun`."""
    if not isinstance(text, str):
        raise UserError(f"The {noun} is text, not {type(text).__name__}. Give its words.")
    refuse_other_encodings(text, f"The {noun} ")
    if not text.strip():
        is_instruction = noun == "instruction"
        remedy = "to do: “make it snow”" if is_instruction else "the picture shows and what it should show"
        raise UserError(f"The {noun} is empty. Say in words what {remedy}.")
    return text


def refuse_unopened(model: object) -> None:
    """`UserError` for a model's name, or anything else, where an open `Backbone` is needed."""
    if isinstance(model, (str, os.PathLike)):
        raise UserError(
            f"{os.fspath(model)} is a model's name. Open it first: backbone.open({str(model)!r})."
        )
    if not hasattr(type(model), "denoiser"):  # on the instance, the property would load the weights
        raise UserError(f'{type(model).__name__} is no open model. Open one first: backbone.open("moji").')


def refuse_no_inversion(inversion: object) -> None:
    """`UserError` for anything but an `Inversion`."""
    if not hasattr(inversion, "overwrites"):
        raise UserError(
            f"{type(inversion).__name__} is no inversion. Make one: edit.invert(model, image, prompt), or read one: "
            "edit.read_inversion(path, model)."
        )


def check_prompts(texts: str | Sequence[str], noun: str) -> tuple[str, ...]:
    """Return the prompts, given as one text or several; `UserError` for none, and as `check_prompt` for each."""
    if isinstance(texts, str):
        texts = (texts,)
    if texts is not None and (isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable)):
        raise UserError(
            f"The {noun} is text, or a list of texts, not {type(texts).__name__}. Give its words."
        )
    texts = () if texts is None else tuple(texts)
    if not texts:
        raise UserError(f"There is no {noun}. Say what the picture should show.")
    return tuple(check_prompt(text, noun) for text in texts)


def check_weighted(
    toward: Mapping[str, float] | Sequence[tuple[str, float]], noun: str
) -> list[tuple[str, float]]:
    """Return (prompt, weight) pairs, given as pairs or as a dict; `UserError` for none, and for no number."""
    pairs = list(toward.items()) if isinstance(toward, Mapping) else list(toward)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise UserError(f"Each {noun} needs its weight. Write [(“a painting”, 1.0)].")
    texts = check_prompts([text for text, _ in pairs], noun)
    try:
        weighted = [(text, float(weight)) for text, (_, weight) in zip(texts, pairs, strict=True)]
        if not all(math.isfinite(weight) for _, weight in weighted):
            raise ValueError
        return weighted
    except (TypeError, ValueError) as error:
        raise UserError(f"The weight of a {noun} is a number, as in [(“a painting”, 1.0)].") from error


def refuse_composed_twice(weighted: Sequence[tuple[str, float]]) -> None:
    """`UserError` for a prompt that is given twice, or both with --toward and with --away."""
    sums: dict[str, list[float]] = {}
    for text, weight in weighted:
        sums.setdefault(" ".join(text.split()), []).append(weight)
    for text, weights in sums.items():
        if len(weights) > 1:
            added = " and ".join(f"{weight:g}" for weight in weights)
            raise UserError(
                f"“{text}” is composed with {len(weights)} times, by {added}, which is {sum(weights):g} in all. Say it "
                "once, with --toward or --away."
            )


def say_far_weights(option: str, weighted: Sequence[tuple[str, float]]) -> None:
    """Warn of weights so large that they break the image."""
    for text, weight in weighted:
        if abs(weight) > MOST_WEIGHT:
            suggestion = suggest_value(weight, USUAL_WEIGHT)
            notify(
                f"{option} “{text}” by {weight:g} breaks the image: {USUAL_WEIGHT} is much already.{suggestion}"
            )


def parse_weight(text: str, option: str) -> tuple[str, float]:
    """Parse `word=2`; `UserError` for anything else."""
    word, separator, number = text.rpartition("=")
    try:
        if separator and word.strip() and math.isfinite(weight := float(number)):
            return word.strip(), weight
    except ValueError:
        pass
    word_part, colon, end = text.rpartition(":")
    suggestion = (
        f"{word_part}={end}" if colon and end.strip() else "word=2" if separator else f"{text.strip()}=2"
    )
    raise UserError(f"{option} {text} is not a word and a number. Write {option} {quote(suggestion)}.")


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """Parse the values of `--reweight` to word → weight; `UserError` for a word with two weights."""
    weights = map_words([parse_weight(text, "--reweight") for text in texts], "--reweight")
    say_far_weights("--reweight", list(weights.items()))
    for word in [word for word, weight in weights.items() if weight == 1]:
        notify(f"--reweight {word}=1 changes nothing: it is the weight that every word has.")
    return weights


def map_words(pairs: Sequence[tuple[str, T]], option: str) -> dict[str, T]:
    """Word → value of a repeatable option; `UserError` for a word that is given twice."""
    words: set[str] = set()
    for word, _ in pairs:
        if word.lower() in words:
            raise UserError(f"{option} is given twice for “{word}”. Give one of them.")
        words.add(word.lower())
    return dict(pairs)


def parse_blend(words: Sequence[str] | None) -> list[str] | None:
    """Parse the values of `--blend`: [] for `none`, None if it is not given; `UserError` for `none` beside words."""
    if not words:
        return None
    if "none" in words and len(words) > 1:
        raise UserError("--blend none is everywhere, and words are given too. Leave out none, or the words.")
    return [word for word in words if word != "none"]


def parse_window(text: str, option: str) -> tuple[str, tuple[float, float]]:
    """Parse `word=0.2:0.8`, or `word=0.8` for a window from the start; `UserError` for anything else."""
    word, separator, numbers = text.rpartition("=")
    start, colon, end = numbers.rpartition(":")
    try:
        if separator and word.strip():
            return word.strip(), check_interval(
                f"{option} {word}", float(start) if colon else 0.0, float(end)
            )
    except ValueError:
        pass
    raise UserError(f"{option} {text} is not a word and its window. Write {option} word=0.2:0.8.")


def parse_swap(text: str) -> tuple[str, str]:
    """Parse `cat=tiger`; `UserError` for anything else."""
    old, separator, new = text.partition("=")
    if not separator or not old.strip() or not new.strip():
        raise UserError(f"--swap {text} is not a pair of words. Write --swap cat=tiger.")
    return old.strip(), new.strip()
