"""`edit clip` from its options to a folder: clips that play, strips of their frames, a report and the record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from backbone.adapters.concept import read_concept, say_uncalled
from backbone.cli.conditions import say_idle_rows
from backbone.cli.values.repeat import as_command
from backbone.conditions.control import Control
from backbone.evaluation import image_metrics
from backbone.evaluation.clip import Scorer
from backbone.evaluation.flow import warped_flicker
from backbone.evaluation.motion import SIDE, draw_track, trace_movement, track_error
from backbone.io.console import UserError, notify
from backbone.io.files import fill_folder, read_metadata, write_json
from backbone.io.progress import progress
from backbone.io.report import command_block, heading, image_figure, table, write_report
from backbone.io.run_folder import hold_new_folder, package_versions
from backbone.media.clips import Film, choose_strip, write_film
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.transforms import to_image
from backbone.models.clips.motion import find_motion
from backbone.models.clips.sparse import open_sparsectrl
from backbone.models.control import write_out_strengths
from backbone.models.model import Backbone
from backbone.world.motions import find_moves
from edit.inversion.inversion import Inversion, count_rounds, read_inversion, select_settings
from edit.layout import NO_LAYOUT, Layout
from edit.masks import mask_to_image
from edit.methods.clip import (
    ClipEdit,
    ClipRedraw,
    ClipResult,
    edit_clip,
    find_other_motions,
    invert_film,
    make_film,
    open_clip_layout,
    redraw_film,
)
from edit.methods.clip_flow import ClipFlow, flow_film
from edit.methods.first_frame import STRENGTH, propagate_first_frame, read_first_frame
from edit.pictures import SourceImage
from edit.run.commands import say_unread_shares
from edit.run.figures import find_scorer
from edit.run.open import ModelWithConcepts, Opening, load_model, merge_layouts
from edit.run.report import INVERSION, RECORD, REPORT
from edit.sampling import resolve_guidance
from edit.settings import ClipOptions, InvertOptions

REDRAWN, FLOWED = 0.6, 0.66  # the usual strength without a source prompt, and without an inversion


def perform_clip(
    film: Film | None,
    source: str | None,
    targets: Sequence[str],
    options: ClipOptions,
    *,
    concepts: Sequence[str],
    first: SourceImage | None = None,
) -> Path:
    """Edit a clip that has been read, and return the folder that was written: `--out`, or runs/edit-NAME.

    Without a `film` it begins from the inversion of `options`. `first` is the edited first frame that the others are
    to follow, if there is one.

    Raises `UserError` for every mistake of the options, before the folder is taken.
    """
    began = time.perf_counter()
    for number in options.keep_frames:
        frame_number(number)
    if first is not None and options.keep_frames:
        raise UserError(
            "--first gives the first frame, and --keep-frames keeps frames of the source. Give one of them."
        )

    # The model with its motion, and the clip or its inversion
    loaded = load_in_motion(options, concepts)
    inversion = None if options.inversion is None else open_inversion(loaded, options.inversion, source)
    if inversion is not None:
        film, source = make_film(inversion), inversion.prompt if source is None else source
    assert film is not None, "the command has read one"
    refuse_longer(loaded.model, film, options.motion)
    say_uncalled([source or "", *targets], loaded.concepts)
    if inversion is None:
        start = ClipStart(film, source, layout=open_clip_layout(loaded.model, film, options.controls))
    else:
        start = ClipStart(film, source, inversion=add_target_layout(inversion, film, options))

    # From here on the folder is taken
    default = Path("runs") / f"edit-{Path(film.name).stem or 'clip'}"
    with hold_new_folder(options.out, default) as folder:
        result = run_clip(loaded, start, targets, options, first)
        films = result.films
        repeated = replace(options, out=None, targets=tuple(targets), guidance=result.facts["guidance"])
        if (layout := start.layout if start.inversion is None else start.inversion.layout).conditions:
            drawn = layout.conditions[-len(options.condition) :] if options.condition else ()
            if start.inversion is None or all(control.map.path for control in options.controls):
                repeated = write_out_strengths(loaded.model, repeated, drawn)
        record = {
            "command": as_command("edit clip", repeated),
            "clip": dict(result.encoded.facts),
            **loaded.facts(),
            "motion": options.motion,
            "steps": options.steps if result.inversion is None else result.inversion.steps,
            "seed": options.seed,
            **result.facts,
            "nfe": result.nfe,
            "seconds": round(time.perf_counter() - began, 2),
            "versions": package_versions(),
        }
        with fill_folder(folder) as unfinished:
            if result.inversion is not None and options.inversion is None:  # it serves further edits
                result.inversion.write(unfinished / INVERSION)
            publish_clip(unfinished, result, films, film.fps, source or "", record)
    return folder


@dataclass(frozen=True, eq=False)
class ClipStart:
    """The start of a clip's edit: the clip, its prompt, and its conditions, or an inversion with its own."""

    film: Film
    source: str | None
    inversion: Inversion | None = None
    layout: Layout = NO_LAYOUT


def open_inversion(loaded: ModelWithConcepts, file: str, source: str | None) -> Inversion:
    """The inversion of a clip from its file; `UserError` for one of an image, another prompt or another model."""
    inversion = read_inversion(file, loaded.model, accepted=loaded.identities, of_clip=True)
    if source is not None and loaded.resolve(source) != inversion.prompt:
        raise UserError(
            f"{file} was made with the prompt “{inversion.prompt}”, not “{source}”. Leave --source out."
        )
    return inversion


def add_target_layout(inversion: Inversion, film: Film, options: ClipOptions) -> Inversion:
    """An inversion whose layout has the requested maps of the targets in addition to its own."""
    layout = merge_layouts(
        inversion,
        options.controls,
        lambda drawn: open_clip_layout(inversion.model, film, drawn) if drawn else NO_LAYOUT,
        str(options.inversion),
    )
    return replace(inversion, layout=layout)


def refuse_longer(model: Backbone, film: Film, name: str) -> None:
    """`UserError` for a clip of more frames than the motion adapter has positions for."""
    motion = find_motion(model.denoiser)
    if motion is not None and len(film.frames) > motion.longest:
        raise UserError(
            f"{name} has positions for {motion.longest} frames, and {film.name} has {len(film.frames)}. Cut the clip, "
            "or leave --motion out: attention alone links any number."
        )


def load_in_motion(options: ClipOptions | InvertOptions, concepts: Sequence[str]) -> ModelWithConcepts:
    """The model with its concepts and, where one is named, a motion adapter.

    Raises `UserError` for an adapter that does not fit the model.
    """
    inversion = options.inversion if isinstance(options, ClipOptions) else None
    if not options.motion:
        opening = Opening(
            model=options.model,
            concepts=concepts,
            scale=options.scale,
            precision=options.precision,
            device=options.device,
            compile=options.compile,
            inversion=inversion,
        )
        return load_model(opening)
    from backbone.adapters.motion import Moves, set_in_motion

    read = tuple(read_concept(folder) for folder in concepts)
    made_with = None if inversion is None else read_metadata(inversion).get("model")
    name = options.model or (read[0].model if read else made_with or "moji")
    model = Backbone.open(name, device=options.device, precision=options.precision, compile=options.compile)
    set_in_motion(model, Moves(options.motion), read, scale=options.scale)
    return ModelWithConcepts(model, read, options.scale)


def invert_with_progress(
    loaded: ModelWithConcepts, film: Film, prompt: str, options: ClipOptions | InvertOptions, layout: Layout
) -> Inversion:
    """The inversion of all frames of a clip by the command's options, with a progress bar."""
    assert options.method != "flow-edit"
    with progress(count_rounds(options.method, options.steps), "inverting", brief=True) as bar:
        return invert_film(
            loaded.model, film, loaded.resolve(prompt), method=options.method, steps=options.steps,
            identity=loaded.identity, layout=layout, progress=bar.advance,
            **select_settings(
                options.method, seed=options.seed, guidance=options.guidance, iterations=options.iterations
            ),
        )  # fmt: skip


def write_clip_inversion(
    file: Path, film: Film, prompt: str, options: InvertOptions, concepts: Sequence[str]
) -> str:
    """Invert all frames of a clip into a file, and say at what cost; `UserError` as `invert_film`."""
    loaded = load_in_motion(options, concepts)
    refuse_longer(loaded.model, film, options.motion)
    layout = open_clip_layout(loaded.model, film, options.controls)
    shared = Layout(layout.conditions, ((True, True),) * len(layout.conditions))
    inversion = invert_with_progress(loaded, film, prompt, options, shared)
    inversion.write(file)
    return f"{inversion.nfe} evaluations of the denoiser (NFE), {len(film.frames)} frames each."


def run_clip(
    loaded: ModelWithConcepts,
    start: ClipStart,
    targets: Sequence[str],
    options: ClipOptions,
    first: SourceImage | None = None,
) -> ClipResult:
    """The edit itself: by an inversion or the difference of velocities where the source is described, else by noise."""
    if start.inversion is None:  # null-text's file has its own guidance
        scales = [resolve_guidance(loaded.model, options.guidance)]
        scales += [options.source_guidance] if options.method == "flow-edit" else []
        say_idle_rows(options.controls, *scales)
    if start.source is None:
        result = redraw_clip(loaded, start.film, targets[0], options, start.layout)
    elif options.method == "flow-edit":
        result = flow_clip(loaded, start.film, start.source, targets, options, start.layout)
    else:
        result = replace_in_clip(loaded, start, start.source, targets, options, first)
    return replace(result, prompts=tuple(targets), chunk=options.decode_chunk_size)


def redraw_clip(
    loaded: ModelWithConcepts, film: Film, target: str, options: ClipOptions, layout: Layout
) -> ClipResult:
    """The edit by noising the clip and sampling it again."""
    strength = REDRAWN if options.strength is None else options.strength
    redraw = ClipRedraw(
        strength, options.steps, options.guidance, loaded.resolve(options.negative), options.seed
    )
    with progress(len(film.frames), "drawing frames") as bar:
        return redraw_film(
            loaded.model, film, loaded.resolve(target), redraw, layout=layout,
            progress=lambda share: bar.advance_images(share * len(film.frames)),
        )  # fmt: skip


def replace_in_clip(
    loaded: ModelWithConcepts,
    start: ClipStart,
    source: str,
    targets: Sequence[str],
    options: ClipOptions,
    first: SourceImage | None,
) -> ClipResult:
    """The edit from an inversion, by words or by the edited first frame."""
    resolved = [loaded.resolve(target) for target in targets]
    settings = ClipEdit(
        cross=options.cross,
        self_attention=options.self_attention,
        temporal=options.temporal,
        threshold=options.threshold,
        guidance=options.guidance,
        negative=loaded.resolve(options.negative),
        strength=(1.0 if first is None else STRENGTH) if options.strength is None else options.strength,
        keep_frames=tuple(map(frame_number, options.keep_frames)),
    )
    inversion = start.inversion or invert_with_progress(loaded, start.film, source, options, start.layout)
    start_step = inversion.start(settings.strength)
    steps = inversion.steps - start_step
    given = {name: getattr(options, name) for name in ("cross", "self_attention", "temporal")}
    say_unread_shares(given, start_step, inversion.steps)
    if first is not None:
        result = run_first_frame(inversion, first, resolved[0], settings, options.sparsectrl, steps)
        return replace(result, inversion=inversion)
    batches = len(set(find_other_motions(inversion, resolved)))
    with progress(steps * batches, "editing") as bar:
        result = edit_clip(inversion, resolved, settings, progress=bar.advance)
    for target, alignment in zip(targets, result.alignments, strict=True):
        description = alignment.describe(loaded.placeholders)
        notify(f"→ {target}\n{description}" if len(targets) > 1 else description)
    return replace(result, inversion=inversion)


def frame_number(text: str) -> int:
    """`first`, `last` or a number; `UserError` for another word."""
    numbers = {"first": 0, "last": -1}
    if text.lower() in numbers:
        return numbers[text.lower()]
    if not text.isdecimal():
        raise UserError(f"--keep-frames {text} is no frame. Say first, last, or a number from 0.")
    return int(text)


def run_first_frame(
    inversion: Inversion,
    picture: SourceImage,
    target: str,
    settings: ClipEdit,
    sparsectrl: str,
    steps: int,
) -> ClipResult:
    """The edit from an edited first frame, which a SparseCtrl carries too where one is named."""
    first = read_first_frame(inversion, picture)
    controls: tuple[Control, ...] = ()
    if sparsectrl:
        network = open_sparsectrl(inversion.model, sparsectrl)
        if inversion.states.shape[2] > network.longest:
            raise UserError(
                f"{sparsectrl} has positions for {network.longest} frames, and the clip has "
                f"{inversion.states.shape[2]}. Cut the clip, or leave --sparsectrl out."
            )
        controls = (network.of((first.pixels[None] + 1) / 2, [0]),)
    with progress(steps, "carrying the first frame") as bar:
        return propagate_first_frame(
            inversion, first, target, settings, controls=controls, progress=bar.advance
        )


def flow_clip(
    loaded: ModelWithConcepts,
    film: Film,
    source: str,
    targets: Sequence[str],
    options: ClipOptions,
    layout: Layout,
) -> ClipResult:
    """The edit without an inversion."""
    if options.negative:
        raise UserError("--negative has no effect with --method flow-edit. Leave out one of the two.")
    settings = ClipFlow(
        strength=FLOWED if options.strength is None else options.strength,
        draws=options.draws,
        shared=options.shared_noise,
        guidance=options.guidance,
        source_guidance=options.source_guidance,
        steps=options.steps,
        seed=options.seed,
    )
    resolved = [loaded.resolve(target) for target in targets]
    with progress(loaded.model.path.count_noised_steps(options.steps, settings.strength), "editing") as bar:
        result = flow_film(
            loaded.model, film, loaded.resolve(source), resolved, settings, layout=layout, progress=bar.advance,
        )  # fmt: skip
    return replace(result, facts={**result.facts, "method": options.method})


def publish_clip(
    folder: Path,
    result: ClipResult,
    films: Sequence[Sequence[Image.Image]],
    fps: float,
    source: str,
    record: dict[str, Any],
) -> None:
    """Write source.webp, edit_0.webp … with their frames, sheet.png, report.html and run.json."""
    original = [to_image(frame) for frame in result.encoded.pixels]
    write_film(folder / "source", original, fps)
    entries, rows, titles = [], [], [source or "source"]
    scorer = find_scorer(result.model)
    strip = [Cell(frame, f"frame {number}") for number, frame in choose_strip(original).items()]
    rows.append([*strip, Cell(draw_track(original), "track")])
    for number, (film, prompt) in enumerate(zip(films, result.prompts, strict=True)):
        write_film(folder / f"edit_{number}", film, fps)
        figures = measure_film(result, number, source, scorer)
        entries.append({"file": f"edit_{number}.webp", "prompt": prompt, **figures})
        rows.append([*(Cell(frame) for frame in choose_strip(film).values()), Cell(draw_track(film))])
        titles.append(prompt)
        if result.masks is not None:
            mask_images = [mask_to_image(mask, original[0].size) for mask in result.masks[number]]
            rows.append([Cell(image) for image in choose_strip(mask_images).values()])
            titles.append("where it was allowed to change")
    page = draw_sheet(rows, row_titles=titles, cell=128)
    save_png(folder / "sheet.png", page)
    write_json(folder / RECORD, {**record, "edits": entries})
    # The report: the clips, their strips, the figures of each edit, and how the run went
    clips = [
        ("source", source or "source"),
        *((f"edit_{i}", prompt) for i, prompt in enumerate(result.prompts)),
    ]
    parts = [image_figure(folder / f"{name}.webp", caption) for name, caption in clips]
    parts += [heading("Frames"), image_figure(page, "strips of the frames"), heading("Figures")]
    names = {
        key: key.replace("_", " ") for entry in entries for key in entry if key not in ("file", "prompt")
    }
    lines = [
        (entry["prompt"], *("–" if (value := entry.get(key)) is None else value for key in names))
        for entry in entries  # not all of them are measured alike
    ]
    parts += [table(("edit", *names.values()), lines), heading("The run")]
    parts += [
        table(
            ("", ""),
            [(key, record[key]) for key in ("model", "motion", "steps", "seed", "nfe", "seconds")],
        )
    ]
    write_report(
        folder / REPORT,
        f"Clip: {', '.join(result.prompts)}",
        [*parts, heading("Again"), command_block(record["command"])],
    )


def measure_film(
    result: ClipResult, number: int, source_words: str, scorer: Scorer | None
) -> dict[str, float | None]:
    """Measure how much of an edit changed, its motion, its flicker beside the source's, and whether it is the target.

    flicker   mean absolute difference of consecutive frames, in 255ths; `along`: what the flow does not explain of it
    track_px  distance of the moving thing from its position in the source, of 128 a side; left out for another motion
    became    share of the frames that are nearer to the target's words than to the source's
    """
    source, edit = result.encoded.pixels.cpu(), result.pixels[number]
    mask = None if result.masks is None else result.masks[number].cpu()
    figures: dict[str, float | None] = {"changed_share": None if mask is None else float(mask.mean())}

    # Flicker, between frames and along the flow
    figures["psnr_db"] = image_metrics.psnr(source, edit)
    for name, clip in (("flicker", edit), ("source_flicker", source)):
        figures[name] = float((clip[1:] - clip[:-1]).abs().mean()) * 127.5
    frames = {
        name: [to_image(frame).resize((SIDE, SIDE)) for frame in clip]
        for name, clip in (("along", edit), ("source_along", source))
    }
    figures |= {name: warped_flicker(film) for name, film in frames.items()}

    # The motion, where the target's words say the source's
    target = result.prompts[number]
    if source_words and find_moves(target) == find_moves(source_words):
        tracks = [trace_movement(film) for film in frames.values()]
        figures["track_px"] = track_error(*tracks)

    # Whether its frames are nearer to the target's words
    if scorer is not None and source_words and target != source_words:
        similarities = (
            scorer.embed_images([to_image(frame) for frame in edit])
            @ scorer.embed_texts([source_words, target]).T
        )
        figures["became"] = float((similarities[:, 1] > similarities[:, 0]).float().mean())
    return {key: None if value is None else round(value, 4) for key, value in figures.items()}
