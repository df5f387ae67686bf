"""Pictures or maps at some frames of a clip that words describe: `customize clip … --sparsectrl NETWORK`.

`--image PICTURE` are frames, `--condition KIND=FOLDER` are maps, whose files are named by the frames that they are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from backbone.cli.conditions import ANY, RGB, RequestedControl
from backbone.conditions.control import Control
from backbone.io.console import UserError, notify
from backbone.media.control.maps import (
    MapTarget,
    as_hints,
    files_by_frame,
    find_numbered_maps,
    read_numbered_maps,
)
from backbone.media.sources.decode import open_named
from backbone.media.sources.pictures import list_images
from backbone.media.transforms import CROPS, crop_and_resize, crop_box
from backbone.models.clips.sparse import SparseControl, open_sparsectrl
from backbone.models.control import Condition, describe_map
from backbone.models.model import Backbone
from backbone.models.sample import find_latent_size
from customize.clips.settings import ClipOptions

CROPPED = 0.01  # share of a picture above which cropping is printed


def open_frames(options: ClipOptions) -> tuple[list[Image.Image], list[int]]:
    """The named pictures and their frame numbers; empty without any.

    Raises `UserError` for a picture that cannot be read, and for frames that are not there or are named twice.
    """
    if not options.images:
        return [], []
    refuse_windows(options)
    places = place_frames(options.image_at, len(options.images), options.frames)
    return [open_named(path) for path in options.images], places


def refuse_windows(options: ClipOptions) -> None:
    """`UserError` for frames that do not fit into one call of the network."""
    if options.context_length and options.context_length < options.frames:
        raise UserError(
            "SparseCtrl carries pictures through all frames together, and --context-length draws them in windows. "
            "Leave it out, and ask for no more --frames than fit."
        )


def place_frames(requested: Sequence[int], count: int, frames: int) -> list[int]:
    """The frame numbers of this many pictures: the requested ones, −1 being the last, else evenly spaced.

    Raises `UserError` for a number that the clip does not have, and for one that is given twice.
    """
    if count > frames:
        raise UserError(
            f"There are {count} pictures for {frames} frames. Give fewer, or ask for more --frames."
        )
    if not requested:
        return [round(k * (frames - 1) / max(1, count - 1)) for k in range(count)]
    for frame in requested:
        if not -frames <= frame < frames:
            raise UserError(
                f"A clip of {frames} frames has none of number {frame}: the first is 0, the last {frames - 1} or -1."
            )
    places = [frame % frames for frame in requested]
    if len(set(places)) < len(places):
        raise UserError(
            f"Two pictures are at one frame (--image-at {', '.join(map(str, requested))}). Give each its own."
        )
    return places


def open_given_frames(
    model: Backbone, pictures: Sequence[Image.Image], places: Sequence[int], options: ClipOptions
) -> tuple[Control, ...]:
    """The control by given frames, cropped to the clip's shape; nothing without any.

    Raises `UserError` for a network of another model, and more frames than it has positions for.
    """
    if not pictures:
        return ()
    network = open_network(model, options)
    height, width = (side * model.factor for side in find_latent_size(model, options.size))
    for path, picture in zip(options.images, pictures, strict=True):
        find_crop(path.name, picture.size, (width, height))
    maps = torch.cat([as_hints(crop_and_resize(picture, (width, height))) for picture in pictures])
    return (network.of(maps, places, scale=options.sparsectrl_scale),)


def open_network(model: Backbone, options: ClipOptions) -> SparseControl:
    """The SparseCtrl; `UserError` for one of another model, and more frames than it has positions for."""
    network = open_sparsectrl(model, options.sparsectrl)
    if options.frames > network.longest:
        raise UserError(
            f"{options.sparsectrl} has positions for {network.longest} frames, and {options.frames} are asked for. Ask "
            "for fewer."
        )
    return network


# Maps --------------------------------------------------------------------------------------------------------


def split_controls(options: ClipOptions) -> tuple[tuple[RequestedControl, ...], RequestedControl | None]:
    """The conditions that have a map for each frame, and the one for `--sparsectrl`, with maps for some frames.

    A lone condition without a `--controlnet` is for it too, however many maps there are. Raises `UserError`, before
    anything is loaded, unless that is exactly one condition, and as `find_numbered_maps` does.
    """
    controls = options.controls
    if (
        options.sparsectrl
        and options.images
        and any(lacks_frames(control.map.path, options.frames) for control in controls)
    ):
        raise UserError(
            "--sparsectrl reads pictures at some frames (--image) or maps of some (--condition), and both are given. "
            "Leave one out."
        )
    if not options.sparsectrl or options.images:
        rgb = next((control for control in controls if control.map.kind == RGB), None)
        if rgb is not None:
            raise UserError(
                f"--condition {rgb.map} are pictures at frames, which SparseCtrl reads. Name its network with "
                "--sparsectrl, and leave --image out."
            )
        return controls, None

    # The one condition that has maps of some frames alone
    sparse_controls = [
        control
        for control in controls
        if control.map.kind == RGB or lacks_frames(control.map.path, options.frames)
    ]
    sparse_controls = sparse_controls or [
        control for control in controls if len(controls) == 1 and not options.controlnet
    ]
    if len(sparse_controls) != 1:
        raise UserError(
            "--sparsectrl reads the maps of one --condition, which has some frames' only, and here are "
            f"{len(sparse_controls)} such. Give one, or leave --sparsectrl out."
        )
    (sparse,) = sparse_controls
    if sparse.scale is not None and options.sparsectrl_scale != 1:
        raise UserError(
            "--condition-scale and --sparsectrl-scale both say how strong it is. Give one of them."
        )
    if sparse.guess:
        raise UserError("SparseCtrl has no guess mode. Leave --guess-mode out.")
    if sparse.rows:
        raise UserError("SparseCtrl acts on both rows of guidance. Leave --condition-rows out.")
    refuse_windows(options)
    find_numbered_maps(sparse.map.path, options.frames)
    return tuple(control for control in controls if control is not sparse), sparse


def lacks_frames(path: str, frames: int) -> bool:
    """Whether this is a folder of fewer maps than the clip has frames, or files with the frames that they are of."""
    if files_by_frame(path):
        return True
    return bool(path) and Path(path).expanduser().is_dir() and len(list_images(path)) < frames


def open_sparse_condition(
    model: Backbone, condition: RequestedControl | None, options: ClipOptions
) -> tuple[Condition, ...]:
    """The condition by maps of some frames; nothing without any.

    Raises `UserError` for maps of another kind, for a network that reads other kinds, and as `open_network` does.
    """
    if condition is None:
        return ()
    height, width = (side * model.factor for side in find_latent_size(model, options.size))
    maps = read_numbered_maps(condition.map, MapTarget((width, height)), options.frames)
    network = open_network(model, options)
    if condition.map.kind != ANY and network.reads_latents != (condition.map.kind == RGB):
        reads = "pictures (rgb=FOLDER)" if network.reads_latents else "lines, white on black (sketch=FOLDER)"
        raise UserError(
            f"{options.sparsectrl} reads {reads}, and --condition {condition.map} holds something else. Give these, or "
            "another network."
        )
    scale = options.sparsectrl_scale if condition.scale is None else condition.scale
    start, stop = condition.start or 0.0, 1.0 if condition.stop is None else condition.stop
    control = network.of(torch.cat([as_hints(image) for image in maps.values()]), list(maps), scale=scale)
    facts = {
        "network": options.sparsectrl,
        "scale": scale,
        "start": start,
        "stop": stop,
        "frames": list(maps),
    }
    frame_maps = [maps.get(number, Image.new("RGB", (width, height))) for number in range(options.frames)]
    return (
        Condition(
            replace(control, start=start, stop=stop),
            next(iter(maps.values())),
            describe_map(condition.map) | facts,
            tuple(frame_maps),
        ),
    )


def find_crop(
    name: str, picture: tuple[int, int], clip: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The crop (left, top, right, bottom) of a picture to a clip's aspect ratio, sizes (W, H); prints what is lost."""
    left, top, right, bottom = box = crop_box(picture, clip, CROPS["center"])
    lost = 1 - (right - left) * (bottom - top) / (picture[0] * picture[1])
    if lost > CROPPED:
        notify(
            f"{name} is {picture[0]} × {picture[1]} and the clip {clip[0]} × {clip[1]}: {lost:.0%} at its edges is "
            "cropped off."
        )
    return box


def describe_given_frames(options: ClipOptions, places: Sequence[int]) -> dict[str, Any]:
    """The facts, for the record."""
    if not options.images:
        return {}
    if not options.sparsectrl:
        return {"images": [str(path) for path in options.images]}
    return {
        "images": [str(path) for path in options.images],
        "image_at": list(places),
        "sparsectrl": options.sparsectrl,
        "sparsectrl_scale": options.sparsectrl_scale,
    }
