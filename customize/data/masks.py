"""Masks of the subject in its images, by the model itself (`--mask auto`).

An image is noised a little, and the base model predicts it twice: conditioned on the class prompt, and on the empty
prompt. Where the two predictions differ is where it sees the class (Couairon et al. 2023, “DiffEdit”, § 3.2). This
needs no attention maps, so it works with every family. The difference, averaged over several levels and noise
samples, is split by Otsu's threshold, and the upper class is dilated by one latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import add_noise, generator, target
from backbone.io.files import content_hash
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import crop_and_resize
from backbone.models.cache import load_or_compute
from backbone.models.model import Backbone, Posterior

SHARES = (0.2, 0.4, 0.6)  # of the levels, from clean to noisy
NOISE_SAMPLES = 2  # at each of them
PIXELS, DARK = 8, 60  # of the sheet: pixels per latent, and brightness outside the mask, of 255


def predict_mask(
    model: Backbone, posterior: Posterior, class_prompt: Conditions, empty: Conditions
) -> Tensor:
    """An image's mask [1, H, W] of zeros and ones at the latents' size, from the class prompt and an empty one.

    Both conditions have one row. Cached on disk. No adapter may be active.
    """
    inputs = [posterior.mean, *class_prompt.tensors(), *empty.tensors()]
    parts = [content_hash(value.detach().float().cpu().contiguous().numpy().tobytes()) for value in inputs]
    facts = [
        model.fingerprint,
        str(model.dtype),
        str(SHARES),
        str(NOISE_SAMPLES),
        *model.placement.rounding,
        *parts,
    ]
    key = content_hash("\n".join(facts).encode())
    cached = load_or_compute(
        "where", key, lambda: {"where": prediction_difference(model, posterior, class_prompt, empty)}
    )
    return dilate(otsu(cached["where"]))


@torch.no_grad()
def prediction_difference(
    model: Backbone, posterior: Posterior, class_prompt: Conditions, empty: Conditions
) -> Tensor:
    """How much the class prompt changes the prediction at each position [1, H, W], with a mean of about 1."""
    total = torch.zeros(1, *posterior.mean.shape[-2:])
    for (conditional, unconditional), _ in predict_both(model, posterior, class_prompt, empty):
        difference = (conditional - unconditional).abs().mean(0).cpu()
        total += difference / difference.mean().clamp(min=1e-12)  # every level counts alike
    return total / (len(SHARES) * NOISE_SAMPLES)


def predict_both(
    model: Backbone, posterior: Posterior, first: Conditions, second: Conditions
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both predictions [2, C, H, W] for an image noised to each of several levels, and the target [1, C, H, W]."""
    path, clean, conditions = model.path, posterior.mean, Conditions.cat([first, second])
    for share in SHARES:
        index = torch.tensor([int(share * len(path.levels))])
        for number in range(NOISE_SAMPLES):
            noise = torch.randn(clean.shape, generator=generator("mask", str(share), number)).to(clean.device)
            noisy = add_noise(clean, noise, path.levels[index])
            predicted = model.predict(torch.cat([noisy, noisy]), index.expand(2), conditions)
            yield predicted, target(clean, noise, path.levels[index], path.prediction_type)


def otsu(values: Tensor) -> Tensor:
    """1 above the threshold that best splits a map [1, H, W] into two classes (Otsu 1979), else 0; 1 if it is flat."""
    ordered = values.flatten().double().sort().values
    count = len(ordered)

    # Between-class variance n₀·n₁·(μ₁ − μ₀)² for a cut behind each of the sorted values
    below = torch.arange(1, count, dtype=torch.float64)
    sums = ordered.cumsum(0)
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (count - below)
    variance = below * (count - below) * (means[1] - means[0]).square()
    if float(ordered[-1] - ordered[0]) <= 1e-9:
        return torch.ones_like(values)
    cut = int(variance.argmax())
    return (values > (ordered[cut] + ordered[cut + 1]) / 2).float()


def dilate(mask: Tensor) -> Tensor:
    """A mask [1, H, W] grown by one position on every side."""
    return F.max_pool2d(mask[None], 3, stride=1, padding=1)[0]


def save_masks(
    path: Path, pictures: Sequence[Sequence[ImageRecord]], masks: Sequence[Tensor], *, most: int
) -> None:
    """A sheet of every subject's first images, `most` at most, darkened outside their mask.

    `masks` are those of every subject's images, then of their crops and of both mirrored, which are not shown.
    """
    rows: list[list[Cell | Image.Image | None]] = []
    views, first = len(masks) // max(1, sum(map(len, pictures))), 0
    for folder in pictures:
        subject_masks = masks[first : first + len(folder)][:most]
        rows.append(
            [
                darken_outside(picture, mask)
                for picture, mask in zip(folder[:most], subject_masks, strict=True)
            ]
        )
        first += len(folder) * views
    save_png(path, draw_sheet(rows, note="Dark: does not count."))


def darken_outside(picture: ImageRecord, mask: Tensor) -> Image.Image:
    """An image, darkened outside its mask; the mask [1, H, W] may be of any scale."""
    height, width = mask.shape[-2:]
    image = crop_and_resize(picture.open(), (PIXELS * width, PIXELS * height))
    small = (mask[0] / mask.max().clamp(min=1e-9) * (255 - DARK) + DARK).byte().cpu().numpy()
    light = Image.fromarray(small).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, Image.new("RGB", image.size), light)
