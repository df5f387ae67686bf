"""Image registration: shift and scale to a fraction of a pixel, and tone, estimated and undone.

    registration = register_to_source(edited, source)  # Registration(shift=(3.2, -0.4), scale=1.012)
    straight = undo(edited, registration)              # lies over the source again
    match_tone(straight, source).undo(straight)        # and its colours are the source's, but for what was edited

Instruction editors redraw the whole picture and let it drift. The edited part is meant to differ and must not lead the
fit: errors count by a function that levels off (Geman & McClure 1987), in an iteratively reweighted
Gauss–Newton search from coarse to fine (Lucas & Kanade 1981; Black & Anandan 1996). It begins at the peak of the phase
correlation (Kuglin & Hines 1975), which sees shifts of any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COARSEST = 24  # pixels of the shorter side at the coarsest level
FINEST = 2**20  # pixels at the finest: larger pictures are measured at half their size, or a quarter …
ROUNDS = 30  # of Gauss–Newton at each level, at most
STARTS = 8  # candidates that are followed at the coarsest level, and a quarter of them at each finer one
SETTLED = 1e-3  # pixels: a round that moves no corner farther is the last
SAME = 0.05  # pixels: fits whose corners are nearer are duplicates
SCALES = tuple(1.02**k for k in range(-6, 7))  # at which the coarsest level starts


@dataclass(frozen=True)
class Registration:
    """A picture against its source: enlarged by `scale` about the middle, then shifted by (right, down) pixels.

    share  of the pixels in common that agree after the fit, by less than `TOLERANCE` of the range
    """

    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    share: float = 1.0

    def drift(self, size: tuple[int, int]) -> float:
        """The largest movement of a corner of a picture (H, W), in pixels."""
        height, width = size
        right, down = (abs(move) for move in self.shift)
        growth = abs(self.scale - 1) / 2
        return math.hypot(right + growth * width, down + growth * height)


@dataclass(frozen=True)
class Tone:
    """How the colours of a picture differ from its source's: source ≈ gain · picture + offset in each channel, −1…1.

    change  the mean change of the largest channel, over the pixels that then agree
    """

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    change: float = 0.0

    def undo(self, picture: Tensor) -> Tensor:
        """A picture [3, H, W] in its source's tone."""
        gain, offset = (torch.tensor(rgb).to(picture)[:, None, None] for rgb in (self.gain, self.offset))
        return (gain * picture + offset).clamp(-1, 1)


TOLERANCE = 0.06  # of half of the range −1…1


@torch.no_grad()
def register_to_source(picture: Tensor, source: Tensor, *, changed: Tensor | None = None) -> Registration:
    """Register a picture [3, H, W] to its source of the same size, values in −1…1.

    `changed` [H, W] is 1 where the two were meant to differ, if that is known. If nothing can be matched (an even
    picture, or a different one) the result is the identity with the share that agrees.
    """
    assert picture.shape == source.shape, f"{list(picture.shape)} over {list(source.shape)}"

    # Both as pyramids, without the levels of more than FINEST pixels
    counted = torch.ones(source.shape[-2:]) if changed is None else (changed.cpu() <= 0.5).float()
    levels = pyramid(picture.detach().cpu().double(), source.detach().cpu().double(), counted.double())
    halvings = next((k for k, level in enumerate(levels) if level[2].numel() <= FINEST), len(levels) - 1)
    levels = levels[halvings:]

    # From coarse to fine: each candidate (t_x, t_y, s) descends; a quarter as many go on at each finer level
    candidates = _guess_starts(*levels[-1])
    for number, level in reversed(list(enumerate(levels))):
        if number < len(levels) - 1:
            candidates = [torch.cat([2 * p[:2], p[2:]]) for p in candidates]
        candidates = _drop_duplicates([_descend(p, *level) for p in candidates], level[1])
        count = max(1, STARTS // 4 ** (len(levels) - 1 - number))
        candidates = sorted(candidates, key=lambda p: -_score(p, *level))[:count]

    # The identity, unless the best agrees with more of the target
    best = candidates[0]
    image, target, weight = levels[0]
    if not _score(best, image, target, weight) > _score(IDENTITY, image, target, weight):
        best = IDENTITY

    # A move in pixels of the full size
    right, down, scale = best.tolist()
    factor = 2**halvings
    return Registration((factor * right, factor * down), scale, _score(best, image, target, weight))


@torch.no_grad()
def match_tone(picture: Tensor, source: Tensor, *, changed: Tensor | None = None) -> Tone:
    """Robust fit of gain and offset for each channel between a registered picture [3, H, W] and its source, in −1…1.

    `changed` [H, W] is 1 where the two were meant to differ. Least squares over gain and offset of each channel, in
    which errors count by a function that levels off (Geman & McClure 1987).
    """
    counted = torch.ones_like(source[0]) if changed is None else (changed <= 0.5).to(source)
    x, y, counted = picture.double(), source.double(), counted.double()
    trust, gain, offset = counted, torch.ones(3, 1, 1).to(x), torch.zeros(3, 1, 1).to(x)
    for _ in range(ROUNDS):
        # Weighted least squares of y on x, channel by channel: gain = cov(x, y)/var(x)
        weight = trust / trust.sum().clamp(min=1e-9)
        means = [(weight * values).sum((1, 2), keepdim=True) for values in (x, y)]
        covariance = (weight * (x - means[0]) * (y - means[1])).sum((1, 2), keepdim=True)
        variance = (weight * (x - means[0]).square()).sum((1, 2), keepdim=True)
        gain = torch.where(variance > 1e-6, covariance / variance.clamp(min=1e-6), 1.0)
        offset = means[1] - gain * means[0]
        # Pixels that the fit misses by much count less in the next round
        trust = _weigh_errors(gain * x + offset - y, counted > 0.5) * counted

    # The mean change of the pixels that then agree
    fitted = (gain * x + offset).clamp(-1, 1)
    agree = ((fitted - y).abs().amax(0) < 2 * TOLERANCE) & (counted > 0.5)
    change = float((fitted - x).abs().amax(0)[agree].mean()) if bool(agree.any()) else 0.0
    gains, offsets = ((float(red), float(green), float(blue)) for red, green, blue in (gain, offset))
    return Tone(gains, offsets, change)


def undo(picture: Tensor, registration: Registration, *, beyond: Tensor | None = None) -> Tensor:
    """A picture [C, H, W] moved back over its source, bicubic; outside of it `beyond` [C, H, W] or its border."""
    if registration.shift == (0.0, 0.0) and registration.scale == 1.0:
        return picture
    p = torch.tensor([*registration.shift, registration.scale], dtype=torch.float64, device=picture.device)
    straight, inside = warp(picture.double(), p)
    if beyond is not None:
        straight = torch.where(inside, straight, beyond.double())
    return straight.to(picture)


# The search ---------------------------------------------------------------------------------------------------

IDENTITY = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def pyramid(*pictures: Tensor) -> list[tuple[Tensor, ...]]:
    """Pictures [..., H, W] at full, half, quarter … resolution, until the shorter side has about `COARSEST` pixels."""
    levels = [pictures]
    while min(levels[-1][0].shape[-2:]) >= 2 * COARSEST:
        levels.append(tuple(_halve(picture) for picture in levels[-1]))
    return levels


def _halve(picture: Tensor) -> Tensor:
    flat = picture if picture.ndim == 3 else picture[None]
    size = (flat.shape[-2] // 2, flat.shape[-1] // 2)
    halved = F.interpolate(flat[None], size, mode="area")[0]
    return halved if picture.ndim == 3 else halved[0]


def warp(picture: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """picture(m + s·(x − m) + t) at every pixel x [C, H, W], with m the middle and p = (t_x, t_y, s), and a mask [H, W]
    of the pixels that lie inside the picture."""
    y, x = _find_offsets(picture)
    height, width = picture.shape[-2:]
    along, down = p[2] * x + p[0], p[2] * y + p[1]
    inside = (along.abs() <= (width - 1) / 2) & (down.abs() <= (height - 1) / 2)
    grid = torch.stack([2 * along / width, 2 * down / height], -1)
    warped = F.grid_sample(picture[None], grid[None], "bicubic", padding_mode="border", align_corners=False)
    return warped[0], inside


def _find_offsets(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel's offset (down, right) from the middle, [H, W] each."""
    height, width = picture.shape[-2:]
    y = torch.arange(height, dtype=torch.float64, device=picture.device) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64, device=picture.device) - (width - 1) / 2
    return tuple(torch.meshgrid(y, x, indexing="ij"))  # type: ignore[return-value]


def _guess_starts(image: Tensor, target: Tensor, weight: Tensor) -> list[Tensor]:
    """Initial guesses: at every scale no shift, and the shift at the phase correlation's peak."""
    starts = []
    for scale in SCALES:
        unshifted = torch.tensor([0.0, 0.0, scale], dtype=torch.float64)
        straight, _ = warp(image, unshifted)
        starts += [unshifted, torch.tensor([*_find_peak(straight, target), scale], dtype=torch.float64)]
    return sorted(starts, key=lambda p: -_score(p, image, target, weight))[:STARTS]


def _find_peak(image: Tensor, target: Tensor) -> tuple[float, float]:
    """The shift (right, down) in whole pixels at the peak of the phase correlation of two pictures [3, H, W]."""
    height, width = target.shape[-2:]
    window = torch.outer(torch.hann_window(height, False), torch.hann_window(width, False)).double()

    # F⁻¹[A·B̄/|A·B̄|] of windowed pictures without their means
    first, second = (
        torch.fft.rfft2((picture - picture.mean((1, 2), keepdim=True)) * window)
        for picture in (image, target)
    )
    product = (first * second.conj()).sum(0)
    surface = torch.fft.irfft2(product / product.abs().clamp(min=1e-9), s=(height, width))
    index = int(surface.argmax())

    # Shifts past the middle are negative ones
    down, right = index // width, index % width
    return float((right + width // 2) % width - width // 2), float(
        (down + height // 2) % height - height // 2
    )


def _descend(p: Tensor, image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Minimise Σ w·ρ(image(p) − target) over t and s by Gauss–Newton."""
    y, x = _find_offsets(target)
    reach = max(target.shape[-2:]) / 2
    for _ in range(ROUNDS):
        # Residuals e, and each pixel's weight w·ρ'(e)/e
        straight, inside = warp(image, p)
        error = straight - target
        trust = _weigh_errors(error, inside & (weight > 0.5)) * weight * inside
        across, down = _find_slopes(straight)
        # ∂image(p)/∂(t_x, t_y, s) at every channel and pixel [3, H, W, 3]
        jacobian = torch.stack([across, down, across * x + down * y], -1)
        jacobian = jacobian / p[2]  # slopes of the picture itself, which the warp has stretched
        # (JᵀWJ + ridge)·δ = JᵀW·error
        rows, errors = jacobian.flatten(0, 2), error.flatten()
        weighted = rows * trust.expand_as(error).flatten()[:, None]
        normal = weighted.T @ rows
        ridge = 1e-6 * torch.diag(normal.diagonal().clamp(min=1e-9))
        step = torch.linalg.solve(normal + ridge, weighted.T @ errors)
        p = p - step
        # Diverged, or another scale than a picture and its edit can have
        if not bool(torch.isfinite(p).all()) or not 0.5 < float(p[2]) < 2:
            return IDENTITY.clone()
        if float(step[:2].norm() + step[2].abs() * reach) < SETTLED:
            break
    return p


def _drop_duplicates(candidates: Sequence[Tensor], target: Tensor) -> list[Tensor]:
    """Drop duplicates: candidates whose corners lie less than `SAME` pixels apart."""
    reach = max(target.shape[-2:]) / 2
    kept: list[Tensor] = []
    for p in candidates:
        differences = [(p - other).abs() for other in kept]
        if all(float(d[:2].norm() + d[2] * reach) >= SAME for d in differences):
            kept.append(p)
    return kept


def _find_slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences across and down [C, H, W]."""
    padded = F.pad(picture[None], (1, 1, 1, 1), mode="replicate")[0]
    return (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2, (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2


def _weigh_errors(error: Tensor, counted: Tensor) -> Tensor:
    """Weights [H, W] of Geman and McClure's function at the errors' own spread: 1 at no error, 0 far from it."""
    magnitude = error.square().sum(0).sqrt()
    median = magnitude[counted].median() if bool(counted.any()) else magnitude.median()
    spread = (2 * median).clamp(min=0.02)
    return (1 + (magnitude / spread).square()).square().reciprocal()


def _score(p: Tensor, image: Tensor, target: Tensor, weight: Tensor) -> float:
    """Share of the counted pixels in common whose colours agree."""
    straight, inside = warp(image, p)
    counted = inside & (weight > 0.5)
    if not bool(counted.any()):
        return 0.0
    agree = (straight - target).abs().amax(0) < 2 * TOLERANCE
    return float(agree[counted].double().mean())
