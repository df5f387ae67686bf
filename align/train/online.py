"""Training on what the model draws itself: draw, let a scorer judge, learn, and draw again.

With a loss of pairs each round's best and worst pictures of a prompt are that round's pairs (on-policy preference
optimisation); the reference stays the base, with the adapter off. `draft` and `ddpo` learn from the scorer's numbers
(`align.objectives.reward`). A run folder keeps every round's pictures in `rounds/`, a folder of `align sample` each.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.collect.rank import rank_samples
from align.collect.sample import SamplingSettings, sample_images
from align.collect.scorers import open_scorer, refuse_not_differentiable
from align.objectives.dataset import Material, prepare, records_of
from align.objectives.preference import PreferenceTraining, share_of
from align.pairs.read import read_preferences
from align.pairs.records import (
    RANKING,
    SAMPLES,
    SCORES,
    Record,
    check_preferences,
    describe_records,
    split_held_out,
)
from align.pairs.samples import FORMAT, image_name
from align.settings import (
    EVALUATIONS,
    FILE,
    LOG,
    REPORT,
    REWARD_LOSSES,
    REWARDS,
    ROUNDS,
    SUMMARY,
    Settings,
    as_command,
    read_settings,
    resolved,
)
from align.train.monitor import Watch
from align.train.report import smoothed_log, write_summary
from align.train.run import shown, write_concept, write_record
from backbone.adapters.apply import put_on, refuse_another_model
from backbone.adapters.concept import Concept, described, read_concept
from backbone.distributed import processes
from backbone.io.console import UserError, progress, say
from backbone.io.files import append_jsonl, read_json, read_jsonl, write_json
from backbone.io.prompts import Prompt, read_prompts
from backbone.io.report import command, curve, curves, heading, paragraph, table, write_report
from backbone.io.run_folder import clear_failed_try, refuse_taken, stopping, trim_log, versions
from backbone.media.sheet import save_png
from backbone.models.model import Backbone
from backbone.models.placement import get_placement

DRAWN_BY = (
    "model",
    "concepts",
    "prompts",
    "per_prompt",
    "sample_steps",
    "guidance",
    "seed",
    "precision",
    "online",
)


def train_online(asked: dict[str, Any], *, out: Path | None) -> Path:
    """Trains in rounds from prompts and a scorer, and gives the run folder. `asked` holds what the user set.

    Raises `UserError`, before any weights load, for a run folder that is taken, a scorer that is none, and settings
    that contradict each other.
    """
    processes.join(asked.get("device", "auto"))
    run = out or Path("runs") / f"{Path(asked['prompts']).stem}-online"
    refuse_taken(run)
    model = Backbone.open(
        asked.get("model", "moji"),
        device=asked.get("device", "auto"),
        precision=asked.get("precision", "auto"),
    )
    settings = resolved(asked, model.defaults)
    if settings.loss == "draft":
        refuse_not_differentiable(settings.online)
    open_scorer(settings.online)
    for folder in settings.concepts:
        refuse_another_model(read_concept(folder), model)
    model = _placed(settings)
    share_of(settings)
    refuse_other_images(run, settings)
    processes.barrier()  # now every process has seen that the folder is free
    if processes.is_writer():
        clear_failed_try(run)
        write_record(run, settings)
    return carry_on(run, settings, model)


def refuse_other_images(run: Path, settings: Settings) -> None:
    """`UserError` where a try that saved no step drew images by other settings: they are kept, and not learned from."""
    if not (run / FILE).is_file() or not any((run / ROUNDS).glob("*/pictures/*.png")):
        return
    before = read_settings(run)
    for name in DRAWN_BY:
        if getattr(before, name) != getattr(settings, name):
            raise UserError(
                f"{run} holds images that were drawn with another {name.replace('_', ' ')}. Continue with --resume "
                f"{run}, or choose another --out."
            )


def resume_online(run: Path) -> Path:
    """Goes on with a run that was stopped."""
    settings = read_settings(run)
    processes.join(settings.device)
    return carry_on(run, settings, _placed(settings))


def _placed(settings: Settings) -> Backbone:
    """The model of these settings, as they hold it in memory."""
    return Backbone.open(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        placement=get_placement(settings),
    )


def carry_on(run: Path, settings: Settings, model: Backbone) -> Path:
    """Trains from the last checkpoint, if there is one, to the finished folder."""
    prompts = read_prompts(Path(settings.prompts))
    concepts = [read_concept(folder) for folder in settings.concepts]
    base = put_on(model, concepts)
    if settings.loss in REWARD_LOSSES:
        return _by_reward(run, settings, model, prompts, concepts, base)
    return _by_pairs(run, settings, model, prompts, concepts, base)


# Rounds of pairs --------------------------------------------------------------------------------------------


def _by_pairs(
    run: Path,
    settings: Settings,
    model: Backbone,
    prompts: Sequence[Prompt],
    concepts: list[Concept],
    base: Sequence[str],
) -> Path:
    began = time.perf_counter()
    training = PreferenceTraining(model, _nothing(model), settings, base, concepts)
    training.resume(run)
    writes = processes.is_writer()
    for log in (LOG, EVALUATIONS) if writes else ():
        trim_log(run / log, training.done)
    watch = Watch(run, training, settings)
    learn: list[Record] = []
    out: list[Record] = []
    spent = {"draw and rank": 0.0, "train": 0.0}
    with stopping() as stop:
        for number in range(_round(training.done, settings), settings.rounds):
            started = time.perf_counter()
            folder = run / ROUNDS / f"{number:02d}"
            _draw_round(folder, settings, model, prompts, concepts, number, stop)
            if writes and not (folder / RANKING).exists():
                rank_samples(folder, [settings.online])
            if writes:
                append_reward(run, folder, settings, number)
            processes.barrier()  # now every process finds the pairs
            learn, out = _round_records(folder, settings)
            training.take(prepare(model, learn, out, settings, concepts))
            if not training.done:
                watch.look(0)
            spent["draw and rank"] += time.perf_counter() - started
            started = time.perf_counter()
            end = _end(number, settings)
            with progress(end, f"round {number + 1} of {settings.rounds}", done=training.done) as bar:
                for report in training.steps(until=end):
                    if writes:
                        append_jsonl(run / LOG, dataclasses.asdict(report) | training.figures)
                    bar.advance(1, images=2 * settings.batch, **shown(report, training))
                    if processes.any_of(bool(stop)):
                        training.save(run)
                        _stopped(run, report.step, settings)
            training.save(run)
            watch.look(training.done)
            spent["train"] += time.perf_counter() - started
            if processes.any_of(watch.must_stop):
                say(f"Stopped after round {number + 1}: {watch.complaint}")
                break
    training.live.asked = int(processes.total([training.live.asked])[0])
    if not writes:
        processes.leave()
        return run
    write_concept(run, settings, model, training.write(run, _header(settings)))
    seconds = {"prepare": spent["draw and rank"], "train": spent["train"], "all": time.perf_counter() - began}
    write_summary(run, training, learn, out, concepts, seconds)
    processes.leave()
    return run


def _draw_round(
    folder: Path,
    settings: Settings,
    model: Backbone,
    prompts: Sequence[Prompt],
    concepts: Sequence[Concept],
    number: int,
    stop: list[int],
) -> None:
    """Draws what the round's folder still lacks, with the adapter as it is; round r's noise is its own."""
    sampling = SamplingSettings(settings.sample_steps, settings.guidance, settings.seed + 1 + number)
    keys = [(i, j) for i in range(len(prompts)) for j in range(settings.per_prompt)]
    missing = [key for key in keys if not (folder / image_name(*key)).exists()]
    processes.barrier()  # now every process knows what is missing
    own = processes.dealt(missing, batch=sampling.batch)  # to the last bit, for what is learned from them
    with progress(len(own), "drawing") as bar:
        for key, picture in zip(own, sample_images(model, prompts, own, sampling, concepts), strict=True):
            save_png(folder / image_name(*key), picture, text={"prompt": prompts[key[0]].text})
            bar.advance(1, images=1)
            if stop:
                break
    if processes.any_of(bool(stop)):
        run = folder.parents[1]
        raise KeyboardInterrupt(f"Stopped while drawing. Continue with: align train --resume {run}")
    if not processes.is_writer():
        return
    facts = {
        "format": FORMAT,
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "round": number,
        "sampling": sampling,
        "per_prompt": settings.per_prompt,
        "prompts": [{"prompt": prompt.text, "category": prompt.category} for prompt in prompts],
    }
    write_json(folder / SAMPLES, facts)


def _round_records(folder: Path, settings: Settings) -> tuple[list[Record], list[Record]]:
    learn, out = split_held_out(
        records_of(check_preferences(read_preferences(folder)), settings),
        share=settings.held_out,
        seed=settings.seed,
    )
    if not learn:
        raise UserError(f"{folder} leaves nothing to learn from. Lower --held-out, or give more prompts.")
    say(f"Learning from {describe_records(learn)}; held out: {describe_records(out)}.")
    return learn, out


def append_reward(run: Path, folder: Path, settings: Settings, number: int) -> None:
    """Logs the mean score of a round's pictures, once."""
    known = read_jsonl(run / REWARDS) if (run / REWARDS).exists() else []
    if any(line["round"] == number for line in known):
        return
    scores = read_json(folder / SCORES)["scores"]
    values = [one[settings.online] for one in scores.values()]
    append_jsonl(run / REWARDS, {"round": number, "reward": sum(values) / len(values)})


def _nothing(model: Backbone) -> Material:
    """No records, before the first round has drawn any."""
    return Material(torch.empty(0, *model.latent_shape), None, {}, [], [])


# Rewards without pairs --------------------------------------------------------------------------------------


def _by_reward(
    run: Path,
    settings: Settings,
    model: Backbone,
    prompts: Sequence[Prompt],
    concepts: list[Concept],
    base: Sequence[str],
) -> Path:
    from align.objectives.ddpo import PolicyGradients
    from align.objectives.draft import RewardGradients

    began = time.perf_counter()
    kind = RewardGradients if settings.loss == "draft" else PolicyGradients
    training = kind(model, prompts, settings, base, concepts)
    training.resume(run)
    writes = processes.is_writer()
    if writes:
        trim_log(run / LOG, training.done)
    with stopping() as stop, progress(settings.steps, settings.loss, done=training.done) as bar:
        for report in training.steps():
            if writes:
                append_jsonl(run / LOG, dataclasses.asdict(report) | training.figures)
            bar.advance(1, images=settings.batch, loss=report.loss, **training.figures)
            finished = report.step == settings.steps
            halt = processes.any_of(bool(stop))
            due = halt or report.step % settings.checkpointing_steps == 0
            if finished or (due and training.may_save(report.step)):
                training.save(run)
            if halt and not finished:
                _stopped(run, report.step, settings)
    if not writes:
        processes.leave()
        return run
    write_concept(run, settings, model, training.write(run, _header(settings)))
    log = read_jsonl(run / LOG)
    tenth = max(1, len(log) // 10)
    first, last = (sum(line["reward"] for line in part) / len(part) for part in (log[:tenth], log[-tenth:]))
    seconds = round(time.perf_counter() - began, 2)
    summary = {
        "kind": "reward",
        "loss": settings.loss,
        "scorer": settings.online,
        "model": settings.model,
        "fingerprint": model.fingerprint,
        "concepts": described(concepts),
        "reward": {"first tenth of the steps": first, "last tenth": last},
        "steps": training.done,
        "seconds": seconds,
        "settings": settings,
        "versions": versions(),
    }
    write_json(run / SUMMARY, summary)
    drawn = [
        curve("Reward", {"reward": [(line["step"], line["reward"]) for line in log]}),
        curve("Loss", {"loss": [(line["step"], line["loss"]) for line in smoothed_log(log)]}),
    ]
    parts = [
        paragraph(f"{settings.steps} steps in {seconds:.0f} s on {len(prompts)} prompts."),
        curves(drawn),
        table(("", "mean reward"), [("first tenth of the steps", first), ("last tenth", last)]),
        paragraph("The scorer that trained a model does not judge it: compare with another one."),
        heading("Again"),
        command(as_command(settings, run)),
    ]
    write_report(run / REPORT, f"{run.name}: {settings.loss} on {settings.model} by {settings.online}", parts)
    processes.leave()
    return run


# Helpers ----------------------------------------------------------------------------------------------------


def _round(step: int, settings: Settings) -> int:
    """The round that the step after this one belongs to."""
    return next(
        (number for number in range(settings.rounds) if step < _end(number, settings)), settings.rounds
    )


def _end(number: int, settings: Settings) -> int:
    """The last step of a round; the last round takes what is left over."""
    return (
        settings.steps
        if number == settings.rounds - 1
        else (number + 1) * (settings.steps // settings.rounds)
    )


def _stopped(run: Path, step: int, settings: Settings) -> None:
    raise KeyboardInterrupt(
        f"Stopped at step {step} of {settings.steps}. Continue with: align train --resume {run}"
    )


def _header(settings: Settings) -> dict[str, str]:
    return {"base_model": settings.model, "limner_loss": settings.loss, "limner_online": settings.online}
