"""Where an edit may change the image: regions of the words that differ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from edit.attention.alignment import (
    Alignment,
    Prompt,
    Run,
    Word,
)
from edit.methods.prompt_to_prompt.settings import AUTO

EVERYWHERE = frozenset([  # words that say how a picture is made, and so have no place in it
    "style", "art", "painting", "drawing", "sketch", "sketched", "watercolor", "watercolour", "photo", "photograph",
    "picture", "image", "render", "rendering", "illustration", "cartoon", "anime", "comic", "poster", "neon", "pixel",
    "oil", "pencil", "charcoal", "ink", "pastel", "mosaic", "sculpture",
])  # fmt: skip


COLOURS = frozenset([  # words that change how a thing looks and leave its shape
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "grey", "gray",
    "golden", "gold", "silver", "turquoise", "teal", "cyan", "magenta", "beige", "maroon", "crimson", "scarlet", "navy",
    "dark", "light", "pale", "bright",
])  # fmt: skip


ARTICLES = frozenset(["a", "an"])  # which follow the word behind them


def places_of(maps: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Maps [B, 1, h, w] as places [B, H, W]: where they exceed `threshold` times their greatest value."""
    large = F.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0]
    greatest = large.amax((1, 2), keepdim=True)
    return (large > threshold * greatest) & (greatest > 0)


def blended_words(alignment: Alignment, phrases: Sequence[str]) -> tuple[list[Word], list[Word]]:
    """The words of the source and the target that were named, in whose place an edit may happen."""
    return _places(alignment, [phrase for phrase in phrases if phrase != AUTO or _says(alignment, AUTO)])


def told_apart(alignment: Alignment, weighted: Mapping[str, float]) -> tuple[str, str] | None:
    """Two prompts that differ in what the edit changes: the source and the target; of the same prompt with other
    weights, the prompt without the weighted words. None where a word that differs says how it is all made."""
    if any(_is_everywhere(run) for run in alignment.changed()):
        return None
    source, target = alignment.source.text, alignment.target.text
    if source != target or not weighted:
        return source, target
    rest = target
    for phrase in weighted:
        rest = re.sub(rf"\b{re.escape(phrase)}\b", " ", rest, flags=re.IGNORECASE)
    rest = " ".join(rest.split())
    return None if rest == target else (rest, target)


def _places(alignment: Alignment, phrases: Sequence[str]) -> tuple[list[Word], list[Word]]:
    """The words that phrases name in the source and the target."""
    pairs = [alignment.places(phrase) for phrase in phrases]
    return [word for old, _ in pairs for word in old], [word for _, new in pairs for word in new]


def only_colours(alignment: Alignment) -> bool:
    """Whether something is said otherwise, and nothing but colours."""
    words = {
        word.text.lower() for run in alignment.changed() for word in (*run.source, *run.target)
    } - ARTICLES
    return bool(words) and words <= COLOURS


def _is_everywhere(run: Run) -> bool:
    return any(word.text in EVERYWHERE for word in (*run.source, *run.target))


def _says(alignment: Alignment, phrase: str) -> bool:
    prompts: tuple[Prompt, ...] = (alignment.source, alignment.target)
    return any(prompt.find(phrase) for prompt in prompts)
