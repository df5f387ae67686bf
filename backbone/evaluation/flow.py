"""Dense optical flow between frames, and a clip's flicker along it.

Flow is estimated coarse to fine by least squares in a window about each pixel (Lucas & Kanade 1981, Bouguet 2000). A
pixel is covered in the other frame if the flows forward and back do not cancel (Sundaram, Brox & Keutzer 2010,
equation 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Pixels of a window, fits at each size, pixels a side of the coarsest one
WINDOW, ROUNDS, SMALLEST = 7, 4, 16
RIGID = 4.0  # grey levels² a pixel: the ridge that holds a window without contrast in place
AWAY, ALONG = 0.5, 0.01  # tolerance of the check: pixels², and the share of both flows' squares


def warped_flicker(frames: Sequence[Image.Image]) -> float:
    """The mean change of a pixel, of 255, from the previous frame carried along the flow, without uncovered pixels.

    Motion by itself, and what it covers or uncovers, has no flicker (Lai et al. 2018, section 4).
    """
    colours = torch.stack([torch.from_numpy(np.array(frame.convert("RGB"))) for frame in frames])
    pixels = colours.permute(0, 3, 1, 2).float()
    grays = pixels.mean(1, keepdim=True)

    # Flow from each frame back to the previous one, and forward from that one, at half the size
    small = F.avg_pool2d(grays, 2)  # fine enough for the flow, and four times as fast
    back, forward = (
        2 * F.interpolate(estimate_flow(*pair), grays.shape[-2:], mode="bilinear", align_corners=False)
        for pair in ((small[1:], small[:-1]), (small[:-1], small[1:]))
    )

    # Visible in both frames where |back + forward|² ≤ ALONG·(|back|² + |forward|²) + AWAY (Sundaram et al., eq. 5)
    mismatch = (back + carry(forward, back)).square().sum(1)
    magnitude = back.square().sum(1) + carry(forward, back).square().sum(1)
    visible = (mismatch <= ALONG * magnitude + AWAY) & is_inside(back)
    changed = (pixels[1:] - carry(pixels[:-1], back)).abs().mean(1)
    return float(changed[visible].mean()) if bool(visible.any()) else 0.0


def estimate_flow(first: Tensor, second: Tensor) -> Tensor:
    """The flow [B, 2, H, W], pixels to the right and down, from pictures [B, 1, H, W] in 0…255 to second ones."""
    # Pyramids of both, halved down to SMALLEST
    levels = [(first, second)]
    while min(levels[-1][0].shape[-2:]) >= 2 * SMALLEST:
        levels.append((F.avg_pool2d(levels[-1][0], 2), F.avg_pool2d(levels[-1][1], 2)))
    flow = first.new_zeros(len(first), 2, *levels[-1][0].shape[-2:])

    # From coarse to fine: the flow doubles with the resolution, and is refined ROUNDS times
    for start, end in reversed(levels):
        if flow.shape[-2:] != start.shape[-2:]:
            flow = 2 * F.interpolate(flow, start.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(ROUNDS):
            flow = _smooth(flow + _fit_step(start, carry(end, flow)))
    return flow


def _fit_step(first: Tensor, second: Tensor) -> Tensor:
    """The step [B, 2, H, W] that moves one picture towards another, by least squares about every pixel."""
    dx, dy = _find_slopes((first + second) / 2)
    change = first - second

    # Windowed sums of the normal equations [xx xy; xy yy]·step = [xt; yt], with a ridge where there is no texture
    products = torch.cat([dx * dx, dx * dy, dy * dy, dx * change, dy * change], 1)
    xx, xy, yy, xt, yt = _smooth(products).split(1, 1)
    xx, yy = xx + RIGID, yy + RIGID

    # Cramer's rule, [B, 1, H, W] each
    determinant = xx * yy - xy * xy
    step: Tensor = torch.cat([yy * xt - xy * yt, xx * yt - xy * xt], 1) / determinant
    return step.clamp(-1, 1)


def _find_slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return across, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def _smooth(values: Tensor) -> Tensor:
    half = WINDOW // 2
    padded = F.pad(values, (half,) * 4, mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, (1, WINDOW), 1), (WINDOW, 1), 1)


def carry(values: Tensor, flow: Tensor) -> Tensor:
    """`values` [B, C, H, W] sampled at the targets of a flow [B, 2, H, W]."""
    x, y = _find_targets(flow)
    height, width = flow.shape[-2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(values, grid, "bilinear", padding_mode="border", align_corners=False)


def is_inside(flow: Tensor) -> Tensor:
    """Whether the targets of a flow [B, 2, H, W] lie in the picture [B, H, W]."""
    x, y = _find_targets(flow)
    height, width = flow.shape[-2:]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def _find_targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    """A flow's targets as columns and rows, [B, H, W] each."""
    height, width = flow.shape[-2:]
    rows = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None]
    columns = torch.arange(width, dtype=flow.dtype, device=flow.device)
    return flow[:, 0] + columns, flow[:, 1] + rows
