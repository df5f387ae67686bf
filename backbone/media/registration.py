"""Image registration: shift and scale to a fraction of a pixel, and tone, estimated and undone.

    found = register_to_source(edited, source)     # Registration(shift=(3.2, -0.4), scale=1.012)
    straight = undo(edited, found)                 # lies over the source again
    match_tone(straight, source).undo(straight)    # and its colours are the source's, but for what was edited

Instruction editors redraw the whole picture and let it drift. A part of it is meant to differ, so the fit must not be
led by that part: errors count by a function that levels off (Geman & McClure 1987), in an iteratively reweighted
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
BEGUN = 8  # starts that are followed at the coarsest level, and a quarter of them at each finer one
SETTLED = 1e-3  # pixels: a round that moves no corner farther is the last
SAME = 0.05  # pixels: fits whose corners are nearer are one
SCALES = tuple(1.02**k for k in range(-6, 7))  # that the coarsest level begins from


@dataclass(frozen=True)
class Registration:
    """A picture against its source: enlarged by `scale` about the middle, then shifted by (right, down) pixels.

    share  of the pixels in common that agree after the fit, by less than `TOLERANCE` of the range
    """

    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    share: float = 1.0

    def drift(self, size: tuple[int, int]) -> float:
        """How far the corner of a picture (H, W) that moves farthest has moved, in pixels."""
        height, width = size
        right, down = (abs(move) for move in self.shift)
        grown = abs(self.scale - 1) / 2
        return math.hypot(right + grown * width, down + grown * height)


@dataclass(frozen=True)
class Tone:
    """How the colours of a picture differ from its source's: source ≈ gain · picture + offset in each channel, −1…1.

    change  of a colour by that, where the two then agree: the mean of the largest channel's
    """

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    change: float = 0.0

    def undo(self, picture: Tensor) -> Tensor:
        """A picture [3, H, W] in its source's tone."""
        gain, offset = (torch.tensor(each).to(picture)[:, None, None] for each in (self.gain, self.offset))
        return (gain * picture + offset).clamp(-1, 1)


TOLERANCE = 0.06  # of the range −1…1's half


@torch.no_grad()
def register_to_source(moved: Tensor, source: Tensor, *, changed: Tensor | None = None) -> Registration:
    """Register a picture [3, H, W] to its source of the same size, values in −1…1.

    `changed` [H, W] is 1 where the two were meant to differ, if that is known. Where nothing can be matched (an even
    picture, or another one altogether) it is the identity with the share that agrees.
    """
    assert moved.shape == source.shape, f"{list(moved.shape)} over {list(source.shape)}"

    # Both as pyramids, without the levels of more than FINEST pixels
    counted = torch.ones(source.shape[-2:]) if changed is None else (changed.cpu() <= 0.5).float()
    levels = pyramid(moved.detach().cpu().double(), source.detach().cpu().double(), counted.double())
    halvings = max(
        0, next((k for k, level in enumerate(levels) if level[2].numel() <= FINEST), len(levels) - 1)
    )
    levels = levels[halvings:]

    # From coarse to fine: each candidate (t_x, t_y, s) descends; a quarter as many go on at each finer level
    candidates = _begin(*levels[-1])
    for number, level in reversed(list(enumerate(levels))):
        if number < len(levels) - 1:
            candidates = [torch.cat([2 * p[:2], p[2:]]) for p in candidates]
        candidates = _distinct([_descend(p, *level) for p in candidates], level[1])
        kept = max(1, BEGUN // 4 ** (len(levels) - 1 - number))
        candidates = sorted(candidates, key=lambda p: -_agreement(p, *level))[:kept]

    # The identity, unless the best agrees with more of the target
    best = candidates[0]
    image, target, weight = levels[0]
    if not _agreement(best, image, target, weight) > _agreement(IDENTITY, image, target, weight):
        best = IDENTITY

    # A move in pixels of the full size
    right, down, scale = best.tolist()
    whole = 2**halvings
    return Registration((whole * right, whole * down), scale, _agreement(best, image, target, weight))


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
        middles = [(weight * each).sum((1, 2), keepdim=True) for each in (x, y)]
        slope = (weight * (x - middles[0]) * (y - middles[1])).sum((1, 2), keepdim=True)
        spread = (weight * (x - middles[0]).square()).sum((1, 2), keepdim=True)
        gain = torch.where(spread > 1e-6, slope / spread.clamp(min=1e-6), 1.0)
        offset = middles[1] - gain * middles[0]
        # Pixels that the fit misses by much count less in the next round
        trust = _trust(gain * x + offset - y, counted > 0.5) * counted

    # The mean change of the pixels that then agree
    fitted = (gain * x + offset).clamp(-1, 1)
    agree = ((fitted - y).abs().amax(0) < 2 * TOLERANCE) & (counted > 0.5)
    change = float((fitted - x).abs().amax(0)[agree].mean()) if bool(agree.any()) else 0.0
    slopes, shifts = ((float(red), float(green), float(blue)) for red, green, blue in (gain, offset))
    return Tone(slopes, shifts, change)


def undo(moved: Tensor, registration: Registration, *, beyond: Tensor | None = None) -> Tensor:
    """A picture [C, H, W] put back over its source, bicubic; where it has nothing, `beyond` [C, H, W] or its border."""
    if registration.shift == (0.0, 0.0) and registration.scale == 1.0:
        return moved
    p = torch.tensor([*registration.shift, registration.scale], dtype=torch.float64, device=moved.device)
    straight, inside = warp(moved.double(), p)
    if beyond is not None:
        straight = torch.where(inside, straight, beyond.double())
    return straight.to(moved)


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
    """picture(m + s·(x − m) + t) at every place x [C, H, W], with m the middle and p = (t_x, t_y, s), and where it has
    something there [H, W]."""
    y, x = _places(picture)
    height, width = picture.shape[-2:]
    along, down = p[2] * x + p[0], p[2] * y + p[1]
    inside = (along.abs() <= (width - 1) / 2) & (down.abs() <= (height - 1) / 2)
    grid = torch.stack([2 * along / width, 2 * down / height], -1)
    found = F.grid_sample(picture[None], grid[None], "bicubic", padding_mode="border", align_corners=False)
    return found[0], inside


def _places(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel's place below and to the right of the middle [H, W]."""
    height, width = picture.shape[-2:]
    y = torch.arange(height, dtype=torch.float64, device=picture.device) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64, device=picture.device) - (width - 1) / 2
    return tuple(torch.meshgrid(y, x, indexing="ij"))  # type: ignore[return-value]


def _begin(image: Tensor, target: Tensor, weight: Tensor) -> list[Tensor]:
    """Initial guesses: for some scales no shift, and the shift at the phase correlation's peak."""
    starts = []
    for scale in SCALES:
        unshifted = torch.tensor([0.0, 0.0, scale], dtype=torch.float64)
        straight, _ = warp(image, unshifted)
        starts += [unshifted, torch.tensor([*_peak(straight, target), scale], dtype=torch.float64)]
    return sorted(starts, key=lambda p: -_agreement(p, image, target, weight))[:BEGUN]


def _peak(image: Tensor, target: Tensor) -> tuple[float, float]:
    """The shift (right, down) in whole pixels at the peak of the phase correlation of two pictures [3, H, W]."""
    height, width = target.shape[-2:]
    window = torch.outer(torch.hann_window(height, False), torch.hann_window(width, False)).double()

    # F⁻¹[A·B̄/|A·B̄|] of windowed pictures without their means
    one, other = (
        torch.fft.rfft2((each - each.mean((1, 2), keepdim=True)) * window) for each in (image, target)
    )
    product = (one * other.conj()).sum(0)
    surface = torch.fft.irfft2(product / product.abs().clamp(min=1e-9), s=(height, width))
    place = int(surface.argmax())

    # Shifts past the middle are negative ones
    down, right = place // width, place % width
    return float((right + width // 2) % width - width // 2), float(
        (down + height // 2) % height - height // 2
    )


def _descend(p: Tensor, image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Gauss–Newton on Σ w·ρ(image(p) − target) over t and s."""
    y, x = _places(target)
    reach = max(target.shape[-2:]) / 2
    for _ in range(ROUNDS):
        # Residuals e, and each pixel's weight w·ρ'(e)/e
        straight, inside = warp(image, p)
        error = straight - target
        trust = _trust(error, inside & (weight > 0.5)) * weight * inside
        across, down = _slopes(straight)
        # ∂image(p)/∂(t_x, t_y, s) at every pixel and channel
        jacobian = torch.stack([across, down, (across * x + down * y)], -1)  # of [3, H, W] by t_x, t_y, s
        jacobian = jacobian / p[2]  # slopes of the picture itself, which the warp has stretched
        # (JᵀWJ + ridge)·δ = JᵀW·error
        rows, errors = jacobian.flatten(0, 2), error.flatten()
        heavy = rows * trust.expand_as(error).flatten()[:, None]
        normal = heavy.T @ rows
        ridge = 1e-6 * torch.diag(normal.diagonal().clamp(min=1e-9))
        step = torch.linalg.solve(normal + ridge, heavy.T @ errors)
        p = p - step
        # Diverged, or another scale than a picture and its edit can have
        if not bool(torch.isfinite(p).all()) or not 0.5 < float(p[2]) < 2:
            return IDENTITY.clone()
        if float(step[:2].norm() + step[2].abs() * reach) < SETTLED:
            break
    return p


def _distinct(found: Sequence[Tensor], target: Tensor) -> list[Tensor]:
    """Drop duplicates: candidates whose corners lie less than `SAME` pixels apart."""
    reach = max(target.shape[-2:]) / 2
    kept: list[Tensor] = []
    for p in found:
        apart = [(p - other).abs() for other in kept]
        if all(float(d[:2].norm() + d[2] * reach) >= SAME for d in apart):
            kept.append(p)
    return kept


def _slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences across and down [C, H, W]."""
    padded = F.pad(picture[None], (1, 1, 1, 1), mode="replicate")[0]
    return (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2, (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2


def _trust(error: Tensor, counted: Tensor) -> Tensor:
    """Weights [H, W] of Geman and McClure's function at the errors' own spread: 1 at no error, 0 far from it."""
    size = error.square().sum(0).sqrt()
    usual = size[counted].median() if bool(counted.any()) else size.median()
    spread = (2 * usual).clamp(min=0.02)
    return (1 + (size / spread).square()).square().reciprocal()


def _agreement(p: Tensor, image: Tensor, target: Tensor, weight: Tensor) -> float:
    """Share of the counted pixels in common whose colours agree."""
    straight, inside = warp(image, p)
    counted = inside & (weight > 0.5)
    if not bool(counted.any()):
        return 0.0
    agree = (straight - target).abs().amax(0) < 2 * TOLERANCE
    return float(agree[counted].double().mean())
