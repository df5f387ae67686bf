"""A preference-training run from pairs to a folder that serves as a concept, with its summary and its report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.evaluate import Figures, judge
from align.material import prepare
from align.pairs import (
    Pair,
    Preferences,
    Record,
    as_singles,
    check,
    counted,
    held_out,
    read,
    refuse_another_model,
)
from align.reference import Bank, Live
from align.settings import FILE, Settings, as_command, read_settings, resolved
from align.train import PreferenceTraining, share_of
from backbone import processes
from backbone.adapters import only
from backbone.concept import Concept, described, read_concept
from backbone.console import UserError, progress, say
from backbone.files import append_jsonl, read_jsonl, write_json
from backbone.learned import change_weights, put_on
from backbone.learned import refuse_another_model as refuse_another_concept
from backbone.loop import Report
from backbone.model import Backbone
from backbone.report import command, curve, curves, heading, paragraph, table, write_report
from backbone.runs import clear_failed_try, refuse_taken, stopping, trim_log, versions
from backbone.thrift import measures_of

LOG = "log.jsonl"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
ROUNDS = "rounds"  # of a run with --online: a folder of `align sample` each
REWARDS = "rewards.jsonl"  # of a run with --online: a line each round


def train_taste(
    asked: dict[str, Any], found: Preferences, *, out: Path | None, vram: float | None = None
) -> Path:
    """Trains on checked preferences and gives the run folder. `asked` holds what the user set, `vram` is in GiB.

    Raises `UserError`, before any weights load, for a run folder that is taken, pairs of another model, and settings
    that contradict each other.
    """
    began = time.perf_counter()
    processes.join(asked.get("device", "auto"))
    run = out or Path("runs") / run_name(asked["pairs"])
    refuse_taken(run)
    model = Backbone.open(
        asked.get("model", "moji"),
        device=asked.get("device", "auto"),
        precision=asked.get("precision", "auto"),
    )
    settings = resolved(asked, model.defaults)
    _refuse_strangers(found, settings, model)
    records = records_of(found, settings)
    model = Backbone.open(
        settings.model, device=settings.device, precision=settings.precision, measures=measures_of(settings)
    )
    if vram is not None:
        from align.budget import budgeted

        processes.refuse_shards("--vram counts for a process alone; it")
        pictures, prompts = sum(len(one.pictures) for one in records), len({one.prompt for one in records})
        model, settings = budgeted(model, settings, pictures, prompts, vram)
    share_of(settings)
    processes.barrier()  # now every process has seen that the folder is free
    if processes.is_writer():
        clear_failed_try(run)
        write_record(run, settings)
    return carry_on(run, settings, model, records, began=began)


def resume_taste(run: Path) -> Path:
    """Goes on with a run that was stopped; the weights come out as if it had not been."""
    began = time.perf_counter()
    settings = read_settings(run)
    processes.join(settings.device)
    found = check(_read_again(settings), skip_bad=settings.skip_bad)
    model = Backbone.open(
        settings.model, device=settings.device, precision=settings.precision, measures=measures_of(settings)
    )
    _refuse_strangers(found, settings, model)
    return carry_on(run, settings, model, records_of(found, settings), began=began)


def carry_on(run: Path, settings: Settings, model: Backbone, records: list[Record], *, began: float) -> Path:
    """Trains from the last checkpoint, if there is one, to the finished folder."""
    learn, out = held_out(records, share=settings.held_out, seed=settings.seed)
    if not learn:
        raise UserError(f"{settings.pairs} leaves nothing to learn from. Lower --held-out.")
    say(f"Learning from {counted(learn)}; held out: {counted(out)}.")
    concepts = [read_concept(folder) for folder in settings.concepts]
    base = put_on(model, concepts)
    material = prepare(model, learn, out, settings, concepts)
    training = PreferenceTraining(model, material, settings, base, concepts)
    training.resume(run)
    writes = processes.is_writer()
    if writes:
        trim_log(run / LOG, training.done)
        trim_log(run / EVALUATIONS, training.done)
    processes.barrier()  # now every process reads what was kept
    watch = Watch(run, training, settings)
    if not training.done:
        watch.look(0)
    prepared = time.perf_counter()
    stopped_early = processes.any_of(watch.must_stop)
    with stopping() as stop, progress(settings.steps, "training", done=training.done) as bar:
        for report in training.steps() if not stopped_early else ():
            if writes:
                append_jsonl(run / LOG, dataclasses.asdict(report) | training.figures)
            bar.advance(1, images=settings.batch * len(material.train[0].pictures), **shown(report, training))
            finished = report.step == settings.steps
            if finished or report.step % settings.evaluation_steps == 0:
                watch.look(report.step)
            halt = processes.any_of(bool(stop))
            stopped_early = processes.any_of(watch.must_stop) and not finished
            if halt or finished or stopped_early or report.step % settings.checkpointing_steps == 0:
                training.save(run)
            if halt and not finished:
                raise KeyboardInterrupt(
                    f"Stopped and saved at step {report.step} of {settings.steps}. "
                    f"Continue with: align train --resume {run}"
                )
            if stopped_early:
                say(f"Stopped at step {report.step}: {watch.complaint}")
                break
    trained = time.perf_counter()
    training.live.asked = int(processes.total([training.live.asked])[0])
    if not writes:
        processes.leave()
        return run
    header = {
        "base_model": settings.model,
        "limner_loss": settings.loss,
        "limner_beta": f"{settings.beta:g}",
    }
    files = training.write(run, header)
    write_concept(run, settings, model, files)
    seconds = {"prepare": prepared - began, "train": trained - prepared, "all": time.perf_counter() - began}
    write_summary(run, training, learn, out, concepts, seconds)
    processes.leave()
    return run


def evaluate_taste(
    run: Path, settings: Settings, *, source: str | None = None, draws: int = 8, skip_bad: bool = False
) -> str:
    """Measures a finished run on preferences, its own held-out ones when no source is named; gives what to print.

    Writes `evaluation.json` into the run.
    """
    concept = read_concept(run)
    if source is None and not settings.pairs:
        rounds = sorted((run / ROUNDS).glob("*"))
        if not rounds:
            raise UserError(f"{run} was trained without pairs. Name some: align evaluate {run} PAIRS.")
        settings = dataclasses.replace(settings, pairs=str(rounds[-1]))
    found = check(
        _read_again(settings) if source is None else read(source), skip_bad=skip_bad or settings.skip_bad
    )
    records = records_of(found, settings)
    if source is None:
        _, records = held_out(records, share=settings.held_out, seed=settings.seed)
    if not records:
        raise UserError(f"{source or settings.pairs} leaves nothing to judge by. Name other pairs.")
    model = Backbone.open(settings.model, device=settings.device, precision=settings.precision)
    refuse_another_concept(concept, model)
    below = [read_concept(folder) for folder in settings.concepts]
    material = prepare(model, [], records, settings, below)
    names = put_on(model, [*below, concept] if concept.weights else below)
    live = Live(
        model, model.denoiser, partial(only, model.denoiser, names[: len(names) - bool(concept.weights)])
    )
    asked = dataclasses.replace(settings, evaluation_draws=draws)
    ask = judge(model, material, material.held_out, live, asked, "held-out")
    if concept.changed:
        model.denoiser.float()  # differences are small
        change_weights(model, concept)
    with torch.no_grad():
        figures = ask(model.denoiser)
    write_json(
        run / EVALUATION, {"source": source or "held out", "records": counted(records), **figures.as_json()}
    )
    levels = ", ".join("–" if math.isnan(share) else f"{share:.0%}" for share in figures.by_level)
    return (
        f"accuracy {figures.accuracy} on {counted(records)}, {figures.draws} draws each\n"
        f"by noise, clean to noisy: {levels}\n"
        f"change of error: winners {figures.winner_change:+.2%}, losers {figures.loser_change:+.2%}"
    )


class Watch:
    """Looks at the model every so often, keeps what it saw, and speaks up when the winners' error rises.

    Preference losses only ask that the winner's error falls behind the loser's, so both may rise together: pictures
    fall apart while accuracy still climbs.
    """

    def __init__(self, run: Path, training: PreferenceTraining, settings: Settings) -> None:
        self.path, self.training, self.settings = run / EVALUATIONS, training, settings
        known = processes.takes_part() and self.path.exists()
        self.seen = read_jsonl(self.path) if known else []
        self.complaint = self._complaint(self.seen[-1]) if self.seen else ""

    def look(self, step: int) -> None:
        """Evaluates and writes a line; warns when the winners' error has risen beyond the tolerance.

        Of several processes the writer does, with the banks of all; or all together, where the base is cut up.
        """
        if isinstance(self.training.reference, Bank):
            self.training.reference.merge()
        if not processes.takes_part():
            return
        if any(line["step"] == step for line in self.seen):
            return  # before the run was stopped
        found, gap = self.training.evaluate(), self.training.gap()
        if not processes.is_writer():
            return
        line: dict[str, Any] = {"step": step, "bank_gap": gap}
        line |= {name: figures.as_json() for name, figures in found.items()}
        append_jsonl(self.path, line)
        self.seen = read_jsonl(self.path)
        before, self.complaint = self.complaint, self._complaint(self.seen[-1])
        if self.complaint and not before and self.settings.on_winner_rise == "warn":
            say(f"Step {step}: {self.complaint}")

    @property
    def must_stop(self) -> bool:
        """Whether training should end here."""
        return bool(self.complaint) and self.settings.on_winner_rise == "stop"

    def _complaint(self, line: dict[str, Any]) -> str:
        figures = line.get("held-out") or line.get("training")
        rise = figures["winner_change"] if figures else None
        if rise is None or rise <= self.settings.winner_tolerance:
            return ""
        return (
            f"the preferred pictures' error has risen by {rise:.1%}, so the model is being spoiled although it may "
            "still tell pictures apart. Lower --learning-rate, raise --beta, or add --safeguard 0.9 or "
            "--sft-weight 0.5."
        )


def write_concept(run: Path, settings: Settings, model: Backbone, files: dict[str, str]) -> None:
    """Writes `concept.json`: the run serves wherever a concept does, and owns no token."""
    weights, changed = files.get("weights", ""), files.get("changed", "")
    concept = Concept("preference", settings.model, model.fingerprint, {}, "", weights, changed=changed)
    concept.write(run)


def write_record(run: Path, settings: Settings) -> None:
    """Writes the run's `settings.json`: what was resolved, how to repeat it, and with which versions."""
    write_json(
        run / FILE, {"settings": settings, "command": as_command(settings, run), "versions": versions()}
    )


def write_summary(
    run: Path,
    training: PreferenceTraining,
    learn: list[Record],
    out: list[Record],
    concepts: list[Concept],
    seconds: dict[str, float],
) -> None:
    """Writes `summary.json` and `report.html` from what the run has logged."""
    settings, bank = training.settings, training.reference
    evaluations = read_jsonl(run / EVALUATIONS)
    last = evaluations[-1]
    summary: dict[str, Any] = {
        "kind": "preference",
        "loss": settings.loss,
        "beta": settings.beta,
        "model": settings.model,
        "fingerprint": training.model.fingerprint,
        "concepts": described(concepts),
        "data": {
            "source": settings.pairs,
            "training": counted(learn),
            "held_out": counted(out),
            "training_records": len(learn),
            "held_out_records": len(out),
        },
        "held_out": last.get("held-out"),
        "training": last.get("training"),
        "bank_gap": last.get("bank_gap"),
        "bank": {"cells": bank.filled, "of": bank.values[..., 0].numel()} if isinstance(bank, Bank) else None,
        "reference_rows": training.live.asked,
        "rewards": read_jsonl(run / REWARDS) if (run / REWARDS).exists() else None,
        "steps": training.done,
        "of_steps": settings.steps,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "settings": settings,
        "versions": versions(),
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
    log = read_jsonl(run / LOG) if (run / LOG).exists() else []
    rows = [
        _row(name, Figures(**_revived(summary[key])))
        for name, key in (("held out", "held_out"), ("training, fresh draws", "training"))
        if summary[key]
    ]
    drawn = [
        one
        for key, name in (("held-out", "held out"), ("training", "training records, fresh draws"))
        for one in _curves(name, [line for line in evaluations if line.get(key)], key)
    ]
    if summary["rewards"]:
        rewards = [(line["round"], line["reward"]) for line in summary["rewards"]]
        drawn.append(curve("Mean score of each round's pictures", {"score": rewards}))
    gap = [(line["step"], _number(line["bank_gap"])) for line in evaluations]
    drawn.append(curve("Bank gap: accuracy at visited minus fresh draws", {"gap": gap}, level=0.0))
    drawn.append(curve("Loss", {"loss": [(line["step"], line["loss"]) for line in smoothed_log(log)]}))
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
                "records × draws",
            ),
            rows,
        ),
        paragraph(
            "Accuracy is the implicit reward's: how often the model's error moved towards the preferred picture, ½ "
            "for no change, at fixed draws that training never visits. Errors are relative to where training began: "
            "a winners' error above zero means that preferred pictures have become less likely."
        ),
        curves(drawn),
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
        curve(f"Accuracy, {name}", accuracy, level=0.5),
        curve(f"Change of error, {name}", changes, level=0.0),
    ]


def smoothed_log(log: list[dict[str, Any]], *, points: int = 200) -> list[dict[str, Any]]:
    """At most so many points, each the mean of its neighbours."""
    width = max(1, math.ceil(len(log) / points))
    parts = [log[first : first + width] for first in range(0, len(log), width)]
    return [
        {"step": part[-1]["step"], "loss": sum(line["loss"] for line in part) / len(part)} for part in parts
    ]


def run_name(source: str) -> str:
    """A run's name from its pairs: the folder's, or the file's without its ending."""
    path = Path(source).expanduser().resolve()
    return (path.stem if path.is_file() else path.name) or "run"


def _read_again(settings: Settings) -> Preferences:
    """The preferences that a run was trained on."""
    limit, user = settings.limit or None, settings.user or None
    return read(settings.pairs, user=user, limit=limit, split=settings.split)


def records_of(found: Preferences, settings: Settings) -> list[Record]:
    """What this loss learns from; `UserError` where the source holds none of it."""
    if not settings.by_pairs:
        return list(as_singles(found))
    if not found.pairs:
        raise UserError(
            f"{found.source} judges single pictures, and {settings.loss} compares pairs. Use --loss kto."
        )
    ties = settings.ties == "model"
    return [pair for pair in found.pairs if isinstance(pair, Pair) and (ties or not pair.is_tie)]


def _refuse_strangers(found: Preferences, settings: Settings, model: Backbone) -> None:
    if not settings.any_model:
        refuse_another_model(found, settings.model, model.fingerprint)
    for folder in settings.concepts:
        refuse_another_concept(read_concept(folder), model)


def shown(step: Report, training: PreferenceTraining) -> dict[str, float | str]:
    figures: dict[str, float | str] = {"loss": step.loss}
    if "accuracy" in training.figures:
        figures["accuracy"] = training.figures["accuracy"]
    return figures


def _row(name: str, figures: Figures) -> tuple[str, ...]:
    levels = " ".join("–" if math.isnan(share) else f"{share:.0%}" for share in figures.by_level)
    return (
        name, str(figures.accuracy), levels, f"{figures.winner_change:+.2%}", f"{figures.loser_change:+.2%}",
        f"{figures.records} × {figures.draws}",
    )  # fmt: skip


def _revived(said: dict[str, Any]) -> dict[str, Any]:
    """Figures from JSON, where a missing number is null."""
    from backbone.statistics import Interval

    interval = Interval(*(_number(said["accuracy"][name]) for name in ("value", "low", "high")))
    levels = tuple(_number(share) for share in said["by_level"])
    return {
        **said, "accuracy": interval, "by_level": levels,
        "winner_change": _number(said["winner_change"]), "loser_change": _number(said["loser_change"]),
    }  # fmt: skip


def _number(value: float | None) -> float:
    return math.nan if value is None else value
