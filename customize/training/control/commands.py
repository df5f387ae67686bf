"""The commands for control networks: show a map, train a network that reads maps, measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from backbone.cli.command_line import command, settled_command
from backbone.cli.commands import print_json
from backbone.cli.conditions import (
    KINDS,
    LINE_KINDS,
    ROWS,
    SYNONYMS,
    RequestedControl,
    RequestedMap,
    check_strength,
)
from backbone.cli.flags import (
    DATA,
    DRAWING,
    MODEL,
    SAMPLING,
    SCORING,
    JsonOptions,
    PlaceOptions,
    model_option,
    out_option,
)
from backbone.cli.options import Option
from backbone.io.console import UserError, notify, quote
from backbone.io.files import read_json
from backbone.io.run_folder import check_new_file, fill_new_folder
from backbone.training.settings import PANELS, RunOptions, find_changed_settings, find_resumed
from backbone.world.parse import parse_pose, parse_scene
from backbone.world.scene import Scene, sample_posed_scene, sample_scene
from customize.control_settings import PROGRAM, ControlSettings, default_folder, read_settings

WORLD_KINDS = ("sketch", "lines", "edges", "labels", "depth", "pose")
# Settings that may change with --resume; the data and the model may have moved
RESUMED = ("steps", "learning_rate", "images", "device", "model", "begin_from", "validation_image")
MAPS = Path("maps")
FIDELITY = Path("condition-fidelity")


def register(app: typer.Typer) -> None:
    """Add the commands to `customize`."""
    settled_command(app, MapOptions)(map)
    command(app, ControlSettings, RunOptions, panels=PANELS)(train_control)
    settled_command(app, EvaluateControlOptions)(evaluate_control)


@dataclass(frozen=True, kw_only=True)
class MapOptions(JsonOptions):
    """Options of `customize map`."""

    words: Annotated[
        tuple[str, ...],
        Option(
            "Kinds of maps (sketch, lines, edges, labels, depth, pose), and a picture's file.",
            DATA,
            argument=True,
            metavar="KIND… [PICTURE]",
            default_text="all that can be made",
        ),
    ] = ()
    scene: Annotated[
        int | None,
        Option(
            "A scene of moji's world by its seed, in place of a picture.",
            DATA,
            min=0,
            needs={"prompt": ("",)},
        ),
    ] = None
    posed: Annotated[
        bool,
        Option(
            "Draw the scene of --scene with things anywhere, rotated and overlapping.",
            DATA,
            needs={"prompt": ("",)},
        ),
    ] = False
    prompt: Annotated[
        str,
        Option(
            "A scene of moji's world in words: “a red dog next to a cat in the snow”.",
            DATA,
            metavar="WORDS",
        ),
    ] = ""
    pose: Annotated[
        tuple[str, ...],
        Option(
            "Where a thing of --prompt is, as x=40,foot=100,size=50,angle=30,depth=0.7,mirrored; one for each.",
            DATA,
            needs={"prompt": ()},
            metavar="POSE",
        ),
    ] = ()
    seed: Annotated[int, Option("Seed of what --prompt leaves open.", DRAWING, needs={"prompt": ()})] = 0
    all: Annotated[bool, Option("Every kind that can be made.", DATA)] = False
    model: Annotated[str | None, model_option("moji")] = None
    resolution: Annotated[
        int,
        Option("Pixels a side that a picture is brought to.", MODEL, default_text="the model's own", min=1),
    ] = 0
    out: Annotated[
        Path | None,
        out_option("A .png for one kind, or a folder, new or empty.", "maps, maps-2 …", metavar="PATH"),
    ] = None


def map(options: MapOptions) -> None:
    """Draw control maps: those found in an image, or the true ones of a scene of moji's world."""
    kinds, pictures = split_words(options.words)
    if options.all and kinds:
        raise UserError(f"--all makes every kind, so {' and '.join(kinds)} need not be named. Leave one out.")
    if options.posed and options.scene is None:
        raise UserError("--posed has no effect without --scene. Add that, or leave out --posed.")
    scene = resolve_scene(options)
    if len(pictures) > 1:
        unknown = next((word for word in pictures if not Path(word).expanduser().exists()), pictures[0])
        raise UserError(
            f"{unknown} is no kind of map, and one picture is taken at a time. Kinds are {', '.join(KINDS)}."
        )
    if (scene is None) == (not pictures):
        raise UserError(
            "Name one picture, as in: customize map edges photo.png; or a scene: customize map --scene 7, or "
            'customize map pose --prompt "a dog in the snow".'
        )
    if scene is not None and (options.model or options.resolution):
        raise UserError(
            "A scene has moji's own size, so --model and --resolution have no effect. Leave them out."
        )
    single = options.out is not None and options.out.suffix.lower() == ".png"
    if single and len(kinds) != 1:
        raise UserError(f"{options.out} is one file. Name one kind for it, or give --out a folder.")
    if single and options.out is not None:
        check_new_file(options.out)
    from customize.data.maps import compute_maps, render_maps, save_map, save_maps

    # The true maps of a scene, or those found in an image
    if scene is not None:
        picture, maps = render_maps(scene, kinds or WORLD_KINDS)
        title = scene.caption()
    else:
        picture, maps = compute_maps(pictures[0], kinds, model=options.model, resolution=options.resolution)
        title = Path(pictures[0]).name
    if empty := [kind for kind in maps if kind in LINE_KINDS and maps[kind].getbbox() is None]:
        notify(f"Nothing is found in {title} for {' and '.join(empty)}: the map is black.")
    if single:
        assert options.out is not None
        (kind, control_map), *_ = maps.items()
        save_map(options.out, control_map)
        notify(f"{options.out} is the {kind} of {title}. Next: --condition {kind}={quote(options.out)}")
        if options.as_json:
            print_json({kind: str(options.out)})
        return
    with fill_new_folder(options.out, MAPS) as (folder, unfinished):
        names = save_maps(unfinished, picture, maps, title)
    notify(f"{', '.join(maps)} in {folder}; {folder / 'sheet.png'} shows them.")
    if options.as_json:
        print_json({"folder": folder, **{kind: str(folder / name) for kind, name in names.items()}})


def split_words(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words split into (kinds of maps, each once, all other words)."""
    kinds = [SYNONYMS.get(word.lower(), word.lower()) for word in words]
    selected = tuple(dict.fromkeys(kind for kind in kinds if kind in KINDS))
    return selected, tuple(word for word, kind in zip(words, kinds, strict=True) if kind not in KINDS)


def resolve_scene(options: MapOptions) -> Scene | None:
    """The scene that the options describe; None for a picture."""
    if options.prompt:
        poses = tuple(parse_pose(pose) for pose in options.pose) or None
        return parse_scene(options.prompt, seed=options.seed, poses=poses)
    if options.scene is None:
        return None
    return sample_posed_scene(options.scene) if options.posed else sample_scene(options.scene)


@dataclass(frozen=True, kw_only=True)
class EvaluateControlOptions(JsonOptions, PlaceOptions):
    """Options of `customize evaluate-control`."""

    network: Annotated[
        str,
        Option(
            "A run of customize train-control, a diffusers folder, a file or a hub id.",
            DATA,
            argument=True,
            metavar="NETWORK",
        ),
    ]
    images: Annotated[
        str,
        Option(
            "Images with their maps and captions, laid out as for train-control; those that it did not learn from.",
            DATA,
            metavar="FOLDER",
        ),
    ] = ""
    condition: Annotated[
        str,
        Option(
            "The kind of map.",
            DATA,
            choices=KINDS,
            words={word: {"condition": kind} for word, kind in SYNONYMS.items()},
            default_text="what it was trained on",
        ),
    ] = ""
    most: Annotated[int, Option("At most this many pairs; 0: all.", DATA, min=0)] = 100
    scale: Annotated[
        float,
        Option(
            "Conditioning scale of the control network.",
            DRAWING,
            flag="condition-scale",
            aliases=("scale", "controlnet-conditioning-scale"),
            min=0,
        ),
    ] = 1.0
    condition_rows: Annotated[
        str,
        Option(
            "Where control acts in guidance: on both predictions, or on the prompted one alone.",
            DRAWING,
            choices=ROWS,
            default_text="the network's own",
        ),
    ] = ""
    sweep: Annotated[
        tuple[float, ...],
        Option("Further scales, a row of the table and a column of the sheet each; repeatable.", DRAWING),
    ] = ()
    steps: Annotated[
        int | None, Option("Sampling steps.", SAMPLING, default_text="the model's own", min=1)
    ] = None
    guidance: Annotated[
        float | None,
        Option("Guidance scale; 1: no guidance.", SAMPLING, default_text="the model's own", min=0),
    ] = None
    seed: Annotated[int, Option("Pair i's noise depends on the seed and i alone.", SAMPLING)] = 0
    scorer: Annotated[
        Path | None,
        Option(
            "A folder of CLIP, for the captions.", SCORING, metavar="FOLDER", default_text="the model's own"
        ),
    ] = None
    model: Annotated[str | None, model_option("what the network was trained on, else moji")] = None
    out: Annotated[
        Path | None,
        out_option(
            "The folder to write the table to, new or empty.", "condition-fidelity, condition-fidelity-2 …"
        ),
    ] = None


def evaluate_control(options: EvaluateControlOptions) -> None:
    """Measure how closely images follow the maps of pairs, against images without control and the true ones."""
    for scale in options.sweep:
        check_strength(RequestedControl(RequestedMap("map", ""), scale=scale))
    if not options.images:
        raise UserError("Say --images FOLDER: images with their maps, as for customize train-control.")
    from backbone.evaluation.clip import load_scorer
    from backbone.models.control import find_control, get_condition_defaults, open_control, refuse_rows
    from backbone.models.locate import OWN
    from backbone.models.model import Backbone
    from backbone.world.rendering.record import load_labels
    from customize.data.control_pairs import check_control_pairs, read_control_pairs
    from customize.training.control.evaluation import TABLE, ControlDrawing
    from customize.training.control.evaluation import evaluate_control as measure

    # Pairs of the kind that the network was trained on
    record = find_control(options.network).record
    kind = choose_kind(options, record.kinds)
    model = Backbone.open(
        options.model or record.model or "moji", device=options.device, precision=options.precision
    )
    pairs = read_control_pairs(options.images, kind)
    pairs = pairs[: options.most or len(pairs)]
    palette = record.palette or (load_labels() if kind == "labels" and model.location.name in OWN else None)
    check_control_pairs(pairs, kind, (model.resolution, model.resolution), palette=palette, wordless=True)
    scorer = options.scorer or model.location.local("scorer")
    with fill_new_folder(options.out, FIDELITY) as (folder, unfinished):
        opened = open_control(model, options.network)
        if options.condition_rows:
            refuse_rows(model, RequestedControl(RequestedMap(kind, ""), rows=options.condition_rows), opened)
        drawing = ControlDrawing(
            kind,
            options.scale,
            options.steps or int(model.defaults["steps"]),
            float(model.defaults["guidance"] if options.guidance is None else options.guidance),
            options.seed,
            options.condition_rows or get_condition_defaults(model, opened.record, kind)["rows"],
            tuple(options.sweep),
        )
        loaded_scorer = None if scorer is None else load_scorer(scorer)
        figures = measure(model, opened, pairs, drawing, scorer=loaded_scorer, out=unfinished)
    if options.as_json:
        print_json({"folder": folder, **read_json(folder / TABLE)})
    else:
        typer.echo(figures["text"])
    notify(f"{folder}/sheet.png shows the images.")


def choose_kind(options: EvaluateControlOptions, kinds: Sequence[str]) -> str:
    """The kind of map to measure; `UserError` if none is named, or one that the network does not read."""
    if kinds and options.condition and options.condition not in kinds:
        raise UserError(
            f"{options.network} was trained on {', '.join(kinds)}, not on {options.condition}. Name one of these with "
            "--condition."
        )
    if not options.condition and len(kinds) != 1:
        reason = f"reads {', '.join(kinds)}" if kinds else "does not say what kind of map it reads"
        raise UserError(f"{options.network} {reason}. Say which with --condition, as in --condition sketch.")
    return options.condition or kinds[0]


def train_control(requested: dict[str, Any], run: RunOptions) -> None:
    """Train a network that reads maps, on images with their maps (T2I-Adapter, ControlNet, control-LoRA)."""
    named = "images" in requested and "condition" in requested
    default = default_folder(requested["images"], requested["condition"]) if named else None
    resumed = None if run.resume is None else find_resumed(run, PROGRAM, default)
    if resumed is None:
        from customize.training.control.start import start

        finished = start(requested, out=run.out, vram=run.vram)
    else:
        saved = read_settings(resumed)  # mistakes are answered before torch is imported
        from customize.training.control.start import as_saved

        overrides = find_changed_settings(saved, as_saved(requested), run, resumed, allowed=RESUMED)
        from customize.training.control.run import resume_control

        finished = resume_control(resumed, overrides)
    kind = read_settings(finished).condition
    notify(
        f'{finished}/sheet.png shows it. Next: customize sample "…" --condition {kind}=map.png --controlnet '
        f"{quote(finished)}"
    )
