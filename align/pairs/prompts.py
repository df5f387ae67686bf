"""Prompts as scorers read them, and grouped by category."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backbone.adapters.concept import word_pattern
from backbone.io.prompts import Prompt
from backbone.io.records import read_as


def strip_tokens(text: str, concepts: Iterable[Mapping[str, Any]]) -> str:
    """Replace concept tokens by the class noun, for scorers that do not know them: “a [V] dog” or “a [V]” → “a dog”.

    `concepts` have `tokens` and `class`, as a run's record describes them.
    """
    for concept in concepts:
        noun = str(concept.get("class") or "")
        tokens = read_as(dict[str, str], concept.get("tokens", {}), "The record of the images", "tokens")
        for token in sorted(filter(None, tokens), key=len, reverse=True):
            with_noun = rf"{word_pattern(token)}(?: {word_pattern(noun)})?" if noun else word_pattern(token)
            text = re.sub(with_noun, lambda _, noun=noun: noun, text)  # type: ignore[misc]
    return " ".join(text.split())


def group_by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Category → indices of its prompts, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.category, []).append(number)
    return groups
