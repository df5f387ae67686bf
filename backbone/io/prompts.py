"""Read prompts: words, or a file with a prompt on each line.

A line of a `.jsonl` file has a `prompt`, and optionally a `category` and `hard_negatives`; a `.json` file is a list of
such objects, or of words.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, format_count, notify_once, refuse_other_encodings
from backbone.io.records import UTF16, iterate_entries, read_text, refuse_pipe
from backbone.io.written import written_path

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")  # except those that `str.split` treats as whitespace
# Byte order marks, soft hyphens, zero-width spaces, marks of the writing direction, and control characters, which
# quotation marks of other encodings are read as
_CONTROLS = "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # except those that `str.split` treats as whitespace
NO_WIDTH = re.compile(f"[\ufeff\u00ad\u200b\u2060\u200e\u200f\u202a-\u202e\u2066-\u2069{_CONTROLS}]")
# Line breaks and tabs, with the spaces around them
BREAKS = re.compile(r"\s*[\t-\r\x1c-\x1f\x85\u2028\u2029]\s*")
# Words that are wrong for a mirrored image: sides and letters
SIDED = re.compile(
    r"\b(?:left|right)(?:most|wards?|-?hand(?:ed)?)?\b|\b(?:text|letters|lettering|inscription|logos?|watermark)\b",
    re.IGNORECASE,
)
JOINERS = " \u200c\u200d"  # zero-width joiners are part of words in some scripts, and of some emoji
SUFFIXES = (".txt", ".jsonl", ".json")
# Keys of other programs' prompt lists that set how a prompt is drawn
DRAWING_KEYS = frozenset({
    "seed", "negative", "negative_prompt", "steps", "sample_steps", "num_inference_steps", "width", "height",
    "guidance", "guidance_scale", "cfg", "cfg_scale", "scale", "sampler", "sampler_name", "count", "lora",
})  # fmt: skip
TABLES = (".csv", ".tsv", ".yaml", ".yml", ".toml", ".parquet")  # files whose lines are not prompts
# Words with which a caption begins, and an instruction does not
VERBLESS = frozenset({"a", "an", "the", "photo", "picture", "image", "painting", "two", "portrait"})


@dataclass(frozen=True)
class Prompt:
    """What to draw, the category that it is counted in, and hard negatives: prompts whose images compete with its own.

    “a horse in a park” is a hard negative of “a horse wearing a crown in a park”: sampled from the same noise, its
    image differs by the crown alone.
    """

    text: str
    category: str = ""
    hard_negatives: tuple[str, ...] = ()


def drop_invisible(text: str) -> str:
    """A text on one line, in NFC, without invisible characters, which would split words into other tokens."""
    return " ".join(NO_WIDTH.sub("", compose(text)).split()).strip(JOINERS)


def compose(text: str) -> str:
    """A text in NFC: “é” as one character, which some keyboards and disks write as a letter and a mark."""
    return unicodedata.normalize("NFC", text)


def is_caption(words: str) -> bool:
    """Whether words seem to describe an image rather than to give an instruction."""
    return (words.split() or [""])[0].lower() in VERBLESS


def load_prompts(
    texts: str | Sequence[str], *, read: Callable[[Path], list[Prompt]] | None = None
) -> list[Prompt]:
    """The prompts of these texts, in order: an existing file is read, any other text is a prompt itself.

    `read` reads a file: `read_prompts` by default, which drops repeated prompts, or `read_lines`.

    Raises `UserError` for an empty text, for a value that is not text, and for the name of a .txt, .jsonl or .json file
    that does not exist.
    """
    prompts = []
    is_single = isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable)
    for words in [texts] if is_single else texts:
        if not isinstance(words, str):
            raise UserError(
                f"A prompt is text, not {type(words).__name__}. Give words, or several in a list."
            )
        refuse_other_encodings(words, "The prompt ")
        if os.path.isfile(path := str(written_path(words))):
            prompts += (read or read_prompts)(Path(path))
            continue
        refuse_pipe(path)  # as from a shell's <(…), whose name is not a prompt
        if words.strip().lower().endswith((*SUFFIXES, *TABLES)):
            if os.path.isdir(path):
                raise UserError(f"{words} is a folder. Name a file with a prompt on each line.")
            raise UserError(
                f"{words} does not exist. Name a file with a prompt on each line, or give the words."
            )
        if os.path.isdir(path) and (
            "/" in words or os.sep in words or os.path.isfile(f"{path}/concept.json")
        ):
            raise UserError(
                f"{words} is a folder, and no prompt. Say in words what to draw; each run has a --concept of its own."
            )
        if words.strip() == "-":
            raise UserError(
                "- is no prompt, and nothing is read from a pipe. Give words, or a file with prompts."
            )
        text = _clean_words(words)
        if not text:
            raise UserError("A prompt is empty. Say in words what to draw.")
        prompts.append(Prompt(text))
    return prompts


def _clean_words(words: str) -> str:
    """The words of a prompt on one line, without invisible characters; prints a line if there were some."""
    words = " ".join(part for part in BREAKS.split(words) if part)
    if (visible := drop_invisible(words)) == " ".join(compose(words).split()):
        return compose(words) if visible else ""
    notify_once("A prompt has zero-width characters in it. They are left out.")
    return visible


def require_prompts(texts: str | Sequence[str]) -> list[Prompt]:
    """`load_prompts`, with a `UserError` for none."""
    prompts = load_prompts(texts)
    if not prompts:
        raise UserError("There are no prompts. Say in words what to draw.")
    return prompts


def unique_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each text: `align` identifies images by prompt and sample."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.text, prompt)
    return list(unique.values())


def one_prompt(text: str, option: str) -> str:
    """The text of one prompt, given in words or in a file; `UserError` for a file with several."""
    if not text.strip():
        return text  # the command decides what an empty prompt means
    prompts = load_prompts([text])
    if len(prompts) != 1:
        raise UserError(
            f"{text} holds {len(prompts)} prompts, and {option} takes one. Give its words instead."
        )
    return prompts[0].text


def parse_prompt(text: str) -> str:
    """`one_prompt` for an `Option`, which does not know its flag."""
    return one_prompt(text, "this option")


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of `read_lines` without repeated ones; prints how many were repeated."""
    lines = read_lines(path)
    unique = unique_prompts(lines)
    if repeats := len(lines) - len(unique):
        notify_once(f"{path} repeats {format_count(repeats, 'prompt')}. Each is used once.")
    return unique


def read_lines(path: Path) -> list[Prompt]:
    """The prompts of a file, line by line. Empty lines and those that begin with # are skipped.

    In a text file the text before a tab is the prompt's category. The `UserError` for bad lines lists them.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file with a prompt on each line.")
    if path.suffix.lower() in TABLES:
        raise UserError(
            f"Prompts are not read from {path.suffix.lower()} files, as {path} is. Write one on each line of a .txt "
            'file, or {"prompt": …} on each line of a .jsonl file.'
        )
    try:
        text = read_text(path)
    except UserError as error:
        with path.open("rb") as file:
            start = file.read(4096)
        if b"\0" in start and not start.startswith(UTF16):  # UTF-16 holds zeros too
            raise UserError(
                f"{path} is no text. Give words, or a file with a prompt on each line."
            ) from error
        raise
    prompts, bad, unused_keys = list[Prompt](), list[str](), dict[str, None]()
    is_json = path.suffix.lower() in (".jsonl", ".json")
    for place, prompt in _iterate_json(text, path, unused_keys) if is_json else _iterate_lines(text):
        if prompt is None:
            bad.append(f"  {place} holds no prompt")
        else:
            prompts.append(prompt)
    if bad:
        raise UserError(
            "\n".join(
                [f"{path} has {format_count(len(bad), 'bad line')}:", *bad[:20], "Repair or remove them."]
            )
        )
    if not prompts:
        raise UserError(f"{path} holds no prompts. Write one on each line.")
    if unused_keys:
        notify_once(
            f"{path} sets {' and '.join(unused_keys)} for single prompts, which has no effect. Set it for all of them, "
            "by a flag."
        )
    return prompts


def _iterate_lines(text: str) -> Iterator[tuple[str, Prompt | None]]:
    """The prompts of a text's lines, each with its place (`line 3`); None for a bad line."""
    # Soft line breaks (U+000B, U+2028) are spaces within a prompt
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            yield f"line {number}", _parse_line(line)


def _iterate_json(text: str, path: Path, unused_keys: dict[str, None]) -> Iterator[tuple[str, Prompt | None]]:
    """The same for JSON lines or a JSON list; keys of drawing settings are added to `unused_keys`."""
    # In JSON lines a # begins a comment too
    without_comments = "\n".join("" if line.startswith("#") else line for line in text.split("\n"))
    for place, value in iterate_entries(without_comments, path):
        if isinstance(value, dict):
            unused_keys |= {
                key: None for key in value if key.lower() in DRAWING_KEYS and value[key] not in (None, "")
            }
        yield place.partition(" of ")[0].lower(), _parse_entry(value)


def _parse_line(line: str) -> Prompt | None:
    category, tab, text = line.rpartition("\t")
    if CONTROL.search(line) or not (text := _clean_words(" ".join(text.split()))):
        return None
    return Prompt(text, category.strip() if tab else "")


def _parse_entry(value: Any) -> Prompt | None:
    value = {"prompt": value} if isinstance(value, str) else value
    text = value.get("prompt") if isinstance(value, dict) else None
    if (
        not isinstance(text, str)
        or CONTROL.search(text)
        or not (visible := _clean_words(" ".join(text.split())))
    ):
        return None
    negatives = value.get("hard_negatives") or []
    if not isinstance(negatives, list) or not all(isinstance(negative, str) for negative in negatives):
        return None
    hard_negatives = tuple(_clean_words(" ".join(negative.split())) for negative in negatives)
    if not all(hard_negatives):
        return None
    return Prompt(visible, str(value.get("category") or ""), hard_negatives)


def describe_mirrored(texts: Iterable[tuple[str, str]]) -> str:
    """A warning about texts that name a side or letters, which are wrong for mirrored images; "" if none does.

    `texts` are pairs of a text and its place.
    """
    matches = [(match[0], place) for text, place in texts if (match := SIDED.search(text))]
    if not matches:
        return ""
    (word, place), *others = matches
    suffix = f" and {format_count(len(others), 'other text')}" if others else ""
    return f"“{word}” stands in {place}{suffix}, and --flip teaches it mirrored too. Leave --flip out if that matters."
