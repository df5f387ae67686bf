"""`customize clip`: sample clips of prompts, with a motion adapter or without, with concepts applied, into a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from backbone.adapters.apply import say_idle_early_scale
from backbone.adapters.concept import (
    Concept,
    needs_whole_base,
    resolve_placeholder_tokens,
    resolve_prompts,
    summarize_concepts,
    trained_resolution,
)
from backbone.adapters.motion import Moves, set_in_motion
from backbone.cli.conditions import say_scales
from backbone.cli.sampling import own_sampler, own_sampler_of_clips
from backbone.cli.values.repeat import as_command
from backbone.conditions.control import Control
from backbone.distributed import processes
from backbone.evaluation.motion import draw_track
from backbone.io.console import UserError
from backbone.io.files import write_json, write_text
from backbone.io.progress import progress
from backbone.io.report import command_block, film_figure, heading, image_figure, table, write_report
from backbone.io.run_folder import hold_new_folder, package_versions, refuse_new_folder
from backbone.media.clips import choose_strip, import_av, write_film
from backbone.media.control.camera import CameraPath, as_lines, embed_rays, read_camera, refuse_beyond
from backbone.media.parameters import describe_concepts
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.sources.decode import open_named
from backbone.media.transforms import to_image
from backbone.memory.drawing import DrawingWorkload, fit_drawing
from backbone.models.clips.camera import CAMERA_WEIGHTS, open_camera
from backbone.models.clips.frames import link_frames, refuse_transformer
from backbone.models.clips.motion import Motion, read_motion_adapter
from backbone.models.clips.windows import Windows
from backbone.models.control import (
    Condition,
    describe_conditions,
    gather_controls,
    name_networks,
    open_clip_conditions,
)
from backbone.models.model import Backbone
from backbone.models.sample import (
    Frames,
    Request,
    refuse_negative,
    resolve_sampling,
    sample_latents,
)
from customize.clips.planned.plan import PlannedClip
from customize.clips.planned.surroundings import give_picture
from customize.clips.settings import ClipOptions
from customize.clips.shots import aim_cameras, choose_size, largest_places, plan_clips, write_plans
from customize.clips.sparse import (
    describe_given_frames,
    frames_of,
    open_given_frames,
    open_sparse_condition,
    split_controls,
)

RECORD = "run.json"
REPORT = "report.html"
PATH_FILE = "camera.txt"  # the path of the clips' camera, as lines
CLIPS = Path("clips")


def draw_clips(prompts: Sequence[str], asked: ClipOptions, *, concepts: Sequence[Concept] = ()) -> Path:
    """Write `p00-s00.webp` and `p00-s00/0000.png` … (prompt, sample; frame), sheet, report and record; the folder.

    Clip (i, j) depends on the seed, i and j alone. Raises `UserError`, before the model's weights load, for an adapter
    of another model, more frames than it has positions for, a size that the model cannot draw, a folder that is taken.
    """
    if processes.world_size() > 1:
        raise UserError("customize clip draws in one process. Start it without a launcher.")
    if asked.mp4:
        import_av("--mp4")
    name = asked.model or (concepts[0].model if concepts else "moji")
    negative = resolve_placeholder_tokens(asked.negative, concepts, model=name)
    model = Backbone.open(name, device=asked.device, precision=asked.precision, compile=asked.compile)
    say_idle_early_scale(concepts, asked.early_scale)
    asked = resolve_sampling(asked, model, resolution=trained_resolution(concepts))

    # What is asked, checked by configs alone
    controls, sparse = split_controls(asked)
    picture = open_named(asked.images[0]) if asked.over_picture else None
    size = choose_size(model, asked, picture)
    what = describe_clips(model, prompts, asked, concepts)
    refuse_new_folder(asked.out, CLIPS, what)
    path = read_camera(asked.camera, asked.frames, size) if asked.camera else None
    shots = aim_cameras(model, prompts, asked, size, path)
    if not asked.motion and not asked.over_picture and not all(shot.views for shot in shots):
        refuse_transformer(model)
    model = fit_clips(
        model, asked, largest_places(model, asked, shots, size), len(prompts) * asked.count, concepts
    )
    refuse_negative(model, asked.negative, asked.guidance)
    pictures, places = frames_of(asked) if asked.sparsectrl else ([], [])

    # The model, its motion adapter and everything that conditions the clips
    began = time.perf_counter()
    moves = Moves(asked.motion, asked.lora, asked.motion_scale)
    motion = set_in_motion(model, moves, concepts, scale=asked.scale)
    frames = choose_frames(asked, motion)
    say_scales(controls)
    conditions = open_clip_conditions(model, controls, size, asked.frames)
    conditions += open_sparse_condition(model, sparse, asked)
    camera = follow_camera(model, asked, size, path)
    given = open_given_frames(model, pictures, places, asked)
    held = (*gather_controls(conditions), *camera, *given)

    # How each clip is drawn, and the requests to the sampler
    plans = plan_clips(model, prompts, shots, asked, concepts, size, picture)
    conditions += tuple(plan.condition for plan in plans if plan.condition is not None)
    said = resolve_prompts([plan.prompt for plan in plans], concepts, model=name)
    requests = [
        [Request(words, (i, j), negative) for j in range(asked.count)] for i, words in enumerate(said)
    ]
    every = [request for some in requests for request in some]
    with hold_new_folder(asked.out, CLIPS, what) as folder:  # of a clip that was stopped all is drawn anew
        drawn = sample_films(model, list(zip(requests, plans, strict=True)), held, asked, frames)
        films = write_films(folder, every, drawn, asked)
        write_plans(folder, plans)
        record = {
            **what,
            **describe_given_frames(asked, places),
            **describe_conditions(conditions),
            **describe_drawings(model, plans, asked),
            "seconds": round(time.perf_counter() - began, 2),
            "versions": package_versions(),
        }
        if path is not None:
            write_text(folder / PATH_FILE, as_lines(path, asked.fps))
        publish(folder, every, prompts, films, record, write_maps(folder, conditions, asked))
    return folder


def fit_clips(
    model: Backbone, asked: ClipOptions, places: tuple[int, int], count: int, concepts: Sequence[Concept]
) -> Backbone:
    """The model as it draws this many clips on a device of `asked.vram` GiB, if that is asked for.

    Raises `UserError` where it cannot.
    """
    if asked.vram is None:
        return model
    assert asked.guidance is not None
    motion = read_motion_adapter(asked.motion) if asked.motion else None
    if motion is not None:
        refuse_longer(asked, int(cast(Any, motion).config.motion_max_seq_length))
    drawn = DrawingWorkload(
        min(asked.batch, count),
        places,
        asked.guidance,
        conditions=name_networks(model, split_controls(asked)[0]),
        frames=asked.together,
        motion=motion,
        window=(asked.context_length, asked.context_stride) if asked.by_free_noise else None,
        whole=any(map(needs_whole_base, concepts)),
    )
    return fit_drawing(model, drawn, asked.vram)


def follow_camera(
    model: Backbone, asked: ClipOptions, size: tuple[int, int], path: CameraPath | None
) -> tuple[Control, ...]:
    """The control by which clips of a motion adapter follow the camera's path; none of other clips.

    Raises `UserError` as `open_camera`, and for a path that leaves the world of the adapter.
    """
    if path is None or not asked.motion:
        return ()
    beside = Path(asked.motion).expanduser() / CAMERA_WEIGHTS
    file = asked.camera_adapter or beside
    if asked.camera_adapter is None and not beside.is_file():
        raise UserError(
            f"{asked.motion} brings no {CAMERA_WEIGHTS} with it, so nothing follows a path. Name one with "
            "--camera-adapter."
        )
    camera = open_camera(model, file)
    if camera.settings.reach is not None:
        refuse_beyond(path, camera.settings.reach, str(file))
    with torch.no_grad():
        return (Control.of(camera, embed_rays(path, size), scale=asked.camera_scale).as_clip(),)


def choose_frames(asked: ClipOptions, motion: Motion | None) -> Frames:
    """The frames of a clip; `UserError` for more at once than the adapter has positions for."""
    if motion is not None:
        refuse_longer(asked, motion.longest)
    by: Windows = "attention" if asked.free_noise else "network"
    return Frames(asked.frames, asked.context_length, asked.context_stride, asked.common_noise, by)


def refuse_longer(asked: ClipOptions, longest: int) -> None:
    """`UserError` for more frames at once than an adapter has positions for."""
    at_once = min(asked.context_length or asked.frames, asked.frames)
    if at_once > longest:
        raise UserError(
            f"{asked.motion} has positions for {longest} frames, and {at_once} are asked for at once. Add "
            f"--context-length {longest} (or less), or ask for fewer --frames."
        )


def sample_films(
    model: Backbone,
    scenes: Sequence[tuple[Sequence[Request], PlannedClip]],
    held: Sequence[Control],
    asked: ClipOptions,
    frames: Frames,
) -> Iterator[list[Image.Image]]:
    """The requested clips of each scene under `held` and its own controls, in order, as their frames.

    Without a motion adapter the frames look at one another through the picture model's own attention.
    """
    count = sum(len(requests) * plan.frames for requests, plan in scenes if not plan.is_drawn)
    with progress(count or None, "drawing frames" if count else "moving the picture", brief=not count) as bar:
        for requests, plan in scenes:
            if plan.is_drawn:
                yield from ([*plan.look_at([])] for _ in requests)
                continue
            how = asked.for_sampler()
            if plan.views is not None:
                how["size"] = plan.views.canvas
            given = None
            if plan.views is not None and plan.picture is not None:
                given = give_picture(model, plan.views, plan.picture, count=len(requests))
            some = frames if plan.frames == frames.count else Frames(plan.frames)
            with link_frames(model, plan.frames) if plan.frames > 1 else nullcontext():
                for latents in sample_latents(
                    model,
                    requests,
                    **how,
                    given=given,
                    frames=some,
                    controls=(*held, *plan.controls),
                    advance=_counted(bar.advance_images, some.count),
                ):
                    for clip in latents:
                        decoded = model.decode_clip(clip, asked.decode_chunk_size).cpu()
                        yield plan.look_at([to_image(frame) for frame in decoded])


def _counted(advance: Callable[[float], None], frames: int) -> Callable[[float], None]:
    return lambda clips: advance(clips * frames)


def write_films(
    folder: Path, requests: Sequence[Request], drawn: Iterator[list[Image.Image]], asked: ClipOptions
) -> list[list[Image.Image]]:
    """Write each clip as soon as it is drawn, and give them all."""
    films = []
    for request, film in zip(requests, drawn, strict=True):
        write_film(folder / film_name(request), film, asked.fps, mp4=asked.mp4)
        films.append(film)
    return films


def film_name(request: Request) -> str:
    """File name of a request's clip, without a suffix: `p00-s00`."""
    i, j = request.key
    return f"p{i:02d}-s{j:02d}"


def describe_clips(
    model: Backbone, prompts: Sequence[str], asked: ClipOptions, concepts: Sequence[Concept]
) -> dict[str, Any]:
    """What clips were asked for, the command that repeats it among it."""
    kept = replace(asked, words=(), prompts=tuple(prompts), out=None, as_json=False)
    return {
        "command": as_command("customize clip", kept),
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "concepts": summarize_concepts(concepts),
        **describe_motion(asked),
        **asked.facts(),
        "sampler": asked.sampler or own_sampler_of_clips(model.defaults),
        "guided": list(asked.guided),
        "scale": asked.scale,
    }


def describe_drawings(model: Backbone, plans: Sequence[PlannedClip], asked: ClipOptions) -> dict[str, Any]:
    """The size of the drawing that each prompt's camera moves over, none where it stands; {} where all stand.

    Clips of one drawing are drawn by the model's own sampler of images, unless one is named.
    """
    sizes = [None if plan.views is None else list(plan.views.canvas) for plan in plans]
    facts: dict[str, Any] = {"drawings": sizes} if any(sizes) else {}
    if asked.sampler is None and any(plan.frames == 1 for plan in plans):
        facts["sampler_of_one_drawing"] = own_sampler(model.defaults)
    return facts


def describe_motion(asked: ClipOptions) -> dict[str, Any]:
    """What a clip depends on beside what a picture depends on."""
    facts: dict[str, Any] = {"motion": asked.motion, "frames": asked.frames, "fps": asked.fps}
    if asked.lora:
        facts |= {"lora": [str(path) for path in asked.lora], "motion_scale": asked.motion_scale}
    if asked.camera:
        facts |= {"camera": asked.camera, "camera_scale": asked.camera_scale}
    if asked.context_length:
        facts |= {"context_length": asked.context_length, "context_stride": asked.context_stride}
        facts |= {"free_noise": True} if asked.free_noise else {}
    facts |= {"redraw": True} if asked.redraw else {}
    facts |= {"track": str(asked.track)} if asked.track else {}
    return facts | ({"shared_noise": asked.common_noise} if asked.common_noise else {})


def write_maps(
    folder: Path, conditions: Sequence[Condition], asked: ClipOptions
) -> dict[str, Sequence[Image.Image]]:
    """Write `condition-0-sketch.webp` …, the maps as the networks read them; those of each, by its title."""
    films: dict[str, Sequence[Image.Image]] = {}
    for number, condition in enumerate(conditions):
        kind, drawn = condition.facts["kind"], condition.maps or (condition.map,) * asked.frames
        write_film(folder / f"condition-{number}-{kind}", drawn, asked.fps)
        title = f"{kind}, scale {condition.facts['scale']:g}"
        films[f"{title}, {number}" if title in films else title] = drawn
    return films


def publish(
    folder: Path,
    requests: Sequence[Request],
    prompts: Sequence[str],
    films: Sequence[Sequence[Image.Image]],
    record: Mapping[str, Any],
    maps: Mapping[str, Sequence[Image.Image]],
) -> None:
    """Write the record, a sheet with a strip of each clip and of its maps, and a report that plays the clips."""
    names = [film_name(request) for request in requests]
    said = [prompts[request.key[0]] for request in requests]
    entries = [
        {"file": f"{name}.webp", "prompt": prompt, "model_reads": request.prompt, "sample": request.key[1]}
        for name, prompt, request in zip(names, said, requests, strict=True)
    ]
    write_json(folder / RECORD, {**record, "clips": entries})

    # A strip of frames for each map and each clip, with the track of what moves
    rows = [
        [Cell(frame, f"frame {number}") for number, frame in choose_strip(film).items()]
        for film in (*maps.values(), *films)
    ]
    for row, film in zip(rows[len(maps) :], films, strict=True):
        row.append(Cell(draw_track(film), "track"))
    titles = [
        f"{prompt}, sample {request.key[1]}" if request.key[1] else prompt
        for prompt, request in zip(said, requests, strict=True)
    ]
    runs = describe_concepts([one["folder"] for one in record["concepts"]], 1.0).get("concepts", [])
    with_what = [str(record["model"]), str(record["motion"]), *runs]
    note = (
        f"{' with '.join(filter(None, with_what))}, {record['frames']} frames at "
        f"{record['fps']:g} a second, {record['steps']} steps, guidance {record['guidance']:g}, seed {record['seed']}"
    )
    page = draw_sheet(rows, note=note, row_titles=[*maps, *titles], cell=128)
    save_png(folder / "sheet.png", page)

    # The report
    facts = {
        key: value for key, value in record.items() if isinstance(value, (str, int, float)) and value != ""
    }
    del facts["command"]
    parts = [film_figure(folder / name, title) for name, title in zip(names, titles, strict=True)]
    parts += [heading("Frames"), image_figure(page, "strips"), heading("The run")]
    parts += [table(("", ""), list(facts.items())), heading("Again"), command_block(record["command"])]
    write_report(folder / REPORT, f"Clips: {said[0]}", parts)
