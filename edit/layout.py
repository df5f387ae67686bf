"""Conditions on the layout of an edit: which control maps hold for the source, and which for the targets.

A map that is found in the source (`edges=auto`) holds for both: the image is inverted under it, and the targets are
sampled under it. A map that somebody drew holds for the targets alone, unless it is said to be the source's; with one
of each a thing moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.cli.conditions import LINE_KINDS, AskedControl, ControlOptions, parse_map, say_scales
from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control, join_controls
from backbone.diffusion.noise import Schedule
from backbone.io.console import UserError
from backbone.media.control.maps import as_hints
from backbone.media.transforms import to_image
from backbone.models.control import (
    Condition,
    OpenedControl,
    gather_controls,
    make_control,
    open_conditions,
    open_control,
    with_map,
)
from backbone.models.model import Backbone
from edit.pictures import ImageLike, read_image, show_image

SOURCE, TARGET = 0, 1
DIFFERS = 0.25  # of 0…1, from which two maps differ in a pixel


@dataclass(frozen=True)
class AskedLayout:
    """What was asked of an edit: conditions of the targets (those found in the source hold for it too), and of the
    source alone."""

    targets: tuple[AskedControl, ...] = ()
    source: tuple[AskedControl, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> AskedLayout:
        """What an edit's options say, by the names of its options; `UserError` for what does not fit."""
        names = [one.name for one in fields(ControlOptions)]
        said: dict[str, Any] = {name: options[name] for name in names if options.get(name)}
        for name, value in said.items():
            said[name] = tuple(value) if isinstance(value, list) else value  # a record's
        targets = ControlOptions(**said).controls
        return cls(targets, tuple(of_source(one, targets) for one in options.get("source_condition") or ()))

    @property
    def for_source(self) -> AskedLayout:
        """Where there are no targets yet: all of them are the source's."""
        return AskedLayout((), self.targets)

    @property
    def paths(self) -> list[str]:
        """The files of all maps."""
        return [one.map.path for one in (*self.targets, *self.source) if one.map.path]

    def __bool__(self) -> bool:
        return bool(self.targets or self.source)


NOTHING_ASKED = AskedLayout()


@dataclass(frozen=True, eq=False)
class Layout:
    """The opened conditions, and of each whether it holds for the source and for the targets."""

    conditions: tuple[Condition, ...] = ()
    sides: tuple[tuple[bool, bool], ...] = ()

    @cached_property
    def controls(self) -> tuple[Control, ...]:
        """Of two rows: the source's and the targets'."""
        return tuple(
            replace(both, scale=both.scale * torch.tensor(sides))
            for sides in dict.fromkeys(self.sides)
            for control in gather_controls(self._on(sides))
            for both in [control.each(lambda value: value.expand(2, *value.shape[1:]))]
        )

    def _on(self, sides: tuple[bool, bool]) -> list[Condition]:
        return [one for one, own in zip(self.conditions, self.sides, strict=True) if own == sides]

    def under(
        self, text: Conditions, schedule: Schedule, sides: Sequence[int], *, unprompted: Sequence[int] = ()
    ) -> Conditions:
        """Encoded prompts with the controls of their rows: SOURCE or TARGET each; some rows are without a prompt."""
        if not self.conditions:
            return text
        assert len(sides) == len(text)
        rows = torch.tensor(sides)
        controls = []
        for control in self.controls:
            chosen = control.during(schedule).to(next(iter(text.text.values())).device).rows(rows)
            scale = chosen.scale.clone()
            scale[list(unprompted)] = chosen.unprompted().scale[list(unprompted)]
            controls.append(replace(chosen, scale=scale))
        return replace(text, controls=tuple(controls))

    def of_targets(self) -> tuple[Control, ...]:
        """The controls of one target, a row each."""
        return tuple(control.rows(torch.tensor([TARGET])) for control in self.controls)

    def of_side(self, side: int) -> tuple[Condition, ...]:
        """The conditions that hold for the source, or for the targets."""
        return tuple(one for one, sides in zip(self.conditions, self.sides, strict=True) if sides[side])

    def under_without(self, text: Conditions, schedule: Schedule, places: Sequence[Tensor]) -> Conditions:
        """As `under`, of the source and of a target for each place [h, w] in which its found maps are blank."""
        blank = [self.without(place) for place in places]
        rows = [blank[0].under(text[:1], schedule, [SOURCE])]
        rows += [one.under(text[1 + n : 2 + n], schedule, [TARGET]) for n, one in enumerate(blank)]
        return replace(text, controls=join_controls([(row.controls, 1) for row in rows]))

    def without(self, place: Tensor) -> Layout:
        """The same with the maps that targets have of the source blank in a place [h, w], which is scaled to them."""
        conditions, sides = list(self.conditions), list(self.sides)
        for number, (condition, both) in enumerate(zip(self.conditions, self.sides, strict=True)):
            if both == (True, True):
                drawn = as_hints(condition.map)[0]
                free = F.interpolate(place.cpu().float()[None, None], drawn.shape[-2:])[0, 0] == 0
                blank = with_map(condition, to_image(2 * drawn * free - 1))
                sides[number] = (True, False)
                conditions.append(blank)
                sides.append((False, True))
        return Layout(tuple(conditions), tuple(sides))

    def moved(self, size: tuple[int, int]) -> Tensor | None:
        """Where the targets' maps differ from the source's [H, W] of the latent, grown by a latent; None without any.

        Lines that the source has no map of are a thing that is added: its place is what they enclose.
        """
        found = None
        for condition, (_, target) in zip(self.conditions, self.sides, strict=True):
            if not target:
                continue
            kind = condition.facts["kind"]
            before = [one for one in self.of_side(SOURCE) if one.facts["kind"] == kind]
            drawn = as_hints(condition.map)
            if before:
                apart = (drawn - as_hints(before[0].map)).abs().amax(1, keepdim=True) > DIFFERS
                place = F.adaptive_max_pool2d(apart.float(), size)[0, 0]
            elif kind in (*LINE_KINDS, "pose"):
                place = fill_outlines(F.adaptive_max_pool2d(drawn.amax(1, keepdim=True), size)[0, 0] > 0.5)
            else:
                continue
            if place.any():
                grown = F.max_pool2d(place[None], 3, 1, 1)[0]
                found = grown if found is None else torch.maximum(found, grown)
        return found

    def facts(self) -> dict[str, Any]:
        """For the record; nothing without conditions."""
        rows = [
            {**one.facts, "of": "both" if both == (True, True) else "source" if both[0] else "targets"}
            for one, both in zip(self.conditions, self.sides, strict=True)
        ]
        return {"conditions": rows} if rows else {}


NO_LAYOUT = Layout()


def of_source(said: str, targets: Sequence[AskedControl]) -> AskedControl:
    """The source's own map, read and as strong as the condition of its kind; `UserError` where there is none."""
    found = parse_map(said)
    for one in targets:
        if one.map.kind == found.kind and one.map.path:
            return replace(one, map=found)
    raise UserError(
        f"--source-condition {said} stands beside no --condition {found.kind}=MAP.png of the targets. Give one, or say "
        f"--condition {found.kind}=auto for both."
    )


def open_layout(
    model: Backbone,
    image: ImageLike,
    asked: AskedLayout,
    *,
    opened: dict[str, OpenedControl] | None = None,
) -> Layout:
    """The conditions of an edit of an image. `opened` keeps networks for further images.

    Raises `UserError` as `open_conditions`.
    """
    if not asked:
        return NO_LAYOUT
    source = read_image(image)
    shown = show_image(model, source)
    say_scales(asked.targets)
    if asked.source:  # beside which those that are found in the image act too
        say_scales([*(one for one in asked.targets if not one.map.path), *asked.source])
    every = open_conditions(
        model,
        (*asked.targets, *asked.source),
        shown.size,
        picture=shown,
        drawn_on=source.image.size,
        opened=opened,
    )
    sides = [(one.map.path == "", True) for one in asked.targets] + [(True, False)] * len(asked.source)
    return Layout(every, tuple(sides))


# Beside an inversion in its file -----------------------------------------------------------------------------


@dataclass(frozen=True)
class WrittenCondition:
    """A condition of the source, as an inversion's file has it beside its map."""

    kind: str
    map: str
    network: str
    scale: float
    start: float
    stop: float
    guess: bool
    rows: str = "both"
    how: str = ""


def map_bytes(condition: Condition) -> Tensor:
    """A condition's map as bytes [3, H, W], of a clip [F, 3, H, W]."""
    maps = torch.cat([as_hints(one) for one in condition.maps or (condition.map,)])
    found: Tensor = maps.mul(255).round().byte()
    return found if condition.maps else found[0]


def read_layout(
    model: Backbone, written: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], path: str | Path
) -> Layout:
    """The conditions of an inversion's file, held for the targets too; `UserError` where their networks are gone."""
    conditions = []
    for number, facts in enumerate(written):
        drawn = tensors.get(f"map_{number}")
        if drawn is None or drawn.dtype != torch.uint8 or drawn.ndim not in (3, 4) or drawn.shape[-3] != 3:
            raise UserError(f"{path} is damaged: it holds no map {number}. Make it again with `edit invert`.")
        network = open_control(model, str(facts["network"])).network.for_kind(str(facts["kind"]))
        images = [to_image(one.float().div(127.5).sub(1)) for one in drawn.reshape(-1, *drawn.shape[-3:])]
        hints = torch.cat([as_hints(one) for one in images])
        # older files leave out on which rows it acts
        control = make_control(network, hints.to(model.device), {"rows": "both", **facts})
        of_clip = drawn.ndim == 4
        maps = tuple(images) if of_clip else ()
        conditions.append(Condition(control.as_clip() if of_clip else control, images[0], dict(facts), maps))
    return Layout(tuple(conditions), ((True, True),) * len(conditions))


def fill_outlines(lines: Tensor) -> Tensor:
    """Lines [H, W] and what cannot be reached from the picture's edge without crossing one, as 0 or 1."""
    free = F.pad((~lines).float(), (1, 1, 1, 1), value=1.0)[None]
    outside = torch.zeros_like(free)
    outside[:, 0, 0] = 1
    while True:
        across, down = (
            F.max_pool2d(outside, kernel, 1, pad) for kernel, pad in (((1, 3), (0, 1)), ((3, 1), (1, 0)))
        )
        grown = torch.maximum(across, down) * free
        if torch.equal(grown, outside):
            return 1 - outside[0, 1:-1, 1:-1]
        outside = grown
