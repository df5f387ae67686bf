"""Planning a motion from a prompt's words, for models without a motion adapter that is trained on them.

    plan_motion("a dog in a park, moving left", frames=16).tracks    # of the dog of "a dog in a park"

The path is that of `backbone.world.clip`. A control network for poses places the thing in one drawing, from which it is
cut out, and it moves over the drawing (`customize.clips.planned.cut_out`). Or each frame is sampled under its own pose:
noise that all frames share keeps the background still, and `link_frames` keeps the thing's appearance. If the camera
moves, the drawing is larger than a frame, and the frames are views of it. If the first frame is a given picture, the
thing is cut out of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbone.conditions.control import Control
from backbone.io.console import UserError
from backbone.media.control.camera import CameraPath, flat_path
from backbone.media.control.views import Views, plan_views
from backbone.models.control import Condition, condition_clips, list_embedded_controls
from backbone.models.model import Backbone
from backbone.world.clip import Clip, follow_path, trace_camera, trace_thing
from backbone.world.maps import draw_sticks
from backbone.world.motions import CAMERAS, MOTIONS, cut_camera, cut_motion, list_motion_words
from backbone.world.parse import parse_scene
from backbone.world.rendering.record import Stick
from backbone.world.rendering.render import SIZE, Figure, place_figures, span_stick
from backbone.world.scene import Scene
from backbone.world.words import Thing
from customize.clips.planned.cut_out import Bools, CutOut, Floats
from customize.clips.planned.in_picture import cut_thing, find_box, name_thing
from customize.clips.planned.parallax import find_nearness
from customize.clips.planned.surroundings import lay_into
from customize.clips.planned.track import add_gait

POSE = "pose"
TRACK = "track"  # the move of a thing that follows a given track
ANYTHING = Scene((Thing("dog"),), "in a park")  # stands where a thing of moji's world stands
SLENDER = 0.9  # width over height of an unknown thing
ROOM = 8.0  # pixels of the world by which a thing may be drawn beside its pose


@dataclass(frozen=True, eq=False)
class Shot:
    """A prompt without its words of the camera, and the camera's views of the drawing; None for a still camera."""

    words: str
    views: Views | None = None


@dataclass(frozen=True, eq=False)
class PlannedClip:
    """The plan of a clip: the picture model's prompt, the thing's pose in each frame, and the camera's views.

    frames     number of frames to sample: one if only the camera or a cut-out thing moves
    move       one of `MOTIONS`, or `TRACK`; "" for none
    picture    the first frame, if given: the drawing continues around it
    cut_out    the thing that moves over the drawing or the picture, unless every frame is sampled
    track      [F, 4]: the track of what moves, if it is not given by words
    """

    prompt: str
    frames: int
    move: str = ""
    condition: Condition | None = None
    views: Views | None = None
    picture: Image.Image | None = None
    cut_out: CutOut | None = None
    track: Floats | None = None

    @property
    def controls(self) -> tuple[Control, ...]:
        """The control inputs of the drawing."""
        return () if self.condition is None else (self.condition.control,)

    @property
    def is_drawn(self) -> bool:
        """Whether the camera sees only the given picture, so that nothing has to be sampled."""
        return self.picture is not None and (self.views is None or self.views.canvas == self.views.size)

    def look_at(self, images: list[Image.Image]) -> list[Image.Image]:
        """The clip's frames, from the sampled ones."""
        if self.picture is not None:
            around = None if self.is_drawn else self.views
            images = [self.picture if around is None else lay_into(images[0], around, self.picture)]
        if self.cut_out is not None:
            images = self.cut_out.move(images[0])
        return images if self.views is None else self.views.look_at(images)


def aim_camera(
    prompt: str,
    frames: int,
    size: tuple[int, int],
    factor: int,
    path: CameraPath | None = None,
    *,
    around: bool = False,
    tracked: bool = False,
) -> Shot:
    """The shot of a prompt: its camera goes along `path`, or as its own words say.

    size    (width, height) of a frame in pixels
    factor  pixels of a latent's side
    around  whether the first frame is a given picture
    tracked whether a track says what moves in it

    Raises `UserError` as `plan_views`, and for a picture in which nothing moves.
    """
    cut = cut_camera(prompt)
    if path is None and not cut.move:
        if around and not tracked and not cut_motion(prompt).move:
            raise UserError(
                f"“{prompt}” moves nothing in the picture and no camera over it. Say how (“a dog, moving left”, "
                "“camera panning left”), or give --camera."
            )
        return Shot(prompt)
    if path is None:
        clip = Clip(ANYTHING, camera=cut.move, speed=cut.speed, frames=frames)
        path = flat_path(trace_camera(clip), SIZE, size[0] / size[1], CAMERAS[cut.move][0])
    return Shot(cut.prompt, plan_views(path, size, multiple=4 * factor, grid=factor, around=around))


def plan_clip(
    model: Backbone,
    shot: Shot,
    frames: int,
    size: tuple[int, int],
    nouns: Mapping[str, str],
    *,
    redraw: bool = False,
    track: Floats | None = None,
) -> PlannedClip:
    """The clip of a shot by a model whose motions are planned if it has a network for poses.

    Under a camera poses also hold what stands still, which a drawing larger than a frame would else show twice. With
    `redraw` every frame is drawn by its pose, and nothing is cut out.
    """
    views = shot.views
    if POSE not in list_embedded_controls(model):
        return PlannedClip(shot.words, frames if views is None else 1, views=views)
    motion = plan_motion(shot.words, frames, nouns=nouns, track=track).in_frame(size)
    if views is None and not motion.move:
        return PlannedClip(motion.still_prompt, frames)
    maps, cut_out = motion.maps if redraw and motion.move else [motion.at_rest], None
    if motion.move and not redraw:
        cut_out = motion.cut_out(size, (0, 0) if views is None else views.corner)
    if views is not None:
        tracks = motion.tracks if motion.move else motion.tracks[:1]
        views = views.with_nearness(
            find_nearness(motion.scene, motion.figures, tracks, views, slender=SLENDER)
        )
        maps = [views.lay_out(hint) for hint in maps]
    condition = condition_clips(model, POSE, maps, size if views is None else views.canvas)
    return PlannedClip(
        motion.still_prompt, len(maps), motion.move, condition, views, cut_out=cut_out, track=track
    )


def plan_in_picture(
    shot: Shot,
    frames: int,
    picture: Image.Image,
    find: Callable[[str, str], Bools],
    behind: Image.Image | None = None,
    track: Floats | None = None,
) -> PlannedClip:
    """The clip of a shot whose first frame is a picture: the thing that moves by its words is cut out of it.

    find    (thing, another thing or "") → the thing's pixels [H, W] in the picture
    behind  the picture without the thing, if given
    track   its track [F, 4], if it is not given by words
    """
    motion, views = cut_motion(shot.words), shot.views
    move = motion.move if track is None else TRACK
    if not move:
        return PlannedClip(shot.words, 1, views=views, picture=picture)

    # The thing as a figure of the world (128 pixels a side): its size, middle and foot
    thing = find(*name_thing(motion.prompt, motion.thing))
    left, top, right, bottom = find_box(thing)
    scale, size = np.array(picture.size) / SIZE, max(right - left, bottom - top)
    figure = Figure(
        Thing("dog"),
        size / scale[1],
        (left + right) / 2 / scale[0],
        (top + bottom + size) / 2 / scale[1],
        False,
        0.0,
    )

    # Its track [F, 4] there, then in pixels of the picture and relative to the first frame
    clip = Clip(ANYTHING, motion.move, speed=motion.speed, frames=frames)
    way = trace_thing(clip, figure, True) if track is None else track
    if motion.walks and track is None:
        way = add_gait(way, figure.size)
    shifts = (way - way[0]).astype(float)  # the first frame is the picture
    shifts[:, :2] *= scale
    shifts[:, 2] = way[:, 2] / way[0, 2]

    # The picture's place in the views' drawing
    x, y = (0, 0) if views is None else views.corner
    wide, high = picture.size if views is None else views.canvas
    margins = [(y, high - picture.height - y), (x, wide - picture.width - x)]
    cut_out = CutOut(
        [(left + x, top + y, right + x, bottom + y)],
        shifts[:, None],
        room=ROOM * float(scale[0]),
        things=np.pad(thing, margins)[None],
        behind=None if behind is None else _pad_with_unknown(behind, margins),
    )
    # What continues the picture is drawn without the words of the thing, which would appear there once more
    prompt = cut_thing(motion.prompt) or motion.prompt
    return PlannedClip(prompt, 1, move, views=views, picture=picture, cut_out=cut_out, track=track)


def _pad_with_unknown(image: Image.Image, margins: Sequence[tuple[int, int]]) -> Floats:
    """A picture's pixels [H, W, 3] in 0…1 with this many unknown rows and columns around it."""
    pixels = np.asarray(image.convert("RGB"), dtype=float) / 255
    return np.pad(pixels, (*margins, (0, 0)), constant_values=np.nan)


def describe_plan(prompt: str, plan: PlannedClip) -> list[str]:
    """The plan for a prompt, in sentences."""
    sentences = []
    if plan.views is not None:
        width, height = plan.views.canvas
        area = "drawing" if plan.picture is None else "drawing around the picture"
        manner = "without parallax" if plan.views.nearness is None else "what is near passes faster"
        sentences.append(f"the camera moves over one {area} of {width} × {height} pixels, {manner}.")
    if plan.move and plan.picture is not None:
        has_background = plan.cut_out is not None and plan.cut_out.behind is not None
        behind = (
            "--behind is seen where it was"
            if has_background
            else "its place is filled from the left and the right"
        )
        sentences.append(f"{_describe_move(plan.move)}: it is cut out of the picture, and {behind}.")
    elif plan.move:
        manner = " by a pose in each frame" if plan.cut_out is None else ", cut out of one drawing"
        sentences.append(f"drawn as “{plan.prompt}”, {_describe_move(plan.move)}{manner}.")
    return [f"“{prompt}”: {sentence}" for sentence in sentences] or [_describe_still(prompt)]


def _describe_still(prompt: str) -> str:
    """Why nothing moves."""
    motions = " and ".join(f"“{words}”" for words in list_motion_words(prompt))
    if motions:
        return (
            f"“{prompt}” stands still: {motions} is not one motion that can be taken out of the sentence. Name one "
            "alone, at the end or between commas: “a dog in a park, moving left”."
        )
    return f"“{prompt}” names no motion (“moving left”, “growing” …), so the clip stands still."


def _describe_move(move: str) -> str:
    return "moving along the track" if move == TRACK else MOTIONS[move][0]


@dataclass(frozen=True, eq=False)
class Motion:
    """The motion that a prompt's words describe.

    still_prompt  the prompt without them
    move     one of `MOTIONS`, or `TRACK`; "" for none
    scene    that the rest describes, and `figures` its things where they stand in the world
    tracks   [F, N, 4]: x, y of each thing's middle, its growth, its turn in degrees
    home     [N, 4]: the same where nothing moves
    canvas   width and height of a frame in the units of both; the shorter is 128
    """

    still_prompt: str
    move: str
    scene: Scene
    figures: tuple[Figure, ...]
    tracks: NDArray[np.floating]
    home: NDArray[np.floating]
    canvas: tuple[int, int] = (SIZE, SIZE)

    def in_frame(self, size: tuple[int, int]) -> Motion:
        """The motion in frames of `size` (width, height): places are spread over them, and things keep their shape.

        A thing is as large as the shorter side lets it be, and its foot stays at its share of the height.
        """
        wide, high = np.array(size) / min(size)
        heights = np.array([figure.size for figure in self.figures])

        def spread(places: NDArray[np.floating]) -> NDArray[np.floating]:
            spread_places = places.copy()
            spread_places[..., 0] *= wide
            spread_places[..., 1] = places[..., 1] * high + heights / 2 * (high - 1)
            return spread_places

        canvas = (round(SIZE * float(wide)), round(SIZE * float(high)))
        return replace(self, tracks=spread(self.tracks), home=spread(self.home), canvas=canvas)

    @property
    def maps(self) -> list[Image.Image]:
        """A map of poses, of the canvas's size, for each frame."""
        return [self._draw(frame) for frame in self.tracks]

    @property
    def at_rest(self) -> Image.Image:
        """The map of poses, of the canvas's size, where nothing moves."""
        return self._draw(self.home)

    def _draw(self, places: NDArray[np.floating]) -> Image.Image:
        return draw_sticks(
            [_make_stick(figure, *at) for figure, at in zip(self.figures, places, strict=True)], self.canvas
        )

    def cut_out(self, size: tuple[int, int], corner: tuple[int, int]) -> CutOut:
        """The moving things, cut out of a drawing with the picture of `size` (width, height) at `corner` (x, y)."""
        scale, at = min(size) / SIZE, np.array(corner)
        halves = [np.array([SLENDER, 1.0]) * figure.size / 2 for figure in self.figures]
        ends = [
            np.concatenate([(place[:2] + side * half) * scale + at for side in (-1, 1)])
            for place, half in zip(self.home, halves, strict=True)
        ]
        shifts = self.tracks - self.home * np.array([1, 1, 0, 0])
        shifts[..., :2] *= scale
        return CutOut([(a, b, c, d) for a, b, c, d in ends], shifts, room=ROOM * scale)


def plan_motion(
    prompt: str, frames: int, *, nouns: Mapping[str, str] | None = None, track: Floats | None = None
) -> Motion:
    """The motion that a prompt's words mean, or a `track` [frames, 4] in their place; without both all stand still.

    `nouns` says what stands for words that moji's world does not have, as for a concept's token. Of two things the
    first one moves, or the one that the words name (“the dog moving left”); of a pair both.
    """
    cut = cut_motion(prompt)
    scene = imagine(cut.prompt, nouns or {})
    figures = place_figures(scene, scene.horizon)
    index = next((k for k, thing in enumerate(scene.things) if thing.noun == cut.thing), 0)
    moving = range(len(figures)) if scene.pair else (index,)
    clip = Clip(scene, cut.move, speed=cut.speed, frames=frames)

    def trace(figure: Figure, moves: bool) -> NDArray[np.floating]:
        if track is not None and moves:
            return follow_path(figure, *_center_track(track).T)
        way = trace_thing(clip, figure, moves)
        return add_gait(way, figure.size) if cut.walks and moves else way

    tracks = np.stack([trace(figure, k in moving) for k, figure in enumerate(figures)], axis=1)
    home = np.concatenate([trace_thing(Clip(scene, frames=1), figure, False) for figure in figures])
    return Motion(cut.prompt, cut.move if track is None else TRACK, scene, tuple(figures), tracks, home)


def _center_track(track: Floats) -> Floats:
    """A track shifted so that it reaches as far to the left as to the right, and as far up as down."""
    low, high = track[:, :2].min(0), track[:, :2].max(0)
    return np.concatenate([track[:, :2] - (low + high) / 2, track[:, 2:]], axis=-1)


def imagine(words: str, nouns: Mapping[str, str]) -> Scene:
    """The scene that words describe; `ANYTHING` if the world does not have them."""
    for word, noun in nouns.items():
        words = " ".join(words.replace(word, noun).split())
    try:
        return parse_scene(words)
    except UserError:
        return ANYTHING


def _make_stick(figure: Figure, x: float, y: float, scale: float, turn: float) -> Stick:
    size = figure.size * float(scale)
    posed = replace(figure, size=size, x=float(x), foot=float(y) + size / 2, angle=float(turn))
    return span_stick(posed, SLENDER * size, size)
