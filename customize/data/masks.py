"""Where the subject is in its pictures, as the model itself sees it (`--mask auto`).

A picture is noised a little, and the untouched model predicts it twice: told of the class, and told of nothing. Where
the two predictions differ is where it sees the class (Couairon et al. 2023, “DiffEdit”, § 3.2, between a prompt and an
empty one). It needs no look into the network, so it works with every family. The difference over several levels and
draws of noise is cut in two by Otsu's threshold, and what lies above grows by one latent on every side.
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
from backbone.models.cache import remembered
from backbone.models.model import Backbone, Posterior

NOISE_FRACTIONS = (0.2, 0.4, 0.6)  # of the levels, from clean to noisy
SAMPLES_PER_LEVEL = 2  # of noise at each of them
PIXELS, DARK = 8, 60  # of the sheet: pixels a latent, and how light what does not count is, of 255


def predict_mask(model: Backbone, posterior: Posterior, text: Text, empty: Text) -> Tensor:
    """A picture's mask [1, H, W] of zeros and ones at the latents' size, from the class prompt and an empty one.

    Both are [1, ...]. Found once for all time. Call it while no adapter is active.
    """
    known = [posterior.mean, *text.values(), *empty.values()]
    parts = [content_hash(value.detach().float().cpu().contiguous().numpy().tobytes()) for value in known]
    facts = [model.fingerprint, str(model.dtype), str(NOISE_FRACTIONS), str(SAMPLES_PER_LEVEL), *parts]
    key = content_hash("\n".join(facts).encode())
    found = remembered("where", key, lambda: {"where": compute_difference_map(model, posterior, text, empty)})
    return dilate(threshold_otsu(found["where"]))


@torch.no_grad()
def compute_difference_map(model: Backbone, posterior: Posterior, text: Text, empty: Text) -> Tensor:
    """How much the class's name changes the prediction, everywhere [1, H, W]; of mean about 1."""
    levels, clean = model.path.levels, posterior.mean
    assert levels.time is not None
    both = {name: torch.cat([value, empty[name]]) for name, value in text.items()}
    total = torch.zeros(1, *clean.shape[-2:])
    for share in NOISE_FRACTIONS:
        index = torch.tensor([int(share * len(levels))])
        for draw in range(SAMPLES_PER_LEVEL):
            noise = torch.randn(clean.shape, generator=generator("mask", str(share), draw)).to(clean.device)
            noisy = add_noise(clean, noise, levels[index]).expand(2, -1, -1, -1)
            with model.autocast():
                network = model.family.network(model.denoiser, both)
                told, untold = network(noisy, levels.time[index].expand(2).to(noisy.device)).float()
            change = (told - untold).abs().mean(0).cpu()
            total += change / change.mean().clamp(min=1e-12)
    return total / (len(NOISE_FRACTIONS) * SAMPLES_PER_LEVEL)


def threshold_otsu(values: Tensor) -> Tensor:
    """Ones where a map lies above the threshold that parts it best into two classes (Otsu 1979); all ones if flat."""
    ordered = values.flatten().double().sort().values
    count = len(ordered)
    below = torch.arange(1, count, dtype=torch.float64)
    sums = ordered.cumsum(0)
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (count - below)
    between = below * (count - below) * (means[1] - means[0]).square()
    if float(ordered[-1] - ordered[0]) <= 1e-9:
        return torch.ones_like(values)
    cut = int(between.argmax())
    return (values > (ordered[cut] + ordered[cut + 1]) / 2).float()


def dilate(mask: Tensor) -> Tensor:
    """A mask [1, H, W] with its neighbours."""
    return F.max_pool2d(mask[None], 3, stride=1, padding=1)[0]


def save_masks(
    path: Path, pictures: Sequence[Sequence[Picture]], masks: Sequence[Tensor], *, flip: bool
) -> None:
    """A sheet of every subject's pictures, dark where they do not count; the mirrored ones behind them are left out."""
    rows: list[list[Cell | Image.Image | None]] = []
    first = 0
    for folder in pictures:
        own = masks[first : first + len(folder)]
        rows.append([overlay_mask(picture, mask) for picture, mask in zip(folder, own, strict=True)])
        first += len(folder) * (2 if flip else 1)
    save_png(path, sheet(rows, note="Dark: does not count."))


def overlay_mask(picture: Picture, mask: Tensor) -> Image.Image:
    """A picture, dark where it does not count; the mask [1, H, W] may be of any scale."""
    height, width = mask.shape[-2:]
    seen = fitted(picture.open(), (PIXELS * width, PIXELS * height))
    small = (mask[0] / mask.max().clamp(min=1e-9) * (255 - DARK) + DARK).byte().cpu().numpy()
    light = Image.fromarray(small).resize(seen.size, Image.Resampling.NEAREST)
    return Image.composite(seen, Image.new("RGB", seen.size), light)
