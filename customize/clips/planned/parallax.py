"""The nearness of every pixel of a drawing of `moji`'s world, so that a pan moves near pixels faster than far ones.

The ground is nearer row by row below the horizon, and a thing is as near as its foot (`backbone.world.clip`). Around a
thing the nearness fades into the ground's, gently enough that no pan folds the drawing: the background at a thing's
sides is stretched where it is uncovered and compressed where it is covered, since nothing is drawn behind the thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbone.media.control.views import Views
from backbone.world.clip import Clip, pan_rate, thing_rate
from backbone.world.rendering.render import SIZE, Figure
from backbone.world.scene import Scene

STEEP = 1.5  # of a smooth step, its steepest over its mean
FOLDED = 0.7  # of a pan's length times its slope: 1 would fold the drawing
LEAST = 12.0  # pixels of the world over which a thing's nearness becomes the ground's, at least
Floats = NDArray[np.float64]


def find_nearness(
    scene: Scene, figures: Sequence[Figure], tracks: NDArray[Any], views: Views, *, slender: float
) -> Floats:
    """[F, H, W] of the views' drawing, for things on `tracks` [F, N, 4]: x, y of their middles, growth, turn.

    Tracks are those in a frame of the views' size (`Motion.in_frame`). `slender` is the width over height of a thing.
    """
    scale = min(views.size) / SIZE  # pixels of the drawing to one of the tracks
    left, top = views.corner

    # The drawing's pixels in the tracks' units; the ground's rows are those of the world, spread over the height
    columns, rows = (
        (np.arange(side) + 0.5 - at) / scale for side, at in zip(views.canvas, (left, top), strict=True)
    )
    clip, reach = Clip(scene), float(np.abs(views.pans).max()) / scale
    ground = np.asarray(pan_rate(rows * min(views.size) / views.size[1], scene.horizon, clip))[:, None]
    frames = []
    for places in tracks:
        nearness = np.broadcast_to(ground, (len(rows), len(columns)))
        for figure, (x, y, grown, *_) in zip(figures, places, strict=True):
            # A thing moves as one. Around it, over `ramp` pixels, its rate becomes the ground's, so that nothing folds
            rate, height = thing_rate(figure, scene.horizon, clip), figure.size * grown
            ramp = max(LEAST, STEEP / FOLDED * reach * float(np.abs(rate - ground).max()))
            beside = np.maximum(np.abs(columns - x) - slender * height / 2, 0)[None]
            above = np.maximum(np.abs(rows - y) - height / 2, 0)[:, None]
            share = _smooth_step(1 - np.hypot(beside, above) / ramp)
            nearness = nearness + share * (rate - nearness)
        frames.append(nearness)
    return np.stack(frames)


def _smooth_step(share: Floats) -> Floats:
    """Smoothly from 0 to 1."""
    inside = share.clip(0, 1)
    stepped: Floats = inside * inside * (3 - 2 * inside)
    return stepped
