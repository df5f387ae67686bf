"""How much of a concept learned on `moji` survives on its few-step model: the twelve development concepts.

    python -m benchmarks.customize.survival                     about two hours on two cores; needs the emoji font
    python -m benchmarks.customize.survival --concepts peacock --count 1 --flags "--steps 20" --fit "--steps 4"

Every concept is learned on the base by the real command, as in `benchmarks.customize` (whose runs in the same `--out`
are taken), and drawn in the seven places that it was not trained in by the base, by the few-step model with the base's
adapter as it is, and with the adapter that `customize transfer` has fitted. The classifier names glyph and place. The
class without the token says what the adapter does to the few-step model beside the subject. Runs and images that
`--out` holds are not made again. `--turbo` is a few-step model, or the folder that `recipes.moji.adapters.turbo`
exports.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.flags import DATA, MODEL
from backbone.cli.options import Option
from backbone.evaluation.statistics import wilson_interval
from backbone.io.console import UserError, notify, run_app
from backbone.io.files import read_json, write_json, write_text
from backbone.models.locate import FEW_STEP_MODELS, OWN, is_path
from backbone.world.rendering.render import find_font
from benchmarks.customize import concepts as learning
from benchmarks.customize.concepts import (
    TOKEN,
    ConceptSettings,
    Kind,
    Tally,
    Trial,
    list_trials,
    tally_folder,
)
from benchmarks.judges.classifier import FACTS, Classifier, load_classifier
from benchmarks.judges.tables import concept_interval, format_interval, format_percent

SIDES = ("the base", "few steps, as it is", "few steps, transferred")
KINDS: tuple[Kind, ...] = ("places", "class")


@dataclass(frozen=True)
class SurvivalResult:
    """One concept: its tallies by side and kind, and the seconds that an image took by side."""

    concept: str
    tallies: Mapping[str, Mapping[str, Tally]]
    seconds: Mapping[str, float]


app = script_app()


@dataclass(frozen=True, kw_only=True)
class SurvivalSettings(ConceptSettings):
    """The concepts, their base, and how they are transferred."""

    count: Annotated[int, Option("Images of each prompt.", DATA, min=1)] = 3
    fit: Annotated[str, Option("More flags for customize transfer, in one string.", "Training")] = ""
    turbo: Annotated[
        str, Option("The base model's few-step model.", MODEL, default_text="the one that goes with it")
    ] = ""
    seed: Annotated[int, Option("Seed of everything random.", DATA)] = 0


@settled_command(app, SurvivalSettings)
def main(settings: SurvivalSettings) -> None:
    """Trains, transfers and draws what is missing, classifies every image, and prints the table."""
    model, out = settings.model, settings.out
    trials = list_trials("concepts", list(settings.concepts), flags=settings.flags, seed=settings.seed)
    few_step = settings.turbo or FEW_STEP_MODELS.get(model, "")
    if not few_step or (few_step not in OWN and not is_path(few_step) and "/" not in few_step):
        raise UserError(
            f"There is no few-step model of {model} yet. Distil one with recipes.moji.adapters.turbo, and name its "
            "folder with --turbo."
        )
    find_font()
    classifier = load_classifier(settings.classifier)
    results = []
    for trial in trials:
        make_images(trial, out, count=settings.count, model=model, few_step=few_step, fit=settings.fit)
        results.append(classify_concept(trial, out, classifier))
        notify(
            f"{trial.concept}: {', '.join(measure_share(results[-1:], side)[0] for side in SIDES)} are right"
        )
    text = format_table(results)
    facts = {
        "model": model,
        "few_step": few_step,
        "flags": settings.flags,
        "fit": settings.fit,
        "classifier": read_json(settings.classifier / FACTS).get("step"),
        "results": [asdict(result) for result in results],
    }
    write_json(out / "survival.json", facts)
    write_text(out / "survival.md", text)
    print(text)


def find_folder(trial: Trial, side: str, kind: Kind, out: Path) -> Path:
    """Where the images of a side lie."""
    if side == SIDES[0]:
        return learning.tuned_folder(trial, kind, out)
    return out / side.replace(" ", "-").replace(",", "") / trial.name / kind


def make_images(trial: Trial, out: Path, *, count: int, model: str, few_step: str, fit: str) -> None:
    """The runs of a concept on both models, and the images of every side, where they are missing."""
    run, transferred = out / "runs" / trial.name, out / "transferred" / trial.name
    learning.train_by_command(trial, out, model)
    if not (transferred / "README.md").exists():
        shutil.rmtree(transferred, ignore_errors=True)
        learning.run_customize(
            "transfer", str(run), "--to", few_step, "--out", str(transferred), *fit.split()
        )
    ways = {
        SIDES[0]: (["--concept", str(run)], model),
        SIDES[1]: (["--concept", str(run), "--on", few_step], model),
        SIDES[2]: (["--concept", str(transferred)], few_step),
    }
    for side, (options, drawn_by) in ways.items():
        for kind in KINDS:
            phrase = "" if kind == "class" else f"{TOKEN} {trial.noun}"
            folder = find_folder(trial, side, kind, out)
            learning.draw(trial, kind, phrase, folder, count, options, drawn_by)


def classify_concept(trial: Trial, out: Path, classifier: Classifier) -> SurvivalResult:
    """A concept's result, from its images."""
    tallies: dict[str, dict[str, Tally]] = {}
    seconds: dict[str, float] = {}
    for side in SIDES:
        folders = {kind: find_folder(trial, side, kind, out) for kind in KINDS}
        tallies[side] = {kind: tally_folder(trial, kind, path, classifier) for kind, path in folders.items()}
        record = folders["places"] / "samples.json"
        spent = float(read_json(record)["seconds"]) if record.exists() else 0.0
        seconds[side] = spent / tallies[side]["places"].n
    return SurvivalResult(trial.concept, tallies, seconds)


def measure_share(results: Sequence[SurvivalResult], side: str) -> tuple[str, int, int]:
    """The share of images in places that show glyph and place, as text, and its two counts."""
    right = sum(result.tallies[side]["places"].both for result in results)
    n = sum(result.tallies[side]["places"].n for result in results)
    return format_percent(right / n), right, n


def format_table(results: Sequence[SurvivalResult]) -> str:
    """Markdown: a row for every side over all concepts, then glyph and place of every concept by side."""
    lines = [
        f"| {len(results)} concepts | glyph | place | both | 95 %, images | 95 %, over concepts | of the base's "
        "| class | s/image |",
        "|---" * 9 + "|",
    ]
    base_share = measure_share(results, SIDES[0])[1]
    for side in SIDES:
        rows = [result.tallies[side] for result in results]
        places, classes = [row["places"] for row in rows], [row["class"] for row in rows]
        share, right, n = measure_share(results, side)
        _, *interval = wilson_interval(right, n)
        cells = [
            side,
            format_percent(sum(tally.glyph for tally in places) / n),
            format_percent(sum(tally.right for tally in places) / n),
            share,
            format_interval(*interval),
            format_interval(*concept_interval([tally.both / tally.n for tally in places])),
            format_percent(right / base_share) if base_share else "–",
            format_percent(sum(tally.right for tally in classes) / sum(tally.n for tally in classes)),
            f"{sum(result.seconds[side] for result in results) / len(results):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| concept | {' | '.join(SIDES)} |", "|---" * (len(SIDES) + 1) + "|"]
    for result in results:
        lines.append(
            f"| {result.concept} | {' | '.join(measure_share([result], side)[0] for side in SIDES)} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_app(app)
