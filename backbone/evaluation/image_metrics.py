"""What an edit kept and what it changed, in numbers: PSNR, SSIM, structure, what a scorer thinks.

Pictures are [3, H, W] in −1…1, masks [H, W] with 1 where a picture was to change. Figures of the background come in
two definitions: over the background's own pixels (`corrected`), and as PIE-Bench's published code takes them
(`pie`: both pictures multiplied by the background's mask, then averaged over the whole frame, so that a larger mask
flatters them; Ju et al. 2024). Decibels of several pictures are averaged as decibels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.evaluation.clip import Scorer
from backbone.media.transforms import to_image

MIN_MSE = 1e-10  # mean square below which two pictures count as equal: 100 dB


def measure_edit(
    before: Tensor,
    after: Tensor,
    *,
    changed: Tensor | None = None,
    scorer: Scorer | None = None,
    target: str = "",
) -> dict[str, float | None]:
    """Everything that can be said of one edit by name; None where it is undefined or its tool is missing."""
    found: dict[str, float | None] = {"psnr_db": psnr(before, after), "mse": mse(before, after)}
    found["ssim"] = ssim(before, after)
    found |= background_metrics(before, after, changed)
    if scorer is not None:
        pictures = [to_image(picture) for picture in (before, after)]
        found["structure_distance"] = structure_distance(scorer, *pictures)
        text = scorer.embed_texts([target])[0]
        found["scorer_whole"] = float(scorer.embed_images(pictures[1:])[0] @ text)
        found["scorer_edited_region"] = None
        if changed is not None and bool(changed.any()):
            region = [to_image(after * changed - (1 - changed))]  # the rest black, as PIE-Bench has it
            found["scorer_edited_region"] = float(scorer.embed_images(region)[0] @ text)
    return found


def background_metrics(before: Tensor, after: Tensor, changed: Tensor | None) -> dict[str, float | None]:
    """PSNR, MSE, SSIM (and LPIPS where its package is installed) where nothing was to change, both definitions."""
    names = ("psnr_db", "mse", "ssim", "lpips")
    if changed is None or bool((changed > 0.5).all()):
        return {f"background_{kind}{name}": None for kind in ("", "pie_") for name in names}
    kept = (changed <= 0.5).to(before)
    first, second = (to_unit_range(picture) for picture in (before, after))
    error = float(((first - second).square() * kept).sum() / (3 * kept.sum()))
    similar = float((ssim_map(first, second) * kept).sum() / (3 * kept.sum()))
    masked = [picture * kept for picture in (first, second)]
    frame = float((masked[0] - masked[1]).square().mean())
    whole = lpips(*(2 * picture - 1 for picture in masked))
    return {
        "background_psnr_db": psnr_from_mse(error),
        "background_mse": error,
        "background_ssim": similar,
        "background_lpips": None if whole is None else whole / float(kept.mean()),
        "background_pie_psnr_db": psnr_from_mse(frame),
        "background_pie_mse": frame,
        "background_pie_ssim": float(ssim_map(*masked).mean()),
        "background_pie_lpips": whole,
    }


def psnr(first: Tensor, second: Tensor) -> float:
    """Decibels of the peak 1 over the mean square error of pictures scaled to 0…1; 100 at most."""
    return psnr_from_mse(mse(first, second))


def mse(first: Tensor, second: Tensor) -> float:
    """Mean square error of pictures scaled to 0…1."""
    return float((to_unit_range(first) - to_unit_range(second)).square().mean())


def ssim(first: Tensor, second: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13), mean over channels and places."""
    return float(ssim_map(to_unit_range(first), to_unit_range(second)).mean())


def ssim_map(first: Tensor, second: Tensor) -> Tensor:
    """SSIM at every pixel of every channel [3, H, W] of pictures in 0…1: Gaussian window of 11, σ 1.5."""
    window = _gaussian_window(first)
    pairs = torch.stack([first, second, first * first, second * second, first * second])
    padded = F.pad(pairs, (5, 5, 5, 5), mode="reflect")
    means = F.conv2d(padded.flatten(0, 1)[:, None], window)[:, 0].unflatten(0, pairs.shape[:2])
    a, b, aa, bb, ab = means
    c1, c2 = 0.01**2, 0.03**2
    return cast(
        Tensor,
        ((2 * a * b + c1) * (2 * (ab - a * b) + c2))
        / ((a * a + b * b + c1) * (aa - a * a + bb - b * b + c2)),
    )


@torch.no_grad()
def structure_distance(scorer: Scorer, first: Image.Image, second: Image.Image) -> float:
    """How differently the places of two pictures resemble each other, whatever they look like.

    Tumanyan et al. 2022, eq. 6 (mean square difference of self-similarities) on the last-but-one hidden states of the
    scorer's vision tower. PIE-Bench takes DINO's keys: figures of different networks cannot be compared.
    """
    model = cast(Any, scorer.model)
    states = model.vision_model(
        pixel_values=scorer.prepare([first, second]), output_hidden_states=True
    ).hidden_states
    places = F.normalize(states[-2][:, 1:].float(), dim=-1)
    alike = places @ places.transpose(1, 2)
    return float((alike[0] - alike[1]).square().mean())


def lpips(first: Tensor, second: Tensor) -> float | None:
    """LPIPS-Squeeze (Zhang et al. 2018) of pictures in −1…1; None where its package is not installed."""
    try:
        import lpips as package  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    network = package.LPIPS(net="squeeze", verbose=False).eval()
    with torch.no_grad():
        return float(network(first[None].cpu(), second[None].cpu()))


def psnr_from_mse(error: float) -> float:
    """10·log₁₀(1/error), 100 at most."""
    return -10 * math.log10(max(error, MIN_MSE))


def to_unit_range(picture: Tensor) -> Tensor:
    """A picture of −1…1 in 0…1, float32, on the CPU."""
    return (picture.detach().float().cpu().clamp(-1, 1) + 1) / 2


def mean_of_defined(values: Sequence[float | None]) -> float | None:
    """The mean of what is defined; None if nothing is."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _gaussian_window(like: Tensor) -> Tensor:
    """[1, 1, 11, 11], its sum 1."""
    offset = torch.arange(11, dtype=like.dtype) - 5
    line = torch.exp(-(offset**2) / (2 * 1.5**2))
    line = line / line.sum()
    return (line[:, None] * line)[None, None]


def batch_psnr(decoded: Tensor, clean: Tensor) -> Tensor:
    """Peak signal to noise ratio of each picture in dB [B], of values in −1…1 rounded as a picture file rounds."""
    rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return 10 * torch.log10(4 / F.mse_loss(rounded, clean, reduction="none").mean((1, 2, 3)))
