"""How well a motion learned from a few clips transfers to other things: eight paths that no words name.

    python -m benchmarks.clips.motions                                     a quarter of an hour, with the emoji font
    python -m benchmarks.clips.motions --motion moji-motion                some hours on two cores
    python -m benchmarks.clips.motions --motion moji-motion --concept runs/dog   with a subject in every clip too

For each path clips of three nouns are rendered, `customize train-motion` learns a token `[M]` from them, and clips of
other nouns are drawn with it, and with the base's own words for it in its place. Compared are the tracks, measured from
the pixels, with the path itself: their correlation, −1 to 1, with the bootstrap's interval over the clips; the bound is
that of true clips of those nouns. Without `--motion` nothing is trained: other things are drawn along the track of the
first of those clips (`customize clip --track`). Runs that `--out` holds are not trained again. Writes `table.md` and
`table.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import cos, exp, pi, sin
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from backbone.adapters.concept import Concept, read_concept
from backbone.cli.commands import run_main
from backbone.evaluation.motion import SIDE, trace_movement, track_correlation
from backbone.evaluation.statistics import bootstrap_mean
from backbone.io.files import read_json, write_bytes, write_json, write_text
from backbone.io.run_folder import CONCEPT_FILE
from backbone.media.clips import encode_webp, read_film
from backbone.training.settings import RunFolderOptions
from backbone.world.rendering.render import find_font, place_figures, render
from backbone.world.scene import Pose, Scene
from backbone.world.words import Thing, choose_article
from customize.clips.draw import RECORD, draw_clips
from customize.clips.settings import ClipOptions
from customize.clips.train import train_motion

Path4 = Callable[[float], tuple[float, float, float, float]]
PATHS: dict[str, Path4] = {  # of u in 0…1: pixels right and down, log of the growth, degrees clockwise
    "stairs": lambda u: (50 * (u - 0.5), -9 * int(4 * u), 0.0, 0.0),
    "pendulum": lambda u: (24 * sin(2 * pi * u), -8 * sin(2 * pi * u) ** 2, 0.0, 20 * sin(2 * pi * u)),
    "heartbeat": lambda u: (0.0, 0.0, 0.35 * (exp(-((8 * u - 2) ** 2)) + exp(-((8 * u - 5) ** 2))), 0.0),
    "eight": lambda u: (20 * sin(2 * pi * u), 9 * sin(4 * pi * u), 0.0, 0.0),
    "spiral": lambda u: (20 * u * cos(3 * pi * u), 20 * u * sin(3 * pi * u), 0.0, 0.0),
    "leap": lambda u: (56 * (u - 0.5), -30 * 4 * u * (1 - u), 0.0, 40 * (u - 0.5)),
    "there and back": lambda u: (44 * (0.5 - abs(2 * u - 1)), 0.0, 0.0, 0.0),
    "tumble": lambda u: (40 * (u - 0.5), 16 * (u - 0.5), -0.3 * u, 90 * u),
}
LEARNED, OTHERS = ("car", "apple", "rocket"), ("dog", "cat", "bird", "penguin")
PLACES = ("in a park", "in the snow", "on a white background", "at sunset")
TOKEN, WORDS = "[M]", "moving in its own way"


def trace_path(path: Path4, frames: int) -> NDArray[np.float64]:
    """The track [F, 4] of a path: x, y, log of the growth, radians of the turn."""
    rows = [path(number / (frames - 1)) for number in range(frames)]
    return np.array([(x, y, growth, np.radians(turn)) for x, y, growth, turn in rows])


def render_path(noun: str, place: str, path: Path4, frames: int, seed: int = 0) -> list[Image.Image]:
    """Frames of one thing that moves along a path, around the place where it would stand."""
    scene = Scene((Thing(noun),), place, seed=seed)
    (figure, *_) = place_figures(scene, scene.horizon)
    images = []
    for number in range(frames):
        x, y, growth, turn = path(number / (frames - 1))
        size = figure.size * exp(growth)
        middle = figure.foot - figure.size / 2 - 10 + y
        pose = Pose(SIDE / 2 + x, middle + size / 2, size, turn, figure.mirrored)
        images.append(render(replace(scene, poses=(pose,))).image)
    return images


def write_training_clips(folder: Path, path: Path4, frames: int) -> None:
    """Write a motion's training clips with their captions."""
    for number, noun in enumerate(LEARNED):
        place = PLACES[number]
        write_bytes(
            folder / f"{number}.webp", encode_webp(render_path(noun, place, path, frames, number), 8.0)
        )
        write_text(folder / f"{number}.txt", f"{choose_article(noun)} {noun} {place}, {TOKEN}")


def learn(name: str, motion: str, model: str, training: dict[str, int], out: Path) -> Path:
    """The run that learned a path, trained if it does not exist yet."""
    run = out / name.replace(" ", "-") / "run"
    if not (run / CONCEPT_FILE).is_file():
        clips = run.with_name("clips")
        write_training_clips(clips, PATHS[name], training["frames"])
        requested = {
            "clips": str(clips),
            "motion": motion,
            "model": model,
            "token": TOKEN,
            "token_words": WORDS,
        }
        train_motion({**requested, **training}, RunFolderOptions(out=run))
    return run


def correlate(films: Sequence[Sequence[Image.Image]], path: Path4) -> list[float]:
    """The correlation of each clip's track with the path."""
    side = (SIDE, SIDE)
    return [
        track_correlation(
            trace_movement([frame.resize(side) for frame in film]), trace_path(path, len(film)), SIDE
        )
        for film in films
    ]


def draw(
    prompts: Sequence[str], options: ClipOptions, concepts: Sequence[Concept]
) -> list[tuple[Image.Image, ...]]:
    """The frames of a clip of each prompt, sampled if they do not exist yet."""
    folder = options.out
    assert folder is not None
    if not (folder / RECORD).is_file():
        draw_clips(prompts, options, concepts=concepts)
    return [read_film(folder / clip["file"]).frames for clip in read_json(folder / RECORD)["clips"]]


def main(
    motion: Annotated[str, typer.Option(help="The motion adapter; none: along the track of a clip.")] = "",
    model: Annotated[str, typer.Option(help="The picture model.")] = "moji",
    concept: Annotated[
        Path | None, typer.Option(help="A subject's run, whose token stands for the nouns.")
    ] = None,
    paths: Annotated[int, typer.Option(help="How many of the paths.", min=1, max=len(PATHS))] = len(PATHS),
    frames: Annotated[int, typer.Option(help="Frames of a clip.", min=3)] = 16,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each motion.", min=1)] = 300,
    drawn: Annotated[int, typer.Option(help="Steps of the sampler.", min=1)] = 25,
    seed: Annotated[int, typer.Option(help="Seed of trainings and clips.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/motions"),
) -> None:
    """Learns, draws, measures, and writes the table."""
    find_font()
    subject = [] if concept is None else [read_concept(concept)]
    correlations: dict[str, dict[str, list[float]]] = {}
    for name, path in list(PATHS.items())[:paths]:
        options = ClipOptions(model=model, motion=motion, frames=frames, steps=drawn, seed=seed)
        nouns = [token for learned in subject for token in learned.tokens][:1] * len(OTHERS) or list(OTHERS)
        captions = [
            f"{choose_article(noun)} {noun} {place}" for noun, place in zip(nouns, PLACES, strict=True)
        ]
        true = [render_path(noun, place, path, frames, 7) for noun, place in zip(OTHERS, PLACES, strict=True)]
        if motion:
            run = learn(name, motion, model, {"frames": frames, "steps": steps, "seed": seed}, out)
            with_token, without_token = (
                replace(options, out=run.with_name(part)) for part in ("drawn", "base")
            )
            learned = [*subject, read_concept(run)]
            correlations[name] = {
                TOKEN: correlate(
                    draw([f"{caption}, {TOKEN}" for caption in captions], with_token, learned), path
                ),
                "the base": correlate(
                    draw([f"{caption}, {WORDS}" for caption in captions], without_token, subject), path
                ),
            }
        else:
            folder = out / name.replace(" ", "-")
            write_training_clips(folder / "clips", path, frames)
            along = replace(options, track=folder / "clips" / "0.webp", out=folder / "along")
            correlations[name] = {"along the track": correlate(draw(captions, along, subject), path)}
        correlations[name]["true clips"] = correlate(true, path)
    write_json(out / "table.json", {"frames": frames, "steps": steps, "correlation": correlations})
    write_text(out / "table.md", format_table(correlations))
    typer.echo((out / "table.md").read_text())


def format_table(correlations: dict[str, dict[str, list[float]]]) -> str:
    """A row for each path and one of all, means with 95 % intervals."""
    ways = list(next(iter(correlations.values())))
    all_values = {way: [value for row in correlations.values() for value in row[way]] for way in ways}
    lines = [f"| path | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for name, row in {**correlations, "all": all_values}.items():
        means = [bootstrap_mean(row[way]) for way in ways]
        cells = [f"{mean.value:.2f} ({mean.low:.2f}–{mean.high:.2f})" for mean in means]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
