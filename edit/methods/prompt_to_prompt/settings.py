"""The settings of a prompt-to-prompt edit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

from backbone.cli.keywords import as_tuple
from backbone.cli.values.build import convert_in_place
from backbone.io.console import UserError
from backbone.models.model import Backbone
from edit.attention.alignment import Window
from edit.attention.control import Reach, SelfAttention
from edit.checks import check_interval, check_not_negative, check_share
from edit.pictures import ImageLike

AUTO = "auto"  # as a word to blend: wherever the prompts differ
DEFAULTS: Mapping[str, float] = {"cross": 0.8, "self_attention": 0.4}
BY_MODEL = (
    "cross",
    "self_attention",
    "colour_self_attention",
    "style_self_attention",
    "place_self_attention",
)
BY_CHANGE = BY_MODEL[2:]  # of some targets alone, by what changes in them


def _check_words(name: str, value: Any) -> tuple[str, ...]:
    """Words, given as one or several; `UserError` for anything else."""
    words = as_tuple(value)
    if not all(isinstance(word, str) for word in words):
        raise UserError(f'{name} is {value!r}, and words are taken. Write ["cat"].')
    return words


def _check_pairs(name: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of words; `UserError` for anything else."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    pairs = list(value.items() if isinstance(value, Mapping) else value) if several else [value]
    if not all(isinstance(pair, (tuple, list)) and len(_check_words(name, pair)) == 2 for pair in pairs):
        raise UserError(f'{name} is {value!r}, and pairs of words are taken. Write [("cat", "tiger")].')
    return tuple((old, new) for old, new in pairs)


def _check_table(name: str, value: Any) -> dict[str, Any]:
    """A dictionary by words; `UserError` for anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(word, str) for word in value):
        raise UserError(f"{name} is {value!r}, and a dictionary by words is taken.")
    return dict(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class ReplaceSettings:
    """How `edit.replace` edits; shares are of the steps, from the noisy end.

    cross, self_attention   until when the targets take the source's cross- and self-attention; None: what works with
                            the model (`edit` in its `limner.json`), or 0.8 and 0.4
    colour_self_attention   `self_attention` of targets in which only colours differ; None: what works with the model
                            where `self_attention` is None too, else `self_attention`
    style_self_attention    the same for targets in which only the way that the image is made differs
    place_self_attention    the same for targets that change everywhere, since most of them is predicted differently
    attention               the part of the source's self-attention: its `layout`, or its `contents` (from then on)
    layers, reach           in which layers of the denoiser (all, or the late ones, which draw the details), and for
                            which rows (`edit.attention.control.AttentionControl`)
    features                until when the targets take the source's residual features
    windows                 (from, until) of single words, instead of (0, cross)
    weights                 how strongly words of the target count, 1 usually: in their windows, which are all the steps
                            where `cross` is 0 and no others are given. In a window of all the steps their influence on
                            the other words is weighted too (`weigh`)
    swaps                   words that replace each other, wherever they stand
    blend                   words to whose region, where attention goes to them, the edit is limited; `auto`: to where
                            the prompts are predicted differently (`edit.masks`), but not limited if the changed words
                            say how the image is made (“a watercolor of”), or more than half of it is predicted
                            differently (three tenths where only the place differs); empty: not limited
    keep                    words in whose region the source stays
    mask                    where the image may change (white); of the image's shape, or as it was cropped
    threshold               share of the greatest difference, or attention, above which a position counts as changed, or
                            as a word's
    blend_from              the share of the steps before masks are read from attention
    guidance, negative      of the targets; None: the model's default guidance
    strength                the share of the steps that is sampled: below 1 the edit begins at a less noisy state
    heatmaps                words whose attention is read
    frames                  how many of the targets' estimates to keep along the way
    """

    cross: float | None = None
    self_attention: float | None = None
    colour_self_attention: float | None = None
    style_self_attention: float | None = None
    place_self_attention: float | None = None
    attention: SelfAttention = "layout"
    layers: Literal["all", "late"] = "all"
    reach: Reach = "prompted"
    features: float = 0.0
    windows: Mapping[str, Window] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    swaps: Sequence[tuple[str, str]] = ()
    blend: Sequence[str] = (AUTO,)
    keep: Sequence[str] = ()
    mask: ImageLike | None = None
    threshold: float = 0.25
    blend_from: float = 0.2
    guidance: float | None = None
    negative: str = ""
    strength: float = 1.0
    heatmaps: Sequence[str] = ()
    frames: int = 0

    def __post_init__(self) -> None:
        convert_in_place(self)
        for name, convert in (("windows", _check_table), ("weights", _check_table), ("swaps", _check_pairs)):
            object.__setattr__(self, name, convert(name, getattr(self, name)))
        for name in ("blend", "keep", "heatmaps"):
            object.__setattr__(self, name, _check_words(name, getattr(self, name)))
        for name in (*BY_MODEL, "features", "threshold", "blend_from", "strength"):
            value = getattr(self, name)
            check_share(name, 0.0 if value is None else value)
        for word, window in self.windows.items():
            if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(map(_is_number, window)):
                raise UserError(f"The window of “{word}” is {window!r}. Write (0.0, 0.8).")
            check_interval(f"the window of “{word}”", *window)
        for word, weight in self.weights.items():
            if not _is_number(weight) or not math.isfinite(weight):
                raise UserError(f"The weight of “{word}” is {weight!r}, which is no number. Give one, as 2.")
        if self.guidance is not None:
            check_not_negative("guidance", self.guidance)

    def resolve(self, model: Backbone) -> ReplaceSettings:
        """These settings with the model's defaults in place of None, guidance excepted."""
        defaults: dict[str, Any] = dict(model.defaults.get("edit", {}))
        if self.self_attention is not None:  # if set, it applies to every target
            defaults = {name: value for name, value in defaults.items() if name not in BY_CHANGE}
        given = {name: value for name in BY_MODEL if (value := getattr(self, name)) is not None}
        resolved = replace(self, **{**DEFAULTS, **defaults, **given})
        if resolved.cross:
            return resolved
        # A word's weight applies only while its window is open
        return replace(resolved, windows={**dict.fromkeys(self.weights, (0.0, 1.0)), **self.windows})

    @property
    def steady_weights(self) -> dict[str, float]:
        """The weights of words whose window is all the steps, once the settings are resolved."""
        default = (0.0, self.cross or 0.0)
        return {
            word: weight
            for word, weight in self.weights.items()
            if self.windows.get(word, default) == (0.0, 1.0)
        }

    @property
    def carries_words(self) -> bool:
        """Whether the edit needs the correspondence of words."""
        by_change = any(getattr(self, name) not in (None, self.self_attention) for name in BY_CHANGE)
        return bool(self.cross or self.windows or self.weights or self.swaps or self.blend or by_change)


PRESETS: Mapping[str, ReplaceSettings] = {
    "prompt-to-prompt": ReplaceSettings(),
    "masactrl": ReplaceSettings(
        attention="contents", self_attention=0.08, layers="late", reach="all", cross=0.0, blend=()
    ),
    "plug-and-play": ReplaceSettings(
        attention="layout", self_attention=0.5, features=0.8, layers="late", reach="all", cross=0.0, blend=()
    ),
}
"""Other methods that are the same sampling with other settings: mutual self-attention in the decoder from the fifth of
fifty steps on (Cao et al. 2023, section 4), for what moves or bends; and features and self-attention of the source
(Tumanyan et al. 2023, section 4), for what looks otherwise all over."""
