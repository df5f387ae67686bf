"""The summary and the report of a preference run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.objectives.metrics import Figures
from align.objectives.preference import PreferenceTraining
from align.objectives.reference import CachedReference
from align.pairs.records import (
    Record,
    describe_records,
)
from align.settings import (
    EVALUATIONS,
    REPORT,
    REWARDS,
    SUMMARY,
    Settings,
    as_command,
)
from backbone.adapters.concept import Concept, summarize_concepts
from backbone.io.files import read_jsonl, write_json
from backbone.io.report import command, heading, line_plot, paragraph, plot_row, table, write_report
from backbone.io.run_folder import package_versions
from backbone.training.run import LOG, LoggedLoss


def write_summary(
    run: Path,
    training: PreferenceTraining,
    learn: list[Record],
    out: list[Record],
    concepts: list[Concept],
    seconds: dict[str, float],
) -> None:
    """Writes `summary.json` and `report.html` from what the run has logged."""
    settings, reference = training.settings, training.reference
    evaluations = read_jsonl(run / EVALUATIONS)
    last = evaluations[-1]
    summary: dict[str, Any] = {
        "kind": "preference",
        "loss": settings.loss,
        "beta": settings.beta,
        "model": settings.model,
        "fingerprint": training.model.fingerprint,
        "concepts": summarize_concepts(concepts),
        "data": {
            "source": settings.pairs,
            "training": describe_records(learn),
            "held_out": describe_records(out),
            "training_records": len(learn),
            "held_out_records": len(out),
        },
        "held_out": last.get("held-out"),
        "training": last.get("training"),
        "bank_gap": last.get("bank_gap"),
        "bank": {"cells": reference.filled, "of": reference.values[..., 0].numel()}
        if isinstance(reference, CachedReference)
        else None,
        "reference_rows": training.live.nfe,
        "rewards": read_jsonl(run / REWARDS) if (run / REWARDS).exists() else None,
        "steps": training.done,
        "of_steps": settings.steps,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "settings": settings,
        "versions": package_versions(),
    }
    write_json(run / SUMMARY, summary)
    write_report(
        run / REPORT, f"{run.name}: {settings.loss} on {settings.model}", report(run, summary, settings)
    )


def report(run: Path, summary: dict[str, Any], settings: Settings) -> list[str]:
    """The parts of the run's `report.html`."""
    done, seconds, data = summary["steps"], summary["seconds"], summary["data"]
    steps = f"{done} of {settings.steps} steps" if done < settings.steps else f"{settings.steps} steps"
    evaluations = read_jsonl(run / EVALUATIONS)
    log = read_jsonl(run / LOG, LoggedLoss) if (run / LOG).exists() else []
    rows = [
        _row(name, Figures(**_revived(summary[key])))
        for name, key in (("held out", "held_out"), ("training, unseen noise", "training"))
        if summary[key]
    ]
    drawn = [
        one
        for key, name in (("held-out", "held out"), ("training", "training records, unseen noise"))
        for one in _curves(name, [line for line in evaluations if line.get(key)], key)
    ]
    if summary["rewards"]:
        rewards = [(line["round"], line["reward"]) for line in summary["rewards"]]
        drawn.append(line_plot("Mean score of each round's pictures", {"score": rewards}))
    gap = [(line["step"], _number(line["bank_gap"])) for line in evaluations]
    drawn.append(
        line_plot("Seen/unseen-noise gap: accuracy at seen minus unseen noise", {"gap": gap}, level=0.0)
    )
    drawn.append(line_plot("Loss", {"loss": smoothed_log(log)}))
    chosen = dataclasses.asdict(settings).items()
    return [
        paragraph(f"{steps}, {seconds['train']:.0f} s of training, {seconds['all']:.0f} s in all."),
        paragraph(
            f"Learned from {data['training']}. Held out, with prompts of their own: {data['held_out']}."
        ),
        heading("Does it tell the preferred pictures apart?"),
        table(
            (
                "",
                "accuracy (95 %)",
                "by noise, clean to noisy",
                "winners' error",
                "losers' error",
                "records × noise samples",
            ),
            rows,
        ),
        paragraph(
            "Accuracy is the implicit reward's: how often the model's error moved towards the preferred picture, ½ "
            "for no change, at noise that training never sees. Errors are relative to where training began: "
            "a winners' error above zero means that preferred pictures have become less likely."
        ),
        plot_row(drawn),
        heading("Again"),
        command(as_command(settings, run)),
        table(
            ("setting", "value"),
            [(name, str(value)) for name, value in chosen if value not in ("", (), None)],
        ),
    ]


def _curves(name: str, seen: list[dict[str, Any]], key: str) -> list[str]:
    """Accuracy with its interval, and the changes of both errors, along training."""

    def along(read: Callable[[dict[str, Any]], float | None]) -> list[tuple[float, float]]:
        return [(line["step"], _number(read(line[key]))) for line in seen]

    accuracy = {
        "accuracy": along(lambda figures: figures["accuracy"]["value"]),
        "lower end": along(lambda figures: figures["accuracy"]["low"]),
        "upper end": along(lambda figures: figures["accuracy"]["high"]),
    }
    changes = {
        "winners": along(lambda figures: figures["winner_change"]),
        "losers": along(lambda figures: figures["loser_change"]),
    }
    return [
        line_plot(f"Accuracy, {name}", accuracy, level=0.5),
        line_plot(f"Change of error, {name}", changes, level=0.0),
    ]


def smoothed_log(log: Sequence[LoggedLoss], *, points: int = 200) -> list[tuple[int, float]]:
    """At most so many (step, loss), each the mean of its neighbours."""
    width = max(1, math.ceil(len(log) / points))
    parts = [log[first : first + width] for first in range(0, len(log), width)]
    return [(part[-1].step, sum(line.loss for line in part) / len(part)) for part in parts]


def _row(name: str, figures: Figures) -> tuple[str, ...]:
    levels = " ".join("–" if math.isnan(share) else f"{share:.0%}" for share in figures.by_level)
    return (
        name, str(figures.accuracy), levels, f"{figures.winner_change:+.2%}", f"{figures.loser_change:+.2%}",
        f"{figures.records} × {figures.draws}",
    )  # fmt: skip


def _revived(said: dict[str, Any]) -> dict[str, Any]:
    """Figures from JSON, where a missing number is null."""
    from backbone.evaluation.statistics import Interval

    interval = Interval(*(_number(said["accuracy"][name]) for name in ("value", "low", "high")))
    levels = tuple(_number(share) for share in said["by_level"])
    return {
        **said, "accuracy": interval, "by_level": levels,
        "winner_change": _number(said["winner_change"]), "loser_change": _number(said["loser_change"]),
    }  # fmt: skip


def _number(value: float | None) -> float:
    return math.nan if value is None else value
