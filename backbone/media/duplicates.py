"""Images that are almost the same: what their hashes have in common."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NEAR = 6  # of 64 bits: at most this many differ between near-duplicates


def perceptual_hash(image: Image.Image) -> NDArray[np.bool_]:
    """64 bits: which of the 8 × 8 lowest frequencies (DCT-II of 32 × 32 grey pixels) lie over their median.

    Scale, compression and small changes of brightness leave it almost as it is (Zauner 2010, section 3.2).
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    position, frequency = np.meshgrid(np.arange(32), np.arange(1, 9))
    basis = np.cos(math.pi / 32 * (position + 0.5) * frequency)
    values = basis @ (grey - grey.mean()) @ basis.T
    return np.asarray(values > np.median(values)).ravel()


def almost_equal(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> bool:
    """Whether two hashes [64] are those of near-duplicates."""
    return int((one != other).sum()) <= NEAR
