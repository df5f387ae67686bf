"""Camera paths: a pose for each frame of a clip, as people write them, and as the rays of its pixels.

    pan-left            pan-left=40px zoom-in=1.3 roll-left=20deg ease          path.json          path.txt

Words and JSON are the camera of a flat picture: pans in pixels, zooms, rolls. It is a pinhole camera before a plane at
depth 1 whose focal length is the picture's width, so that a pan by p pixels moves it by p/width, and a zoom lengthens
the focal length. A text file has RealEstate10K's lines: time, intrinsics as shares of the picture's size, two zeros,
and a matrix 3 × 4 from world to camera. What a network reads are Plücker coordinates of each pixel's ray (He et al.
2024, CameraCtrl, section 3.2), relative to the first frame.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.records import read_text
from backbone.io.written import written_path

# Widths sideways and up, times, degrees: where nothing is said
PAN, RISE, ZOOM, ROLL = 0.3125, 0.1875, 1.35, 20.0
WORDS = {  # what each moves by 1: (x, y) of the camera in widths, log of the zoom, degrees clockwise for the picture
    "pan-left": ("pan", (-1.0, 0.0, 0.0, 0.0)), "pan-right": ("pan", (1.0, 0.0, 0.0, 0.0)),
    "pan-up": ("rise", (0.0, -1.0, 0.0, 0.0)), "pan-down": ("rise", (0.0, 1.0, 0.0, 0.0)),
    "zoom-in": ("zoom", (0.0, 0.0, 1.0, 0.0)), "zoom-out": ("zoom", (0.0, 0.0, -1.0, 0.0)),
    "roll-left": ("roll", (0.0, 0.0, 0.0, 1.0)), "roll-right": ("roll", (0.0, 0.0, 0.0, -1.0)),
}  # fmt: skip
ALIASES = {"roll": "roll-left"}
USUAL = {"pan": PAN, "rise": RISE, "zoom": math.log(ZOOM), "roll": ROLL}
EASE = "ease"
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # of a picture, in shares of its sides
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)(px|%|deg|x)?")
UNITS = {"pan": ("", "px", "%"), "rise": ("", "px", "%"), "zoom": ("", "x"), "roll": ("", "deg")}
NUMBERS = 19  # of a line: time, fx, fy, cx, cy, 0, 0, and 3 × 4
LONGEST_FOCUS = 10.0  # widths; beyond, intrinsics are in pixels
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CameraPath:
    """The camera of F frames.

    intrinsics  [F, 4]: fx and cx as shares of the picture's width, fy and cy of its height
    poses       [F, 3, 4]: from world to camera, x to the right, y down, z forwards
    name        as it was asked for
    """

    intrinsics: Floats
    poses: Floats
    name: str = ""

    def __len__(self) -> int:
        return len(self.poses)

    @property
    def positions(self) -> Floats:
        """[F, 3] of the camera, as it is seen by the first frame's."""
        rotations, moved = self.poses[:, :, :3], self.poses[:, :, 3]
        middles = -np.einsum("fij,fi->fj", rotations, moved)
        found: Floats = middles @ rotations[0].T + moved[0]
        return found

    @property
    def turns(self) -> Floats:
        """[F] degrees by which the camera is turned from the first frame's, in whatever direction."""
        relative = np.einsum("fij,kj->fik", self.poses[:, :, :3], self.poses[0, :, :3])
        cosine = (np.trace(relative, axis1=1, axis2=2) - 1) / 2
        found: Floats = np.degrees(np.arccos(cosine.clip(-1, 1)))
        return found


@dataclass(frozen=True)
class Reach:
    """How far a camera goes from its first frame: in widths, in times of its zoom, in degrees."""

    pan: float = 0.0
    zoom: float = 1.0
    turn: float = 0.0


def measure_reach(path: CameraPath) -> Reach:
    """How far a path goes."""
    focus = path.intrinsics[:, 0]
    return Reach(
        float(np.linalg.norm(path.positions, axis=1).max()),
        float(np.exp(np.abs(np.log(focus / focus[0])).max())),
        float(path.turns.max()),
    )


def refuse_beyond(path: CameraPath, reach: Reach, name: str) -> None:
    """`UserError` for a path that leaves the world in which a camera was trained."""
    found = measure_reach(path)
    for what, went, least, unit in (
        ("moves by", found.pan, reach.pan, " widths of the picture"),
        ("zooms by", found.zoom, reach.zoom, " times"),
        ("turns by", found.turn, reach.turn, " degrees"),
    ):
        if went > least * 1.001 + 1e-6:
            raise UserError(
                f"--camera {path.name} leaves the world that {name} knows: it {what} {went:.3g}{unit}, and {least:.3g} "
                "is the most that was trained. Give a shorter path."
            )


# A flat picture's camera -------------------------------------------------------------------------------------


def flat_path(values: ArrayLike, width: float, aspect: float = 1.0, name: str = "") -> CameraPath:
    """The path of values [F, 4]: how far a pan has gone (x, y), in pixels; zoom; the picture's turn, in degrees.

    width   of the picture, in those pixels
    aspect  width by height of the picture
    """
    x, y, zoom, roll = np.asarray(values, dtype=np.float64).T

    # Roll: rotation [F, 3, 3] about the viewing axis
    turn, nothing, one = np.radians(roll), np.zeros_like(roll), np.ones_like(roll)
    rows = [np.cos(turn), -np.sin(turn), nothing, np.sin(turn), np.cos(turn), nothing, nothing, nothing, one]
    rotations = np.stack(rows, axis=-1).reshape(-1, 3, 3)

    # Pan: the camera's centre c in picture widths, t = −R·c; zoom: the focal length
    middles = np.stack([x / width, y / width, nothing], axis=-1)
    moved = -np.einsum("fij,fj->fi", rotations, middles)
    focus = np.stack([zoom, zoom * aspect, one / 2, one / 2], axis=-1)
    return CameraPath(focus, np.concatenate([rotations, moved[:, :, None]], axis=2), name)


def relative_values(values: ArrayLike) -> Floats:
    """The same [F, 4] as the first frame sees it: with its zoom 1 and its roll 0, whatever they were.

    z_t R_t (x − c_t) = (z_t/z_0) (R_t R_0⁻¹) (p_0 − z_0 R_0 (c_t − c_0))      p_0 = z_0 R_0 (x − c_0)
    """
    x, y, zoom, roll = np.asarray(values, dtype=np.float64).T
    turn = math.radians(float(roll[0]))
    dx, dy = (x - x[0]) * zoom[0], (y - y[0]) * zoom[0]
    across = math.cos(turn) * dx - math.sin(turn) * dy
    down = math.sin(turn) * dx + math.cos(turn) * dy
    return np.stack([across, down, zoom / zoom[0], roll - roll[0]], axis=-1)


def trace_corners(path: CameraPath) -> Floats:
    """Where the first picture's corners are in every frame [F, 4, 2], in shares of its width and height.

    They lie on a plane at depth 1 before the first camera; one that comes behind a camera is no number.
    """
    seen = np.einsum(
        "fij,cj->fci", find_homographies(path), np.concatenate([CORNERS, np.ones((4, 1))], axis=1)
    )
    depth = np.where(seen[..., 2:] > 1e-6, seen[..., 2:], np.nan)
    found: Floats = seen[..., :2] / depth
    return found


def find_homographies(path: CameraPath) -> Floats:
    """[F, 3, 3]: from the first picture to each frame's, both in shares of width and height, of the plane at depth 1.

    A point r = K₀⁻¹p of the plane before the first camera lies at R_t R₀ᵀ (r − T₀) + T_t before camera t.
    """
    turns, moved = path.poses[:, :, :3], path.poses[:, :, 3]

    # R + t·nᵀ of each camera relative to the first, n = (0, 0, 1) and depth 1
    relative = turns @ turns[0].T
    shift = moved - relative @ moved[0]
    onto = relative + shift[:, :, None] * np.array([0.0, 0.0, 1.0])

    # H_t = K_t·(R + t·nᵀ)·K₀⁻¹
    lenses = np.tile(np.eye(3), (len(path), 1, 1))
    lenses[:, 0, 0], lenses[:, 1, 1] = path.intrinsics[:, 0], path.intrinsics[:, 1]
    lenses[:, :2, 2] = path.intrinsics[:, 2:]
    found: Floats = lenses @ onto @ np.linalg.inv(lenses[0])
    return found


# As it is asked for ------------------------------------------------------------------------------------------


def read_camera(said: str, frames: int, size: tuple[int, int]) -> CameraPath:
    """The path of words, a JSON file or a text file, for a clip of this many frames of `size` (width, height).

    Raises `UserError` for words that are none or contradict one another, another number of poses than frames, what is
    no rotation, numbers that are none, and intrinsics in pixels.
    """
    suffix = Path(said).suffix.lower()
    if suffix == ".json":
        path = _read_values(written_path(said), size)
    elif suffix == ".txt":
        path = _read_lines(written_path(said), size)
    else:
        return flat_path(_spell(said, frames, size[0]), size[0], size[0] / size[1], said)
    if len(path) != frames:
        raise UserError(
            f"--camera {said} has {len(path)} poses and the clip {frames} frames. Give a pose for each frame, or "
            f"--frames {len(path)}."
        )
    return path


def _spell(said: str, frames: int, width: int) -> Floats:
    """[F, 4] of words; the way is even, or with `ease` slow at both ends."""
    words = said.lower().replace(",", " ").replace("+", " ").split()
    total, parts = np.zeros(4), set()
    for word in words:
        move, equals, amount = word.partition("=")
        if word == EASE:
            continue
        move = ALIASES.get(move, move)
        if move not in WORDS:
            raise UserError(
                f"--camera {said} is no path: there is no {word}. Say one of {', '.join(WORDS)}, alone or with an "
                "amount (pan-left=40px, zoom-in=1.3, roll-left=20deg), or name a file .json or .txt."
            )
        part, direction = WORDS[move]
        if part in parts:
            raise UserError(f"--camera {said} says two {move.split('-')[0]}s in one line. Say one of them.")
        parts.add(part)
        total += _parse_amount(said, part, amount, width, equals != "") * np.array(direction)
    if not parts:
        raise UserError(f"--camera {said or '“”'} moves nothing. Say {', '.join(WORDS)}, or leave it out.")

    # Even, or eased by smoothstep; pan in frame widths → pixels, zoom as a power
    u = np.linspace(0, 1, frames)
    u = u * u * (3 - 2 * u) if EASE in words else u
    values = u[:, None] * total
    values[:, :2] *= width
    values[:, 2] = np.exp(values[:, 2])
    return values


def _parse_amount(said: str, part: str, amount: str, width: int, given: bool) -> float:
    """How far: in widths, the log of times, or degrees."""
    if not given:
        return USUAL[part]
    match = AMOUNT.fullmatch(amount)
    if match is None or (match[2] or "") not in UNITS[part] or float(match[1]) == 0:
        units = " or ".join(unit for unit in UNITS[part] if unit) or "times"
        raise UserError(
            f"--camera {said} has no amount of a {part} in {amount!r}. Give a number above 0, in {units}."
        )
    value = float(match[1])
    if part == "zoom":
        if value < 1:
            raise UserError(
                f"--camera {said} zooms by {value:g}. Give 1 or more, and zoom-out for the other way."
            )
        return math.log(value)
    if part == "roll":
        return value
    return value / 100 if match[2] == "%" else value / width


@dataclass(frozen=True)
class FlatRecord:
    """A path's JSON: a value for each frame of what moves.

    pan    [x, y] of the camera in pixels, x to the right, y down
    zoom   times the first frame's
    roll   degrees by which the picture turns clockwise
    width  the pixels of a row that pans are in; 0: those of the clip
    """

    pan: list[list[float]] | None = None
    zoom: list[float] | None = None
    roll: list[float] | None = None
    width: float = 0.0


def _read_values(file: Path, size: tuple[int, int]) -> CameraPath:
    """A path from JSON; unknown keys, unlike lengths and values that are none are refused."""
    _refuse_missing(file)
    raw = read_json(file)
    foreign = [key for key in raw if key not in FlatRecord.__dataclass_fields__]
    if foreign:
        raise UserError(
            f"{file} has a key {foreign[0]!r} that no camera has. There are pan, zoom, roll and width."
        )
    said = read_json(file, FlatRecord)
    counts = {
        name: len(value) for name in ("pan", "zoom", "roll") if (value := getattr(said, name)) is not None
    }
    if not counts or len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of {name}" for name, count in counts.items()) or "none"
        raise UserError(
            f"{file} needs a value for each frame of what moves, as many of each; it has {found}."
        )

    # [F, 4]: pan x, pan y, zoom, roll
    frames = next(iter(counts.values()))
    values = np.tile(np.array([0.0, 0.0, 1.0, 0.0]), (frames, 1))
    if said.pan is not None:
        if any(len(pair) != 2 for pair in said.pan):
            raise UserError(f"{file} has a pan that is no pair [x, y]. Give two numbers for each frame.")
        values[:, :2] = said.pan
    values[:, 2] = said.zoom or 1.0
    values[:, 3] = said.roll or 0.0
    _refuse_no_numbers(file, values)
    if (values[:, 2] <= 0).any() or said.width < 0:
        raise UserError(f"{file} has a zoom or a width of 0 or less. Give numbers above 0.")
    return flat_path(values, said.width or size[0], size[0] / size[1], str(file))


def _read_lines(file: Path, size: tuple[int, int]) -> CameraPath:
    """A path from RealEstate10K's lines; the first may be the film's address."""
    _refuse_missing(file)
    try:
        lines = [line.split() for line in read_text(file).split("\n") if line.strip()]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read as a camera's path. Give text, a line for each frame."
        ) from error
    if lines and len(lines[0]) == 1:
        lines = lines[1:]
    if not lines:
        raise UserError(f"{file} holds no poses. Give a line for each frame.")
    rows = []
    for number, words in enumerate(lines, 1):
        try:
            rows.append([float(word) for word in words])
        except ValueError:
            rows.append([])
        if len(rows[-1]) != NUMBERS:
            raise UserError(
                f"Pose {number} of {file} is not {NUMBERS} numbers (time fx fy cx cy 0 0 and a matrix of 3 × 4), but "
                f"{len(words)} words. Write RealEstate10K's lines."
            )
    values = np.array(rows)
    _refuse_no_numbers(file, values)
    focus, poses = values[:, 1:5], values[:, 7:].reshape(-1, 3, 4)
    _refuse_no_camera(file, focus, poses)
    return CameraPath(_crop_intrinsics(focus, size), poses, str(file))


def _refuse_no_camera(file: Path, focus: Floats, poses: Floats) -> None:
    if (focus[:, :2] <= 0).any() or (focus[:, :2] > LONGEST_FOCUS).any():
        number = int(np.argmax((focus[:, :2] <= 0).any(1) | (focus[:, :2] > LONGEST_FOCUS).any(1)))
        raise UserError(
            f"Pose {number + 1} of {file} has focal lengths {focus[number, 0]:g} and {focus[number, 1]:g}; they are "
            "shares of the picture's width and height, around 1. Divide pixels by them."
        )
    rotations = poses[:, :, :3]
    apart = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    wrong = (apart > 0.01) | (np.linalg.det(rotations) < 0)
    if wrong.any():
        raise UserError(
            f"Pose {int(np.argmax(wrong)) + 1} of {file} is no camera's: its matrix does not turn without stretching "
            "or mirroring. Give world to camera, row by row."
        )


def _refuse_missing(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"There is no camera path {file}. Check the spelling, or say words like pan-left.")


def _refuse_no_numbers(file: Path, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"{file} holds values that are no numbers. Write the path again.")


def _crop_intrinsics(focus: Floats, size: tuple[int, int]) -> Floats:
    """Intrinsics of a film as those of the middle of its pictures that has the clip's shape.

    Pixels are square, so that fy/fx is the film's width by height.
    """
    width, height = size
    film = focus[:, 1] / focus[:, 0]
    wide = np.maximum(film * height / width, 1.0)  # the film's width in the clip's
    high = np.maximum(width / (film * height), 1.0)

    # Shares of a narrower picture are larger, about its middle
    fx, fy = focus[:, 0] * wide, focus[:, 1] * high
    cx, cy = 0.5 + (focus[:, 2] - 0.5) * wide, 0.5 + (focus[:, 3] - 0.5) * high
    return np.stack([fx, fy, cx, cy], axis=-1)


# As a network reads it ---------------------------------------------------------------------------------------


def embed_rays(path: CameraPath, size: tuple[int, int]) -> Tensor:
    """Plücker coordinates (o × d, d) [F, 6, H, W] of the rays through the pixels of `size` (width, height).

    o is where the camera is and d the ray's direction, of length 1, both as the first frame's camera sees them.
    """
    width, height = size
    x, y = (np.arange(count) + 0.5 for count in size)

    # d = K⁻¹·p of every pixel's middle, of length 1
    fx, fy, cx, cy = (path.intrinsics[:, None, None, i] for i in range(4))
    across = np.broadcast_to((x / width - cx) / fx, (len(path), height, width))
    down = np.broadcast_to((y[:, None] / height - cy) / fy, (len(path), height, width))
    rays = np.stack([across, down, np.ones_like(across)], axis=-1)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)

    # Turned into the first camera's axes by R₀·R_tᵀ, then o × d
    back = np.einsum("ij,fkj->fik", path.poses[0, :, :3], path.poses[:, :, :3])  # camera to the first one's
    rays = np.einsum("fij,fhwj->fhwi", back, rays)
    moments = np.cross(path.positions[:, None, None], rays)
    return torch.from_numpy(np.concatenate([moments, rays], axis=-1)).permute(0, 3, 1, 2).float().contiguous()


def as_lines(path: CameraPath, fps: float = 8.0) -> str:
    """RealEstate10K's lines of a path."""
    lines: list[str] = []
    for number, (focus, pose) in enumerate(zip(path.intrinsics, path.poses, strict=True)):
        values: Sequence[float] = [round(1e6 * number / fps), *focus, 0, 0, *pose.flatten()]
        lines.append(" ".join(f"{value:.9g}" for value in values))
    return "\n".join(["limner", *lines]) + "\n"
