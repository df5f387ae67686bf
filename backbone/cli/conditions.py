"""Conditions on a picture's layout as they are asked for: `--condition KIND=MAP` and its options. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from backbone.cli.options import Option
from backbone.io.console import UserError, notify, notify_once
from backbone.io.written import written_path

CONTROL = "Control"
LINE_KINDS = ("sketch", "lines", "edges")
KINDS = (*LINE_KINDS, "labels", "depth", "pose", "normal", "tile")
INVERTIBLE = (*LINE_KINDS, "depth")  # which are white on black, or white where it is near
SYNONYMS = {
    **dict.fromkeys(("scribble", "hed", "softedge", "pidi"), "sketch"),
    **dict.fromkeys(("lineart", "mlsd"), "lines"),
    "canny": "edges",
    **dict.fromkeys(("seg", "segmentation", "label"), "labels"),
    "openpose": "pose",
    **dict.fromkeys(("normals", "normalbae"), "normal"),
}
RGB = "rgb"  # pictures themselves, which SparseCtrl reads at some frames of a clip
ROWS = ("both", "prompted")  # of classifier-free guidance
ANY = "map"  # the kind of a map of which nothing is said
AUTO, INVERTED = "auto", "inverted"
MOST, MUCH = 2.0, 1.5  # of a scale; beyond the second, details burn
NEEDS: dict[str, tuple[Any, ...]] = {"condition": ()}


@dataclass(frozen=True)
class AskedMap:
    """One `--condition`: `sketch=drawing.png`, `sketch=scan.png:inverted`, `edges=photo.png:auto`, `edges=auto`.

    path      the map's file; "" where it is found in the picture that is edited
    how       "", `inverted` for black on white, `auto` where the file is a picture in which the map is found
    """

    kind: str
    path: str
    how: str = ""

    @property
    def is_computed(self) -> bool:
        """Whether the map is found in a picture."""
        return self.how == AUTO

    @property
    def is_of_colours(self) -> bool:
        """Whether the file is a picture, in which values are colours; in other maps they are numbers."""
        return self.is_computed or self.kind == "tile"

    @property
    def inverted(self) -> bool:
        """Whether the map is black on white."""
        return self.how == INVERTED

    def __str__(self) -> str:
        return f"{self.kind}={':'.join(filter(None, (self.path, self.how)))}"


@dataclass(frozen=True)
class AskedControl:
    """A map and how it acts: by which network ("" for the model's own), how strongly, at which steps."""

    map: AskedMap
    network: str = ""
    scale: float | None = None
    start: float | None = None
    stop: float | None = None
    rows: str = ""
    guess: bool = False


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Conditions on the layout. None and () stand for what the network's own settings say, else 1, 0 and 1."""

    READ: ClassVar[tuple[str, ...]] = KINDS  # kinds of maps that there are here

    condition: Annotated[
        tuple[str, ...],
        Option(
            "A map of the layout: KIND=MAP.png, with KIND sketch, lines, edges, labels, depth or pose; repeatable. "
            "MAP.png:inverted is black on white, PHOTO.png:auto finds the map in a picture.",
            CONTROL,
            aliases=("control-image", "conditioning-image", "validation-image"),
            metavar="KIND=MAP",
        ),
    ] = ()
    controlnet: Annotated[
        tuple[str, ...],
        Option(
            "The control network: a run of train-control, a diffusers folder, a file, or a hub id; one for all, "
            "or one for each condition.",
            CONTROL,
            aliases=("controlnet-model-name-or-path", "t2i-adapter", "control-net-name"),
            metavar="NETWORK",
            default_text="the model's own",
            needs=NEEDS,
        ),
    ] = ()
    condition_scale: Annotated[
        tuple[float, ...],
        Option(
            "Conditioning scale of the control network; 0: without it. One for all, or one for each condition.",
            CONTROL,
            aliases=(
                "controlnet-conditioning-scale",
                "adapter-conditioning-scale",
                "control-strength",
            ),
            default_text="1",
            needs=NEEDS,
        ),
    ] = ()
    condition_start: Annotated[
        tuple[float, ...],
        Option(
            "Share of the steps before control begins.",
            CONTROL,
            aliases=("control-guidance-start", "start-percent"),
            default_text="0",
            needs=NEEDS,
        ),
    ] = ()
    condition_stop: Annotated[
        tuple[float, ...],
        Option(
            "Share of the steps after which control ends; below 1, details follow the map less.",
            CONTROL,
            aliases=("control-guidance-end", "adapter-conditioning-factor", "end-percent"),
            default_text="1",
            needs=NEEDS,
        ),
    ] = ()
    condition_rows: Annotated[
        str,
        Option(
            "Where control acts in guidance: on both predictions, or on the prompted one alone, so that guidance "
            "amplifies it (webui's “ControlNet is more important”).",
            CONTROL,
            choices=ROWS,
            default_text="both",
            needs=NEEDS,
        ),
    ] = ""
    guess_mode: Annotated[
        bool,
        Option(
            "ControlNets' guess mode, to draw without a prompt: control of the conditional rows alone, and weaker.",
            CONTROL,
            needs=NEEDS,
        ),
    ] = False

    @property
    def controls(self) -> tuple[AskedControl, ...]:
        """What was asked, condition by condition; `UserError` for what does not fit."""
        maps = [parse_map(said, self.READ) for said in self.condition]
        count = len(maps)
        if self.guess_mode and not count:
            spread_values([True], 0, "--guess-mode")
        if self.condition_rows and not count:
            spread_values([self.condition_rows], 0, "--condition-rows")
        every = {
            "--controlnet": self.controlnet,
            "--condition-scale": self.condition_scale,
            "--condition-start": self.condition_start,
            "--condition-stop": self.condition_stop,
        }
        columns = [spread_values(values, count, flag) for flag, values in every.items()]
        asked = tuple(
            AskedControl(each, network or "", scale, start, stop, self.condition_rows, self.guess_mode)
            for each, network, scale, start, stop in zip(maps, *columns, strict=True)
        )
        for one in asked:
            check_strength(one)
        refuse_repeated(asked)
        return asked


@dataclass(frozen=True, kw_only=True)
class ClipControlOptions(ControlOptions):
    """Conditions on the layout of a clip's frames."""

    condition: Annotated[
        tuple[str, ...],
        Option(
            "Maps of the layout, one a frame: KIND=FOLDER or an animated file; or KIND=MAP.png for all frames. KIND is "
            "as in customize sample; repeatable. FOLDER:inverted is black on white, CLIP:auto a clip in which they are "
            "found.",
            CONTROL,
            aliases=("control-image", "conditioning-frames"),
            metavar="KIND=MAPS",
        ),
    ] = ()


def spread_values(values: Sequence[Any], count: int, flag: str) -> Sequence[Any]:
    """One value for each condition: none, one for all, or as many as there are; else `UserError`."""
    if values and not count:
        raise UserError(
            f"{flag} has no effect without a condition. Give --condition KIND=MAP.png, or leave it out."
        )
    if len(values) in (0, 1):
        return [values[0] if values else None] * count
    if len(values) != count:
        raise UserError(
            f"{flag} has {len(values)} values for {count} condition{'s' * (count != 1)}. Give one for all, or one for "
            "each in their order."
        )
    return values


def parse_map(said: str, kinds: Sequence[str] = KINDS) -> AskedMap:
    """`KIND=MAP` in its parts; other tools' words for a kind are understood. `UserError` for anything else."""
    kind, equals, path = said.partition("=")
    kind, path = kind.strip().lower(), path.strip() and str(written_path(path.strip()))
    kind = SYNONYMS.get(kind, kind)
    # A file alone, as diffusers' spellings have it: its network says what it is
    if not equals and "." in said:
        kind, path = ANY, said
    elif not equals or not path:
        found = kind if kind in kinds and kind != RGB else "edges"
        raise UserError(
            f"--condition {said} names no map. Give {kind if kind in kinds else 'sketch'}=MAP.png, or what it is found "
            f"in: {found}=PHOTO.png:auto, and in an edit {found}=auto, of the picture that is edited."
        )
    elif kind not in kinds:
        raise UserError(f"There is no condition {kind}. Choose one of {', '.join(kinds)}.")

    # A map, or what it is found in (:auto), or one in inverted colours (:inverted)
    if path == AUTO and kind == RGB:
        raise UserError(f"--condition {said} names no pictures. Give rgb=FOLDER.")
    if path == AUTO:
        return AskedMap(kind, "", AUTO)
    for how in (AUTO, INVERTED):
        if path.lower().endswith(f":{how}"):
            if how == AUTO and kind == RGB:
                raise UserError(
                    f"--condition {said} are pictures, which are read as they are. Leave :auto out."
                )
            if how == INVERTED and kind not in (*INVERTIBLE, ANY):
                raise UserError(
                    f"--condition {said} turns the colours of {kind} round, so that they say something else. Leave "
                    ":inverted out."
                )
            return AskedMap(kind, path[: -len(how) - 1], how)
    return AskedMap(kind, path)


def refuse_repeated(asked: Sequence[AskedControl]) -> None:
    """`UserError` for a condition that is given twice, with the same network at the same steps."""
    seen = set()
    for one in asked:
        what = (one.map, one.network, one.start, one.stop)
        if what in seen:
            raise UserError(
                f"--condition {one.map} is given twice. Give it once; --condition-scale says how strongly it acts."
            )
        seen.add(what)


def check_strength(asked: AskedControl) -> None:
    """`UserError` for a scale or share that is none; a scale that burns is said."""
    scale, start, stop = (
        usual if value is None else value
        for usual, value in ((1.0, asked.scale), (0.0, asked.start), (1.0, asked.stop))
    )
    if not 0 <= scale <= MOST:  # NaN too
        raise UserError(
            f"--condition-scale {scale:g} is not between 0 and {MOST:g}. 1 is usual, 0 is no control."
        )
    if not (math.isfinite(start) and math.isfinite(stop) and 0 <= start < stop <= 1):
        raise UserError(
            f"A condition from {start:g} to {stop:g} of the steps never acts. Let --condition-start be 0 or later, and "
            "--condition-stop behind it, at 1 or earlier."
        )


def refuse_from_source(asked: Sequence[AskedControl]) -> None:
    """`UserError` for `KIND=auto` where no picture is edited in which the map could be found."""
    for one in asked:
        if not one.map.path:
            raise UserError(
                f"--condition {one.map} finds its map in the picture that is edited, and nothing is edited here. Give "
                f"{one.map.kind}=MAP.png, or {one.map.kind}=PHOTO.png:auto."
            )


def say_scales(asked: Sequence[AskedControl]) -> None:
    """Say where conditions together are so strong that they burn the picture, and which have no effect."""
    for one in asked:
        if one.scale == 0:
            notify_once(f"At --condition-scale 0 {one.map} has no effect.")
    total = sum(1.0 if one.scale is None else one.scale for one in asked)
    if total > MUCH:
        notify(
            f"The conditions' scales add up to {total:g}; above {MUCH:g} a picture may look burnt. Lower "
            "--condition-scale where it does."
        )
