"""What moves in a clip, measured from its pixels alone, and whether it is what a word says.

A similarity is fitted to each pair of frames (Lucas & Kanade 1981): of the whole frame, weighted by what changes, for
things, of its border for the camera. Its parts add up over the clip to a track; joined one behind the other they carry
the first frame's corners through the clip, which is how a camera is compared with its path.
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
SIDE, BORDER = 128, 20  # pixels: of a picture, and of its border, in which the camera's movement is seen
TRACK = "#dc2626"
ROUNDS = 4  # of the fit, each from the frame that the one before has warped
PARTS = {  # which part of a measured motion a word names, and its sign
    "left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1),
    "grow": ("growth", 1), "shrink": ("growth", -1), "clockwise": ("turn", 1), "counterclockwise": ("turn", -1),
    "pan-left": ("x", 1), "pan-right": ("x", -1), "pan-up": ("y", 1), "pan-down": ("y", -1),
    "zoom-in": ("growth", 1), "zoom-out": ("growth", -1), "roll-left": ("turn", 1), "roll-right": ("turn", -1),
}  # fmt: skip
Gray = NDArray[np.float32]


class Moved(NamedTuple):
    """How something moved: pixels to the right and down, log of its growth, degrees clockwise."""

    x: float
    y: float
    growth: float
    turn: float


def trace_moved(frames: Sequence[Image.Image], *, camera: bool = False) -> NDArray[np.float64]:
    """The track [F, 4] of what moves, or with `camera` of the border: x, y, log of the growth, radians of the turn."""
    grays = [_smooth(np.asarray(frame.convert("L"), dtype=np.float32)) for frame in frames]
    track = np.zeros((len(frames), 4))
    for number, (here, there) in enumerate(pairwise(grays), 1):
        weight = _border(here.shape) if camera else None
        track[number] = track[number - 1] + _fit_similarity(here, there, weight)
    return track


def draw_track(frames: Sequence[Image.Image]) -> Image.Image:
    """The last frame, dimmed, and on it the way of what moves, from a ring to a dot."""
    side = [frame.convert("RGB").resize((SIDE, SIDE)) for frame in frames]
    track = trace_moved(side)[:, :2]
    changes = np.abs(
        np.diff(np.stack([np.asarray(one.convert("L"), dtype=np.float64) for one in side]), axis=0)
    ).sum(0)
    page = Image.blend(side[-1], Image.new("RGB", (SIDE, SIDE), "white"), 0.5)
    if not changes.any():
        return page
    rows, columns = np.mgrid[:SIDE, :SIDE]
    middle = np.array([(changes * columns).sum(), (changes * rows).sum()]) / changes.sum()
    way = [tuple(map(float, place)) for place in middle + track - track.mean(0)]
    pen = ImageDraw.Draw(page)
    pen.line(way, fill=TRACK, width=2)
    for (x, y), inside in ((way[0], "white"), (way[-1], TRACK)):
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=inside, outline=TRACK)
    return page


def follow_border(frames: Sequence[Image.Image]) -> NDArray[np.float64]:
    """Where the first frame's corners are in every frame [F, 4, 2], as its border moves; shares of width and height."""
    grays = [_smooth(np.asarray(frame.convert("L"), dtype=np.float32)) for frame in frames]
    height, width = grays[0].shape
    middle, size = np.array([(width - 1) / 2, (height - 1) / 2]), np.array([width, height])
    at = CORNERS * size - 0.5  # of the outermost pixels' edges
    found = [at]
    for here, there in pairwise(grays):
        x, y, growth, turn = _fit_similarity(here, there, _border(here.shape))
        # The similarity between two frames, applied to the corners about the middle
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        at = middle + [x, y] + np.exp(growth) * (at - middle) @ rotation.T
        found.append(at)
    corners: NDArray[np.float64] = (np.stack(found) + 0.5) / size
    return corners


def corner_error(frames: Sequence[Image.Image], asked: NDArray[np.float64]) -> float:
    """How far the corners are from where they were `asked` to be [F, 4, 2], in pixels of 128 a side: the mean.

    The first frame, which fits by itself, is not counted, and corners that are no numbers are not either.
    """
    apart = np.linalg.norm((follow_border(frames) - asked)[1:], axis=-1) * SIDE
    return float(np.nanmean(apart)) if np.isfinite(apart).any() else math.nan


def measure_moved(frames: Sequence[Image.Image], *, camera: bool = False) -> Moved:
    """How far a clip's track goes."""
    x, y, scale, turn = map(float, trace_moved(frames, camera=camera)[-1])
    return Moved(x, y, scale, math.degrees(turn))


def track_error(track: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """Root mean square distance, in pixels, of what moves from where it should be, relative to the first frame."""
    apart = track[1:, :2] - true[1:, :2]
    return float(np.sqrt((apart**2).sum(1).mean()))


def track_correlation(one: NDArray[np.float64], other: NDArray[np.float64], side: float) -> float:
    """How alike two tracks [F, 4] are, −1…1, whatever their length; growth and turn count as what moves at half a side.

    0 where one of them does not move.
    """
    count = min(len(one), len(other))
    rows = []
    for track in (one, other):
        # Both resampled to as many frames, in pixels, less their means
        at, here = np.linspace(0, 1, count), np.linspace(0, 1, len(track))
        even = np.stack([np.interp(at, here, column) for column in track.T], axis=-1) * [
            1,
            1,
            side / 2,
            side / 2,
        ]
        rows.append((even - even.mean(0)).ravel())
    norms = [float(np.linalg.norm(row)) for row in rows]
    return float(rows[0] @ rows[1] / (norms[0] * norms[1])) if min(norms) > 1e-9 else 0.0


def _smooth(gray: NDArray[Any]) -> NDArray[Any]:
    for axis in (0, 1):
        for _ in range(3):
            gray = (gray + np.roll(gray, 1, axis) + np.roll(gray, -1, axis)) / 3
    return gray


def _border(shape: tuple[int, ...]) -> NDArray[np.float64]:
    weight = np.ones(shape)
    edge = max(1, min(shape) * BORDER // SIDE)
    weight[edge:-edge, edge:-edge] = 0
    return weight


def _fit_similarity(here: Gray, there: Gray, weight: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """(x, y, log scale, turn in radians) that carries one frame into the next, about the middle of what moves."""
    # The middle of what moves (cx, cy), and every pixel's place from there
    height, width = here.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    changed = np.abs(there - here).astype(np.float64)
    weight = _smooth(changed.astype(np.float32)).astype(np.float64) if weight is None else weight
    if changed.max() < 0.5 or weight.sum() == 0:
        return np.zeros(4)
    cx, cy = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    dx, dy = x - cx, y - cy

    # Gauss–Newton on Σ w·(there(T x) − here(x))² over T's x, y, log scale and turn
    fitted = np.zeros(4)
    for _ in range(ROUNDS):
        # The next frame at T x = c + (x, y) + scale·R(turn)·(x − c)
        scale, turn = np.exp(fitted[2]), fitted[3]
        sx = cx + fitted[0] + scale * (np.cos(turn) * dx - np.sin(turn) * dy)
        sy = cy + fitted[1] + scale * (np.sin(turn) * dx + np.cos(turn) * dy)
        inside = (sx >= 1) & (sx <= width - 2) & (sy >= 1) & (sy <= height - 2)
        warped = _sample(there, sx.clip(0, width - 1.001), sy.clip(0, height - 1.001))
        # Jacobian [pixels, 4] by x, y, log scale, turn, with the mean gradient of both frames
        iy, ix = np.gradient((here + warped) / 2)
        columns = np.stack([ix, iy, ix * dx + iy * dy, iy * dx - ix * dy], -1)[inside]
        # Normal equations JᵀWJ·δ = JᵀW·error, with a ridge where the frame is even
        w = weight[inside][:, None]
        system = columns.T @ (w * columns) + 1e-3 * np.eye(4)
        fitted -= np.linalg.solve(system, columns.T @ (w[:, 0] * (warped - here)[inside]))

    # What moves by a quarter of the frame, or grows by e^½, was not matched
    return fitted if np.abs(fitted[:2]).max() < width / 4 and abs(fitted[2]) < 0.5 else np.zeros(4)


def _sample(picture: Gray, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    left, top = x.astype(int), y.astype(int)
    across, down = x - left, y - top
    above = picture[top, left] * (1 - across) + picture[top, left + 1] * across
    below = picture[top + 1, left] * (1 - across) + picture[top + 1, left + 1] * across
    found: NDArray[np.float64] = above * (1 - down) + below * down
    return found


def is_right(move: str, moved: Moved) -> bool:
    """Whether what was measured is what the word says, by more than the least that counts."""
    part, sign = PARTS[move]
    return bool(sign * getattr(moved, part) > LEAST[part])
