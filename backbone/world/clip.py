"""Clips of the world: values that determine every frame and its ground truth.

A clip is a scene, the moves of its things and the camera's move. Rendering gives the track of every thing, their masks,
the camera's path and the flow of every pixel, all exact. Zooming and rolling turn the whole picture as a lens does, and
have no parallax; a pan slides the camera sideways, and near things pass faster: each row of the ground by its distance,
a thing by that of its foot. Beyond its edges a place continues mirrored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from backbone.world.motions import CAMERAS, MOTIONS, SPEEDS, opposite, phrase_camera, phrase_motion
from backbone.world.rendering.render import (
    FLOATING,
    SIZE,
    SUPERSAMPLING,
    Figure,
    draw_figure,
    draw_place,
    draw_sprite,
    place_figures,
    render,
)
from backbone.world.rendering.styles import STYLES
from backbone.world.scene import Scene, sample_scene

SLIDE, PAN = 46.0, 40.0  # pixels from the first frame to the last
GROWTH, ZOOM = 1.7, 1.35  # times
TURN, ROLL = 150.0, 20.0  # degrees
FAR = 0.45  # share of a pan by which the horizon moves
STILL = 0.15  # share of the training clips in which nothing moves
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Journey:
    """A camera path that no words describe, given by its end.

    x, y  pixels of a pan, to the right and down
    zoom  times
    roll  degrees by which the picture turns clockwise
    ease  slow at both ends
    """

    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0
    roll: float = 0.0
    ease: bool = False


@dataclass(frozen=True)
class Clip:
    """A scene in motion.

    move     the first thing's move (of a pair both move), of `MOTIONS`; "": none
    camera   the camera's move, of `CAMERAS`; "": none
    speed    the speed of both, of `SPEEDS`
    frames   the number of frames
    journey  a camera path without words, in place of `camera`
    """

    scene: Scene
    move: str = ""
    camera: str = ""
    speed: str = ""
    frames: int = 16
    journey: Journey | None = None

    def __post_init__(self) -> None:
        assert self.move in ("", *MOTIONS) and self.camera in ("", *CAMERAS) and self.speed in SPEEDS
        assert self.frames > 0 and not (self.camera and self.journey)

    @property
    def travels(self) -> bool:
        """Whether the camera moves."""
        return bool(self.camera) or self.journey is not None

    def caption(self, *, name: str | None = None) -> str:
        """The scene's caption, then its moves: `a dog in a park, moving left, camera zooming in`."""
        return self._add(self.scene.caption(name=name), None)

    def caption_for_training(self) -> str:
        """A training caption of the scene, with a random phrase for each move."""
        return self._add(self.scene.caption_for_training(), self.scene.random("motion words"))

    def _add(self, text: str, random: Random | None) -> str:
        noun = self.scene.things[0].noun if len(self.scene.things) > 1 else ""
        parts = [text]
        if self.move:
            parts.append(phrase_motion(self.move, speed=self.speed, noun=noun, random=random))
        if self.camera:
            parts.append(phrase_camera(self.camera, speed="" if self.move else self.speed, random=random))
        return ", ".join(parts)

    def backwards(self) -> Clip:
        """The clip whose words describe this clip's frames in reverse order."""
        return replace(self, move=opposite(self.move), camera=opposite(self.camera))


@dataclass(frozen=True, eq=False)
class ClipRendering:
    """A rendered clip and its ground truth; coordinates are pixels of the picture's 128, x to the right and y down.

    frames  RGB
    masks   the masks (L) of the N things in every frame, covered parts included
    tracks  [F, N, 4]: a thing's middle (x, y), its size over its size in the scene, its turn in degrees, clockwise
    camera  [F, 4]: how far a pan has gone (x, y), its zoom, its roll in degrees, clockwise for the picture
    flow    [F − 1, H, W, 2]: a pixel's position in the next frame, less its position in this one
    """

    frames: tuple[Image.Image, ...]
    masks: tuple[tuple[Image.Image, ...], ...]
    tracks: Floats
    camera: Floats
    flow: Floats


def sample_clip(seed: int, *, frames: int = 16) -> Clip:
    """Sample the clip of a seed: in 15 % nothing moves, in 55 % a thing, in 20 % the camera, in 10 % both."""
    scene = sample_scene(seed)
    random = Random(f"{seed}/clip")
    chance = random.random()
    move = random.choice(tuple(MOTIONS)) if STILL <= chance < 0.7 or chance >= 0.9 else ""
    camera = random.choice(tuple(CAMERAS)) if chance >= 0.7 else ""
    speed = random.choice(("", "", "slowly", "fast")) if move or camera else ""
    return Clip(scene, move, camera, speed, frames)


def sample_journey(random: Random) -> Journey:
    """A random path of the camera: a pan, a zoom, a roll or several of them, each at most as far as its words go."""
    parts = [random.random() < 0.5 for _ in range(3)]
    if not any(parts):
        parts[random.randrange(3)] = True
    x, y, zoom, roll = (random.uniform(-1, 1) for _ in range(4))
    return Journey(
        PAN * x if parts[0] else 0.0,
        PAN * 0.6 * y if parts[0] else 0.0,
        ZOOM**zoom if parts[1] else 1.0,
        ROLL * roll if parts[2] else 0.0,
        random.random() < 0.5,
    )


def render_clip(clip: Clip) -> ClipRendering:
    """Render a clip; one in which nothing moves repeats the scene's own picture, bit for bit.

    Raises `UserError` if the emoji font is missing.
    """
    # The scene's parts, and each thing's track: its own path [F, N, 4] seen through the camera [F, 4]
    place, horizon = draw_place(clip.scene)
    figures = place_figures(clip.scene, horizon)
    ground = np.asarray(place.convert("RGB"), dtype=np.float32)
    camera = trace_camera(clip)
    moving = [*range(len(figures))] if clip.scene.pair else [0]
    paths = np.stack([trace_thing(clip, f, i in moving) for i, f in enumerate(figures)], axis=1)
    tracks = np.stack([_view_things(camera[t], paths[t], figures, clip, horizon) for t in range(clip.frames)])

    # Nothing moves: the still picture, bit for bit
    if not clip.move and not clip.travels:
        still = render(clip.scene)
        flow = np.zeros((clip.frames - 1, SIZE, SIZE, 2), np.float32)
        return ClipRendering((still.image,) * clip.frames, (still.masks,) * clip.frames, tracks, camera, flow)

    # Frame by frame: the place as the camera sees it, then the things on it
    sprites = [_Sprite.of(figure) for figure in figures]
    frames, masks = [], []
    for t in range(clip.frames):
        canvas = _warp_place(ground, camera[t], horizon, clip).convert("RGBA")
        frame_masks = []
        for i, figure in enumerate(figures):
            stands = not clip.travels and i not in moving
            canvas, mask = draw_figure(canvas, figure) if stands else sprites[i].draw(canvas, tracks[t, i])
            frame_masks.append(mask)
        picture = canvas.convert("RGB")
        frames.append(STYLES[clip.scene.style](picture) if clip.scene.style else picture)
        masks.append(tuple(frame_masks))
    flow = _compute_flow(clip, camera, tracks, masks, horizon)
    return ClipRendering(tuple(frames), tuple(masks), tracks, camera, flow)


# Paths -------------------------------------------------------------------------------------------------------


def trace_thing(clip: Clip, figure: Figure, moves: bool) -> Floats:
    """The path [F, 4] of one thing without the camera: x, y of its middle, relative size, turn in degrees."""
    # u: time in 0…1; displacement: 0 half way; wave: one oscillation of a clip or more
    u = np.linspace(0, 1, clip.frames) if clip.frames > 1 else np.zeros(1)
    pace = SPEEDS[clip.speed] if moves else 0.0
    x, y, size, turn = np.zeros_like(u), np.zeros_like(u), np.ones_like(u), np.zeros_like(u)
    wave, displacement = np.sin(2 * np.pi * u * max(1.0, pace)), pace * (u - 0.5)
    match clip.move if moves else "":
        case "left" | "right":
            x = (1 if clip.move == "right" else -1) * SLIDE * displacement
        case "up" | "down":
            y = (1 if clip.move == "down" else -1) * SLIDE * 0.8 * displacement
        case "grow" | "shrink":
            size = GROWTH ** ((1 if clip.move == "grow" else -1) * displacement)
        case "clockwise" | "counterclockwise":
            turn = (1 if clip.move == "clockwise" else -1) * TURN * displacement
        case "bounce":
            y = -18 * pace * np.abs(np.sin(2 * np.pi * u))
        case "swing":
            turn = 24 * pace * wave
        case "circle":
            x, y = 15 * np.cos(2 * np.pi * u * pace), 12 * np.sin(2 * np.pi * u * pace)
        case "shake":
            x = 4 * pace * np.sin(2 * np.pi * 4 * u)
        case "pulse":
            size = 1.25 ** (pace * wave)
        case "zigzag":
            x, y = SLIDE * displacement, 10 * np.abs((4 * u) % 2 - 1) - 5
    return follow_path(figure, x, y, size, turn)


def follow_path(
    figure: Figure, x: NDArray[Any], y: NDArray[Any], size: NDArray[Any], turn: NDArray[Any]
) -> Floats:
    """The path [F, 4] of a thing by offsets [F] from its position; the whole path is shifted into the picture."""
    half = figure.size * size / 2
    middle_x, middle_y = figure.x + x, figure.foot - figure.size / 2 + y
    middle_x += _shift_inside(middle_x, half)
    middle_y += _shift_inside(middle_y, half)
    return np.stack([middle_x, middle_y, size, turn], axis=-1).astype(np.float32)


def _shift_inside(middle: NDArray[Any], half: NDArray[Any]) -> float:
    """The shift of a whole path that keeps the thing in the picture, if it fits."""
    low, high = float((middle - half).min()), float((middle + half).max())
    if high - low > SIZE:
        return SIZE / 2 - (low + high) / 2
    return max(0.0, -low) - max(0.0, high - SIZE)


def trace_camera(clip: Clip) -> Floats:
    """The camera's path [F, 4]: how far a pan has gone (x, y), zoom, and the picture's turn in degrees."""
    u = np.linspace(0, 1, clip.frames) if clip.frames > 1 else np.zeros(1)
    progress = SPEEDS[clip.speed] * u
    path = np.tile(np.array([0, 0, 1, 0], np.float32), (clip.frames, 1))
    if (journey := clip.journey) is not None:
        # A journey's own end point, eased by smoothstep
        progress = u * u * (3 - 2 * u) if journey.ease else u
        values = journey.x * progress, journey.y * progress, journey.zoom**progress, journey.roll * progress
        return np.stack(values, axis=-1).astype(np.float32)
    match clip.camera:
        case "pan-left" | "pan-right":
            path[:, 0] = (1 if clip.camera == "pan-right" else -1) * PAN * progress
        case "pan-up" | "pan-down":
            path[:, 1] = (1 if clip.camera == "pan-down" else -1) * PAN * 0.6 * progress
        case "zoom-in" | "zoom-out":
            path[:, 2] = ZOOM ** ((1 if clip.camera == "zoom-in" else -1) * progress)
        case "roll-left" | "roll-right":
            path[:, 3] = (1 if clip.camera == "roll-left" else -1) * ROLL * progress
    return path


def pan_rate(y: Any, horizon: float, clip: Clip) -> Any:
    """The share of a sideways pan by which the ground at height y moves: FAR at the horizon, 1 at the bottom."""
    if clip.scene.place in FLOATING or clip.scene.place == "on a white background":
        return np.full_like(np.asarray(y, dtype=np.float64), FAR)
    return FAR + (1 - FAR) * np.clip((np.asarray(y) - horizon) / (SIZE - horizon), 0, 1)


def thing_rate(figure: Figure, horizon: float, clip: Clip) -> float:
    """The share of a sideways pan by which a thing moves: as the ground at its foot, fully if it floats."""
    return 1.0 if clip.scene.place in FLOATING else float(pan_rate(figure.foot, horizon, clip))


def _view_things(camera: Floats, things: Floats, figures: list[Figure], clip: Clip, horizon: float) -> Floats:
    """Things [N, 4] as seen through the camera of one frame."""
    pan_x, pan_y, zoom, roll = (float(value) for value in camera)

    # A pan moves near things by more
    viewed = things.copy()
    for i, figure in enumerate(figures):
        viewed[i, 0] -= pan_x * thing_rate(figure, horizon, clip)
        viewed[i, 1] -= pan_y

    # Roll and zoom about the frame's middle
    turn = math.radians(roll)
    x, y = viewed[:, 0] - SIZE / 2, viewed[:, 1] - SIZE / 2
    viewed[:, 0] = SIZE / 2 + zoom * (math.cos(turn) * x - math.sin(turn) * y)
    viewed[:, 1] = SIZE / 2 + zoom * (math.sin(turn) * x + math.cos(turn) * y)
    viewed[:, 2] *= zoom
    viewed[:, 3] += roll
    return viewed


# Drawing -----------------------------------------------------------------------------------------------------


def _list_pixels() -> tuple[NDArray[Any], NDArray[Any]]:
    """(x, y) of the middles of all pixels, [H, W] each."""
    y, x = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    return x, y


def _map_to_place(
    x: NDArray[Any], y: NDArray[Any], camera: Floats, horizon: float, clip: Clip
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The points of the place at points of a frame."""
    pan_x, pan_y, zoom, roll = (float(value) for value in camera)
    turn = math.radians(roll)
    dx, dy = (x - SIZE / 2) / zoom, (y - SIZE / 2) / zoom
    x = SIZE / 2 + math.cos(turn) * dx + math.sin(turn) * dy
    y = SIZE / 2 - math.sin(turn) * dx + math.cos(turn) * dy
    y = y + pan_y
    return x + pan_x * pan_rate(y, horizon, clip), y


def _map_from_place(
    x: NDArray[Any], y: NDArray[Any], camera: Floats, horizon: float, clip: Clip
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The inverse of `_map_to_place`."""
    pan_x, pan_y, zoom, roll = (float(value) for value in camera)
    turn = math.radians(roll)
    x = x - pan_x * pan_rate(y, horizon, clip) - SIZE / 2
    y = y - pan_y - SIZE / 2
    return (
        SIZE / 2 + zoom * (math.cos(turn) * x - math.sin(turn) * y),
        SIZE / 2 + zoom * (math.sin(turn) * x + math.cos(turn) * y),
    )


def _warp_place(ground: Floats, camera: Floats, horizon: float, clip: Clip) -> Image.Image:
    x, y = _map_to_place(*_list_pixels(), camera, horizon, clip)
    return Image.fromarray(sample_bilinear(ground, x - 0.5, y - 0.5).round().clip(0, 255).astype(np.uint8))


def sample_bilinear(picture: Floats, x: NDArray[Any], y: NDArray[Any]) -> Floats:
    """A picture [H, W, C] sampled bilinearly at points of its grid; beyond its edges it continues mirrored."""
    height, width = picture.shape[:2]
    x, y = _mirror(x, width), _mirror(y, height)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    # (1 − dy)·((1 − dx)·p00 + dx·p01) + dy·((1 − dx)·p10 + dx·p11)
    across, down = (x - left)[..., None], (y - top)[..., None]
    above = picture[top, left] * (1 - across) + picture[top, right] * across
    below = picture[bottom, left] * (1 - across) + picture[bottom, right] * across
    sampled: Floats = (above * (1 - down) + below * down).astype(np.float32)
    return sampled


def _mirror(positions: NDArray[Any], count: int) -> NDArray[Any]:
    last = count - 1
    mirrored: NDArray[Any] = last - np.abs(last - np.mod(positions, 2 * last))
    return mirrored


@dataclass(frozen=True, eq=False)
class _Sprite:
    """A thing drawn large once, from which all frames are resampled, so that it moves evenly between pixels."""

    figure: Figure
    pixels: Image.Image  # premultiplied
    middle: tuple[float, float]  # of the body, in its own pixels

    @staticmethod
    def of(figure: Figure) -> _Sprite:
        large = replace(figure, size=figure.size * SUPERSAMPLING)
        sprite, _, _ = draw_sprite(large)
        return _Sprite(figure, sprite.convert("RGBa"), (sprite.width / 2, sprite.height - large.size / 2))

    def draw(self, canvas: Image.Image, pose: Floats) -> tuple[Image.Image, Image.Image]:
        """The canvas with the thing and its shadow, and the thing's mask."""
        x, y, size, turn = (float(value) for value in pose)
        if self.figure.shadow:
            canvas = canvas.copy()
            canvas.paste((12, 12, 24), mask=self._shade(x, y, size))
        # The affine map from pixels of the supersampled picture to pixels of the sprite
        angle, (mx, my) = math.radians(turn), self.middle
        a, b = math.cos(angle) / size, math.sin(angle) / size
        cx, cy = x * SUPERSAMPLING, y * SUPERSAMPLING
        back = (a, b, mx - a * cx - b * cy, -b, a, my + b * cx - a * cy)
        side = SIZE * SUPERSAMPLING
        layer = self.pixels.transform(
            (side, side), Image.Transform.AFFINE, back, resample=Image.Resampling.BILINEAR
        )
        layer = layer.reduce(SUPERSAMPLING).convert("RGBA")
        result = canvas.copy()
        result.alpha_composite(layer)
        return result, layer.getchannel("A")

    def _shade(self, x: float, y: float, size: float) -> Image.Image:
        width, foot = self.figure.size * size * 0.8, y + self.figure.size * size / 2
        dark = Image.new("L", (SIZE * SUPERSAMPLING,) * 2, 0)
        box = (x - width / 2, foot - width * 0.11, x + width / 2, foot + width * 0.07)
        ImageDraw.Draw(dark).ellipse(
            tuple(SUPERSAMPLING * edge for edge in box), fill=round(255 * self.figure.shadow)
        )
        return dark.filter(ImageFilter.GaussianBlur(2 * SUPERSAMPLING)).reduce(SUPERSAMPLING)


# Ground truth ------------------------------------------------------------------------------------------------


def _compute_flow(
    clip: Clip, camera: Floats, tracks: Floats, masks: list[tuple[Image.Image, ...]], horizon: float
) -> Floats:
    """The flow [F − 1, H, W, 2]: the place's, and each thing's inside its mask."""
    x, y = _list_pixels()
    flow = np.zeros((clip.frames - 1, SIZE, SIZE, 2), np.float32)
    for t in range(clip.frames - 1):
        # A pixel's point of the place, and that point in the next frame
        point = _map_to_place(x, y, camera[t], horizon, clip)
        next_x, next_y = _map_from_place(*point, camera[t + 1], horizon, clip)
        flow[t] = np.stack([next_x - x, next_y - y], axis=-1)
        for i, mask in enumerate(masks[t]):
            inside = np.asarray(mask) > 127
            flow[t][inside] = _compute_thing_flow(x, y, tracks[t, i], tracks[t + 1, i])[inside]
    return flow


def _compute_thing_flow(x: NDArray[Any], y: NDArray[Any], pose: Floats, next_pose: Floats) -> Floats:
    scale, turn = float(next_pose[2] / pose[2]), math.radians(float(next_pose[3] - pose[3]))
    dx, dy = x - pose[0], y - pose[1]
    new_x = next_pose[0] + scale * (math.cos(turn) * dx - math.sin(turn) * dy)
    new_y = next_pose[1] + scale * (math.sin(turn) * dx + math.cos(turn) * dy)
    return np.stack([new_x - x, new_y - y], axis=-1).astype(np.float32)
