"""Warmth of colours, a score that needs no model: a scorer file for `align rank --scorer` and `align compare`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image


def score(pictures: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """Mean red minus mean blue of each picture, −1…1."""
    pixels = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return [float((image[..., 0] - image[..., 2]).mean()) for image in pixels]
