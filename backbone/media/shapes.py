"""Whether images of different sizes (a mask, a map) match once one is scaled, without a crop."""

from __future__ import annotations

import math

SAME_SHAPE = 0.02  # of the logarithm of width by height


def is_same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have about the same aspect ratio, so that one is the other scaled."""
    return abs(math.log(size[0] * other[1] / (size[1] * other[0]))) <= SAME_SHAPE
