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
    """A prompt, its category in statistics, and hard negatives: prompts whose images compete with its own.

    “a horse in a park” is a hard negative of “a horse wearing a crown in a park”: sampled from the same noise, its
    image differs by the crown alone.
    """

    text: str
    category: str = ""
    hard_negatives: tuple[str, ...] = ()


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file, in order, without duplicates. Empty lines and those that begin with # are skipped.

    In a .txt file a category may stand before the prompt, followed by a tab. Raises `UserError` with every bad line.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name a file with a prompt on each line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error
    prompts: dict[str, Prompt] = {}
    bad_lines = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        prompt = _parse_json(line) if path.suffix.lower() == ".jsonl" else _parse_text(line)
        if prompt is None:
            bad_lines.append(f"  line {number} holds no prompt")
        else:
            prompts.setdefault(prompt.text, prompt)
    if bad_lines:
        heading = f"{path} has {len(bad_lines)} bad lines:"
        raise UserError("\n".join([heading, *bad_lines[:20], "Repair or remove them."]))
    if not prompts:
        raise UserError(f"{path} holds no prompts. Write one on each line.")
    return list(prompts.values())


def strip_tokens(text: str, concepts: Iterable[Mapping[str, Any]]) -> str:
    """Replace concept tokens by the class noun, for scorers that do not know them: “a [V] dog” or “a [V]” → “a dog”.

    `concepts` have `tokens` and `class`, as a run's record describes them.
    """
    for concept in concepts:
        noun = str(concept.get("class") or "")
        for token in sorted(concept.get("tokens", ()), key=len, reverse=True):
            text = text.replace(f"{token} {noun}", noun) if noun else text
            text = text.replace(token, noun)
    return " ".join(text.split())


def group_by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Category → indices of its prompts, in order of appearance."""
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
    negatives = value.get("hard_negatives") or []
    if not isinstance(negatives, list) or not all(isinstance(n, str) and n.strip() for n in negatives):
        return None
    hard_negatives = tuple(" ".join(negative.split()) for negative in negatives)
    return Prompt(" ".join(text.split()), str(value.get("category") or ""), hard_negatives)
