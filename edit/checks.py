"""What can be said of a request before a model is loaded. No heavy imports."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from backbone.cli.sampling import MOST_EDITS
from backbone.io.console import UserError, guess_meant, notify, quote, refuse_other_encodings

T = TypeVar("T")
# Of a word, or of a prompt to compose with: what is much, and what nobody means
USUAL_WEIGHT, MOST_WEIGHT = 10, 20


def count(value: int) -> int:
    """How many images an edit gives, if so many can be meant."""
    if not 1 <= value <= MOST_EDITS:
        raise UserError(
            f"count is {value}, and an edit gives 1 to {MOST_EDITS} images. Ask for so many; further ones are another "
            "seed's."
        )
    return value


def share(name: str, value: float) -> float:
    """The value, if it is a share of the whole."""
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value:g} and must lie between 0 and 1, a share of the whole.")
    return value


def between(name: str, start: float, end: float) -> tuple[float, float]:
    """Both, if they are shares of the whole, and the first is not after the second."""
    found = share(name, start), share(name, end)
    if start > end:
        raise UserError(f"{name} begins at {start:g} and ends before, at {end:g}. Write {end:g}:{start:g}.")
    return found


UNCHANGED = "At a strength of 0 nothing is changed: what comes out is the image as the model keeps it."


def strength(value: float, steps: int, *, nothing: str = UNCHANGED) -> float:
    """The value, if it is a share of the steps that is 0, of which `nothing` is said, or at least one of them."""
    share("strength", value)
    if value == 0:
        notify(nothing)
    if value > 0 and int(steps * value + 1e-9) == 0:
        raise UserError(
            f"A strength of {value:g} is less than one of {steps} steps, so nothing would change. Raise either."
        )
    return value


def not_negative(name: str, value: float) -> float:
    """The value, if it is not negative."""
    if not value >= 0:
        raise UserError(f"{name} is {value:g} and must not be negative. 1 is none.")
    return value


def prompt(text: str, what: str) -> str:
    """The prompt, if it says something; `what` names it in the complaint."""
    if not isinstance(text, str):
        raise UserError(f"The {what} is text, and {type(text).__name__} is none. Give its words.")
    refuse_other_encodings(text, f"The {what} ")
    if not text.strip():
        told = what == "instruction"
        remedy = "to do: “make it snow”" if told else "the picture shows and what it should show"
        raise UserError(f"The {what} is empty. Say in words what {remedy}.")
    return text


def opened(model: object) -> None:
    """Refuse the name of a model, and what is none, where an open one is needed."""
    if isinstance(model, (str, os.PathLike)):
        raise UserError(
            f"{os.fspath(model)} is a model's name. Open it first: backbone.open({str(model)!r})."
        )
    if not hasattr(type(model), "denoiser"):  # asked of the model itself, it would load its weights
        raise UserError(f'{type(model).__name__} is no open model. Open one first: backbone.open("moji").')


def inverted(inversion: object) -> None:
    """Refuse what is no inversion, where an edit begins from one."""
    if not hasattr(inversion, "overwrites"):
        raise UserError(
            f"{type(inversion).__name__} is no inversion. Make one: edit.invert(model, image, prompt), or read one: "
            "edit.read_inversion(path, model)."
        )


def prompts(texts: str | Sequence[str], what: str) -> tuple[str, ...]:
    """The prompts, if there are any and each says something; a text is one."""
    if isinstance(texts, str):
        texts = (texts,)
    if texts is not None and (isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable)):
        raise UserError(
            f"The {what} is text, or a list of some, and {type(texts).__name__} is none. Give its words."
        )
    texts = () if texts is None else tuple(texts)
    if not texts:
        raise UserError(f"There is no {what}. Say what the picture should show.")
    return tuple(prompt(text, what) for text in texts)


def weighted(toward: Mapping[str, float] | Sequence[tuple[str, float]], what: str) -> list[tuple[str, float]]:
    """Prompts with their weights, as pairs or in a dict, if there are any, and each says something."""
    pairs = list(toward.items()) if isinstance(toward, Mapping) else list(toward)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise UserError(f"Each {what} needs its weight. Write [(“a painting”, 1.0)].")
    texts = prompts([text for text, _ in pairs], what)
    try:
        found = [(text, float(weight)) for text, (_, weight) in zip(texts, pairs, strict=True)]
        if not all(math.isfinite(weight) for _, weight in found):
            raise ValueError
        return found
    except (TypeError, ValueError) as error:
        raise UserError(f"The weight of a {what} is a number, as in [(“a painting”, 1.0)].") from error


def composed_once(weighted: Sequence[tuple[str, float]]) -> None:
    """`UserError` where an image is to be led towards a prompt twice, or towards it and away from it."""
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
    """Says of weights that nobody means that they break the image."""
    for text, weight in weighted:
        if abs(weight) > MOST_WEIGHT:
            meant = guess_meant(weight, USUAL_WEIGHT)
            notify(
                f"{option} “{text}” by {weight:g} breaks the image: {USUAL_WEIGHT} is much already.{meant}"
            )


def split_weight(asked: str, option: str) -> tuple[str, float]:
    """`word=2` as a word and a number."""
    word, separator, number = asked.rpartition("=")
    try:
        if separator and word.strip() and math.isfinite(weight := float(number)):
            return word.strip(), weight
    except ValueError:
        pass
    said, colon, end = asked.rpartition(":")
    meant = f"{said}={end}" if colon and end.strip() else "word=2" if separator else f"{asked.strip()}=2"
    raise UserError(f"{option} {asked} is not a word and a number. Write {option} {quote(meant)}.")


def weights(asked: Sequence[str]) -> dict[str, float]:
    """The weights of `--reweight`, by word; `UserError` for a word that has two. That 1 changes nothing is said."""
    found = by_word([split_weight(one, "--reweight") for one in asked], "--reweight")
    say_far_weights("--reweight", list(found.items()))
    for word in [word for word, weight in found.items() if weight == 1]:
        notify(f"--reweight {word}=1 changes nothing: it is the weight that every word has.")
    return found


def by_word(pairs: Sequence[tuple[str, T]], option: str) -> dict[str, T]:
    """What an option says of each word; `UserError` where it says two things of one."""
    seen: set[str] = set()
    for word, _ in pairs:
        if word.lower() in seen:
            raise UserError(f"{option} is given twice for “{word}”. Say one of them.")
        seen.add(word.lower())
    return dict(pairs)


def blend(asked: Sequence[str] | None) -> list[str] | None:
    """The words to blend: none of them for `none`, and None where nothing was asked for."""
    if not asked:
        return None
    if "none" in asked and len(asked) > 1:
        raise UserError(f"--blend none is everywhere, and {len(asked) - 1} more are given. Leave out either.")
    return [word for word in asked if word != "none"]


def window(asked: str, option: str) -> tuple[str, tuple[float, float]]:
    """`word=0.2:0.8` (or `word=0.8`, from the start) as a word and its window."""
    word, separator, numbers = asked.rpartition("=")
    start, colon, end = numbers.rpartition(":")
    try:
        if separator and word.strip():
            return word.strip(), between(f"{option} {word}", float(start) if colon else 0.0, float(end))
    except ValueError:
        pass
    raise UserError(f"{option} {asked} is not a word and its window. Write {option} word=0.2:0.8.")


def swap(asked: str) -> tuple[str, str]:
    """`cat=tiger` as a pair of phrases."""
    old, separator, new = asked.partition("=")
    if not separator or not old.strip() or not new.strip():
        raise UserError(f"--swap {asked} is not a pair of words. Write --swap cat=tiger.")
    return old.strip(), new.strip()
