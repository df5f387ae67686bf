"""Movement in a clip, measured from its pixels alone, and whether it matches a word.

A similarity is fitted to each pair of frames (Lucas & Kanade 1981): for things to the whole frame, weighted by its
changes, for the camera to its border. The similarities add up to a track; applied one after another they carry the
first frame's corners through the clip, so that a camera can be compared with its path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from backbone.media.control.camera import CORNERS

LEAST = {"x": 6.0, "y": 5.0, "growth": 0.08, "turn": 6.0}  # pixels, log of a ratio, degrees
DRIFT = 1.0  # pixels a frame, up to which a clip stands still
SIDE, BORDER = 128, 20  # pixels: of a picture, and of its border, where the camera's movement is measured
TRACK = "#dc2626"
ROUNDS = 4  # of the fit, each from the frame warped by the previous round
PARTS = {  # the part of a measured movement that a word names, and its sign
    "left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1),
    "grow": ("growth", 1), "shrink": ("growth", -1), "clockwise": ("turn", 1), "counterclockwise": ("turn", -1),
    "pan-left": ("x", 1), "pan-right": ("x", -1), "pan-up": ("y", 1), "pan-down": ("y", -1),
    "zoom-in": ("growth", 1), "zoom-out": ("growth", -1), "roll-left": ("turn", 1), "roll-right": ("turn", -1),
}  # fmt: skip
Gray = NDArray[np.float32]


class Movement(NamedTuple):
    """A movement: pixels to the right and down, log of the growth, degrees clockwise."""

    x: float
    y: float
    growth: float
    turn: float


def trace_movement(frames: Sequence[Image.Image], *, camera: bool = False) -> NDArray[np.float64]:
    """The track [F, 4] of what moves, or with `camera` of the border: x, y, log of the growth, radians of the turn."""
    grays = [_smooth(np.asarray(frame.convert("L"), dtype=np.float32)) for frame in frames]
    track = np.zeros((len(frames), 4))
    for number, (gray, next_gray) in enumerate(pairwise(grays), 1):
        weight = _weigh_border(gray.shape) if camera else None
        track[number] = track[number - 1] + _fit_similarity(gray, next_gray, weight)
    return track


def draw_track(frames: Sequence[Image.Image]) -> Image.Image:
    """The last frame, dimmed, with the path of what moves drawn on it, from a ring to a dot."""
    images = [frame.convert("RGB").resize((SIDE, SIDE)) for frame in frames]
    track = trace_movement(images)[:, :2]
    changes = np.abs(
        np.diff(np.stack([np.asarray(image.convert("L"), dtype=np.float64) for image in images]), axis=0)
    ).sum(0)
    page = Image.blend(images[-1], Image.new("RGB", (SIDE, SIDE), "white"), 0.5)
    if not changes.any():
        return page
    rows, columns = np.mgrid[:SIDE, :SIDE]
    middle = np.array([(changes * columns).sum(), (changes * rows).sum()]) / changes.sum()
    path = [tuple(map(float, point)) for point in middle + track - track.mean(0)]
    pen = ImageDraw.Draw(page)
    pen.line(path, fill=TRACK, width=2)
    for (x, y), inside in ((path[0], "white"), (path[-1], TRACK)):
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=inside, outline=TRACK)
    return page


def follow_border(frames: Sequence[Image.Image]) -> NDArray[np.float64]:
    """The first frame's corners in every frame [F, 4, 2], as its border moves; shares of width and height."""
    grays = [_smooth(np.asarray(frame.convert("L"), dtype=np.float32)) for frame in frames]
    height, width = grays[0].shape
    middle, size = np.array([(width - 1) / 2, (height - 1) / 2]), np.array([width, height])
    corners = CORNERS * size - 0.5  # the edges of the outermost pixels
    positions = [corners]
    for gray, next_gray in pairwise(grays):
        x, y, growth, turn = _fit_similarity(gray, next_gray, _weigh_border(gray.shape))
        # The similarity between two frames, applied to the corners about the middle
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        corners = middle + [x, y] + np.exp(growth) * (corners - middle) @ rotation.T
        positions.append(corners)
    shares: NDArray[np.float64] = (np.stack(positions) + 0.5) / size
    return shares


def corner_error(frames: Sequence[Image.Image], expected: NDArray[np.float64]) -> float:
    """The mean distance of the corners from the `expected` ones [F, 4, 2], in pixels of 128 a side.

    The first frame, which always fits, and corners of NaN are not counted.
    """
    distances = np.linalg.norm((follow_border(frames) - expected)[1:], axis=-1) * SIDE
    return float(np.nanmean(distances)) if np.isfinite(distances).any() else math.nan


def measure_movement(frames: Sequence[Image.Image], *, camera: bool = False) -> Movement:
    """The end of a clip's track."""
    x, y, growth, turn = map(float, trace_movement(frames, camera=camera)[-1])
    return Movement(x, y, growth, math.degrees(turn))


def track_error(track: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """Root mean square distance of a track from the true one, in pixels, relative to the first frame."""
    differences = track[1:, :2] - true[1:, :2]
    return float(np.sqrt((differences**2).sum(1).mean()))


def track_correlation(first: NDArray[np.float64], second: NDArray[np.float64], side: float) -> float:
    """The correlation of two tracks [F, 4], −1…1, whatever their lengths; 0 if one of them does not move.

    Growth and turn count as the movement of a point at half a side from the middle.
    """
    count = min(len(first), len(second))
    rows = []
    for track in (first, second):
        # Both resampled to the same number of frames, in pixels, less their means
        common_times, times = np.linspace(0, 1, count), np.linspace(0, 1, len(track))
        resampled = np.stack([np.interp(common_times, times, column) for column in track.T], axis=-1)
        points = resampled * [1, 1, side / 2, side / 2]
        rows.append((points - points.mean(0)).ravel())
    norms = [float(np.linalg.norm(row)) for row in rows]
    return float(rows[0] @ rows[1] / (norms[0] * norms[1])) if min(norms) > 1e-9 else 0.0


def _smooth(gray: NDArray[Any]) -> NDArray[Any]:
    for axis in (0, 1):
        for _ in range(3):
            gray = (gray + np.roll(gray, 1, axis) + np.roll(gray, -1, axis)) / 3
    return gray


def _weigh_border(shape: tuple[int, ...]) -> NDArray[np.float64]:
    weight = np.ones(shape)
    edge = max(1, min(shape) * BORDER // SIDE)
    weight[edge:-edge, edge:-edge] = 0
    return weight


def _fit_similarity(frame: Gray, next_frame: Gray, weight: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """(x, y, log scale, turn in radians) that carries one frame into the next, about the middle of what moves."""
    # The middle of what moves (cx, cy), and every pixel's offset from it
    height, width = frame.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    changed = np.abs(next_frame - frame).astype(np.float64)
    weight = _smooth(changed.astype(np.float32)).astype(np.float64) if weight is None else weight
    if changed.max() < 0.5 or weight.sum() == 0:
        return np.zeros(4)
    cx, cy = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    dx, dy = x - cx, y - cy

    # Gauss–Newton on Σ w·(next_frame(T x) − frame(x))² over T's x, y, log scale and turn
    fitted = np.zeros(4)
    for _ in range(ROUNDS):
        # The next frame at T x = c + (x, y) + scale·R(turn)·(x − c)
        scale, turn = np.exp(fitted[2]), fitted[3]
        sx = cx + fitted[0] + scale * (np.cos(turn) * dx - np.sin(turn) * dy)
        sy = cy + fitted[1] + scale * (np.sin(turn) * dx + np.cos(turn) * dy)
        inside = (sx >= 1) & (sx <= width - 2) & (sy >= 1) & (sy <= height - 2)
        warped = _sample(next_frame, sx.clip(0, width - 1.001), sy.clip(0, height - 1.001))
        # Jacobian [pixels, 4] by x, y, log scale, turn, with the mean gradient of both frames
        iy, ix = np.gradient((frame + warped) / 2)
        columns = np.stack([ix, iy, ix * dx + iy * dy, iy * dx - ix * dy], -1)[inside]
        # Normal equations JᵀWJ·δ = JᵀW·error, with a ridge where the frame is even
        w = weight[inside][:, None]
        system = columns.T @ (w * columns) + 1e-3 * np.eye(4)
        fitted -= np.linalg.solve(system, columns.T @ (w[:, 0] * (warped - frame)[inside]))

    # A movement by a quarter of the frame, or a growth by e^½, is a failed match
    return fitted if np.abs(fitted[:2]).max() < width / 4 and abs(fitted[2]) < 0.5 else np.zeros(4)


def _sample(picture: Gray, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    left, top = x.astype(int), y.astype(int)
    across, down = x - left, y - top
    above = picture[top, left] * (1 - across) + picture[top, left + 1] * across
    below = picture[top + 1, left] * (1 - across) + picture[top + 1, left + 1] * across
    sampled: NDArray[np.float64] = above * (1 - down) + below * down
    return sampled


def matches_move(move: str, movement: Movement) -> bool:
    """Whether a measured movement matches a word by more than the least that counts."""
    part, sign = PARTS[move]
    return bool(sign * getattr(movement, part) > LEAST[part])
