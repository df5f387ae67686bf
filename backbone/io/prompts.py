"""Prompts as people give them: words, or a file with a prompt on each line.

In a `.jsonl` file a line has a `prompt`, and perhaps a `category` and `hard_negatives`; a `.json` file is a list of
these, or of words.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, count_of, notify_once, refuse_other_encodings
from backbone.io.records import UTF16, iterate_entries, read_text, refuse_pipe
from backbone.io.written import written_path

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")  # all but those that `str.split` takes for blanks
# A byte order mark, what web pages put into words and between them, marks of the direction of writing, and control
# characters, as which other encodings' quotation marks are taken too
_CONTROLS = "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # but those that `str.split` takes for blanks
NO_WIDTH = re.compile(f"[\ufeff\u00ad\u200b\u2060\u200e\u200f\u202a-\u202e\u2066-\u2069{_CONTROLS}]")
BREAKS = re.compile(
    r"\s*[\t-\r\x1c-\x1f\x85\u2028\u2029]\s*"
)  # ends of lines and tabs, with the blanks around them
# What a mirrored image shows otherwise than its prompt says: a side, letters
SIDED = re.compile(
    r"\b(?:left|right)(?:most|wards?|-?hand(?:ed)?)?\b|\b(?:text|letters|lettering|inscription|logos?|watermark)\b",
    re.IGNORECASE,
)
JOINERS = " \u200c\u200d"  # which have no width either, and make words of some scripts and some emoji
SUFFIXES = (".txt", ".jsonl", ".json")
# Keys of other programs' lists that say how a prompt is drawn
WISHES = frozenset({
    "seed", "negative", "negative_prompt", "steps", "sample_steps", "num_inference_steps", "width", "height",
    "guidance", "guidance_scale", "cfg", "cfg_scale", "scale", "sampler", "sampler_name", "count", "lora",
})  # fmt: skip
TABLES = (".csv", ".tsv", ".yaml", ".yml", ".toml", ".parquet")  # whose lines are no prompts


VERBLESS = frozenset({"a", "an", "the", "photo", "picture", "image", "painting", "two", "portrait"})


@dataclass(frozen=True)
class Prompt:
    """What to draw, the group that it is counted in, and hard negatives: prompts whose images compete with its own.

    “a horse in a park” is a hard negative of “a horse wearing a crown in a park”: sampled from the same noise, its
    image differs by the crown alone.
    """

    text: str
    category: str = ""
    hard_negatives: tuple[str, ...] = ()


def drop_unseen(text: str) -> str:
    """A text on one line, in NFC, without marks that nobody sees: they are tokens, and cut words into others."""
    return " ".join(NO_WIDTH.sub("", compose(text)).split()).strip(JOINERS)


def compose(text: str) -> str:
    """A text in NFC: “é” as one character, of which some keyboards and disks make a letter and a mark."""
    return unicodedata.normalize("NFC", text)


def is_caption(words: str) -> bool:
    """Whether words seem to describe an image, where an instruction says what to do."""
    return (words.split() or [""])[0].lower() in VERBLESS


def prompts_of(
    given: str | Sequence[str], *, read: Callable[[Path], list[Prompt]] | None = None
) -> list[Prompt]:
    """The prompts of what was given, in order: a file that exists is read, other words are a prompt themselves.

    `read` is how: `read_prompts`, each once, where nothing is said, or `read_lines`.

    Raises `UserError` for empty words, for what is no text, and for the name of a .txt, .jsonl or .json file that is
    not there.
    """
    found = []
    for words in [given] if isinstance(given, (str, bytes)) or not isinstance(given, Iterable) else given:
        if not isinstance(words, str):
            raise UserError(
                f"A prompt is text, not {type(words).__name__}. Give words, or several in a list."
            )
        refuse_other_encodings(words, "The prompt ")
        if os.path.isfile(path := str(written_path(words))):
            found += (read or read_prompts)(Path(path))
            continue
        refuse_pipe(path)  # as a shell's <(…) is: its name is no prompt
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
        if seen := _see(words):
            found.append(Prompt(seen))
        else:
            raise UserError("A prompt is empty. Say in words what to draw.")
    return found


def _see(words: str) -> str:
    """The words of a prompt as they were given, on one line, but for marks that nobody sees, of which it is said."""
    words = " ".join(part for part in BREAKS.split(words) if part)
    if (seen := drop_unseen(words)) == " ".join(compose(words).split()):
        return compose(words) if seen else ""
    notify_once("A prompt has zero-width characters in it. They are left out.")
    return seen


def some_prompts(given: str | Sequence[str]) -> list[Prompt]:
    """`prompts_of` where at least one is wanted."""
    found = prompts_of(given)
    if not found:
        raise UserError("There are no prompts. Say in words what to draw.")
    return found


def unique_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once, the first of its words: images of `align` are told apart by prompt and sample."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.text, prompt)
    return list(unique.values())


def one_prompt(given: str, option: str) -> str:
    """The prompt in words or in a file, where one is wanted; `UserError` for a file with several."""
    if not given.strip():
        return given  # what an empty prompt means is for the command to say
    found = prompts_of([given])
    if len(found) != 1:
        raise UserError(
            f"{given} holds {len(found)} prompts, and {option} takes one. Give its words instead."
        )
    return found[0].text


def words_of(given: str) -> str:
    """The words of one prompt, which may stand in a file; `UserError` for a file with several."""
    return one_prompt(given, "this option")


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of `read_lines`, each once; says how many stand there again."""
    lines = read_lines(path)
    unique = unique_prompts(lines)
    if again := len(lines) - len(unique):
        notify_once(f"{path} says {count_of(again, 'prompt')} again. Each is taken once.")
    return unique


def read_lines(path: Path) -> list[Prompt]:
    """The prompts of a file, line by line. Lines that begin with # and empty ones are passed over.

    In a text file, what stands before a tab is the prompt's category. `UserError` lists every bad line.
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
    found, bad, idle = list[Prompt](), list[str](), dict[str, None]()
    for where, prompt in (
        _read_entries(text, path, idle) if path.suffix.lower() in (".jsonl", ".json") else _read_text(text)
    ):
        if prompt is None:
            bad.append(f"  {where} holds no prompt")
        else:
            found.append(prompt)
    if bad:
        raise UserError(
            "\n".join([f"{path} has {count_of(len(bad), 'bad line')}:", *bad[:20], "Repair or remove them."])
        )
    if not found:
        raise UserError(f"{path} holds no prompts. Write one on each line.")
    if idle:
        notify_once(
            f"{path} says {' and '.join(idle)} of its prompts, which has no effect there. Give it for all of them, by "
            "a flag."
        )
    return found


def _read_text(text: str) -> Iterator[tuple[str, Prompt | None]]:
    """The prompts of lines of text, each with where it stands; None for what is none."""
    # Word's and the web's soft line breaks (U+000B, U+2028) stand within a prompt, where they are blanks
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            yield f"line {number}", _from_text(line)


def _read_entries(text: str, path: Path, idle: dict[str, None]) -> Iterator[tuple[str, Prompt | None]]:
    """The same of JSON lines, or of a JSON list; keys that ask for something which is the same for all go to `idle`."""
    # In JSON lines a # begins a comment too
    kept = "\n".join("" if line.startswith("#") else line for line in text.split("\n"))
    for where, value in iterate_entries(kept, path):
        if isinstance(value, dict):
            idle |= {key: None for key in value if key.lower() in WISHES and value[key] not in (None, "")}
        yield where.partition(" of ")[0].lower(), _from_entry(value)


def _from_text(line: str) -> Prompt | None:
    category, tab, text = line.rpartition("\t")
    if CONTROL.search(line) or not (text := _see(" ".join(text.split()))):
        return None
    return Prompt(text, category.strip() if tab else "")


def _from_entry(value: Any) -> Prompt | None:
    value = {"prompt": value} if isinstance(value, str) else value
    text = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(text, str) or CONTROL.search(text) or not (seen := _see(" ".join(text.split()))):
        return None
    negatives = value.get("hard_negatives") or []
    if not isinstance(negatives, list) or not all(isinstance(n, str) for n in negatives):
        return None
    hard_negatives = tuple(_see(" ".join(negative.split())) for negative in negatives)
    if not all(hard_negatives):
        return None
    return Prompt(seen, str(value.get("category") or ""), hard_negatives)


def describe_mirrored(texts: Iterable[tuple[str, str]]) -> str:
    """A sentence on texts, each with where it stands, that name a side or letters: mirrored images show others.

    "" where none does.
    """
    found = [(match[0], where) for text, where in texts if (match := SIDED.search(text))]
    if not found:
        return ""
    (word, where), *more = found
    also = f" and {count_of(len(more), 'other text')}" if more else ""
    return f"“{word}” stands in {where}{also}, and --flip teaches it mirrored too. Leave --flip out if that matters."
