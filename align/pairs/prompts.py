"""Prompts as judges read them, and grouped by category."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backbone.io.prompts import Prompt


def without_tokens(text: str, concepts: Iterable[Mapping[str, Any]]) -> str:
    """A prompt as somebody reads it who does not know the concepts: “a [V] dog” is “a dog”, and so is “a [V]”.

    `concepts` is what a record says of them: their tokens and the class.
    """
    for concept in concepts:
        noun = str(concept.get("class") or "")
        for token in sorted(concept.get("tokens", ()), key=len, reverse=True):
            text = text.replace(f"{token} {noun}", noun) if noun else text
            text = text.replace(token, noun)
    return " ".join(text.split())


def by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The numbers of the prompts in each category, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt.category, []).append(number)
    return groups
