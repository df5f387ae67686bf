"""The summary and the report of a preference run."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.objectives.metrics import Figures
from align.objectives.preference import PreferenceTraining
from align.objectives.reference import CachedReference
from align.pairs.prepared import PreparedRecords
from align.pairs.records import Records
from align.settings import REPORT, REWARD_LOSSES, SUMMARY, Settings, as_command
from align.training.reporting.logs import (
    LoggedEvaluation,
    LoggedFigures,
    LoggedInterval,
    LoggedStep,
    read_evaluations,
    read_rewards,
    read_steps,
)
from align.training.reporting.pictures import Pictures, describe
from backbone.adapters.concept import Concept, summarize_concepts
from backbone.evaluation.statistics import Interval
from backbone.io.console import notify_once
from backbone.io.files import write_json
from backbone.io.report import command_block, heading, line_plot, paragraph, plot_row, table, write_report
from backbone.io.run_folder import package_versions

RENEW_SECONDS = 15


def write_summary(
    run: Path,
    training: PreferenceTraining,
    train: Records | PreparedRecords,
    held_out: Records | PreparedRecords,
    concepts: list[Concept],
    seconds: dict[str, float],
    pictures: Pictures,
) -> None:
    """Write `summary.json` and `report.html` from the run's logs."""
    settings, reference = training.settings, training.reference
    evaluations = read_evaluations(run)
    last = evaluations[-1] if evaluations else LoggedEvaluation(training.done)
    summary: dict[str, Any] = {
        "kind": "preference",
        "loss": settings.loss,
        "beta": settings.beta,
        "model": settings.model,
        "fingerprint": training.model.fingerprint,
        "concepts": summarize_concepts(concepts),
        "data": {
            "source": settings.pairs,
            "training": train.describe(),
            "held_out": held_out.describe(),
            "training_records": len(train),
            "held_out_records": len(held_out),
        },
        "held_out": last.held_out,
        "training": last.training,
        "noise_gap": last.noise_gap,
        "cached_errors": {"computed": reference.filled, "of": reference.values[..., 0].numel()}
        if isinstance(reference, CachedReference)
        else None,
        "reference_rows": training.live.nfe,
        "rewards": read_rewards(run) or None,
        "steps": training.done,
        "of_steps": settings.steps,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "settings": settings,
        "versions": package_versions(),
    }
    write_json(run / SUMMARY, summary)
    title = f"{run.name}: {describe(settings)}"
    write_report(run / REPORT, title, build_report(run, summary, settings, pictures))


def write_running_report(run: Path, settings: Settings, pictures: Pictures, step: int) -> None:
    """Write the `report.html` of a run in progress, which a browser reloads by itself."""
    notify_once(f"{run / REPORT} shows the progress and updates itself.")
    status = f"Step {step} of {settings.steps}. This page updates itself during the run."
    parts = [paragraph(status), plot_row(draw_curves(run, settings)), *pictures.parts(), heading("Again")]
    write_report(
        run / REPORT,
        f"{run.name}: {describe(settings)}",
        [*parts, command_block(as_command(settings, run))],
        renew=RENEW_SECONDS,
    )


def draw_curves(run: Path, settings: Settings) -> list[str]:
    """The run's curves from its logs, with explanations."""
    # Evaluations, and the scores of online rounds
    evaluations = read_evaluations(run)
    sides = {
        "held out": [(line.step, line.held_out) for line in evaluations if line.held_out],
        "training records, unseen noise": [
            (line.step, line.training) for line in evaluations if line.training
        ],
    }
    plots = [plot for name, logged in sides.items() for plot in _plot_figures(name, logged)]
    rewards = [(line.round, _read_number(line.reward)) for line in read_rewards(run)]
    plots.append(line_plot("Mean score of each round's pictures", {"score": rewards}))
    gap = [(line.step, _read_number(line.noise_gap)) for line in evaluations]
    plots.append(
        line_plot(
            "Seen/unseen-noise gap: accuracy at seen minus unseen noise",
            {"gap": gap},
            level=0.0,
            note="Where it grows, training fits its noise samples rather than the pictures: more --draws help.",
        )
    )

    # Training's own metrics, smoothed over steps
    points = smooth_log(read_steps(run))
    if settings.loss in REWARD_LOSSES:
        reward = [(line.step, _read_number(line.reward)) for line in points]
        plots.append(
            line_plot(
                "Reward",
                {"reward": reward},
                note=f"The mean score by {settings.online} of the pictures that steps draw. It should rise.",
            )
        )
    plots.append(
        line_plot(
            "Loss",
            {"loss": [(line.step, line.loss) for line in points]},
            note="What training lowers. Its ups and downs are mostly chance.",
        )
    )
    return plots


def build_report(run: Path, summary: dict[str, Any], settings: Settings, pictures: Pictures) -> list[str]:
    """Build the parts of the run's `report.html`, in reading order."""
    done, seconds, data = summary["steps"], summary["seconds"], summary["data"]
    steps = f"{done} of {settings.steps} steps" if done < settings.steps else f"{settings.steps} steps"
    rows = [
        _format_row(name, _read_figures(summary[key]))
        for name, key in (("held out", "held_out"), ("training, unseen noise", "training"))
        if summary[key]
    ]
    options = dataclasses.asdict(settings).items()
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
        plot_row(draw_curves(run, settings)),
        *pictures.parts(),
        heading("Again"),
        command_block(as_command(settings, run)),
        table(
            ("setting", "value"),
            [(name, str(value)) for name, value in options if value not in ("", (), None)],
        ),
    ]


def _plot_figures(name: str, logged: list[tuple[int, LoggedFigures]]) -> list[str]:
    """Accuracy with its interval, and the changes of both errors, along training (step, figures)."""

    def collect(read: Callable[[LoggedFigures], float | None]) -> list[tuple[float, float]]:
        return [(step, _read_number(read(figures))) for step, figures in logged]

    accuracy = {
        "accuracy": collect(lambda figures: figures.accuracy.value),
        "lower end": collect(lambda figures: figures.accuracy.low),
        "upper end": collect(lambda figures: figures.accuracy.high),
    }
    changes = {
        "winners": collect(lambda figures: figures.winner_change),
        "losers": collect(lambda figures: figures.loser_change),
    }
    return [
        line_plot(
            f"Accuracy, {name}",
            accuracy,
            level=0.5,
            note="How often the preferred picture has gained on the other; dashed: chance.",
        ),
        line_plot(
            f"Change of error, {name}",
            changes,
            level=0.0,
            note="Relative to where training began. Winners should stay at or below 0, and losers above them.",
        ),
    ]


def smooth_log(log: list[LoggedStep], *, points: int = 200) -> list[LoggedStep]:
    """At most this many points, each the mean of its neighbours: loss, and reward where there is one."""
    width = max(1, math.ceil(len(log) / points))
    parts = [log[first : first + width] for first in range(0, len(log), width)]
    return [
        LoggedStep(
            part[-1].step,
            statistics.fmean(line.loss for line in part),
            mean_reward(part),
        )
        for part in parts
    ]


def mean_reward(log: list[LoggedStep]) -> float | None:
    """The mean over the steps that have one; None without any."""
    rewards = [line.reward for line in log if line.reward is not None]
    return statistics.fmean(rewards) if rewards else None


def _format_row(name: str, figures: Figures) -> tuple[str, ...]:
    levels = " ".join("–" if math.isnan(share) else f"{share:.0%}" for share in figures.by_level)
    return (
        name, str(figures.accuracy), levels, f"{figures.winner_change:+.2%}", f"{figures.loser_change:+.2%}",
        f"{figures.records} × {figures.draws}",
    )  # fmt: skip


def _read_figures(logged: LoggedFigures) -> Figures:
    return Figures(
        accuracy=_read_interval(logged.accuracy),
        by_level=tuple(map(_read_number, logged.by_level)),
        winner_change=_read_number(logged.winner_change),
        loser_change=_read_number(logged.loser_change),
        records=logged.records,
        draws=logged.draws,
    )


def _read_interval(logged: LoggedInterval) -> Interval:
    return Interval(_read_number(logged.value), _read_number(logged.low), _read_number(logged.high))


def _read_number(value: float | None) -> float:
    return math.nan if value is None else value
