"""Subject masks predicted by the model itself (`--mask auto`), after DiffEdit (Couairon et al. 2023, § 3.2).

The noised latent is predicted twice by the frozen base model, conditioned on the class prompt and on an empty one; the
subject is where the two predictions differ. No attention maps are needed, so it works with every family. The
difference is averaged over noise levels and samples, thresholded by Otsu's method, and dilated by one latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.diffusion.noise import add_noise, generator
from backbone.families.base import Text
from backbone.io.files import content_hash
from backbone.media.pictures import Picture
from backbone.media.sheet import Cell, save_png, sheet
from backbone.media.transforms import fitted
from backbone.models.cache import load_or_compute
from backbone.models.model import Backbone, Posterior

NOISE_FRACTIONS = (0.2, 0.4, 0.6)  # noise levels, as fractions of the schedule from clean to noisy
SAMPLES_PER_LEVEL = 2
PIXELS_PER_LATENT = 8  # on the sheet
DARK = 60  # brightness of masked-out pixels on the sheet, of 255


def predict_mask(model: Backbone, posterior: Posterior, text: Text, empty: Text) -> Tensor:
    """Mask [1, H, W] of zeros and ones at latent size, for a posterior [1, C, H, W] and the text of its class prompt.

    `text` and `empty` have batch size 1. The difference map is cached on disk. Call it while no adapter is active.
    """
    inputs = [posterior.mean, *text.values(), *empty.values()]
    hashes = [content_hash(value.detach().float().cpu().contiguous().numpy().tobytes()) for value in inputs]
    parts = [model.fingerprint, str(model.dtype), str(NOISE_FRACTIONS), str(SAMPLES_PER_LEVEL), *hashes]
    key = content_hash("\n".join(parts).encode())
    cached = load_or_compute(
        "where", key, lambda: {"where": compute_difference_map(model, posterior, text, empty)}
    )
    return dilate(threshold_otsu(cached["where"]))


@torch.no_grad()
def compute_difference_map(model: Backbone, posterior: Posterior, text: Text, empty: Text) -> Tensor:
    """Mean |ε(class prompt) − ε(empty prompt)| over channels, levels and samples [1, H, W], normalised to mean 1."""
    levels, clean = model.path.levels, posterior.mean
    assert levels.time is not None
    conditioning = {name: torch.cat([value, empty[name]]) for name, value in text.items()}
    total = torch.zeros(1, *clean.shape[-2:])
    for fraction in NOISE_FRACTIONS:
        index = torch.tensor([int(fraction * len(levels))])
        for number in range(SAMPLES_PER_LEVEL):
            random = generator("mask", str(fraction), number)
            noise = torch.randn(clean.shape, generator=random).to(clean.device)
            noisy = add_noise(clean, noise, levels[index]).expand(2, -1, -1, -1)
            with model.autocast():
                network = model.family.network(model.denoiser, conditioning)
                conditional, unconditional = network(
                    noisy, levels.time[index].expand(2).to(noisy.device)
                ).float()
            difference = (conditional - unconditional).abs().mean(0).cpu()
            total += difference / difference.mean().clamp(min=1e-12)
    return total / (len(NOISE_FRACTIONS) * SAMPLES_PER_LEVEL)


def threshold_otsu(values: Tensor) -> Tensor:
    """Binary map: ones above the threshold of greatest between-class variance (Otsu 1979); all ones if it is flat."""
    ordered = values.flatten().double().sort().values
    count = len(ordered)
    if float(ordered[-1] - ordered[0]) <= 1e-9:
        return torch.ones_like(values)
    # For every split of the sorted values: n₀·n₁·(μ₁ − μ₀)², n² times the between-class variance.
    below = torch.arange(1, count, dtype=torch.float64)
    sums = ordered.cumsum(0)
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (count - below)
    variance = below * (count - below) * (means[1] - means[0]).square()
    split = int(variance.argmax())
    return (values > (ordered[split] + ordered[split + 1]) / 2).float()


def dilate(mask: Tensor) -> Tensor:
    """Grow a binary mask [1, H, W] by one pixel on every side."""
    return F.max_pool2d(mask[None], 3, stride=1, padding=1)[0]


def save_masks(
    path: Path, images: Sequence[Sequence[Picture]], masks: Sequence[Tensor], *, flip: bool
) -> None:
    """Write a sheet with a row of images per subject, darkened outside their masks.

    With `flip` the masks of each subject are followed by those of its mirrored images, which are not shown.
    """
    rows: list[list[Cell | Image.Image | None]] = []
    first = 0
    for subject in images:
        subject_masks = masks[first : first + len(subject)]
        rows.append([overlay_mask(image, mask) for image, mask in zip(subject, subject_masks, strict=True)])
        first += len(subject) * (2 if flip else 1)
    save_png(path, sheet(rows, note="Dark: does not count."))


def overlay_mask(image: Picture, mask: Tensor) -> Image.Image:
    """An image darkened where its mask [1, H, W] is low; the mask may have any scale."""
    height, width = mask.shape[-2:]
    resized = fitted(image.open(), (PIXELS_PER_LATENT * width, PIXELS_PER_LATENT * height))
    brightness = (mask[0] / mask.max().clamp(min=1e-9) * (255 - DARK) + DARK).byte().cpu().numpy()
    alpha = Image.fromarray(brightness).resize(resized.size, Image.Resampling.NEAREST)
    return Image.composite(resized, Image.new("RGB", resized.size), alpha)
