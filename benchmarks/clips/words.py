"""How well clips follow their words: direction, stillness, camera, flicker, and what a judge names in every frame.

    python -m benchmarks.clips --clips 300 --each-frame-drawn 36        40 minutes of one core

Clips of the world's benchmark seeds are drawn from their captions and measured beside others: the floor, where the
adapter is left out and every frame is a picture by itself, the bound, the true clip through the autoencoder, and where
the model has a network for poses, clips whose motion is planned from the words (`customize.clips.planned.plan`): of a
thing cut out of one drawing, and of one drawn anew in every frame. Where the adapter brings a camera with it
(`camera.safetensors`), its clips are drawn once more with the camera's words left out and its path in their place. The
true clip's first picture is moved as `customize clip --image` moves it, and with `--sparsectrl` clips of the adapter
begin from it. What moves is measured from the pixels alone, by a similarity fitted to each pair of frames (Lucas &
Kanade 1981): of the whole frame, weighted by what changes, for things, of its border for the camera. A direction is
right where its part is the word's, and by more than the least that counts. The track's error is how far what moves is
from where it is in the true clip, measured alike; the camera's, how far the first frame's corners are. Slides are asked
for slowly, as usual and fast: their speed is the slope of how far they were to go and went, 1 where all go as far as
they say. Flicker is what is left of it along the flow. True clips need the emoji font; without it the bound and both
errors are left out. Writes `table.md`, `table.json` and `sheet.png`, strips of the first clips drawn every way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from backbone.adapters.motion import Moves, set_in_motion
from backbone.conditions.control import Control
from backbone.evaluation.flow import warped_flicker
from backbone.evaluation.image_metrics import psnr
from backbone.evaluation.motion import (
    DRIFT,
    PARTS,
    SIDE,
    corner_error,
    follow_border,
    matches_move,
    measure_movement,
    trace_movement,
    track_error,
)
from backbone.evaluation.statistics import Interval, bootstrap_mean, wilson_interval
from backbone.io.console import UserError, notify
from backbone.io.files import write_json, write_text
from backbone.io.progress import progress
from backbone.media.clips import choose_strip
from backbone.media.control.camera import embed_rays, flat_path
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.transforms import to_image, to_tensor
from backbone.models.clips.camera import CAMERA_WEIGHTS, Camera, open_camera
from backbone.models.clips.frames import link_frames
from backbone.models.clips.sparse import open_sparsectrl
from backbone.models.control import list_embedded_controls
from backbone.models.model import Backbone
from backbone.models.sample import Frames, GivenLatents, Request, sample_latents
from backbone.world.clip import Clip, render_clip, trace_camera, trace_thing
from backbone.world.motions import CAMERAS, MOTIONS
from backbone.world.rendering.render import find_font, place_figures
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from benchmarks.judges.classifier import Classifier, load_classifier
from customize.clips.planned.in_picture import cut_thing, find_named
from customize.clips.planned.plan import POSE, aim_camera, plan_clip, plan_in_picture
from customize.clips.planned.surroundings import give_picture

TRUE, PLANNED, REDRAWN = "true clips, decoded", "planned from the words", "planned, every frame drawn"
MOVED = "the true first picture, moved"
QUICK = (TRUE, PLANNED, MOVED)  # rows of which a clip takes no more than a picture
SLIDES, PACES = ("left", "right", "up", "down"), ("", "slowly", "fast")
EXACT = 99.0  # dB, of a first frame that is the true one itself
SHOWN = 12  # clips of the sheet
THINGS = (SLIDES, ("grow", "shrink"), ("clockwise", "counterclockwise"))
Floats = NDArray[np.float64]
Way = Callable[[int, Clip], list[Image.Image]]


@dataclass(frozen=True)
class Row:
    """The metrics of a clip.

    right    None if no word names a direction
    still    None if something is to move
    flicker  mean change of a pixel from frame to frame, along the flow
    colours  None if the prompt names no colour
    asked    pixels that a slide should go, None for other words
    went     pixels that it went in that direction
    first    PSNR of the first frame to the true clip's, None without one
    corners  pixels from the true clip's, None if the camera stands or there is no true clip
    track    the same for the thing that moves, None if nothing is to move
    """

    move: str
    right: bool | None
    still: bool | None
    flicker: float
    corners: float | None
    track: float | None
    nouns: float
    places: float
    colours: float | None = None
    asked: float | None = None
    went: float | None = None
    first: float | None = None


# Measuring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """How a true clip moves: its corners [F, 4, 2] where its camera does, else the track [F, 4] of its things."""

    corners: Floats | None = None
    track: Floats | None = None
    first: Image.Image | None = None

    @classmethod
    def of(cls, clip: Clip) -> Truth:
        """The motion of a true clip, measured like that of sampled clips."""
        frames = render_clip(clip).frames
        if clip.camera:
            return cls(corners=follow_border(frames), first=frames[0])
        return cls(track=trace_movement(frames) if clip.move else None, first=frames[0])


def measure(clip: Clip, film: Sequence[Image.Image], classifier: Classifier, truth: Truth = Truth()) -> Row:
    """All metrics of one clip."""
    direction = clip.camera or clip.move
    frames = [frame.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for frame in film]
    movement = measure_movement(frames, camera=bool(clip.camera))
    predictions = classifier.classify(frames)
    thing = clip.scene.things[0]
    colour, slide = thing.colour, measure_slide(clip)
    return Row(
        move=direction,
        right=matches_move(direction, movement) if direction in PARTS else None,
        still=None if direction else bool(np.hypot(movement.x, movement.y) < DRIFT * len(frames)),
        flicker=warped_flicker(frames),
        corners=None if truth.corners is None else corner_error(frames, truth.corners),
        track=None if truth.track is None else track_error(trace_movement(frames), truth.track),
        nouns=float(np.mean([prediction.glyph == thing.noun for prediction in predictions])),
        places=float(
            np.mean([next(iter(prediction.place)) == clip.scene.place for prediction in predictions])
        ),
        colours=float(np.mean([next(iter(prediction.colour)) == colour for prediction in predictions]))
        if colour
        else None,
        asked=None if slide is None else float(np.linalg.norm(slide)),
        first=None if truth.first is None else min(EXACT, psnr(to_tensor(frames[0]), to_tensor(truth.first))),
        went=None
        if slide is None
        else float(np.dot([movement.x, movement.y], slide) / np.linalg.norm(slide)),
    )


def measure_slide(clip: Clip) -> Floats | None:
    """How far [x, y], in pixels, the thing of a clip is to slide; None for another word."""
    if clip.camera or clip.move not in SLIDES:
        return None
    (figure, *_) = place_figures(clip.scene, clip.scene.horizon)
    track = trace_thing(clip, figure, True)
    return np.asarray(track[-1, :2] - track[0, :2], dtype=np.float64)


# Clips -------------------------------------------------------------------------------------------------------


def select_clips(count: int, frames: int) -> list[Clip]:
    """`count` clips of the benchmark's seeds, of one thing each: all directed words equally often, every sixth still.

    Slides have each pace equally often.
    """
    words = [*(move for move in MOTIONS if move in PARTS), *CAMERAS]
    clips: list[Clip] = []
    for seed in BENCHMARK_SEEDS:
        if len(clips) == count:
            return clips
        scene: Scene = sample_scene(seed)
        if len(scene.things) > 1 or scene.pair or scene.style or not is_fair(scene):
            continue
        number = len(clips) - len(clips) // 6
        word = "" if len(clips) % 6 == 5 else words[number % len(words)]
        move, camera = word if word in MOTIONS else "", word if word in CAMERAS else ""
        speed = PACES[number // len(words) % len(PACES)] if move in SLIDES else ""
        clips.append(Clip(scene, move, camera, speed, frames=frames))
    return clips


def main(
    model: Annotated[str, typer.Option(help="The picture model.")] = "moji",
    motion: Annotated[str, typer.Option(help="The motion adapter; none: the floor and the bound.")] = "",
    sparsectrl: Annotated[
        str, typer.Option(help="A SparseCtrl that reads pictures: its clips begin from the true first one.")
    ] = "",
    clips: Annotated[int, typer.Option(help="How many clips.", min=1)] = 300,
    each_frame_drawn: Annotated[
        int | None,
        typer.Option(
            help="Of how many the rows are that draw every frame, which takes long.  [default: all]"
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of each.", min=2)] = 16,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.", min=1)] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.", min=1)] = 4.0,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/clips"),
) -> None:
    """Draws, measures and writes the table."""
    selected, classifier, true = select_clips(clips, frames), load_classifier(), has_font()
    if sparsectrl and not (true and motion):
        raise UserError(
            "--sparsectrl begins from true pictures, beside a --motion. Give that, and the emoji font."
        )
    ways = make_ways(model, motion, steps, guidance, true=true)
    if sparsectrl:
        ways["begun from the true first picture"] = begin_from_picture(
            model, motion, sparsectrl, steps, guidance
        )
    rows: dict[str, list[Row]] = defaultdict(list)
    strips, titles = list[list[Cell]](), list[str]()
    few = clips if each_frame_drawn is None else min(clips, each_frame_drawn)
    with progress(sum(clips if name in QUICK else few for name in ways), "measuring clips") as bar:
        for number, clip in enumerate(selected):
            truth = Truth.of(clip) if true else Truth()
            for name, way in ways.items():
                if number >= few and name not in QUICK:
                    continue
                film = way(number, clip)
                rows[name].append(measure(clip, film, classifier, truth))
                if number < SHOWN:
                    strips.append([Cell(frame) for frame in choose_strip(film).values()])
                    titles.append(f"{clip.caption()}: {name}")
                bar.advance()
    save_png(out / "sheet.png", draw_sheet(strips, row_titles=titles, cell=SIDE))
    write_text(out / "table.md", format_table(rows))
    write_json(
        out / "table.json", {name: [row.__dict__ for row in way_rows] for name, way_rows in rows.items()}
    )
    typer.echo((out / "table.md").read_text())


def has_font() -> bool:
    """Whether true clips can be rendered; prints if they cannot."""
    try:
        find_font()
    except UserError as error:
        notify(
            f"{error} Without it there are no true clips, so neither the bound nor errors of tracks and cameras."
        )
        return False
    return True


def make_ways(model: str, motion: str, steps: int, guidance: float, *, true: bool) -> dict[str, Way]:
    """The table's rows by name, each a function (number, clip) → frames."""
    floor, ways = Backbone.open(model, device="cpu"), dict[str, Way]()
    if true:
        ways[TRUE] = lambda _, clip: decode_true_clip(floor, clip)
        ways[MOVED] = lambda i, clip: move_picture(floor, i, clip, steps, guidance)
    ways["without an adapter"] = lambda i, clip: draw(floor, i, clip, steps, guidance)
    if POSE in list_embedded_controls(floor):
        ways[PLANNED] = lambda i, clip: draw_planned(floor, i, clip, steps, guidance)
        ways[REDRAWN] = lambda i, clip: draw_planned(floor, i, clip, steps, guidance, redraw=True)
    if motion:
        moving = Backbone.open(model, device="cpu")
        set_in_motion(moving, Moves(motion))
        ways[motion] = lambda i, clip: draw(moving, i, clip, steps, guidance)
        if (file := Path(motion).expanduser() / CAMERA_WEIGHTS).is_file():
            camera = open_camera(moving, file)
            ways[f"{motion}, its camera on a path"] = lambda i, clip: draw(
                moving, i, clip, steps, guidance, camera=camera
            )
    return ways


def begin_from_picture(model: str, motion: str, sparsectrl: str, steps: int, guidance: float) -> Way:
    """Clips from their captions and the true clip's first picture."""
    moving = Backbone.open(model, device="cpu")
    set_in_motion(moving, Moves(motion))
    network = open_sparsectrl(moving, sparsectrl)

    def begin(number: int, clip: Clip) -> list[Image.Image]:
        side = moving.resolution
        picture = (to_tensor(render_clip(clip).frames[0].resize((side, side)))[None] + 1) / 2
        request = Request(clip.caption(), (number, 0))
        return draw_frames(moving, request, Frames(clip.frames), [network.of(picture, [0])], steps, guidance)

    return begin


def decode_true_clip(model: Backbone, clip: Clip) -> list[Image.Image]:
    """The bound: the true clip encoded and decoded by the autoencoder."""
    frames = np.stack([np.asarray(frame) for frame in render_clip(clip).frames])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return [to_image(frame) for frame in model.decode_clip(model.encode_clip(pixels)).cpu()]


def draw(
    model: Backbone, number: int, clip: Clip, steps: int, guidance: float, *, camera: Camera | None = None
) -> list[Image.Image]:
    """A clip sampled from its caption; with a `camera`, which gets the path, the caption leaves out the camera."""
    captioned, controls = clip, list[Control]()
    if camera is not None and clip.camera:
        path = flat_path(trace_camera(clip), SIDE)
        rays = embed_rays(path, (model.resolution, model.resolution))
        captioned, controls = replace(clip, camera=""), [Control.of(camera, rays).as_clip()]
    return draw_frames(
        model, Request(captioned.caption(), (number, 0)), Frames(clip.frames), controls, steps, guidance
    )


def draw_planned(
    model: Backbone, number: int, clip: Clip, steps: int, guidance: float, *, redraw: bool = False
) -> list[Image.Image]:
    """A clip as `customize clip` draws it without a motion adapter: what moves is cut out of one drawing, or drawn by a
    pose in each frame, under noise they share; where the camera moves as its views of a larger drawing."""
    shot = aim_camera(clip.caption(), clip.frames, (SIDE, SIDE), model.factor)
    plan = plan_clip(model, shot, clip.frames, (SIDE, SIDE), {}, redraw=redraw)
    frames, size = Frames(plan.frames, shared=1.0), (SIDE, SIDE) if plan.views is None else plan.views.canvas
    with link_frames(model, plan.frames):
        return plan.look_at(
            draw_frames(
                model, Request(plan.prompt, (number, 0)), frames, plan.controls, steps, guidance, size=size
            )
        )


def move_picture(model: Backbone, number: int, clip: Clip, steps: int, guidance: float) -> list[Image.Image]:
    """A clip as `customize clip --image` makes it of the true clip's first picture; still where no thing is found."""
    picture, words = render_clip(clip).frames[0].resize((SIDE, SIDE)), clip.caption()
    if not (clip.camera or clip.move):
        return [picture] * clip.frames
    if clip.camera:
        words = cut_thing(words)  # what lies around it
    try:
        shot = aim_camera(words, clip.frames, (SIDE, SIDE), model.factor, around=True)
        plan = plan_in_picture(shot, clip.frames, picture, partial(find_named, model, picture))
    except UserError:
        return [picture] * clip.frames
    if plan.is_drawn or plan.views is None:
        return plan.look_at([])
    given = give_picture(model, plan.views, picture, count=1)
    request, size = Request(plan.prompt, (number, 0)), plan.views.canvas
    return plan.look_at(draw_frames(model, request, Frames(1), (), steps, guidance, size=size, given=given))


def draw_frames(
    model: Backbone,
    request: Request,
    frames: Frames,
    controls: Sequence[Control],
    steps: int,
    guidance: float,
    *,
    size: tuple[int | None, int | None] = (None, None),
    given: GivenLatents | None = None,
) -> list[Image.Image]:
    """The frames of one clip, of `size` (width, height), around latents that are `given`."""
    (latents,) = sample_latents(
        model,
        [request],
        steps=steps,
        guidance=guidance,
        seed=0,
        frames=frames,
        controls=controls,
        size=size,
        given=given,
    )
    return [to_image(frame) for frame in model.decode_clip(latents[0]).cpu()]


def format_table(rows: Mapping[str, Sequence[Row]]) -> str:
    """Shares with 95 % intervals, in per cent; pixels of 128 a side; flicker is of 255."""
    lines = [
        "| clips | slides | grow, shrink | spins | track, px off | speed | camera's direction | camera, px off | "
        "stillness | noun | noun in all frames | colour | place | flicker | first frame, dB |",
        f"|{' --- |' * 15}",
    ]
    for name, way_rows in rows.items():
        parts = [
            [row.right for row in way_rows if row.right is not None and row.move in moves] for moves in THINGS
        ]
        camera = [row.right for row in way_rows if row.right is not None and row.move in CAMERAS]
        still = [row.still for row in way_rows if row.still is not None]
        means = {
            key: [value for row in way_rows if (value := getattr(row, key)) is not None]
            for key in ("track", "corners", "nouns", "colours", "places", "flicker", "first")
        }
        track, corners, nouns, colours, places, flicker, first = (
            _format_mean(values, 100 if key in ("nouns", "colours", "places") else 1)
            for key, values in means.items()
        )
        cells = (
            *map(_format_share, parts), track, format_speed(way_rows), _format_share(camera), corners,
            _format_share(still), nouns, _format_share([row.nouns == 1 for row in way_rows]), colours, places,
            flicker, first,
        )  # fmt: skip
        lines.append(f"| {name} ({len(way_rows)}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_speed(rows: Sequence[Row]) -> str:
    """The least-squares slope of how far slides went over how far they were to go; – if all were to go equally far."""
    pairs = [(row.asked, row.went) for row in rows if row.asked is not None and row.went is not None]
    asked, went = np.array(pairs or [(0.0, 0.0)]).T
    if np.ptp(asked) < 1:
        return "–"
    return f"{np.polyfit(asked, went, 1)[0]:.2f}"


def _format_mean(values: Sequence[float], scale: float) -> str:
    if not values:
        return "–"
    interval: Interval = bootstrap_mean(values)
    return f"{scale * interval.value:.1f} ({scale * interval.low:.1f}–{scale * interval.high:.1f})"


def _format_share(flags: Sequence[bool]) -> str:
    if not flags:
        return "–"
    interval = wilson_interval(sum(flags), len(flags))
    return f"{100 * interval.value:.1f} ({100 * interval.low:.1f}–{100 * interval.high:.1f}) of {len(flags)}"
