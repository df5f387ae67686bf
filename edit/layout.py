"""Conditions on the layout of an edit: which control maps hold for the source, and which for the targets.

A map computed from the source (`edges=auto`) holds for both: the image is inverted under it, and the targets are
sampled under it. A given map holds for the targets alone, unless it is the source's by --source-condition; with one of
each a thing moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.cli.conditions import AUTO, LINE_KINDS, ControlOptions, RequestedControl, parse_map, say_scales
from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control, join_controls
from backbone.diffusion.noise import Schedule
from backbone.io.console import UserError, notify_once
from backbone.media.control.maps import as_hints, compute_map
from backbone.media.transforms import to_image
from backbone.models.control import (
    Condition,
    OpenedControl,
    gather_controls,
    group_conditions,
    make_control,
    open_conditions,
    open_control,
    refuse_other_control,
    with_map,
)
from backbone.models.model import Backbone
from edit.pictures import ImageLike, read_image, show_image

SOURCE, TARGET = 0, 1
DIFFERS = 0.25  # on the scale 0…1: two maps differ in a pixel by more than this


@dataclass(frozen=True)
class RequestedLayout:
    """The requested conditions of an edit: of the targets (those computed from the source hold for it too), and of the
    source alone."""

    targets: tuple[RequestedControl, ...] = ()
    source: tuple[RequestedControl, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RequestedLayout:
        """From an edit's options by name; `UserError` for conditions that do not fit."""
        names = [option.name for option in fields(ControlOptions)]
        controls: dict[str, Any] = {name: options[name] for name in names if options.get(name)}
        for name, value in controls.items():
            controls[name] = tuple(value) if isinstance(value, list) else value  # a record's
        targets = ControlOptions(**controls).controls
        return cls(
            targets,
            tuple(parse_source_condition(text, targets) for text in options.get("source_condition") or ()),
        )

    @property
    def for_source(self) -> RequestedLayout:
        """The layout of an inversion, without targets: all conditions are the source's."""
        return RequestedLayout((), self.targets)

    @property
    def paths(self) -> list[str]:
        """The files of all maps."""
        return [control.map.path for control in self.all if control.map.path]

    @property
    def all(self) -> tuple[RequestedControl, ...]:
        """The targets' conditions and the source's."""
        return (*self.targets, *self.source)

    def __bool__(self) -> bool:
        return bool(self.all)


NOTHING_REQUESTED = RequestedLayout()


@dataclass(frozen=True, eq=False)
class Layout:
    """The opened conditions, and for each whether it holds for the source and for the targets."""

    conditions: tuple[Condition, ...] = ()
    sides: tuple[tuple[bool, bool], ...] = ()

    @cached_property
    def controls(self) -> tuple[Control, ...]:
        """Controls of two rows: the source's and the targets'.

        Each side's conditions are gathered for themselves: kinds of a union ControlNet are fused as on that side alone.
        """
        groups = [group_conditions(self.of_side(side)) for side in (SOURCE, TARGET)]
        controls = []
        for group in sorted(
            dict.fromkeys([*groups[SOURCE], *groups[TARGET]]),
            key=lambda group: self.conditions.index(group[0]),
        ):
            (control,) = gather_controls(group)
            rows = control.apply(lambda value: value.expand(2, *value.shape[1:]))
            holds = torch.tensor([group in groups[side] for side in (SOURCE, TARGET)])
            controls.append(replace(rows, scale=rows.scale * holds))
        return tuple(controls)

    def attach(
        self,
        text: Conditions,
        schedule: Schedule,
        sides: Sequence[int],
        *,
        unprompted: Sequence[int] = (),
    ) -> Conditions:
        """Encoded prompts with each row's controls, by its side: SOURCE or TARGET; `unprompted` rows have no prompt.

        The schedule is that of the steps that are taken. Raises `UserError` for a control that acts in none of them.
        """
        if not self.conditions or len(schedule) == 1:  # without a step nothing is controlled
            return text
        assert len(sides) == len(text)
        rows = torch.tensor(sides)
        controls = []
        for control in self.controls:
            selected = control.during(schedule).to(next(iter(text.text.values())).device).rows(rows)
            scale = selected.scale.clone()
            scale[list(unprompted)] = selected.unprompted().scale[list(unprompted)]
            controls.append(replace(selected, scale=scale))
        return replace(text, controls=tuple(controls))

    def say_idle(self, first: int, steps: int) -> None:
        """Say which conditions act in none of the steps that an edit of an inversion samples, from `first` of `steps`.

        The inversion is made under its conditions in all steps, so their shares are of all of them.
        """
        for condition in self.conditions if first < steps else ():
            if not any(step >= first for step in condition.control.acting_steps(steps)):
                start, stop = condition.control.start, condition.control.stop
                notify_once(
                    f"The condition {condition.facts['kind']} has no effect from {start:g} to {stop:g} of the {steps} "
                    f"steps: only the last {steps - first} are sampled. Raise --strength, or --condition-stop."
                )

    def in_image(self, image: Image.Image) -> Layout:
        """The layout of an edit of another image: maps that were found in the first are found in this one."""
        conditions = []
        for condition in self.conditions:
            if condition.facts["map"] == AUTO:
                kind = str(condition.facts["kind"])
                found = compute_map(kind, image)
                if not found.getbbox():
                    notify_once(
                        f"No {kind} was found in an edit, so nothing holds its layout in the next one."
                    )
                condition = with_map(condition, found)
            conditions.append(condition)
        return Layout(tuple(conditions), self.sides)

    def of_targets(self) -> tuple[Control, ...]:
        """The controls of one target, with one row each."""
        return tuple(control.rows(torch.tensor([TARGET])) for control in self.controls)

    def of_side(self, side: int) -> tuple[Condition, ...]:
        """The conditions that hold for the source, or for the targets."""
        return tuple(
            condition for condition, sides in zip(self.conditions, self.sides, strict=True) if sides[side]
        )

    def attach_with_blank(
        self, text: Conditions, schedule: Schedule, regions: Sequence[Tensor]
    ) -> Conditions:
        """As `attach`, for the source and one target per region [h, w] in which its computed maps are blank."""
        blank = [self.blank(region) for region in regions]
        rows = [blank[0].attach(text[:1], schedule, [SOURCE])]
        rows += [layout.attach(text[1 + n : 2 + n], schedule, [TARGET]) for n, layout in enumerate(blank)]
        return replace(text, controls=join_controls([(row.controls, 1) for row in rows]))

    def blank(self, region: Tensor) -> Layout:
        """The layout in which the targets' maps from the source are blank in a region [h, w], scaled to the maps."""
        conditions, sides = list(self.conditions), list(self.sides)
        for number, (condition, holds) in enumerate(zip(self.conditions, self.sides, strict=True)):
            if holds == (True, True):
                hints = as_hints(condition.map)[0]
                free = F.interpolate(region.cpu().float()[None, None], hints.shape[-2:])[0, 0] == 0
                blank = with_map(condition, to_image(2 * hints * free - 1))
                sides[number] = (True, False)
                conditions.append(blank)
                sides.append((False, True))
        return Layout(tuple(conditions), tuple(sides))

    def find_moved(self, size: tuple[int, int]) -> Tensor | None:
        """Where the targets' maps differ from the source's [H, W], in latents, grown by one; None if nowhere.

        Lines without a map of the source are an added thing; its region is what they enclose.
        """
        region = None
        for condition, (_, target) in zip(self.conditions, self.sides, strict=True):
            if not target:
                continue
            kind = condition.facts["kind"]
            source_maps = [other.map for other in self.of_side(SOURCE) if other.facts["kind"] == kind]
            hints = as_hints(condition.map)
            if source_maps:
                differs = (hints - as_hints(source_maps[0])).abs().amax(1, keepdim=True) > DIFFERS
                changed = F.adaptive_max_pool2d(differs.float(), size)[0, 0]
            elif kind in (*LINE_KINDS, "pose"):
                changed = fill_outlines(F.adaptive_max_pool2d(hints.amax(1, keepdim=True), size)[0, 0] > 0.5)
            else:
                continue
            if changed.any():
                grown = F.max_pool2d(changed[None], 3, 1, 1)[0]
                region = grown if region is None else torch.maximum(region, grown)
        return region

    def facts(self) -> dict[str, Any]:
        """The conditions and their sides, for the record; {} without conditions."""
        facts = [
            {**condition.facts, "of": "both" if all(sides) else "source" if sides[0] else "targets"}
            for condition, sides in zip(self.conditions, self.sides, strict=True)
        ]
        return {"conditions": facts} if facts else {}


NO_LAYOUT = Layout()


def parse_source_condition(text: str, targets: Sequence[RequestedControl]) -> RequestedControl:
    """The source's own map with the settings of the targets' condition of its kind; `UserError` if there is none."""
    source_map = parse_map(text)
    for condition in targets:
        if condition.map.kind == source_map.kind and condition.map.path:
            return replace(condition, map=source_map)
    raise UserError(
        f"--source-condition {text} stands beside no --condition {source_map.kind}=MAP.png of the targets. Give one, "
        f"or say --condition {source_map.kind}=auto for both."
    )


def open_layout(
    model: Backbone,
    image: ImageLike,
    requested: RequestedLayout,
    *,
    opened: dict[str, OpenedControl] | None = None,
) -> Layout:
    """The conditions of an edit of an image. `opened` keeps networks for further images.

    Raises `UserError` as `open_conditions`.
    """
    if not requested:
        return NO_LAYOUT
    source = read_image(image)
    picture = show_image(model, source)
    say_scales(requested.targets)
    if requested.source:  # the maps that are computed from the image act on the source too
        say_scales(
            [*(condition for condition in requested.targets if not condition.map.path), *requested.source]
        )
    conditions = open_conditions(
        model,
        (*requested.targets, *requested.source),
        picture.size,
        picture=picture,
        drawn_on=source.image.size,
        opened=opened,
    )
    sides = [(condition.map.path == "", True) for condition in requested.targets] + [(True, False)] * len(
        requested.source
    )
    return Layout(conditions, tuple(sides))


# Beside an inversion in its file -----------------------------------------------------------------------------


@dataclass(frozen=True)
class WrittenCondition:
    """The record of a source's condition in an inversion's file; its map is a tensor there."""

    kind: str
    map: str
    network: str
    scale: float
    start: float
    stop: float
    guess: bool
    rows: str = "both"
    how: str = ""
    weights: str = ""


def encode_map(condition: Condition) -> Tensor:
    """A condition's map as bytes [3, H, W], of a clip [F, 3, H, W]."""
    maps = torch.cat([as_hints(image) for image in condition.maps or (condition.map,)])
    pixels: Tensor = maps.mul(255).round().byte()
    return pixels if condition.maps else pixels[0]


def read_layout(
    model: Backbone, records: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], path: str | Path
) -> Layout:
    """The conditions of an inversion's file, for the targets too; `UserError` where their networks are missing."""
    conditions = []
    for number, facts in enumerate(records):
        map_pixels = tensors.get(f"map_{number}")
        if (
            map_pixels is None
            or map_pixels.dtype != torch.uint8
            or map_pixels.ndim not in (3, 4)
            or map_pixels.shape[-3] != 3
        ):
            raise UserError(f"{path} is damaged: it holds no map {number}. Make it again with `edit invert`.")
        refuse_other_control(facts, path)
        network = open_control(model, str(facts["network"])).network.for_kind(str(facts["kind"]))
        images = [
            to_image(pixels.float().div(127.5).sub(1))
            for pixels in map_pixels.reshape(-1, *map_pixels.shape[-3:])
        ]
        hints = torch.cat([as_hints(pixels) for pixels in images])
        # older files leave out on which rows it acts
        control = make_control(network, hints.to(model.device), {"rows": "both", **facts})
        of_clip = map_pixels.ndim == 4
        maps = tuple(images) if of_clip else ()
        conditions.append(Condition(control.as_clip() if of_clip else control, images[0], dict(facts), maps))
    return Layout(tuple(conditions), ((True, True),) * len(conditions))


def fill_outlines(lines: Tensor) -> Tensor:
    """Lines [H, W] and the regions that they enclose, as 0 or 1."""
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
