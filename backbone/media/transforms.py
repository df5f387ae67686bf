"""Resizing, cropping, aspect-ratio buckets, and conversion to and from tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image

from backbone.io.console import UserError

if TYPE_CHECKING:
    import torch
import torch

CropPosition: TypeAlias = tuple[float, float]


CROPS: dict[str, CropPosition] = {
    "center": (0.5, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
}


def crop_square(image: Image.Image, size: int, *, crop: str = "center") -> Image.Image:
    """The largest square at `crop` (a key of CROPS), resized to size × size with Lanczos in one pass."""
    return crop_and_resize(image, (size, size), crop=crop)


def crop_and_resize(
    image: Image.Image, size: tuple[int, int], *, crop: str | CropPosition = "center"
) -> Image.Image:
    """The largest part of this shape (W, H) at `crop`, resized to it with Lanczos in one pass.

    `crop` is a key of CROPS, or says how much of what is cut off lies left of the part and above it, 0…1 each.
    """
    if isinstance(crop, str) and crop not in CROPS:
        raise UserError(f"There is no crop named {crop!r}. Use one of {', '.join(CROPS)}.")
    place = CROPS[crop] if isinstance(crop, str) else crop
    scale = min(own / wanted for own, wanted in zip(image.size, size, strict=True))
    sides = (size[0] * scale, size[1] * scale)
    left, top = ((own - side) * part for own, side, part in zip(image.size, sides, place, strict=True))
    box = (left, top, min(left + sides[0], image.width), min(top + sides[1], image.height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Sizes (W, H) for pictures that are not cropped square: of the resolution's area or less, sides at most 1 : 2.

    Sides are multiples of 64 (for small models, of a quarter of the resolution), as in NovelAI's aspect buckets.
    """
    step = min(64, resolution // 4)
    sizes = {(resolution, resolution)}
    for short in range(resolution // 2 + step, resolution, step):
        long = min(resolution * resolution // short // step * step, 2 * short)
        sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_bucket(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Which of the sizes (W, H) has the shape nearest to this one's; of two alike the larger."""
    shape = math.log(size[0] / size[1])
    return min(sizes, key=lambda one: (round(abs(math.log(one[0] / one[1]) - shape), 9), -one[0] * one[1]))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as float32 [3, H, W] in −1…1."""
    import numpy as np
    import torch

    assert image.mode == "RGB", f"expected RGB, got {image.mode}"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1.0).contiguous()


def to_image(tensor: torch.Tensor) -> Image.Image:
    """[3, H, W] in −1…1, any dtype and device, as an RGB picture, rounded and clipped: the inverse of
    `to_tensor`. UserError for values that are not numbers: what a half-precision decoder gives when it
    overflows."""
    import torch

    assert tensor.shape[:-2] == (3,), f"expected [3, H, W], got {list(tensor.shape)}"
    values = tensor.detach().float().cpu()
    if torch.isnan(values).any():
        raise UserError("The decoded picture holds values that are not numbers. Decode it in fp32 or bf16.")
    bytes_ = values.add(1.0).mul(127.5).round().clamp(0, 255).byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())


def mask_to_tensor(mask: Image.Image) -> torch.Tensor:
    """A mask (mode L) as float32 [1, H, W] in 0…1, 1 = train."""
    import numpy as np
    import torch

    assert mask.mode == "L", f"expected L, got {mask.mode}"
    return torch.from_numpy(np.array(mask)).float().div(255.0)[None]


MAX_ASPECT_RATIO = 2.0  # a picture longer than this is cropped to it


def working_size(size: tuple[int, int], *, area: int, unit: int) -> tuple[int, int]:
    """(width, height) near a picture's shape and an area in pixels, both multiples of `unit`."""
    ratio = min(max(size[0] / size[1], 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO)
    width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    return max(unit, round(width / unit) * unit), max(unit, round(height / unit) * unit)
