"""A taste that needs no model to be measured: warm colours. A scorer file for `align rank --scorer` and `compare`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image


def score(pictures: Sequence[Image], prompts: Sequence[str]) -> list[float]:
    """Mean red minus mean blue of each picture, −1…1."""
    pixels = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return [float((one[..., 0] - one[..., 2]).mean()) for one in pixels]
