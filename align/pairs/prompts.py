"""Prompt files: a prompt on each line, or JSON lines with a `prompt` and perhaps a `category` and `hard_negatives`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError


@dataclass(frozen=True)
class Prompt:
    """What to draw, the group that it is counted in, and hard negatives: prompts whose pictures compete with its own.

    “a horse in a park” is a hard negative of “a horse wearing a crown in a park”: drawn from the same noise, its
    picture
    differs by the crown alone.
    """

    text: str
    category: str = ""
    hard_negatives: tuple[str, ...] = ()


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order, each once. Lines that begin with # and empty ones are passed over.

    In a .txt file, what stands before a tab is the prompt's category. `UserError` lists every bad line.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file with a prompt on each line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error
    found: dict[str, Prompt] = {}
    bad = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        prompt = _parse_json(line) if path.suffix.lower() == ".jsonl" else _parse_text(line)
        if prompt is None:
            bad.append(f"  line {number} holds no prompt")
        else:
            found.setdefault(prompt.text, prompt)
    if bad:
        raise UserError("\n".join([f"{path} has {len(bad)} bad lines:", *bad[:20], "Repair or remove them."]))
    if not found:
        raise UserError(f"{path} holds no prompts. Write one on each line.")
    return list(found.values())


def strip_tokens(text: str, concepts: Iterable[Mapping[str, Any]]) -> str:
    """A prompt as somebody reads it who does not know the concepts: “a [V] dog” is “a dog”, and so is “a [V]”.

    `concepts` is what a record says of them: their tokens and the class.
    """
    for concept in concepts:
        noun = str(concept.get("class") or "")
        for token in sorted(concept.get("tokens", ()), key=len, reverse=True):
            text = text.replace(f"{token} {noun}", noun) if noun else text
            text = text.replace(token, noun)
    return " ".join(text.split())


def group_by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The numbers of the prompts in each category, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.category, []).append(number)
    return groups


def _parse_text(line: str) -> Prompt | None:
    category, tab, text = line.rpartition("\t")
    text = " ".join(text.split())
    return Prompt(text, category.strip() if tab else "") if text else None


def _parse_json(line: str) -> Prompt | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    text = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        return None
    near = value.get("hard_negatives") or []
    if not isinstance(near, list) or not all(isinstance(one, str) and one.strip() for one in near):
        return None
    tidy = tuple(" ".join(one.split()) for one in near)
    return Prompt(" ".join(text.split()), str(value.get("category") or ""), tidy)
