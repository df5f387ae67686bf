"""Near-duplicates among images, found by their perceptual hashes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NEAR = 6  # of 64 bits: at most this many differ between near-duplicates


def perceptual_hash(image: Image.Image) -> NDArray[np.bool_]:
    """64 bits: which of the 8 × 8 lowest frequencies (DCT-II of 32 × 32 grey pixels) lie above their median.

    Scale, compression and small changes of brightness hardly change it (Zauner 2010, section 3.2).
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    position, frequency = np.meshgrid(np.arange(32), np.arange(1, 9))
    basis = np.cos(math.pi / 32 * (position + 0.5) * frequency)
    values = basis @ (grey - grey.mean()) @ basis.T
    return np.asarray(values > np.median(values)).ravel()


def almost_equal(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> bool:
    """Whether two hashes [64] belong to near-duplicates."""
    return int((first != second).sum()) <= NEAR
