"""The random tiny pipeline on other noise paths and schedules, and a picture to edit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbone.diffusion.noise import Level, PredictionType, flow, vp
from backbone.diffusion.schedules import Spacing, alphas_cumprod, flow_schedule, vp_schedule
from backbone.families.base import NoisePath
from backbone.models.model import Backbone

PATHS = (
    ("epsilon", "leading", 1, "first"),
    ("epsilon", "leading", 0, "one"),
    ("epsilon", "trailing", 0, "one"),
    ("epsilon", "linspace", 0, "first"),
    ("v_prediction", "leading", 1, "first"),
    ("v_prediction", "trailing", 0, "one"),
    ("flow", "", 0, ""),
)
# Where schedules begin and end is compared with diffusers' in tests/backbone/diffusion
USUAL = (("epsilon", "leading", 1, "first"), ("v_prediction", "trailing", 0, "one"), ("flow", "", 0, ""))
paths = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path not in USUAL)) for path in PATHS],
    ids=lambda path: "-".join(map(str, path)),
)


@cache
def tiny_on(folder: Path, kind: PredictionType, spacing: str, offset: int, final: str) -> Backbone:
    """The tiny pipeline, its network read as one that predicts `kind` on another schedule; opened once."""
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    alphas = alphas_cumprod()

    def schedule(steps: int, size: tuple[int, int]) -> Level:
        if kind == "flow":
            return flow_schedule(steps)
        chosen: Spacing = spacing  # type: ignore[assignment]
        return vp_schedule(alphas, steps, chosen, offset, final="one" if final == "one" else "first")

    levels = flow(alphas) if kind == "flow" else vp(alphas)
    model.__dict__["path"] = NoisePath(kind, levels, schedule)
    return model


def photo(width: int = 64, height: int = 64, *, seed: int = 0) -> Image.Image:
    """A smooth picture without any meaning."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
