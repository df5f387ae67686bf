"""Motion tracks that are not given by words: measured from a clip, or read from a file.

read_track("bounce.webp", 16)       # [16, 4]: pixels right and down, growth, degrees clockwise
read_track("zigzag.json", 16)       # {"x": [0, 20, 0, 20]}, {"turn": [0, 90], "growth": [1, 1.5]} …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbone.evaluation.motion import SIDE, trace_movement
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.media.clips import read_film
from customize.clips.planned.cut_out import Floats

STILL = {"x": 0.0, "y": 0.0, "growth": 1.0, "turn": 0.0}
STRIDE, RISE, LEAN = 0.2, 0.03, 3.0  # of a thing's size, of it, and degrees, at each step
LEAST = np.array([1.0, 1.0, 0.02, 1.0])  # range of a clip's track, below which there is no motion


def read_track(source: Path, frames: int) -> Floats:
    """A track [frames, 4] of this many frames: pixels of 128 to the right and down, growth, degrees clockwise.

    A clip is measured by `backbone.evaluation.motion.trace_movement`: from its pixels alone, in which things
    move and the camera stands still. Raises `UserError` for what is no clip and no track, and if nothing moves.
    """
    if source.suffix.lower() == ".json":
        track = parse_track(source, read_json(source))
    else:
        track = measure_track(read_film(source).frames)
        if (np.ptp(track, axis=0) < LEAST).all():
            raise UserError(f"Nothing moves in {source}. Give a clip in which one thing does.")
    at, here = np.linspace(0, 1, frames), np.linspace(0, 1, len(track))
    return np.stack([np.interp(at, here, column) for column in track.T], axis=-1)


def measure_track(film: Sequence[Image.Image]) -> Floats:
    """The track [F, 4] of what moves in a clip."""
    track = trace_movement([frame.resize((SIDE, SIDE)) for frame in film])
    return np.concatenate([track[:, :2], np.exp(track[:, 2:3]), np.rad2deg(track[:, 3:])], axis=-1)


def parse_track(source: Path, document: Any) -> Floats:
    """The track [F, 4] of a .json; `UserError` for a document that is no track."""
    columns = document if isinstance(document, Mapping) else {}
    lengths = {len(column) if isinstance(column, list) else 0 for column in columns.values()}
    if not columns or not columns.keys() <= STILL.keys() or len(lengths) != 1 or min(lengths) < 2:
        raise UserError(
            f"{source} is no track: it needs lists of two numbers or more, as many of each, named {', '.join(STILL)}."
        )
    try:
        listed = [
            np.array(columns.get(name, [usual] * min(lengths)), dtype=float) for name, usual in STILL.items()
        ]
    except (TypeError, ValueError):
        listed = [np.array([np.nan])]
    if not all(np.isfinite(column).all() and column.ndim == 1 for column in listed) or (listed[2] <= 0).any():
        raise UserError(f"{source} is no track: x, y and turn are numbers, and growth is above 0.")
    return np.stack(listed, axis=-1)


def add_gait(track: NDArray[np.floating], size: float) -> Floats:
    """A track [F, 4] of something of this size that goes on foot: at every step it rises, and leans to one side.

    The first frame stays as it is.
    """
    stride = STRIDE * size
    steps = np.pi * np.cumsum(np.hypot(*np.diff(track[:, :2], axis=0, prepend=track[:1, :2]).T)) / stride
    walked = track.astype(float)
    walked[:, 1] -= RISE * size * np.abs(np.sin(steps))
    walked[:, 3] += LEAN * np.sin(steps)
    return walked


def as_json(track: Floats) -> dict[str, list[float]]:
    """A track as the JSON that `read_track` reads."""
    return {
        name: [round(float(value), 3) for value in column]
        for name, column in zip(STILL, track.T, strict=True)
    }
