"""Camera paths: a pose for each frame of a clip, as people write them, and as the rays of its pixels.

    pan-left            pan-left=40px zoom-in=1.3 roll-left=20deg ease          path.json          path.txt

Words and JSON are the camera of a flat picture: pans in pixels, zooms, rolls. It is a pinhole camera before a plane at
depth 1 whose focal length is the picture's width, so that a pan by p pixels moves it by p/width, and a zoom lengthens
the focal length. A text file has RealEstate10K's lines: time, intrinsics as shares of the picture's size, two zeros,
and a matrix 3 × 4 from world to camera. A network reads the Plücker coordinates of each pixel's ray (He et al. 2024,
CameraCtrl, section 3.2), relative to the first frame.
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

# Default amounts: widths sideways and up, times, degrees
PAN, RISE, ZOOM, ROLL = 0.3125, 0.1875, 1.35, 20.0
WORDS = {  # the move of amount 1: (x, y) of the camera in widths, log of the zoom, degrees clockwise for the picture
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
LONGEST_FOCAL_LENGTH = 10.0  # widths; beyond, intrinsics are in pixels
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CameraPath:
    """The camera of F frames.

    intrinsics  [F, 4]: fx and cx as shares of the picture's width, fy and cy of its height
    poses       [F, 3, 4]: from world to camera, x to the right, y down, z forwards
    name        the words or the file that it was read from
    """

    intrinsics: Floats
    poses: Floats
    name: str = ""

    def __len__(self) -> int:
        return len(self.poses)

    @property
    def positions(self) -> Floats:
        """The camera's position in each frame [F, 3], in the coordinates of the first frame's camera."""
        rotations, translations = self.poses[:, :, :3], self.poses[:, :, 3]
        centres = -np.einsum("fij,fi->fj", rotations, translations)
        positions: Floats = centres @ rotations[0].T + translations[0]
        return positions

    @property
    def turns(self) -> Floats:
        """Degrees [F] between each frame's camera and the first one's, in any direction."""
        relative = np.einsum("fij,kj->fik", self.poses[:, :, :3], self.poses[0, :, :3])
        cosine = (np.trace(relative, axis1=1, axis2=2) - 1) / 2
        degrees: Floats = np.degrees(np.arccos(cosine.clip(-1, 1)))
        return degrees


@dataclass(frozen=True)
class Reach:
    """How far a camera goes from its first frame: pan in widths, zoom in times, turn in degrees."""

    pan: float = 0.0
    zoom: float = 1.0
    turn: float = 0.0


def measure_reach(path: CameraPath) -> Reach:
    """How far a path goes."""
    focal_lengths = path.intrinsics[:, 0]
    return Reach(
        float(np.linalg.norm(path.positions, axis=1).max()),
        float(np.exp(np.abs(np.log(focal_lengths / focal_lengths[0])).max())),
        float(path.turns.max()),
    )


def refuse_beyond(path: CameraPath, reach: Reach, name: str) -> None:
    """`UserError` for a path that goes beyond the reach with which a network was trained."""
    reached = measure_reach(path)
    for verb, amount, most, unit in (
        ("moves by", reached.pan, reach.pan, " widths of the picture"),
        ("zooms by", reached.zoom, reach.zoom, " times"),
        ("turns by", reached.turn, reach.turn, " degrees"),
    ):
        if amount > most * 1.001 + 1e-6:
            raise UserError(
                f"--camera {path.name} leaves the world that {name} knows: it {verb} {amount:.3g}{unit}, and "
                f"{most:.3g} is the most that was trained. Give a shorter path."
            )


# A flat picture's camera -------------------------------------------------------------------------------------


def flat_path(values: ArrayLike, width: float, aspect: float = 1.0, name: str = "") -> CameraPath:
    """The path of values [F, 4]: how far a pan has gone (x, y), in pixels; zoom; the picture's turn, in degrees.

    width   of the picture, in the same pixels
    aspect  width by height of the picture
    """
    x, y, zoom, roll = np.asarray(values, dtype=np.float64).T

    # Roll: rotation [F, 3, 3] about the viewing axis
    turn, zeros, ones = np.radians(roll), np.zeros_like(roll), np.ones_like(roll)
    rows = [np.cos(turn), -np.sin(turn), zeros, np.sin(turn), np.cos(turn), zeros, zeros, zeros, ones]
    rotations = np.stack(rows, axis=-1).reshape(-1, 3, 3)

    # Pan: the camera's centre c in picture widths, t = −R·c; zoom: the focal length
    centres = np.stack([x / width, y / width, zeros], axis=-1)
    translations = -np.einsum("fij,fj->fi", rotations, centres)
    intrinsics = np.stack([zoom, zoom * aspect, ones / 2, ones / 2], axis=-1)
    return CameraPath(intrinsics, np.concatenate([rotations, translations[:, :, None]], axis=2), name)


def relative_values(values: ArrayLike) -> Floats:
    """The values [F, 4] relative to the first frame, whose zoom becomes 1 and whose roll becomes 0.

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

    They lie on a plane at depth 1 before the first camera; a corner behind a camera is NaN.
    """
    points = np.einsum(
        "fij,cj->fci", find_homographies(path), np.concatenate([CORNERS, np.ones((4, 1))], axis=1)
    )
    depth = np.where(points[..., 2:] > 1e-6, points[..., 2:], np.nan)
    corners: Floats = points[..., :2] / depth
    return corners


def find_homographies(path: CameraPath) -> Floats:
    """[F, 3, 3]: from the first picture to each frame's, both in shares of width and height, of the plane at depth 1.

    A point r = K₀⁻¹p of the plane before the first camera lies at R_t R₀ᵀ (r − T₀) + T_t before camera t.
    """
    turns, translations = path.poses[:, :, :3], path.poses[:, :, 3]

    # R + t·nᵀ of each camera relative to the first, n = (0, 0, 1) and depth 1
    relative = turns @ turns[0].T
    shift = translations - relative @ translations[0]
    onto = relative + shift[:, :, None] * np.array([0.0, 0.0, 1.0])

    # H_t = K_t·(R + t·nᵀ)·K₀⁻¹
    lenses = np.tile(np.eye(3), (len(path), 1, 1))
    lenses[:, 0, 0], lenses[:, 1, 1] = path.intrinsics[:, 0], path.intrinsics[:, 1]
    lenses[:, :2, 2] = path.intrinsics[:, 2:]
    homographies: Floats = lenses @ onto @ np.linalg.inv(lenses[0])
    return homographies


# Reading -----------------------------------------------------------------------------------------------------


def read_camera(text: str, frames: int, size: tuple[int, int]) -> CameraPath:
    """The path of words, a JSON file or a text file, for a clip of this many frames of `size` (width, height).

    Raises `UserError` for unknown words and words that contradict one another, another number of poses than frames,
    matrices that are no rotations, values that are not finite, and intrinsics in pixels.
    """
    suffix = Path(text).suffix.lower()
    if suffix == ".json":
        path = _read_values(written_path(text), size)
    elif suffix == ".txt":
        path = _read_lines(written_path(text), size)
    else:
        return flat_path(_parse_words(text, frames, size[0]), size[0], size[0] / size[1], text)
    if len(path) != frames:
        raise UserError(
            f"--camera {text} has {len(path)} poses and the clip {frames} frames. Give a pose for each frame, or "
            f"--frames {len(path)}."
        )
    return path


def _parse_words(text: str, frames: int, width: int) -> Floats:
    """The values [F, 4] of words; the speed is even, or with `ease` slow at both ends."""
    words = text.lower().replace(",", " ").replace("+", " ").split()
    total, parts = np.zeros(4), set()
    for word in words:
        move, equals, amount = word.partition("=")
        if word == EASE:
            continue
        move = ALIASES.get(move, move)
        if move not in WORDS:
            raise UserError(
                f"--camera {text} is no path: there is no {word}. Say one of {', '.join(WORDS)}, alone or with an "
                "amount (pan-left=40px, zoom-in=1.3, roll-left=20deg), or name a file .json or .txt."
            )
        part, direction = WORDS[move]
        if part in parts:
            raise UserError(f"--camera {text} says two {move.split('-')[0]}s in one line. Give one of them.")
        parts.add(part)
        total += _parse_amount(text, part, amount, width, equals != "") * np.array(direction)
    if not parts:
        raise UserError(f"--camera {text or '“”'} moves nothing. Say {', '.join(WORDS)}, or leave it out.")

    # Even, or eased by smoothstep; pan in frame widths → pixels, zoom as a power
    u = np.linspace(0, 1, frames)
    u = u * u * (3 - 2 * u) if EASE in words else u
    values = u[:, None] * total
    values[:, :2] *= width
    values[:, 2] = np.exp(values[:, 2])
    return values


def _parse_amount(text: str, part: str, amount: str, width: int, has_amount: bool) -> float:
    """The amount of a move: widths, log of times, or degrees."""
    if not has_amount:
        return USUAL[part]
    match = AMOUNT.fullmatch(amount)
    if match is None or (match[2] or "") not in UNITS[part] or float(match[1]) == 0:
        units = " or ".join(unit for unit in UNITS[part] if unit) or "times"
        raise UserError(
            f"--camera {text} has no amount of a {part} in {amount!r}. Give a number above 0, in {units}."
        )
    value = float(match[1])
    if part == "zoom":
        if value < 1:
            raise UserError(
                f"--camera {text} zooms by {value:g}. Give 1 or more, and zoom-out for the other way."
            )
        return math.log(value)
    if part == "roll":
        return value
    return value / 100 if match[2] == "%" else value / width


@dataclass(frozen=True)
class FlatRecord:
    """A path's JSON: a value for each frame of each part that moves.

    pan    [x, y] of the camera in pixels, x to the right, y down
    zoom   times the first frame's
    roll   degrees by which the picture turns clockwise
    width  of the picture, in the pixels of `pan`; 0: the clip's
    """

    pan: list[list[float]] | None = None
    zoom: list[float] | None = None
    roll: list[float] | None = None
    width: float = 0.0


def _read_values(file: Path, size: tuple[int, int]) -> CameraPath:
    """A path from JSON; `UserError` for unknown keys, unlike lengths and values that are not finite."""
    _refuse_missing(file)
    raw = read_json(file)
    foreign = [key for key in raw if key not in FlatRecord.__dataclass_fields__]
    if foreign:
        raise UserError(
            f"{file} has a key {foreign[0]!r} that no camera has. There are pan, zoom, roll and width."
        )
    record = read_json(file, FlatRecord)
    counts = {
        name: len(value) for name in ("pan", "zoom", "roll") if (value := getattr(record, name)) is not None
    }
    if not counts or len(set(counts.values())) > 1:
        lengths = ", ".join(f"{count} of {name}" for name, count in counts.items()) or "none"
        raise UserError(
            f"{file} needs a value for each frame of what moves, as many of each; it has {lengths}."
        )

    # [F, 4]: pan x, pan y, zoom, roll
    frames = next(iter(counts.values()))
    values = np.tile(np.array([0.0, 0.0, 1.0, 0.0]), (frames, 1))
    if record.pan is not None:
        if any(len(pair) != 2 for pair in record.pan):
            raise UserError(f"{file} has a pan that is no pair [x, y]. Give two numbers for each frame.")
        values[:, :2] = record.pan
    values[:, 2] = record.zoom or 1.0
    values[:, 3] = record.roll or 0.0
    _refuse_non_finite(file, values)
    if (values[:, 2] <= 0).any() or record.width < 0:
        raise UserError(f"{file} has a zoom or a width of 0 or less. Give numbers above 0.")
    return flat_path(values, record.width or size[0], size[0] / size[1], str(file))


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
    _refuse_non_finite(file, values)
    intrinsics, poses = values[:, 1:5], values[:, 7:].reshape(-1, 3, 4)
    _refuse_distorted_poses(file, intrinsics, poses)
    return CameraPath(_crop_intrinsics(intrinsics, size), poses, str(file))


def _refuse_distorted_poses(file: Path, intrinsics: Floats, poses: Floats) -> None:
    focal_lengths = intrinsics[:, :2]
    in_pixels = ((focal_lengths <= 0) | (focal_lengths > LONGEST_FOCAL_LENGTH)).any(1)
    if in_pixels.any():
        number = int(np.argmax(in_pixels))
        raise UserError(
            f"Pose {number + 1} of {file} has focal lengths {intrinsics[number, 0]:g} and {intrinsics[number, 1]:g}; "
            "they are shares of the picture's width and height, around 1. Divide pixels by them."
        )
    rotations = poses[:, :, :3]
    errors = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    distorted = (errors > 0.01) | (np.linalg.det(rotations) < 0)
    if distorted.any():
        raise UserError(
            f"Pose {int(np.argmax(distorted)) + 1} of {file} is no camera's: its matrix does not turn without "
            "stretching or mirroring. Give world to camera, row by row."
        )


def _refuse_missing(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"There is no camera path {file}. Check the spelling, or say words like pan-left.")


def _refuse_non_finite(file: Path, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"{file} holds values that are no numbers. Write the path again.")


def _crop_intrinsics(intrinsics: Floats, size: tuple[int, int]) -> Floats:
    """A film's intrinsics for the middle of its pictures, cropped to the clip's shape.

    Pixels are square, so fy/fx is the film's width by height.
    """
    width, height = size
    aspect = intrinsics[:, 1] / intrinsics[:, 0]
    wide = np.maximum(aspect * height / width, 1.0)  # the film's width in widths of the clip
    high = np.maximum(width / (aspect * height), 1.0)

    # Shares of a narrower picture are larger, about its middle
    fx, fy = intrinsics[:, 0] * wide, intrinsics[:, 1] * high
    cx, cy = 0.5 + (intrinsics[:, 2] - 0.5) * wide, 0.5 + (intrinsics[:, 3] - 0.5) * high
    return np.stack([fx, fy, cx, cy], axis=-1)


# For networks ------------------------------------------------------------------------------------------------


def embed_rays(path: CameraPath, size: tuple[int, int]) -> Tensor:
    """Plücker coordinates (o × d, d) [F, 6, H, W] of the rays through the pixels of `size` (width, height).

    o is the camera's position and d the ray's direction, of length 1, both in the first camera's coordinates.
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
    back = np.einsum("ij,fkj->fik", path.poses[0, :, :3], path.poses[:, :, :3])
    rays = np.einsum("fij,fhwj->fhwi", back, rays)
    moments = np.cross(path.positions[:, None, None], rays)
    return torch.from_numpy(np.concatenate([moments, rays], axis=-1)).permute(0, 3, 1, 2).float().contiguous()


def as_lines(path: CameraPath, fps: float = 8.0) -> str:
    """RealEstate10K's lines of a path."""
    lines: list[str] = []
    for number, (intrinsics, pose) in enumerate(zip(path.intrinsics, path.poses, strict=True)):
        values: Sequence[float] = [round(1e6 * number / fps), *intrinsics, 0, 0, *pose.flatten()]
        lines.append(" ".join(f"{value:.9g}" for value in values))
    return "\n".join(["limner", *lines]) + "\n"
