"""Line drawings of pictures without a network, drawn where colours change.

    lines    every line: where neighbouring pixels differ by much, in any colour
    sketch   the strong outlines alone: the same in a softened picture, 2 px wide

`edges` are Canny's, in `backbone.media.control.maps`. All work at the picture's own size, so resize it first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LINE = 0.2  # least difference of neighbours, of 0…1, that makes a line
OUTLINE = 0.15  # the same in the softened picture
SOFT = 1.2  # pixels of 128 by which a sketch's picture is softened


def draw_lines(picture: Tensor) -> Tensor:
    """The lines [H, W], 0 or 1, of a picture [3, H, W] in 0…1: Beucher's morphological gradient, thresholded."""
    return (_gradient(_blur(picture, 0.6)) > LINE).to(picture.dtype)


def draw_outlines(picture: Tensor) -> Tensor:
    """The strong outlines [H, W], 0 or 1, of a picture [3, H, W] in 0…1: ridges of the gradient, 2 px wide."""
    strength = _gradient(_blur(picture, SOFT * min(picture.shape[1:]) / 128))
    smooth = F.avg_pool2d(strength[None, None], 3, 1, 1)[0, 0]

    # Ridges: no weaker than the neighbour before and stronger than the one after, across or down
    ridge = torch.zeros_like(strength, dtype=torch.bool)
    for axis in (0, 1):
        before, after = smooth.roll(1, axis), smooth.roll(-1, axis)
        ridge |= (smooth >= before) & (smooth > after)
    thin = (ridge & (strength > OUTLINE)).to(picture.dtype)
    padded = F.pad(thin[None, None], (0, 1, 0, 1))
    return F.max_pool2d(padded, 2, 1)[0, 0]


def _gradient(picture: Tensor) -> Tensor:
    """Largest minus smallest value within 3 × 3 pixels, of the channel with the most: [3, H, W] → [H, W]."""
    padded = F.pad(picture[None], (1, 1, 1, 1), mode="replicate")
    return (F.max_pool2d(padded, 3, 1) + F.max_pool2d(-padded, 3, 1))[0].amax(0)


def _blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, `sigma` in pixels, edges repeated: [C, H, W] → [C, H, W]."""
    reach = max(1, round(3 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=picture.dtype, device=picture.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = kernel / kernel.sum()
    channels = picture[:, None]
    across = F.conv2d(F.pad(channels, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None])
    down = F.conv2d(F.pad(across, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None])
    return down[:, 0]
