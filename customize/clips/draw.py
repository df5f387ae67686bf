"""`customize clip`: sample clips of prompts, with a motion adapter or without, with concepts applied, into a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from backbone.cli.conditions import say_idle_rows, say_scales
from backbone.cli.sampling import default_sampler, default_sampler_of_clips
from backbone.cli.values.repeat import as_command
from backbone.conditions.control import Control
from backbone.distributed import processes
from backbone.evaluation.motion import draw_track
from backbone.io.console import UserError
from backbone.io.files import write_json, write_text
from backbone.io.progress import progress
from backbone.io.report import command_block, film_figure, heading, image_figure, table, write_report
from backbone.io.run_folder import check_new_folder, hold_new_folder, package_versions
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
    write_out_strengths,
)
from backbone.models.model import Backbone
from backbone.models.sample import (
    Frames,
    Request,
    refuse_negative,
    resolve_sampling,
    sample_latents,
)
from customize.clips.planned.plan import PlannedClip, Shot
from customize.clips.planned.surroundings import give_picture
from customize.clips.settings import ClipOptions
from customize.clips.shots import aim_cameras, choose_size, find_largest_latents, plan_clips, write_plans
from customize.clips.sparse import (
    describe_given_frames,
    open_frames,
    open_given_frames,
    open_sparse_condition,
    split_controls,
)

RECORD = "run.json"
REPORT = "report.html"
PATH_FILE = "camera.txt"  # the path of the clips' camera, as lines
CLIPS = Path("clips")
OF_SAMPLER = (
    "shared_noise",
    "steps",
    "guidance",
    "guidance_start",
    "guidance_stop",
    "seed",
    "sampler",
    "scale",
)


def draw_clips(prompts: Sequence[str], options: ClipOptions, *, concepts: Sequence[Concept] = ()) -> Path:
    """Sample clips of prompts into a folder, and return it.

    It holds `p00-s00.webp` and `p00-s00/0000.png` … (prompt, sample; frame), a sheet, a report and a record. Clip
    (i, j) depends on the seed, i and j alone. Raises `UserError`, before the model's weights load, for an adapter of
    another model, more frames than it has positions for, a size that the model cannot draw, a folder that is taken.
    """
    if processes.world_size() > 1:
        raise UserError("customize clip draws in one process. Start it without a launcher.")
    if options.mp4:
        import_av("--mp4")
    negative = resolve_placeholder_tokens(options.negative, concepts, model=name_model(options, concepts))
    inputs = resolve_inputs(prompts, options, concepts)
    model, options = inputs.model, inputs.options

    # The model with its motion adapter and everything that conditions the clips
    began = time.perf_counter()
    conditioning = condition_model(inputs)
    options = conditioning.options

    # The plan of each clip, and the requests to the sampler
    plans = plan_clips(model, prompts, inputs.shots, options, concepts, inputs.size, inputs.picture)
    conditions = (
        *conditioning.conditions,
        *(plan.condition for plan in plans if plan.condition is not None),
    )
    resolved = resolve_prompts([plan.prompt for plan in plans], concepts, model=name_model(options, concepts))
    requests = [
        [Request(words, (i, j), negative) for j in range(options.count)] for i, words in enumerate(resolved)
    ]
    all_requests = [request for prompt_requests in requests for request in prompt_requests]
    # A clip that was stopped is sampled again as a whole
    with hold_new_folder(options.out, CLIPS, inputs.description) as folder:
        scenes = list(zip(requests, plans, strict=True))
        sampled = sample_films(model, scenes, conditioning.controls, options, conditioning.frames)
        films = write_films(folder, all_requests, sampled, options)
        write_plans(folder, plans)
        record = {
            **inputs.description,
            "command": repeat_clips(prompts, options),
            **describe_given_frames(options, conditioning.given),
            **describe_conditions(conditions),
            **describe_drawings(model, plans, options),
            "seconds": round(time.perf_counter() - began, 2),
            "versions": package_versions(),
        }
        if inputs.path is not None:
            write_text(folder / PATH_FILE, as_lines(inputs.path, options.fps))
        is_moved = all(plan.is_drawn for plan in plans)  # the picture alone
        maps = write_maps(folder, conditions, options)
        publish(folder, all_requests, prompts, films, record, maps, is_moved=is_moved)
    return folder


@dataclass(frozen=True, eq=False)
class ClipInputs:
    """Everything that clips are sampled from, except the prompts.

    model        the image model, without its motion adapter and its concepts
    options      with the model's defaults in place of None
    size         (width, height) of a frame in pixels
    picture      the image that is set in motion, if there is one
    path         of the camera, if one is named
    shots        the camera's shot of each prompt
    description  of the clips, for the record
    """

    model: Backbone
    options: ClipOptions
    concepts: Sequence[Concept]
    size: tuple[int, int]
    picture: Image.Image | None
    path: CameraPath | None
    shots: Sequence[Shot]
    description: Mapping[str, Any]


def name_model(options: ClipOptions, concepts: Sequence[Concept]) -> str:
    """The name of the image model: the given one, else that of the concepts, else `moji`."""
    return options.model or (concepts[0].model if concepts else "moji")


def resolve_inputs(prompts: Sequence[str], options: ClipOptions, concepts: Sequence[Concept]) -> ClipInputs:
    """The inputs with all defaults filled in, checked by configs alone.

    Raises `UserError` for a size that the model cannot draw, a folder that is taken, a path of the camera that leaves
    what can be drawn, and clips that do not fit into `options.vram` GiB.
    """
    name = name_model(options, concepts)
    model = Backbone.open(name, device=options.device, precision=options.precision, compile=options.compile)
    say_idle_early_scale(concepts, options.early_scale)
    options = resolve_sampling(options, model, resolution=trained_resolution(concepts))
    picture = open_named(options.images[0]) if options.over_picture else None
    size = choose_size(model, options, picture)
    description = describe_clips(model, prompts, options, concepts)
    check_new_folder(options.out, CLIPS, description)
    path = read_camera(options.camera, options.frames, size) if options.camera else None
    shots = aim_cameras(model, prompts, options, size, path)
    if not options.motion and not options.over_picture and not all(shot.views for shot in shots):
        refuse_transformer(model)
    largest = find_largest_latents(model, options, shots, size)
    model = fit_clips(model, options, largest, len(prompts) * options.count, concepts)
    refuse_negative(model, options.negative, options.guidance)
    return ClipInputs(model, options, concepts, size, picture, path, shots, description)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What clips follow besides their prompts.

    options     with what they left to the control networks
    frames      of a clip, and how many of them the motion adapter sees together
    controls    those that all clips share: maps, the camera's path, given frames
    conditions  the maps among them, for the record
    given       the numbers of the frames that are given as images
    """

    options: ClipOptions
    frames: Frames
    controls: tuple[Control, ...]
    conditions: tuple[Condition, ...]
    given: Sequence[int]


def condition_model(inputs: ClipInputs) -> Conditioning:
    """Load the motion adapter, the concepts and the networks that read maps into the model.

    Raises `UserError` for conditions that contradict each other, before anything is loaded.
    """
    model, options, size = inputs.model, inputs.options, inputs.size
    controls, sparse = split_controls(options)
    say_idle_rows(controls, float(options.guidance or 0))
    images, given = open_frames(options) if options.sparsectrl else ([], [])
    moves = Moves(options.motion, options.lora, options.motion_scale)
    motion = set_in_motion(model, moves, inputs.concepts, scale=options.scale)
    frames = choose_frames(options, motion)
    say_scales(controls)
    conditions = open_clip_conditions(model, controls, size, options.frames)
    if sparse is None:  # SparseCtrl's strength is an option, and no network's own
        options = write_out_strengths(model, options, conditions)
    conditions += open_sparse_condition(model, sparse, options)
    camera = follow_camera(model, options, size, inputs.path)
    given_frames = open_given_frames(model, images, given, options)
    shared = (*gather_controls(conditions), *camera, *given_frames)
    return Conditioning(options, frames, shared, conditions, given)


def fit_clips(
    model: Backbone, options: ClipOptions, places: tuple[int, int], count: int, concepts: Sequence[Concept]
) -> Backbone:
    """The model, placed so that this many clips fit on a device of `options.vram` GiB, if that is given.

    Raises `UserError` if it cannot.
    """
    if options.vram is None:
        return model
    assert options.guidance is not None
    motion = read_motion_adapter(options.motion) if options.motion else None
    if motion is not None:
        refuse_longer(options, int(cast(Any, motion).config.motion_max_seq_length))
    workload = DrawingWorkload(
        min(options.batch, count),
        places,
        options.guidance,
        conditions=name_networks(model, split_controls(options)[0]),
        frames=options.together,
        motion=motion,
        window=(options.context_length, options.context_stride) if options.by_free_noise else None,
        whole_base=any(map(needs_whole_base, concepts)),
    )
    return fit_drawing(model, workload, options.vram)


def follow_camera(
    model: Backbone, options: ClipOptions, size: tuple[int, int], path: CameraPath | None
) -> tuple[Control, ...]:
    """The control for a motion adapter's clips to follow the camera's path; empty for other clips.

    Raises `UserError` as `open_camera`, and for a path that leaves the world of the adapter.
    """
    if path is None or not options.motion:
        return ()
    own_camera = Path(options.motion).expanduser() / CAMERA_WEIGHTS
    file = options.camera_adapter or own_camera
    if options.camera_adapter is None and not own_camera.is_file():
        raise UserError(
            f"{options.motion} brings no {CAMERA_WEIGHTS} with it, so nothing follows a path. Name one with "
            "--camera-adapter."
        )
    camera = open_camera(model, file)
    if camera.settings.reach is not None:
        refuse_beyond(path, camera.settings.reach, str(file))
    with torch.no_grad():
        return (Control.of(camera, embed_rays(path, size), scale=options.camera_scale).as_clip(),)


def choose_frames(options: ClipOptions, motion: Motion | None) -> Frames:
    """The frames of a clip; `UserError` for more at once than the adapter has positions for."""
    if motion is not None:
        refuse_longer(options, motion.longest)
    by: Windows = "attention" if options.free_noise else "network"
    return Frames(options.frames, options.context_length, options.context_stride, options.common_noise, by)


def refuse_longer(options: ClipOptions, longest: int) -> None:
    """`UserError` for more frames at once than an adapter has positions for."""
    at_once = min(options.context_length or options.frames, options.frames)
    if at_once > longest:
        raise UserError(
            f"{options.motion} has positions for {longest} frames, and {at_once} are asked for at once. Add "
            f"--context-length {longest} (or less), or ask for fewer --frames."
        )


def sample_films(
    model: Backbone,
    scenes: Sequence[tuple[Sequence[Request], PlannedClip]],
    controls: Sequence[Control],
    options: ClipOptions,
    frames: Frames,
) -> Iterator[list[Image.Image]]:
    """The requested clips of each scene under `controls` and its own controls, in order, as their frames.

    Without a motion adapter, frames attend to one another in the picture model's own attention.
    """
    count = sum(len(requests) * plan.frames for requests, plan in scenes if not plan.is_drawn)
    with progress(count or None, "drawing frames" if count else "moving the picture", brief=not count) as bar:
        for requests, plan in scenes:
            if plan.is_drawn:
                yield from ([*plan.look_at([])] for _ in requests)
                continue
            arguments = options.for_sampler()
            if plan.views is not None:
                arguments["size"] = plan.views.canvas
            picture = None
            if plan.views is not None and plan.picture is not None:
                picture = give_picture(model, plan.views, plan.picture, count=len(requests))
            span = frames if plan.frames == frames.count else Frames(plan.frames)
            with link_frames(model, plan.frames) if plan.frames > 1 else nullcontext():
                for latents in sample_latents(
                    model,
                    requests,
                    **arguments,
                    given=picture,
                    frames=span,
                    controls=(*controls, *plan.controls),
                    advance=_advance_by_frames(bar.advance_images, span.count),
                ):
                    for clip in latents:
                        decoded = model.decode_clip(clip, options.decode_chunk_size).cpu()
                        yield plan.look_at([to_image(frame) for frame in decoded])


def _advance_by_frames(advance: Callable[[float], None], frames: int) -> Callable[[float], None]:
    return lambda clips: advance(clips * frames)


def write_films(
    folder: Path, requests: Sequence[Request], films: Iterator[list[Image.Image]], options: ClipOptions
) -> list[list[Image.Image]]:
    """Write each clip as soon as it is sampled; returns all of them."""
    all_films = []
    for request, film in zip(requests, films, strict=True):
        write_film(folder / name_film(request), film, options.fps, mp4=options.mp4)
        all_films.append(film)
    return all_films


def name_film(request: Request) -> str:
    """File name of a request's clip, without a suffix: `p00-s00`."""
    i, j = request.key
    return f"p{i:02d}-s{j:02d}"


def describe_clips(
    model: Backbone, prompts: Sequence[str], options: ClipOptions, concepts: Sequence[Concept]
) -> dict[str, Any]:
    """The clips' settings for the record, with the command that repeats them."""
    return {
        "command": repeat_clips(prompts, options),
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "concepts": summarize_concepts(concepts),
        **describe_motion(options),
        **options.facts(),
        "sampler": options.sampler or default_sampler_of_clips(model.defaults),
        "guided": list(options.guided),
        "scale": options.scale,
    }


def repeat_clips(prompts: Sequence[str], options: ClipOptions) -> str:
    """The command that repeats the clips."""
    repeated = replace(options, words=(), prompts=tuple(prompts), out=None, as_json=False)
    return as_command("customize clip", repeated)


def describe_drawings(model: Backbone, plans: Sequence[PlannedClip], options: ClipOptions) -> dict[str, Any]:
    """The size of the drawing that each prompt's camera moves over, None for a still one; {} if all are still.

    Clips of one drawing use the model's image sampler, unless one is named.
    """
    sizes = [None if plan.views is None else list(plan.views.canvas) for plan in plans]
    facts: dict[str, Any] = {"drawings": sizes} if any(sizes) else {}
    if options.sampler is None and any(plan.frames == 1 for plan in plans):
        name = "sampler" if all(plan.frames == 1 for plan in plans) else "sampler_of_one_drawing"
        facts[name] = default_sampler(model.defaults)
    return facts


def describe_motion(options: ClipOptions) -> dict[str, Any]:
    """The settings that a clip depends on in addition to an image's."""
    facts: dict[str, Any] = {"motion": options.motion, "frames": options.frames, "fps": options.fps}
    if options.lora:
        facts |= {"lora": [str(path) for path in options.lora], "motion_scale": options.motion_scale}
    if options.camera:
        facts |= {"camera": options.camera, "camera_scale": options.camera_scale}
    if options.context_length:
        facts |= {"context_length": options.context_length, "context_stride": options.context_stride}
        facts |= {"free_noise": True} if options.free_noise else {}
    facts |= {"redraw": True} if options.redraw else {}
    facts |= {"track": str(options.track)} if options.track else {}
    return facts | ({"shared_noise": options.common_noise} if options.common_noise else {})


def write_maps(
    folder: Path, conditions: Sequence[Condition], options: ClipOptions
) -> dict[str, Sequence[Image.Image]]:
    """Write `condition-0-sketch.webp` …, the maps as the networks read them; returns them by title."""
    films: dict[str, Sequence[Image.Image]] = {}
    for number, condition in enumerate(conditions):
        kind, frames = condition.facts["kind"], condition.maps or (condition.map,) * options.frames
        write_film(folder / f"condition-{number}-{kind}", frames, options.fps)
        scale = f"scale {condition.facts['scale']:g}"
        title = f"{kind}, {scale}"
        films[f"{kind} {number + 1}, {scale}" if title in films else title] = frames
    return films


def publish(
    folder: Path,
    requests: Sequence[Request],
    prompts: Sequence[str],
    films: Sequence[Sequence[Image.Image]],
    record: Mapping[str, Any],
    maps: Mapping[str, Sequence[Image.Image]],
    *,
    is_moved: bool = False,
) -> None:
    """Write the record, a sheet with a strip of each clip and of its maps, and a report that plays the clips.

    `is_moved`: a picture was moved and nothing drawn, so no settings of a sampler count.
    """
    names = [name_film(request) for request in requests]
    texts = [prompts[request.key[0]] for request in requests]
    entries = [
        {"file": f"{name}.webp", "prompt": prompt, "model_reads": request.prompt, "sample": request.key[1]}
        for name, prompt, request in zip(names, texts, requests, strict=True)
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
        for prompt, request in zip(texts, requests, strict=True)
    ]
    runs = describe_concepts([concept["folder"] for concept in record["concepts"]], 1.0).get("concepts", [])
    sources = [str(record["model"]), str(record["motion"]), *runs]
    note = f"{record['frames']} frames at {record['fps']:g} a second"
    if not is_moved:
        drawn = f"{record['steps']} steps, guidance {record['guidance']:g}, seed {record['seed']}"
        note = f"{' with '.join(filter(None, sources))}, {note}, {drawn}"
    page = draw_sheet(rows, note=note, row_titles=[*maps, *titles], cell=128)
    save_png(folder / "sheet.png", page)

    # The report
    hidden = ("command", *(OF_SAMPLER if is_moved else ()))
    facts = {
        key.replace("_", " "): value
        for key, value in record.items()
        if isinstance(value, (str, int, float)) and value != "" and key not in hidden
    }
    parts = [film_figure(folder / name, title) for name, title in zip(names, titles, strict=True)]
    parts += [heading("Frames"), image_figure(page, "strips"), heading("The run")]
    parts += [table(("", ""), list(facts.items())), heading("Again"), command_block(record["command"])]
    write_report(folder / REPORT, f"Clips: {texts[0]}", parts)
