"""Where two prompts see a picture differently: the difference of their predictions along its trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.io.console import UserError
from backbone.media.decode import open_rgb
from backbone.media.transforms import mask_to_tensor
from backbone.models.cache import encode_prompts_cached
from edit.inversion.inversion import Inversion
from edit.pictures import fitted

# Of the way down: late enough to see where a thing is, early enough to see what.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
FLOOR = 0.1  # share of the places that are taken to differ by nothing


@torch.no_grad()
def differences(
    inversion: Inversion, pairs: Sequence[tuple[str, str]], *, first: int = 0
) -> tuple[Tensor, int]:
    """How much the second prompt of each pair differs from the first [N, H, W] at every place, 1 at most; and how
    many samples the denoiser was asked about: one for each different prompt at each of five rungs.

    After Couairon et al. 2023 (DiffEdit, section 3.2), with the states that the inversion went through, from rung
    `first` on, in place of fresh noise: at each rung, the mean over channels of |ε̂ − ε̂'|, above what a tenth of the
    places stays below, divided by its greatest value; added up over the rungs, and smoothed over 3 × 3 places.
    """
    model, steps = inversion.model, inversion.steps
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair))
    rungs = torch.tensor(sorted({first + int(share * (steps - first)) for share in SHARES}))
    states = inversion.states.float()[rungs.to(inversion.states.device)]
    levels = inversion.schedule[rungs.to(inversion.schedule.a.device).repeat_interleave(len(prompts))]
    text = {name: value.repeat(len(rungs), *[1] * (value.ndim - 1))
            for name, value in encode_prompts_cached(model, prompts).items()}  # fmt: skip
    rows = states.repeat_interleave(len(prompts), 0)
    noise = model.predictor(text)(rows, levels).noise.unflatten(0, (len(rungs), len(prompts)))
    found = []
    for one, other in pairs:
        apart = (noise[:, prompts.index(other)] - noise[:, prompts.index(one)]).abs().mean(1)
        floor = apart.flatten(1).quantile(FLOOR, dim=1)[:, None, None]
        apart = (apart - floor).clamp(min=0)
        apart = apart / apart.amax((1, 2), keepdim=True).clamp(min=1e-12)
        smooth = F.avg_pool2d(F.pad(apart.sum(0)[None, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        found.append(smooth[0, 0] / smooth.amax().clamp(min=1e-12))
    return torch.stack(found), len(rows)


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
