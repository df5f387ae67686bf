"""Resizing, cropping, aspect-ratio buckets, and conversion to and from tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image

from backbone.io.console import UserError


class CropPosition(NamedTuple):
    """The shares of the cropped-away margins that lie left of the crop and above it, 0…1, and the crop's size.

    `side` is relative to the largest crop.
    """

    left: float
    top: float
    side: float = 1.0


MAX_ASPECT_RATIO = 2.0  # longer images are cropped to it
CROPS: dict[str, CropPosition] = {
    "center": CropPosition(0.5, 0.5),
    "top": CropPosition(0.5, 0.0),
    "bottom": CropPosition(0.5, 1.0),
    "left": CropPosition(0.0, 0.5),
    "right": CropPosition(1.0, 0.5),
}


def crop_square(image: Image.Image, size: int, *, crop: str = "center") -> Image.Image:
    """Crop the largest square at `crop` (a key of CROPS) and resize it to size × size, Lanczos, in one pass."""
    return crop_and_resize(image, (size, size), crop=crop)


def crop_and_resize(
    image: Image.Image, size: tuple[int, int], *, crop: str | CropPosition = "center"
) -> Image.Image:
    """Crop the largest region of the aspect ratio of `size` (W, H) and resize it to `size`, Lanczos, in one pass.

    `crop` is a key of CROPS or a `CropPosition`; `UserError` for an unknown key.
    """
    if isinstance(crop, str) and crop not in CROPS:
        raise UserError(f"There is no crop named {crop!r}. Use one of {', '.join(CROPS)}.")
    box = crop_box(image.size, size, CROPS[crop] if isinstance(crop, str) else crop)
    return resize_picture(image, size, box=box)


def resize_picture(
    image: Image.Image, size: tuple[int, int], *, box: tuple[float, float, float, float]
) -> Image.Image:
    """A picture's `box` (left, top, right, bottom) at a size (W, H), Lanczos."""
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def crop_box(
    size: tuple[int, int], target: tuple[int, int], position: CropPosition
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest region of the aspect ratio of `target` (W, H) in an image of `size`.

    With a `side` below 1 it is that much smaller. Whatever rounding does, it never reaches beyond the image: the side
    that limits it is the image's own, and the other at most the image's.
    """
    (width, height), (wide, high) = size, target
    if width * high <= height * wide:
        crop = (float(width), min(width * high / wide, float(height)))
    else:
        crop = (min(height * wide / high, float(width)), float(height))
    crop = (crop[0] * position.side, crop[1] * position.side)
    left, top = (width - crop[0]) * position.left, (height - crop[1]) * position.top
    return left, top, min(left + crop[0], float(width)), min(top + crop[1], float(height))


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Aspect-ratio buckets (W, H): areas of at most resolution², ratios from 1:2 to 2:1, as in NovelAI's bucketing.

    Sides are multiples of 64 pixels (for small models, of a quarter of the resolution).
    """
    step = min(64, resolution // 4)
    sizes = {(resolution, resolution)}
    for short in range(resolution // 2 + step, resolution, step):
        long = min(resolution * resolution // short // step * step, 2 * short)
        sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_bucket(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (W, H) whose log aspect ratio is nearest to that of `size`; among equals the largest."""
    log_ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda wh: (round(abs(math.log(wh[0] / wh[1]) - log_ratio), 9), -wh[0] * wh[1]))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image → float32 [3, H, W] in [−1, 1]."""
    import numpy as np

    assert image.mode == "RGB", f"expected RGB, got {image.mode}"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1.0).contiguous()


def to_image(tensor: torch.Tensor) -> Image.Image:
    """[3, H, W] in [−1, 1], any dtype and device → an RGB image, rounded and clipped: the inverse of `to_tensor`.

    Raises `UserError` for NaN: from a half-precision autoencoder that overflows, or from latents with NaN.
    """
    assert tensor.shape[:-2] == (3,), f"expected [3, H, W], got {list(tensor.shape)}"
    values = tensor.detach().float().cpu()
    if torch.isnan(values).any():
        raise UserError(
            "The decoded image holds NaN. In fp16 the autoencoder overflows: give --precision fp32 or bf16. In these, "
            "a guidance, a weight or a learning rate was too large (lower it), or weights of the model are damaged "
            "(download it again)."
        )
    bytes_ = values.add(1.0).mul(127.5).round().clamp(0, 255).byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())


def mask_to_tensor(mask: Image.Image) -> torch.Tensor:
    """A mask (mode L) → float32 [1, H, W] in [0, 1], 1 = train."""
    import numpy as np

    assert mask.mode == "L", f"expected L, got {mask.mode}"
    return torch.from_numpy(np.array(mask)).float().div(255.0)[None]


def working_size(size: tuple[int, int], *, area: int, unit: int) -> tuple[int, int]:
    """The size (W, H) nearest to the aspect ratio of `size` and to `area` pixels, both sides multiples of `unit`."""
    ratio = min(max(size[0] / size[1], 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO)
    width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    return max(unit, round(width / unit) * unit), max(unit, round(height / unit) * unit)
