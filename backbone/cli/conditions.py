"""The options that condition a picture's layout: `--condition KIND=MAP` and its settings. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from backbone.cli.options import Option
from backbone.io.console import UserError, notify, notify_once
from backbone.io.written import written_path

CONTROL = "Control"
LINE_KINDS = ("sketch", "lines", "edges")
KINDS = (*LINE_KINDS, "labels", "depth", "pose", "normal", "tile")
INVERTIBLE = (*LINE_KINDS, "depth")  # white on black, or near in white
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
SCALE = re.compile(r"\d*\.?\d+")  # a strength, as LoRAs have it behind their names in other tools
ANY = "map"  # the kind of a map whose kind is not given
AUTO, INVERTED = "auto", "inverted"
LARGEST_SCALE, BURNING_SCALE = 2.0, 1.5  # the largest allowed, and the sum above which details burn
NEEDS: dict[str, tuple[Any, ...]] = {"condition": ()}


@dataclass(frozen=True)
class RequestedMap:
    """One `--condition`: `sketch=drawing.png`, `sketch=scan.png:inverted`, `edges=photo.png:auto`, `edges=auto`.

    path  the map's file; "" if it is found in the picture that is edited
    mode  "", `inverted` for black on white, `auto` if the file is a picture in which the map is found
    """

    kind: str
    path: str
    mode: str = ""

    @property
    def is_computed(self) -> bool:
        """Whether the map is found in a picture."""
        return self.mode == AUTO

    @property
    def has_colours(self) -> bool:
        """Whether the file is a picture, in which values are colours; in other maps they are numbers."""
        return self.is_computed or self.kind == "tile"

    @property
    def inverted(self) -> bool:
        """Whether the map is black on white."""
        return self.mode == INVERTED

    def __str__(self) -> str:
        return f"{self.kind}={':'.join(filter(None, (self.path, self.mode)))}"


@dataclass(frozen=True)
class RequestedControl:
    """A map and how it acts: by which network ("" for the model's own), how strongly, at which steps."""

    map: RequestedMap
    network: str = ""
    scale: float | None = None
    start: float | None = None
    stop: float | None = None
    rows: str = ""
    guess: bool = False


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Conditions on the layout. None and () stand for the network's own settings, else 1, 0 and 1."""

    READ: ClassVar[tuple[str, ...]] = KINDS  # the kinds of maps that are read

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
            "Share of the steps that are taken before control begins.",
            CONTROL,
            aliases=("control-guidance-start", "start-percent"),
            default_text="0",
            needs=NEEDS,
        ),
    ] = ()
    condition_stop: Annotated[
        tuple[float, ...],
        Option(
            "Share of the steps that are taken after which control ends; below 1, details follow the map less.",
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
    def controls(self) -> tuple[RequestedControl, ...]:
        """The requested controls, one for each condition; `UserError` for values that do not fit."""
        maps = [parse_map(text, self.READ) for text in self.condition]
        count = len(maps)
        for flag, value in (("--guess-mode", self.guess_mode), ("--condition-rows", self.condition_rows)):
            if value and not maps:
                raise _explain_no_condition(flag)
        values_by_flag = {
            "--controlnet": self.controlnet,
            "--condition-scale": self.condition_scale,
            "--condition-start": self.condition_start,
            "--condition-stop": self.condition_stop,
        }
        columns = [spread_values(values, count, flag) for flag, values in values_by_flag.items()]
        controls = tuple(
            RequestedControl(map_, network or "", scale, start, stop, self.condition_rows, self.guess_mode)
            for map_, network, scale, start, stop in zip(maps, *columns, strict=True)
        )
        for control in controls:
            check_strength(control)
        refuse_repeated(controls)
        return controls


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
    """One value for each condition, from none, one for all, or one each; `UserError` for another number."""
    if values and not count:
        raise _explain_no_condition(flag)
    if len(values) in (0, 1):
        return [values[0] if values else None] * count
    if len(values) != count:
        raise UserError(
            f"{flag} has {len(values)} values for {count} condition{'s' * (count != 1)}. Give one for all, or one for "
            "each in their order."
        )
    return values


def _explain_no_condition(flag: str) -> UserError:
    """The error for a flag of conditions without a condition."""
    return UserError(
        f"{flag} has no effect without a condition. Give --condition KIND=MAP.png, or leave it out."
    )


def refuse_scale_in_map(*parts: str) -> None:
    """`UserError` for a strength behind a map or its kind: `sketch=map.png:0.5`."""
    for part in parts:
        _, colon, number = part.strip().rpartition(":")
        if colon and SCALE.fullmatch(number) and not Path(part.strip()).exists():
            raise UserError(
                f"--condition {part.strip()} ends in a number. Leave it out and use --condition-scale {number}."
            )


def parse_map(text: str, kinds: Sequence[str] = KINDS) -> RequestedMap:
    """Parse `KIND=MAP`, with other tools' words for a kind too. Raises `UserError` for anything else."""
    kind, equals, path = text.partition("=")
    refuse_scale_in_map(kind, path)
    kind, path = kind.strip().lower(), path.strip() and str(written_path(path.strip()))
    kind = SYNONYMS.get(kind, kind)
    # A file alone, as in diffusers' scripts: its network says what it is
    if not equals and "." in text:
        kind, path = ANY, text
    elif not equals or not path:
        example_kind = kind if kind in kinds and kind != RGB else "edges"
        raise UserError(
            f"--condition {text} names no map. Give {kind if kind in kinds else 'sketch'}=MAP.png, or what it is found "
            f"in: {example_kind}=PHOTO.png:auto, and in an edit {example_kind}=auto, of the picture that is edited."
        )
    elif kind not in kinds:
        raise UserError(f"There is no condition {kind}. Choose one of {', '.join(kinds)}.")

    # A map, a picture to find it in (:auto), or a map in inverted colours (:inverted)
    if path == AUTO and kind == RGB:
        raise UserError(f"--condition {text} names no pictures. Give rgb=FOLDER.")
    if path == AUTO:
        return RequestedMap(kind, "", AUTO)
    for suffix in (AUTO, INVERTED):
        if path.lower().endswith(f":{suffix}"):
            if suffix == AUTO and kind == RGB:
                raise UserError(
                    f"--condition {text} are pictures, which are read as they are. Leave :auto out."
                )
            if suffix == INVERTED and kind not in (*INVERTIBLE, ANY):
                raise UserError(
                    f"--condition {text} turns the colours of {kind} round, so that they say something else. Leave "
                    ":inverted out."
                )
            return RequestedMap(kind, path[: -len(suffix) - 1], suffix)
    return RequestedMap(kind, path)


def refuse_repeated(controls: Sequence[RequestedControl]) -> None:
    """Raise `UserError` for a condition that is given twice with the same network at the same steps."""
    seen = set()
    for control in controls:
        key = (control.map, control.network, control.start, control.stop)
        if key in seen:
            raise UserError(
                f"--condition {control.map} is given twice. Give it once; --condition-scale says how strongly it acts."
            )
        seen.add(key)


def check_strength(control: RequestedControl) -> None:
    """Raise `UserError` for a scale or a share of the steps outside its range."""
    scale, start, stop = (
        default if value is None else value
        for default, value in ((1.0, control.scale), (0.0, control.start), (1.0, control.stop))
    )
    if not 0 <= scale <= LARGEST_SCALE:  # NaN too
        raise UserError(
            f"--condition-scale {scale:g} is not between 0 and {LARGEST_SCALE:g}. 1 is usual, 0 is no control."
        )
    if not (math.isfinite(start) and math.isfinite(stop) and 0 <= start < stop <= 1):
        raise UserError(
            f"A condition from {start:g} to {stop:g} of the steps never acts. Let --condition-start be 0 or later, and "
            "--condition-stop behind it, at 1 or earlier."
        )


def refuse_from_source(controls: Sequence[RequestedControl]) -> None:
    """Raise `UserError` for `KIND=auto` if no picture is edited in which the map could be found."""
    for control in controls:
        if not control.map.path:
            raise UserError(
                f"--condition {control.map} finds its map in the picture that is edited, and nothing is edited here. "
                f"Give {control.map.kind}=MAP.png, or {control.map.kind}=PHOTO.png:auto."
            )


def say_idle_rows(controls: Sequence[RequestedControl], *guidances: float) -> None:
    """Say that a choice of rows has no effect where none of these scales guides."""
    if any(control.rows for control in controls) and all(guidance == 1 for guidance in guidances):
        notify_once("At guidance 1 control acts on one prediction alone, so --condition-rows has no effect.")


def say_scales(controls: Sequence[RequestedControl]) -> None:
    """Print which conditions have no effect, and whether all together may burn the picture."""
    for control in controls:
        if control.scale == 0:
            notify_once(f"At --condition-scale 0 {control.map} has no effect.")
    total = sum(1.0 if control.scale is None else control.scale for control in controls)
    if total > BURNING_SCALE:
        notify(
            f"The conditions' scales add up to {total:g}; above {BURNING_SCALE:g} a picture may look burnt. Lower "
            "--condition-scale where it does."
        )
