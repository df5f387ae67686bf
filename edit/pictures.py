"""Pictures and masks in the sizes that a model works in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.console import UserError
from backbone.files import content_hash
from backbone.images import mask_to_tensor, open_rgb
from backbone.model import Backbone

WIDEST = 2.0  # a picture longer than this is cropped to it


def prepared(model: Backbone, image: Image.Image | str | Path) -> tuple[Image.Image, dict[str, Any]]:
    """The picture as the model is shown it, and facts about where it came from: name, size, content hash.

    Its shape is kept, up to 2 : 1, at about the model's own number of pixels.
    """
    if isinstance(image, Image.Image):
        opened, name, digest = image.convert("RGB"), "", content_hash(image.convert("RGB").tobytes())
    else:
        opened, name, digest = open_rgb(image), str(image), content_hash(Path(image))
    size = working_size(opened.size, area=model.resolution**2, unit=2 * model.factor)
    return fitted(opened, size), {"name": name, "size": list(opened.size), "content": digest}


def working_size(size: tuple[int, int], *, area: int, unit: int) -> tuple[int, int]:
    """(width, height) near a picture's shape and an area in pixels, both multiples of `unit`."""
    ratio = min(max(size[0] / size[1], 1 / WIDEST), WIDEST)
    width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    return max(unit, round(width / unit) * unit), max(unit, round(height / unit) * unit)


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest part of this shape at the centre, resized (Lanczos)."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def mask_of(
    mask: Image.Image | str | Path, *, shown: tuple[int, int], original: Sequence[int] | None = None
) -> Image.Image:
    """A mask (white = may change) as the picture was shown to the model [mode L].

    It must have the picture's original size, or that in which it was shown; `UserError` otherwise.
    """
    opened = mask.convert("L") if isinstance(mask, Image.Image) else open_rgb(mask).convert("L")
    first = tuple(original or shown)
    if opened.size not in (shown, first):
        sizes = " or ".join(f"{width} × {height}" for width, height in dict.fromkeys([first, shown]))
        raise UserError(
            f"The mask is {opened.width} × {opened.height} pixels and the picture {sizes}. Draw it on the picture."
        )
    return opened if opened.size == shown else fitted(opened, shown)


def latent_mask(mask: Image.Image, size: Sequence[int]) -> Tensor:
    """A mask at a latent's size (H, W), 0 or 1: 1 where at least half of the place is white."""
    small = F.interpolate(mask_to_tensor(mask)[None], tuple(size), mode="area")[0, 0]
    return (small >= 0.5).float()


def composed(edits: Tensor, around: Tensor, masks: Tensor | None) -> Tensor:
    """Decoded edits [N, 3, 8H, 8W] inside their masks [N, H, W] (0 or 1; None: everywhere), what lies `around` outside.

    A decoder sees the whole latent, so what it draws around an edit changes with the edit even where the latent is the
    same. An edit reaches half a latent beyond its mask and fades out there.
    """
    if masks is None:
        return edits
    large = F.interpolate(masks[:, None].to(edits), edits.shape[-2:], mode="bilinear", align_corners=False)
    return around + (2 * large).clamp(0, 1) * (edits - around)


def as_mask(places: Tensor, size: tuple[int, int]) -> Image.Image:
    """Places [h, w] in 0…1 as a mask of (width, height) pixels [mode L]."""
    pixels = (places.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def heat(places: Tensor, over: Image.Image, greatest: float) -> Image.Image:
    """A map [h, w] laid over a picture: bright where it is strong, the picture darkened where it is weak."""
    share = (places.detach().float().cpu() / max(greatest, 1e-12)).clamp(0, 1)
    large = F.interpolate(share[None, None], (over.height, over.width), mode="bilinear", align_corners=False)[
        0, 0
    ]
    picture = mask_to_tensor(over.convert("L"))[0]
    strength = large.clamp(0, 1)
    channels = (
        0.25 * picture + 0.75 * (1.6 * strength).clamp(0, 1),
        0.25 * picture + 0.75 * (2.2 * strength - 0.8).clamp(0, 1),
        0.25 * picture + 0.75 * (0.35 * (1 - strength)),
    )
    pixels = (torch.stack(channels, -1).clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels)
