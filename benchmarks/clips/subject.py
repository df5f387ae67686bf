"""How many frames of a clip show the subject that `customize train` learned: the development concepts in motion.

    python -m benchmarks.clips.subject                                   two hours on two cores; needs the emoji font
    python -m benchmarks.clips.subject --concepts peacock --count 2 --frames 6                to try it
    python -m benchmarks.clips.subject --motion moji-motion              by a motion adapter beside planned motions

Every concept's run (those of `benchmarks.customize` in the same `--out` are taken) draws `a [V] CLASS` in the places
that it was not trained in, each with another word of motion, by `customize clip --concept`: planned from the words,
and where `--motion` names an adapter by that too. Beside them stand stills of the same words without the motion, by
`customize sample`. The classifier looks at every frame:

    concept   share of the frames in which it sees the concept's glyph, and of clips in all of whose frames it does
    place     share of the frames in which it sees the place
    moves     share of the clips that move as their words say, measured from the pixels (as in `benchmarks.clips`)
    flicker   mean change of a pixel from frame to frame along the flow, of 255

Frames of one clip are alike, so intervals of their means are the bootstrap's over clips; shares have Wilson's. Runs and
clips that `--out` holds are not made again. Writes `clips.md`, `clips.json` and `clips.png`, a strip of every clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from backbone.adapters.concept import Concept, checkpoint, read_concept
from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.flags import DATA, MODEL, SAMPLING
from backbone.cli.options import Option
from backbone.cli.sampling import DrawingOptions
from backbone.evaluation.flow import warped_flicker
from backbone.evaluation.motion import PARTS, SIDE, matches_move, measure_movement
from backbone.io.console import notify, run_app
from backbone.io.files import read_json, write_json, write_text
from backbone.media.clips import choose_strip
from backbone.media.sheet import GREEN, RED, Cell, draw_sheet, save_png
from backbone.world.motions import MOTIONS
from benchmarks.clips.motions import draw
from benchmarks.customize.concepts import (
    TOKEN,
    ConceptSettings,
    Question,
    Trial,
    list_trials,
    make_questions,
    train_by_command,
)
from benchmarks.judges.classifier import (
    FACTS,
    Classifier,
    Prediction,
    is_top_glyph,
    load_classifier,
    most_likely,
)
from benchmarks.judges.tables import (
    concept_interval,
    format_interval,
    format_mean,
    format_mean_share,
    format_percent,
    format_share,
)
from customize.clips.settings import ClipOptions
from customize.sampling import sample_to_folder

STILLS, PLANNED = "stills", "planned from the words"
MOVES = tuple(move for move in MOTIONS if move in PARTS)  # those with a direction that can be measured
app = script_app()


@dataclass(frozen=True, kw_only=True)
class SubjectClipSettings(ConceptSettings):
    """The concepts and the clips to sample."""

    count: Annotated[int, Option("Clips of each concept.", DATA, min=1)] = 7
    frames: Annotated[int, Option("Frames of a clip.", DATA, min=2)] = 16
    motion: Annotated[str, Option("A motion adapter, beside planned motions.", MODEL)] = ""
    steps: Annotated[int, Option("Sampling steps.", SAMPLING, min=1)] = 25
    guidance: Annotated[float, Option("Guidance scale.", SAMPLING)] = 4.0
    early_scale: Annotated[
        float, Option("Strength of the concept in a quarter of a clip's steps, the first.", SAMPLING, min=0)
    ] = 1.0
    seed: Annotated[int, Option("Seed of training and of the clips.", DATA)] = 0


@dataclass(frozen=True)
class ClipReading:
    """The classifier's readings of one clip, or of a still.

    frames   whether each frame shows the concept's glyph
    places   share of the frames that show the place
    right    whether it moves as its words say; None of a still
    flicker  None of a still
    """

    concept: str
    frames: tuple[bool, ...]
    places: float
    right: bool | None = None
    flicker: float | None = None

    @property
    def glyph(self) -> float:
        """The share of the frames that show the concept."""
        return float(np.mean(self.frames))


@settled_command(app, SubjectClipSettings)
def main(settings: SubjectClipSettings) -> None:
    """Trains and draws what is missing, looks at every frame, and prints the table."""
    trials = list_trials("concepts", list(settings.concepts), flags=settings.flags, seed=settings.seed)
    classifier = load_classifier(settings.classifier)
    readings: dict[str, list[ClipReading]] = {}
    rows: list[list[Cell]] = []
    titles: list[str] = []
    for number, trial in enumerate(trials):
        train_by_command(trial, settings.out, settings.model)
        clip_requests = list_clips(trial, settings.count, first=number)
        for way, films in draw_ways(trial, clip_requests, settings).items():
            clip_readings = [
                read_clip(trial, request, film, classifier)
                for request, film in zip(clip_requests, films, strict=True)
            ]
            readings.setdefault(way, []).extend(clip_readings)
            rows += [
                make_strip(film, reading.frames) for film, reading in zip(films, clip_readings, strict=True)
            ]
            titles += [
                f"{trial.concept}, {way}: {request.prompt if way != STILLS else request.still_prompt}"
                for request in clip_requests
            ]
        shares = []
        for way, way_readings in readings.items():
            of_concept = [reading for reading in way_readings if reading.concept == trial.concept]
            shares.append(f"{way} {format_glyph_share(of_concept)}")
        notify(f"{trial.concept}: {', '.join(shares)}")
    facts = {
        "model": settings.model, "motion": settings.motion, "frames": settings.frames, "steps": settings.steps,
        "guidance": settings.guidance, "early_scale": settings.early_scale,
        "classifier": read_json(settings.classifier / FACTS).get("step"),
    }  # fmt: skip
    text = format_table(readings)
    clips = {way: [asdict(reading) for reading in way_readings] for way, way_readings in readings.items()}
    write_json(settings.out / "clips.json", {**facts, "clips": clips})
    write_text(settings.out / "clips.md", text)
    note = "Green: the classifier sees the concept's glyph."
    save_png(settings.out / "clips.png", draw_sheet(rows, note=note, row_titles=titles, cell=SIDE // 2))
    print(text)


# Clips ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipRequest:
    """The prompt of a clip without its words of motion, the motion, and the place that the classifier should see."""

    still_prompt: str
    move: str
    place: str

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return f"{self.still_prompt}, {MOTIONS[self.move][0]}"


def list_clips(trial: Trial, count: int, *, first: int) -> list[ClipRequest]:
    """The clips of a concept: in the places that it is not learned in, with motions from the `first` on."""
    questions: list[Question] = make_questions("places", trial.noun, f"{TOKEN} {trial.noun}")
    selected = [questions[k % len(questions)] for k in range(count)]
    return [
        ClipRequest(question.prompt, MOVES[(first + k) % len(MOVES)], question.expected)
        for k, question in enumerate(selected)
    ]


def draw_ways(
    trial: Trial, clips: Sequence[ClipRequest], settings: SubjectClipSettings
) -> dict[str, list[tuple[Image.Image, ...]]]:
    """The frames of every clip by the way that it is drawn; a still is one frame."""
    learned = read_concept(checkpoint(settings.out / "runs" / trial.name))
    folder = settings.out / "clips" / trial.name
    ways = {STILLS: draw_stills(folder / "stills", clips, settings, learned)}
    options = ClipOptions(
        model=settings.model, frames=settings.frames, steps=settings.steps, guidance=settings.guidance,
        seed=settings.seed, early_scale=settings.early_scale, out=folder / "planned",
    )  # fmt: skip
    prompts = [clip.prompt for clip in clips]
    ways[PLANNED] = draw(prompts, options, [learned])
    if settings.motion:
        name = Path(settings.motion).name
        ways[name] = draw(
            prompts, replace(options, motion=settings.motion, out=folder / f"by-{name}"), [learned]
        )
    return ways


def draw_stills(
    folder: Path, clips: Sequence[ClipRequest], settings: SubjectClipSettings, learned: Concept
) -> list[tuple[Image.Image, ...]]:
    """An image of every prompt without its motion; missing images are drawn."""
    if not (folder / "sheet.png").exists():  # the sheet is written last
        options = DrawingOptions(
            model=settings.model, steps=settings.steps, guidance=settings.guidance, seed=settings.seed
        )
        sample_to_folder([clip.still_prompt for clip in clips], options, folder, concepts=[learned])
    return [(Image.open(folder / f"p{k:02d}-s00.png").convert("RGB"),) for k in range(len(clips))]


# Readings ---------------------------------------------------------------------------------------------------


def read_clip(
    trial: Trial, clip: ClipRequest, film: Sequence[Image.Image], classifier: Classifier
) -> ClipReading:
    """The classifier's readings of a clip, and its motion."""
    frames = [frame.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for frame in film]
    predictions: list[Prediction] = classifier.classify(frames)
    glyph = tuple(is_top_glyph(prediction, trial.concept) for prediction in predictions)
    places = float(np.mean([most_likely(prediction.place) == clip.place for prediction in predictions]))
    if len(frames) == 1:
        return ClipReading(trial.concept, glyph, places)
    right = matches_move(clip.move, measure_movement(frames))
    return ClipReading(trial.concept, glyph, places, right, warped_flicker(frames))


def make_strip(film: Sequence[Image.Image], glyph: Sequence[bool]) -> list[Cell]:
    """A strip of a clip, each frame framed by whether the concept is seen in it."""
    return [Cell(frame, frame=GREEN if glyph[k] else RED) for k, frame in choose_strip(film).items()]


def format_glyph_share(readings: Sequence[ClipReading]) -> str:
    """The share of the frames that show the concept."""
    return format_percent(float(np.mean([reading.glyph for reading in readings])))


def format_table(readings: Mapping[str, Sequence[ClipReading]]) -> str:
    """Markdown: a row for each way of drawing, then the share of every concept's frames that show it."""
    concepts = list(dict.fromkeys(reading.concept for reading in readings[STILLS]))
    lines = [
        f"| {len(concepts)} concepts, {len(readings[STILLS])} of each | concept in frames | 95 %, over concepts "
        "| in all "
        "frames | place | moves | flicker |",
        "|---" * 7 + "|",
        *(
            f"| {way} | {' | '.join(format_row(way_readings, concepts))} |"
            for way, way_readings in readings.items()
        ),
        "",
        f"| concept in frames | {' | '.join(readings)} |",
        "|---" * (len(readings) + 1) + "|",
    ]
    for concept in concepts:
        shares = [
            format_glyph_share([reading for reading in way_readings if reading.concept == concept])
            for way_readings in readings.values()
        ]
        lines.append(f"| {concept} | {' | '.join(shares)} |")
    return "\n".join([*lines, ""])


def format_row(readings: Sequence[ClipReading], concepts: Sequence[str]) -> list[str]:
    """The cells of one way of drawing."""
    by_concept = [
        float(np.mean([reading.glyph for reading in readings if reading.concept == concept]))
        for concept in concepts
    ]
    right = [reading.right for reading in readings if reading.right is not None]
    return [
        format_mean_share([reading.glyph for reading in readings]),
        format_interval(*concept_interval(by_concept)),
        format_share([all(reading.frames) for reading in readings]),
        format_mean_share([reading.places for reading in readings]),
        format_share(right) if right else "–",
        format_mean([reading.flicker for reading in readings if reading.flicker is not None], ".1f"),
    ]


if __name__ == "__main__":
    run_app(app)
