"""How closely concepts of `customize train` follow a map: the development concepts under a map of their own glyph.

    python -m benchmarks.control.subject                                    two hours on two cores; needs the emoji font
    python -m benchmarks.control.subject --concepts peacock --count 2 --kinds sketch          to try it
    python -m benchmarks.control.subject --of-class                         under maps of the class's glyph too

Every concept's run (those of `benchmarks.customize` in the same `--out` are taken) draws `a [V] CLASS` in the places
that it was not trained in. The glyph is rendered there, held as a posed scene of seeds that no network was trained on
holds its thing; the map of that rendering goes to the control network, and the same prompt is drawn from the same
noise without a map (the *floor*). The true picture through the autoencoder is the *bound*. What is compared:

    glyph, place      by the classifier: whether it sees the concept, and where
    edges             F1 of Canny's edges with those of the true picture, within a pixel
    pose              the concept's glyph registered over place, size, angle and mirroring: medians of the errors

With `--of-class` the map is that of the class's glyph, in the same pose: its edges are not the concept's, and are left
out. Shares have Wilson's 95 % interval, means the bootstrap's; the last rows are what a map changes, image by image.
Runs and images that `--out` holds are not made again. Writes `under-maps.md`, `under-maps.json` and `under-maps.png`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Annotated, Any

import numpy as np
from PIL import Image

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import checkpoint, read_concept
from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.flags import DATA, MODEL, SAMPLING
from backbone.cli.options import Option
from backbone.io.console import notify, run_app
from backbone.io.files import read_json, write_json, write_text
from backbone.io.progress import progress
from backbone.media.sheet import GREEN, RED, Cell, draw_sheet, save_png
from backbone.media.transforms import to_image
from backbone.models.model import Backbone
from backbone.world.rendering.render import SIZE, find_font
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_posed_scene
from backbone.world.words import Thing, load_vocabulary
from benchmarks.control.scenes import (
    BOUND,
    FLOOR,
    KINDS,
    Case,
    ControlSettings,
    Gallery,
    PoseError,
    compare_poses,
    edge_f1,
    find_pose,
    make_case,
)
from benchmarks.customize.concepts import (
    TOKEN,
    ConceptSettings,
    Trial,
    list_trials,
    make_questions,
    train_by_command,
)
from benchmarks.judges.classifier import (
    FACTS,
    Classifier,
    is_top_glyph,
    load_classifier,
    most_likely,
    prepare_images,
)
from benchmarks.judges.fidelity import decode_renderings
from benchmarks.judges.tables import (
    concept_interval,
    format_interval,
    format_mean,
    format_percent,
    format_share,
)

FIRST_SEED = BENCHMARK_SEEDS[0] + 800_000
OF_CLASS = "{} of the class"
app = script_app()


@dataclass(frozen=True, kw_only=True)
class SubjectSettings(ConceptSettings):
    """The concepts and the maps to sample."""

    count: Annotated[int, Option("Images of each concept under each kind of map.", DATA, min=1)] = 7
    kinds: Annotated[tuple[str, ...], Option("Kinds of maps; repeatable.", DATA, choices=KINDS)] = (
        "sketch",
        "pose",
    )
    of_class: Annotated[bool, Option("Under maps of the class's glyph too.", DATA)] = False
    network: Annotated[str, Option("A control network.", MODEL, default_text="the model's own")] = ""
    scale: Annotated[
        float | None,
        Option("Conditioning scale of the control network.", SAMPLING, default_text="the network's own"),
    ] = None
    steps: Annotated[int, Option("Sampling steps.", SAMPLING, min=1)] = 25
    guidance: Annotated[float, Option("Guidance scale.", SAMPLING)] = 4.0
    seed: Annotated[int, Option("Seed of training.", DATA)] = 0


@dataclass(frozen=True)
class ImageReading:
    """The readings of one image of a concept; `edges` is None under a map of another glyph."""

    concept: str
    glyph: bool
    place: bool
    edges: float | None
    pose: PoseError


@settled_command(app, SubjectSettings)
def main(settings: SubjectSettings) -> None:
    """Trains and draws what is missing, measures every image, and prints the table."""
    trials = list_trials("concepts", list(settings.concepts), flags=settings.flags, seed=settings.seed)
    find_font()
    classifier = load_classifier(settings.classifier)
    readings: dict[str, list[ImageReading]] = {}
    rows: list[list[Cell]] = []
    for trial in trials:
        train_by_command(trial, settings.out, settings.model)
        cases = make_cases(trial, settings.count)
        columns = draw_columns(trial, cases, settings)
        for name, images in columns.items():
            readings.setdefault(name, []).extend(read_images(trial, cases, images, classifier, name))
        rows.append(
            make_cells(trial, cases[0], {name: (columns[name][0], readings[name]) for name in columns})
        )
        shares = [f"{name} {format_glyph_share(trial.concept, readings[name])}" for name in columns]
        notify(f"{trial.concept}: {', '.join(shares)}")
    facts = {
        "model": settings.model, "network": settings.network or "the model's own", "scale": settings.scale,
        "steps": settings.steps, "guidance": settings.guidance, "first_seed": FIRST_SEED,
        "classifier": read_json(settings.classifier / FACTS).get("step"),
    }  # fmt: skip
    text = format_table(readings)
    records = {name: [asdict(reading) for reading in column] for name, column in readings.items()}
    write_json(settings.out / "under-maps.json", {**facts, "images": records})
    write_text(settings.out / "under-maps.md", text)
    note = "The first image of each concept. Green: the classifier sees its glyph."
    save_png(settings.out / "under-maps.png", draw_sheet(rows, note=note, cell=SIZE))
    print(text)


# Scenes and images ------------------------------------------------------------------------------------------


def make_cases(trial: Trial, count: int) -> list[Case]:
    """The concept in the places that it is not learned in, posed as single things of posed scenes are."""
    number = list(load_vocabulary().development_concepts).index(trial.concept)
    places = [question.expected for question in make_questions("places", trial.noun, "")]
    seeds = itertools.count(FIRST_SEED + 10_000 * number)
    posed = (scene for scene in map(sample_posed_scene, seeds) if is_whole(scene))
    placed = zip(itertools.islice(posed, count), itertools.cycle(places), strict=False)
    return [
        make_case(replace(scene, things=(Thing(trial.concept),), place=place, style=None))
        for scene, place in placed
    ]


def is_whole(scene: Scene) -> bool:
    """Whether a posed scene is of one thing of the usual size, all of it within the picture."""
    if len(scene.figures) > 1 or scene.things[0].small or scene.poses is None or not is_fair(scene):
        return False
    pose, half = scene.poses[0], scene.poses[0].size / 2
    return half <= pose.x <= SIZE - half and 2 * half <= pose.foot <= SIZE


def draw_columns(
    trial: Trial, cases: Sequence[Case], settings: SubjectSettings
) -> dict[str, list[Image.Image]]:
    """The images of a concept by their map; without a map first, the true ones last."""
    concept = read_concept(checkpoint(settings.out / "runs" / trial.name))
    model = Backbone.open(settings.model, device="cpu")
    load_concepts(model, [concept])
    control_settings = ControlSettings(
        model=settings.model, network=settings.network, steps=settings.steps, guidance=settings.guidance,
        scale=settings.scale, out=settings.out / "under-maps" / trial.name,
    )  # fmt: skip
    gallery = Gallery(control_settings, model)
    phrase = f"{concept.tokens[TOKEN]} {trial.noun}"
    prompts = [(case.scene.caption(name=phrase), case.scene.seed) for case in cases]
    columns = {FLOOR: gallery.draw_all([(*prompt, ()) for prompt in prompts], "")}
    for name, (kind, map_cases) in list_ways(trial, cases, settings).items():
        requests = [(*prompt, (case.maps[kind],)) for prompt, case in zip(prompts, map_cases, strict=True)]
        suffix = "" if name == kind else trial.noun.replace(" ", "-")
        columns[name] = gallery.draw_all(requests, kind, suffix=suffix)
    exact = Backbone.open(settings.model, device="cpu", precision="fp32")
    columns[BOUND] = [
        to_image(picture) for picture in decode_renderings(exact, [case.scene for case in cases])
    ]
    return columns


def list_ways(
    trial: Trial, cases: Sequence[Case], settings: SubjectSettings
) -> dict[str, tuple[str, Sequence[Case]]]:
    """The maps to sample under, by name: a kind, and the scenes whose maps they are."""
    ways = {kind: (kind, cases) for kind in settings.kinds}
    if not settings.of_class:
        return ways
    others = [make_case(replace(case.scene, things=(Thing(trial.noun),))) for case in cases]
    return ways | {OF_CLASS.format(kind): (kind, others) for kind in settings.kinds}


# Measures ---------------------------------------------------------------------------------------------------


def read_images(
    trial: Trial, cases: Sequence[Case], images: Sequence[Image.Image], classifier: Classifier, name: str
) -> list[ImageReading]:
    """The readings of a column of images of a concept."""
    predictions = classifier.classify(list(images))
    readings = []
    with progress(len(images), f"registering ({trial.concept}, {name})") as bar:
        for case, image, prediction in zip(cases, images, predictions, strict=True):
            assert case.scene.poses is not None
            picture = (prepare_images([image])[0] + 1) / 2
            pose = find_pose(picture, case.scene.things[0], None)
            readings.append(
                ImageReading(
                    trial.concept,
                    is_top_glyph(prediction, trial.concept),
                    most_likely(prediction.place) == case.scene.place,
                    None if name.endswith(OF_CLASS.format("")) else edge_f1(case.picture, image),
                    compare_poses(case.scene.poses[0], pose),
                )
            )
            bar.advance(images=1)
    return readings


def format_glyph_share(concept: str, readings: Sequence[ImageReading]) -> str:
    """The share of a concept's images that show its glyph."""
    return format_percent(
        float(np.mean([reading.glyph for reading in readings if reading.concept == concept]))
    )


# Table and sheet --------------------------------------------------------------------------------------------


def make_cells(
    trial: Trial, case: Case, columns: Mapping[str, tuple[Image.Image, Sequence[ImageReading]]]
) -> list[Cell]:
    """A concept's row of the sheet: its first image of each column, behind the map that it was drawn under."""
    cells = [Cell(case.picture, case.scene.caption(name=f"{TOKEN} {trial.noun}"))]
    for name, (image, readings) in columns.items():
        if name in case.maps:
            cells.append(Cell(case.maps[name].convert("RGB"), name))
        first = next(reading for reading in readings if reading.concept == trial.concept)
        cells.append(
            Cell(image, name if name in (FLOOR, BOUND) else f"by {name}", GREEN if first.glyph else RED)
        )
    return cells


def format_table(columns: Mapping[str, Sequence[ImageReading]]) -> str:
    """Markdown: a row for each column of images, what a map changes, and the glyph of every concept."""
    concepts = list(dict.fromkeys(reading.concept for reading in columns[FLOOR]))
    lines = [
        f"| {len(concepts)} concepts, {len(columns[FLOOR])} images each | glyph | 95 %, over concepts | place | both | "
        "edges F1 | place, px | size | angle | looks the right way |",
        "|---" * 10 + "|",
        *(f"| {name} | {' | '.join(format_row(readings, concepts))} |" for name, readings in columns.items()),
    ]
    lines += ["", "| what the map changes | glyph, points | place, points | edges F1 |", "|---|---|---|---|"]
    for name, readings in columns.items():
        if name not in (FLOOR, BOUND):
            lines.append(f"| {name} | {' | '.join(format_changes(readings, columns[FLOOR]))} |")
    lines += ["", f"| glyph of | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for concept in concepts:
        shares = [format_glyph_share(concept, readings) for readings in columns.values()]
        lines.append(f"| {concept} | {' | '.join(shares)} |")
    return "\n".join([*lines, ""])


def format_row(readings: Sequence[ImageReading], concepts: Sequence[str]) -> list[str]:
    """The cells of one column of images."""
    by_concept = [
        [reading.glyph for reading in readings if reading.concept == concept] for concept in concepts
    ]
    edges = [reading.edges for reading in readings if reading.edges is not None]
    poses = [reading.pose for reading in readings]
    return [
        format_share([reading.glyph for reading in readings]),
        format_interval(*concept_interval([float(np.mean(glyphs)) for glyphs in by_concept])),
        format_share([reading.place for reading in readings]),
        format_share([reading.glyph and reading.place for reading in readings]),
        format_mean(edges),
        f"{median(pose.place for pose in poses):.1f}",
        f"{median(pose.size for pose in poses):.0%}",
        f"{median(pose.angle for pose in poses):.0f}°",
        format_share([pose.mirror for pose in poses]),
    ]


def format_changes(readings: Sequence[ImageReading], floor: Sequence[ImageReading]) -> list[str]:
    """The paired differences of a column's images to those without a map, from the same noise."""
    pairs = list(zip(readings, floor, strict=True))
    edges: list[Any] = [
        under_map.edges - without_map.edges
        for under_map, without_map in pairs
        if under_map.edges is not None and without_map.edges is not None
    ]
    return [
        format_mean(
            [100.0 * (under_map.glyph - without_map.glyph) for under_map, without_map in pairs], "+.1f"
        ),
        format_mean(
            [100.0 * (under_map.place - without_map.place) for under_map, without_map in pairs], "+.1f"
        ),
        format_mean(edges, "+.2f"),
    ]


if __name__ == "__main__":
    run_app(app)
