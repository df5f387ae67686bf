"""Pictures at some frames of a clip that is told in words: `customize clip … --image PICTURE --sparsectrl NETWORK`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from backbone.conditions.control import Control
from backbone.io.console import UserError, notify
from backbone.media.control_maps import as_hints
from backbone.media.decode import open_rgb
from backbone.media.transforms import crop_and_resize, crop_box
from backbone.models.model import Backbone
from backbone.models.sample import latent_size
from backbone.models.sparse import open_sparsectrl
from customize.clips.settings import ClipOptions

CROPPED = 0.01  # of a picture, from which on it is said


def given_frames(asked: ClipOptions) -> tuple[list[Image.Image], list[int]]:
    """The pictures that were named and the frames that they are of; nothing without any.

    Raises `UserError` for a picture that cannot be read, and for frames that are not there or are named twice.
    """
    if not asked.images:
        return [], []
    if asked.context_length and asked.context_length < asked.frames:
        raise UserError(
            "SparseCtrl carries pictures through all frames together, and --context-length draws them in windows. "
            "Leave it out, and ask for no more --frames than fit."
        )
    places = place_frames(asked.image_at, len(asked.images), asked.frames)
    return [open_rgb(path) for path in asked.images], places


def place_frames(asked: Sequence[int], count: int, frames: int) -> list[int]:
    """The frames of so many pictures: those asked for, −1 being the last one, else the first … evenly to the last."""
    if count > frames:
        raise UserError(
            f"There are {count} pictures for {frames} frames. Give fewer, or ask for more --frames."
        )
    if not asked:
        return [round(k * (frames - 1) / max(1, count - 1)) for k in range(count)]
    for place in asked:
        if not -frames <= place < frames:
            raise UserError(
                f"A clip of {frames} frames has none of number {place}: the first is 0, the last {frames - 1} or -1."
            )
    places = [place % frames for place in asked]
    if len(set(places)) < len(places):
        raise UserError(
            f"Two pictures are at one frame (--image-at {', '.join(map(str, asked))}). Give each its own."
        )
    return places


def open_given_frames(
    model: Backbone, pictures: Sequence[Image.Image], places: Sequence[int], asked: ClipOptions
) -> tuple[Control, ...]:
    """The control by given frames, cropped to the clip's shape; nothing without any.

    Raises `UserError` for a network of another model, and more frames than it has positions for.
    """
    if not pictures:
        return ()
    network = open_sparsectrl(model, asked.sparsectrl)
    if asked.frames > network.longest:
        raise UserError(
            f"{asked.sparsectrl} has positions for {network.longest} frames, and {asked.frames} are asked for. Ask for "
            "fewer."
        )
    height, width = (side * model.factor for side in latent_size(model, asked.size))
    for path, picture in zip(asked.images, pictures, strict=True):
        say_crop(path.name, picture.size, (width, height))
    maps = torch.cat([as_hints(crop_and_resize(picture, (width, height))) for picture in pictures])
    return (network.of(maps, places, scale=asked.sparsectrl_scale),)


def say_crop(name: str, picture: tuple[int, int], clip: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of a picture that has a clip's shape, sizes (W, H); what is lost is said."""
    left, top, right, bottom = box = crop_box(picture, clip, (0.5, 0.5))
    lost = 1 - (right - left) * (bottom - top) / (picture[0] * picture[1])
    if lost > CROPPED:
        notify(
            f"{name} is {picture[0]} × {picture[1]} and the clip {clip[0]} × {clip[1]}: {lost:.0%} at its edges is "
            "cropped off."
        )
    return box


def describe_given_frames(asked: ClipOptions, places: Sequence[int]) -> dict[str, Any]:
    """The facts, for the record."""
    if not asked.images:
        return {}
    return {
        "images": [str(path) for path in asked.images],
        "image_at": list(places),
        "sparsectrl": asked.sparsectrl,
        "sparsectrl_scale": asked.sparsectrl_scale,
    }
