"""The image to edit: read and checked once, and brought to the size that a model works in. No heavy imports."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from backbone.io.console import UserError, notify_once
from backbone.io.files import content_hash
from backbone.io.written import written_path
from backbone.media.clips import Film
from backbone.media.sources.decode import (
    BadImageError,
    convert_loaded,
    describe_further_frames,
    mask_from_image,
    named_alone,
    open_loaded,
    open_mask,
    open_named,
)
from backbone.media.transforms import crop_and_resize, to_tensor, working_size

if TYPE_CHECKING:
    from torch import Tensor

    from backbone.models.model import Backbone

ENLARGED = 2.0  # times a side, above which a model sees nothing but blur
CROPPED = 0.15  # share of an image below which cropping is not printed: due to the model's sizes


@dataclass(frozen=True, eq=False)
class SourceImage:
    """An image or mask that has been read.

    image    RGB, upright; of a mask L, 0 or 255
    name     the path, "" of an image that came from memory
    content  hash of the file, or of the pixels
    """

    image: Image.Image
    name: str
    content: str


ImageLike: TypeAlias = Image.Image | str | Path | SourceImage
"""An image as the methods take it: from memory, a path, or one that has been read."""


def read_image(image: ImageLike) -> SourceImage:
    """Read an image once; one that has been read is returned. Raises `BadImageError`, a `UserError`, as `open_rgb`."""
    if isinstance(image, SourceImage):
        return image
    if isinstance(image, Image.Image):
        rgb = open_loaded(image)
        return SourceImage(rgb, "", content_hash(rgb.tobytes()))
    image = _check_path(image)
    try:
        rgb = open_named(image)
    except BadImageError as error:
        if not error.reason.startswith("does not exist"):
            raise
        remedy = "Check the spelling; `edit example cat/` writes one to try with."
        raise UserError(f"{image} {error.reason}. {remedy}") from error
    return SourceImage(rgb, str(image), content_hash(Path(image)))


def _check_path(image: object) -> str | Path:
    """Return the path; `UserError` for anything else, as an array, whose value range is unknown."""
    if isinstance(image, os.PathLike):
        image = os.fsdecode(image)
    if not isinstance(image, str):
        raise UserError(
            f"An image is a PIL image or a path, and {type(image).__name__} is neither. Of an array of 0 to 255, "
            "[H, W, 3], PIL.Image.fromarray makes one."
        )
    return image if Path(image).exists() else written_path(image)


def read_mask(mask: ImageLike) -> SourceImage:
    """Read a mask once: white where it is at least half white; transparent ground is black (`open_mask`).

    Raises `UserError` for a mask in which nothing is white.
    """
    if isinstance(mask, SourceImage) and mask.image.mode == "L":
        return mask
    if isinstance(mask, SourceImage):
        grey, name, content = mask_from_image(mask.image), mask.name, mask.content
    elif isinstance(mask, Image.Image):
        grey, name = convert_loaded(mask, mask_from_image), ""
        content = content_hash(grey.tobytes())
    else:
        mask = _check_path(mask)
        if further := describe_further_frames(Path(mask)):
            notify_once(further)
        with named_alone():
            grey, name, content = open_mask(mask), str(mask), content_hash(Path(mask))
    white = grey.point([0] * 128 + [255] * 128)
    if not white.getbbox():
        brightest = max(grey.tobytes())
        reason = f"its brightest place is {brightest} of 255" if brightest else "it is black everywhere"
        raise UserError(
            f"{name or 'The mask'} lets nothing change: {reason}. Paint white what may change, on black or on nothing."
        )
    return SourceImage(white, name, content)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image, or a clip of F frames, as a model sees it.

    pixels  [3, 8H, 8W], of a clip [F, 3, 8H, 8W], in −1…1
    latent  [1, C, H, W], of a clip [1, C, F, H, W], the posterior's mean
    facts   where it came from: name, size (width, height), content hash
    """

    pixels: Tensor
    latent: Tensor
    facts: Mapping[str, Any]


def encode_image(model: Backbone, image: ImageLike) -> EncodedImage:
    """An image at about the model's number of pixels, with its aspect ratio up to 2 : 1, and its latent."""
    source = read_image(image)
    if misfit := model.describe_misfit([source.image.size]):
        notify_once(misfit)
    pixels = to_tensor(show_image(model, source))
    facts = {"name": source.name, "size": list(source.image.size), "content": source.content}
    return EncodedImage(pixels, model.encode(pixels[None]).mean, facts)


def show_image(model: Backbone, source: SourceImage) -> Image.Image:
    """Crop and resize an image to the nearest shape that a model works in, at about the model's own size."""
    size = _find_working_size(model, source.image.size, source.name or "The image")
    return crop_and_resize(source.image, size)


def _find_working_size(model: Backbone, original: tuple[int, int], name: str) -> tuple[int, int]:
    """The size (W, H) at which a model edits an image of this size; says if much is cropped off or enlarged."""
    size = working_size(original, area=model.resolution**2, unit=2 * model.factor)
    shapes = (original[0] / original[1], size[0] / size[1])
    lost = 1 - min(shapes) / max(shapes)
    if lost > CROPPED:
        notify_once(
            f"{name} is {original[0]} × {original[1]} pixels, and shapes up to 2 : 1 are edited: {min(lost, 0.99):.0%} "
            "of it is cropped off, at both ends alike. Edit a part of it, where that matters."
        )
    if (times := max(size[0] / original[0], size[1] / original[1])) > ENLARGED:
        notify_once(
            f"{name} is {original[0]} × {original[1]} pixels and is enlarged {times:.3g} times, to the size at which "
            "the model works: it stays as blurred as that. Give a larger version of it, if there is one."
        )
    return size


def refuse_other_shape(model: Backbone, first: SourceImage, second: SourceImage) -> None:
    """`UserError` for two images that have different working sizes."""
    sizes = [
        _find_working_size(model, image.image.size, image.name or "The image") for image in (first, second)
    ]
    if sizes[0] != sizes[1]:
        first_size, second_size = (f"{image.image.width} × {image.image.height}" for image in (first, second))
        raise UserError(
            f"{first.name or 'The first image'} is {first_size} pixels and {second.name or 'the second'} "
            f"{second_size}: other shapes. Crop one as the other is."
        )


def encode_film(model: Backbone, film: Film) -> EncodedImage:
    """A clip at about the model's number of pixels, with its aspect ratio up to 2 : 1, and its latents."""
    import torch

    pixels = torch.stack([to_tensor(frame) for frame in show_film(model, film)])
    facts = {
        "name": film.name,
        "size": list(film.size),
        "frames": len(film.frames),
        "fps": film.fps,
        "content": film.content,
    }
    return EncodedImage(pixels, model.encode_clip(pixels)[None], facts)


def show_film(model: Backbone, film: Film) -> list[Image.Image]:
    """Crop and resize the frames of a clip, as `show_image`."""
    size = _find_working_size(model, film.size, film.name or "The clip")
    return [crop_and_resize(frame, size) for frame in film.frames]


def join_side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Join images of one size in a row."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for number, image in enumerate(images):
        row.paste(image, (number * width, 0))
    return row
