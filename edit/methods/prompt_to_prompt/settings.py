"""The settings of a prompt-to-prompt edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from backbone.models.model import Backbone
from edit.attention.alignment import (
    Window,
)
from edit.attention.control import Reach, SelfAttention
from edit.checks import not_negative, share

AUTO = "auto"  # as a word to blend: wherever the prompts differ


@dataclass(frozen=True)
class Settings:
    """What an edit is asked for; shares are of the steps, from the noisy end.

    cross, self_attention   until when the targets take the source's cross- and self-attention; a model may have other
                            shares of its own (`usual`)
    colour_self_attention   that of targets in which nothing but colours is said otherwise; `self_attention` if None
    attention               what of the source's self-attention: its `layout`, or its `contents` (from then on)
    layers, reach           in which layers of the denoiser (all, or the late ones, which draw the details), and for
                            which rows (`edit.attention.control.Control`)
    features                until when the targets take the source's residual features
    windows                 (from, until) of single words, instead of (0, cross)
    weights                 how strongly words of the target count, 1 usually
    swaps                   words that take each other's place, whatever stands around them
    blend                   words outside whose place, which is where attention goes to them, the source stays; `auto`:
                            stays where both prompts see the same (`edit.masks`), and nowhere if what differs says
                            how the picture is made (“a watercolor of”); empty: nowhere
    keep                    words in whose place the source stays
    mask                    where the picture may change (white); of the picture's size, or as it was cropped
    threshold, blend_from   how much of the greatest difference, or attention, makes a place differ, or a word's; from
                            which share of the steps on
    guidance, negative      of the targets; the model's usual guidance if None
    strength                how much of the way down is walked: below 1 the edit begins at a less noisy state
    heatmaps                words whose attention is read
    frames                  how many of the targets' estimates to keep along the way
    """

    cross: float = 0.8
    self_attention: float = 0.4
    colour_self_attention: float | None = None
    attention: SelfAttention = "layout"
    layers: Literal["all", "late"] = "all"
    reach: Reach = "prompted"
    features: float = 0.0
    windows: Mapping[str, Window] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    swaps: Sequence[tuple[str, str]] = ()
    blend: Sequence[str] = (AUTO,)
    keep: Sequence[str] = ()
    mask: Image.Image | str | Path | None = None
    threshold: float = 0.25
    blend_from: float = 0.2
    guidance: float | None = None
    negative: str = ""
    strength: float = 1.0
    heatmaps: Sequence[str] = ()
    frames: int = 0

    def __post_init__(self) -> None:
        for name in ("cross", "self_attention", "features", "threshold", "blend_from", "strength"):
            share(name, getattr(self, name))
        if self.colour_self_attention is not None:
            share("colour_self_attention", self.colour_self_attention)
        for word, (start, end) in self.windows.items():
            share(f"the window of “{word}”", start)
            share(f"the window of “{word}”", end)
        if self.guidance is not None:
            not_negative("guidance", self.guidance)

    @property
    def carries_words(self) -> bool:
        """Whether the edit needs to know which word became which."""
        by_colour = self.colour_self_attention not in (None, self.self_attention)
        return bool(self.cross or self.windows or self.weights or self.swaps or self.blend or by_colour)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "prompt-to-prompt": {},
    "masactrl": {
        "attention": "contents", "self_attention": 0.08, "layers": "late", "reach": "all", "cross": 0.0,
        "blend": (),
    },
    "plug-and-play": {
        "attention": "layout", "self_attention": 0.5, "features": 0.8, "layers": "late", "reach": "all",
        "cross": 0.0, "blend": (),
    },
}  # fmt: skip
"""`Settings` of other methods that are the same walk: mutual self-attention in the decoder from the fifth of fifty
steps on (Cao et al. 2023, section 4), for what moves or bends; and features and self-attention of the source (Tumanyan
et al. 2023, section 4), for what looks otherwise all over."""


def usual(model: Backbone) -> dict[str, Any]:
    """The settings that work with a model, where it says some."""
    said: dict[str, Any] = model.defaults.get("edit", {})
    return dict(said)


def over(usual: Mapping[str, Any], wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Wishes over usual settings: a share of self-attention that is wished for is every target's."""
    every = "self_attention" in wishes
    return {
        name: value for name, value in usual.items() if not (every and name == "colour_self_attention")
    } | {**wishes}
