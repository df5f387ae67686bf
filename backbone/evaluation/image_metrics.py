"""Image-editing metrics: PSNR, MSE, SSIM, LPIPS, structure distance, CLIP similarity to the target prompt.

Images are [3, H, W] in [−1, 1], masks [H, W] with 1 where the image was to change. Background metrics come in two
definitions: over the background's own pixels, and as PIE-Bench's published code computes them (`pie`: both images
multiplied by the background mask, then averaged over the whole frame, so that a larger mask flatters them; Ju et al.
2024). The PSNR of several images is the mean of their dB.
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

MIN_MSE = 1e-10  # caps PSNR at 100 dB


def measure_edit(
    before: Tensor,
    after: Tensor,
    *,
    changed: Tensor | None = None,
    scorer: Scorer | None = None,
    target: str = "",
) -> dict[str, float | None]:
    """All metrics of an edit from `before` to `after`, by name; None if undefined or if a package is missing.

    changed  [H, W], 1 where the image was to change
    scorer   for structure distance and the similarity to the prompt `target`; both are left out without it
    """
    metrics: dict[str, float | None] = {"psnr_db": psnr(before, after), "mse": mse(before, after)}
    metrics["ssim"] = ssim(before, after)
    metrics |= background_metrics(before, after, changed)
    if scorer is not None:
        images = [to_image(image) for image in (before, after)]
        metrics["structure_distance"] = structure_distance(scorer, *images)
        text = scorer.embed_texts([target])[0]
        metrics["scorer_whole"] = float(scorer.embed_images(images[1:])[0] @ text)
        metrics["scorer_edited_region"] = None
        if changed is not None and bool(changed.any()):
            region = [to_image(after * changed - (1 - changed))]  # black elsewhere, as in PIE-Bench
            metrics["scorer_edited_region"] = float(scorer.embed_images(region)[0] @ text)
    return metrics


def background_metrics(before: Tensor, after: Tensor, changed: Tensor | None) -> dict[str, float | None]:
    """PSNR, MSE, SSIM, and LPIPS if installed, of the background (`changed` [H, W] ≤ ½) of images [3, H, W] in −1…1.

    In both definitions: over the background's own pixels, and PIE-Bench's; None if there is no background.
    """
    names = ("psnr_db", "mse", "ssim", "lpips")
    if changed is None or bool((changed > 0.5).all()):
        return {f"background_{definition}{name}": None for definition in ("", "pie_") for name in names}
    mask = (changed <= 0.5).to(before)
    first, second = (to_unit_range(image) for image in (before, after))
    # Over the background's pixels: sums divided by its area times three channels.
    background_mse = float(((first - second).square() * mask).sum() / (3 * mask.sum()))
    background_ssim = float((ssim_map(first, second) * mask).sum() / (3 * mask.sum()))
    # As PIE-Bench: the mean over the whole frame of the masked images.
    masked = [image * mask for image in (first, second)]
    pie_mse = float((masked[0] - masked[1]).square().mean())
    pie_lpips = lpips(*(2 * image - 1 for image in masked))
    return {
        "background_psnr_db": psnr_from_mse(background_mse),
        "background_mse": background_mse,
        "background_ssim": background_ssim,
        "background_lpips": None if pie_lpips is None else pie_lpips / float(mask.mean()),
        "background_pie_psnr_db": psnr_from_mse(pie_mse),
        "background_pie_mse": pie_mse,
        "background_pie_ssim": float(ssim_map(*masked).mean()),
        "background_pie_lpips": pie_lpips,
    }


def psnr(first: Tensor, second: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images [3, H, W] in −1…1, at most 100."""
    return psnr_from_mse(mse(first, second))


def psnr_8_bit(decoded: Tensor, clean: Tensor) -> Tensor:
    """PSNR in dB [B] of each image of a batch [B, 3, H, W] after rounding `decoded` to 8 bits, as a file would."""
    rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return torch.tensor([psnr(image, target) for image, target in zip(rounded, clean, strict=True)])


def mse(first: Tensor, second: Tensor) -> float:
    """Mean squared error of two images [3, H, W] in −1…1, scaled to 0…1."""
    return float((to_unit_range(first) - to_unit_range(second)).square().mean())


def ssim(first: Tensor, second: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13) of two images [3, H, W], averaged over channels and pixels."""
    return float(ssim_map(to_unit_range(first), to_unit_range(second)).mean())


def ssim_map(first: Tensor, second: Tensor) -> Tensor:
    """SSIM at every pixel and channel [3, H, W] of two images in [0, 1]; Gaussian window of 11 pixels, σ = 1.5."""
    # Local means of a, b, a², b², ab under the window [5, 3, H, W]
    window = _gaussian_window(first)
    pairs = torch.stack([first, second, first * first, second * second, first * second])
    padded = F.pad(pairs, (5, 5, 5, 5), mode="reflect")
    means = F.conv2d(padded.flatten(0, 1)[:, None], window)[:, 0].unflatten(0, pairs.shape[:2])
    a, b, aa, bb, ab = means

    # (2·μ_a·μ_b + C1)(2·σ_ab + C2) / ((μ_a² + μ_b² + C1)(σ_a² + σ_b² + C2)), Wang et al. 2004, eq. 13
    c1, c2 = 0.01**2, 0.03**2
    return cast(
        Tensor,
        ((2 * a * b + c1) * (2 * (ab - a * b) + c2))
        / ((a * a + b * b + c1) * (aa - a * a + bb - b * b + c2)),
    )


@torch.no_grad()
def structure_distance(scorer: Scorer, first: Image.Image, second: Image.Image) -> float:
    """Mean squared difference of two images' patch self-similarities (Tumanyan et al. 2022, eq. 6).

    Patch features are the last-but-one hidden states of the scorer's vision tower. PIE-Bench takes DINO's keys: values
    of different networks cannot be compared.
    """
    model = cast(Any, scorer.model)
    states = model.vision_model(
        pixel_values=scorer.preprocess([first, second]), output_hidden_states=True
    ).hidden_states
    patches = F.normalize(states[-2][:, 1:].float(), dim=-1)  # without the class token
    similarity = patches @ patches.transpose(1, 2)
    return float((similarity[0] - similarity[1]).square().mean())


def lpips(first: Tensor, second: Tensor) -> float | None:
    """LPIPS with SqueezeNet (Zhang et al. 2018) of two images in [−1, 1]; None if `lpips` is not installed."""
    try:
        import lpips as package  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    network = package.LPIPS(net="squeeze", verbose=False).eval()
    with torch.no_grad():
        return float(network(first[None].cpu(), second[None].cpu()))


def psnr_from_mse(error: float) -> float:
    """10·log₁₀(1 / error) for a peak of 1, at most 100 dB."""
    return -10 * math.log10(max(error, MIN_MSE))


def to_unit_range(image: Tensor) -> Tensor:
    """[−1, 1] → [0, 1], clipped, float32, on the CPU."""
    return (image.detach().float().cpu().clamp(-1, 1) + 1) / 2


def mean_of_defined(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are neither None nor NaN; None if there are none."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return sum(defined) / len(defined) if defined else None


def _gaussian_window(like: Tensor) -> Tensor:
    """A normalised Gaussian kernel [1, 1, 11, 11] of σ 1.5 for SSIM."""
    offset = torch.arange(11, dtype=like.dtype) - 5
    line = torch.exp(-(offset**2) / (2 * 1.5**2))
    line = line / line.sum()
    return (line[:, None] * line)[None, None]
