"""Online training: sample with the model, score, train, and repeat.

With a loss of pairs each round's best and worst pictures of a prompt are that round's pairs (on-policy preference
optimisation); the reference stays the base, with the adapter off. `draft` and `ddpo` learn from the scorer's numbers
(`align.objectives.reward`). A run folder keeps every round's pictures in `rounds/`, a folder of `align sample` each.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.collect.rank import rank_samples
from align.collect.sample import sample_images
from align.collect.scorers import hash_scorer, open_scorer, refuse_not_differentiable
from align.objectives.dataset import PreferenceData, make_preference_data, make_records
from align.objectives.preference import PreferenceTraining, find_share
from align.pairs.read import read_preferences
from align.pairs.records import (
    RANKING,
    SAMPLES,
    SCORES,
    Records,
    Scores,
    check_preferences,
)
from align.pairs.samples import FORMAT, image_name
from align.settings import (
    FILE,
    REPORT,
    REWARD_LOSSES,
    REWARDS,
    ROUNDS,
    SUMMARY,
    Settings,
    as_command,
    read_settings,
    refuse_out_of_reach,
    resolve_settings,
)
from align.training.monitor import Validation
from align.training.reporting.logs import read_rewards, read_steps
from align.training.reporting.pictures import AFTER, Pictures, describe, draw_before
from align.training.reporting.report import draw_curves, mean_reward, write_running_report, write_summary
from align.training.run import hash_concepts, write_concept, write_record
from backbone.adapters.apply import check_concept_fits, load_concepts
from backbone.adapters.concept import Concept, read_concept, summarize_concepts
from backbone.cli.sampling import SamplingSettings
from backbone.cli.values.convert import is_code
from backbone.distributed import processes
from backbone.io.console import UserError, notify, quote
from backbone.io.files import append_jsonl, content_hash, read_json, write_json
from backbone.io.progress import progress
from backbone.io.prompts import Prompt, read_prompts
from backbone.io.report import command_block, heading, paragraph, plot_row, table, write_report
from backbone.io.run_folder import CHECKPOINT, catch_interrupts, make_absolute, package_versions, refuse_taken
from backbone.media.parameters import describe_drawing, last_name
from backbone.media.sheet import save_png
from backbone.models.model import Backbone
from backbone.training.checkpoint import refuse_other_sources
from backbone.training.models import open_configs, open_model
from backbone.training.run import Every, drive
from backbone.training.settings import refuse_gone

REPORTS = 20  # report updates of a run on rewards
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


def train_online(requested: dict[str, Any], *, out: Path | None) -> Path:
    """Train in rounds from prompts and a scorer; returns the run folder. `requested` holds the user's settings.

    Raises `UserError`, before any weights load, for a run folder that is taken, an unknown scorer, and settings that
    contradict each other.
    """
    processes.init_process(requested.get("device", "auto"))
    run = out or Path("runs") / f"{Path(requested['prompts']).stem}-online"
    refuse_taken(run)
    model, requested = open_configs(requested)
    settings = resolve_settings(requested, model.defaults)
    refuse_out_of_reach(settings, requested)
    if settings.loss == "draft":
        refuse_not_differentiable(settings.online)
    open_scorer(settings.online)
    for folder in settings.concepts:
        check_concept_fits(read_concept(folder), model)
    model = open_model(settings)
    find_share(settings)
    refuse_other_images(run, settings)
    with processes.hold_new_run(run) as writes:
        if writes:
            write_record(run, settings, model)
        return run_training(run, settings, model)


def refuse_other_images(run: Path, settings: Settings) -> None:
    """`UserError` if an earlier attempt without a checkpoint sampled images by other settings; they are not deleted."""
    if not (run / FILE).is_file() or not any((run / ROUNDS).glob("*/pictures/*.png")):
        return
    stored = read_settings(run)
    for name in DRAWN_BY:
        if getattr(stored, name) != getattr(settings, name):
            raise UserError(
                f"{run} holds images that were drawn with another {name.replace('_', ' ')}. Continue with --resume "
                f"{quote(run)}, or choose another --out."
            )


def resume_online(run: Path, overrides: Mapping[str, Any] | None = None, *, code: str = "") -> Path:
    """Resume a run that was stopped. `overrides` are settings that change (`align.training.cli.RESUMED`).

    A run folder may come from anybody: a scorer that is a Python file is run only if it is `code`, the absolute path
    that the user names in this call; `UserError` otherwise.
    """
    settings = dataclasses.replace(read_settings(run), **(overrides or {}))
    refuse_gone(run, settings)
    if is_code(settings.online) and make_absolute(settings.online) != code:
        raise UserError(
            f"{run} scores with the Python file {settings.online}, which would be run. If you trust it, name it: "
            f"{resume_command(settings)} --resume {quote(run)}"
        )
    processes.init_process(settings.device)
    with processes.hold_folder(run):
        model = open_model(settings)
        if overrides:
            refuse_other_sources(run / CHECKPOINT, list_sources(model, settings))
            if processes.is_main_process():
                write_record(run, settings, model)
        return run_training(run, settings, model)


def list_sources(model: Backbone, settings: Settings) -> dict[str, Any]:
    """The sources of a checkpoint, by name: it can only be resumed with the same ones."""
    prompts = [(prompt.text, prompt.hard_negatives) for prompt in read_prompts(Path(settings.prompts))]
    return {
        "model": model.fingerprints,
        "set of prompts": content_hash(repr(prompts).encode()),
        **hash_concepts(settings.concepts),
        "scorer": hash_scorer(settings.online),
    }


def resume_command(settings: Settings) -> str:
    """The command that resumes a run, without the run's name: a Python file has to be named again."""
    code = f" --online {quote(settings.online)}" if is_code(settings.online) else ""
    return f"align train{code}"


def run_training(run: Path, settings: Settings, model: Backbone) -> Path:
    """Train from the last checkpoint, if there is one, to the finished folder."""
    prompts = read_prompts(Path(settings.prompts))
    concepts = [read_concept(folder) for folder in settings.concepts]
    base = load_concepts(model, concepts)
    if settings.loss in REWARD_LOSSES:
        return _train_by_reward(run, settings, model, prompts, concepts, base)
    return _train_by_pairs(run, settings, model, prompts, concepts, base)


# Rounds of pairs --------------------------------------------------------------------------------------------


def _train_by_pairs(
    run: Path,
    settings: Settings,
    model: Backbone,
    prompts: Sequence[Prompt],
    concepts: list[Concept],
    base: Sequence[str],
) -> Path:
    began = time.perf_counter()
    training = PreferenceTraining(model, PreferenceData.empty(model), settings, base, concepts)
    training.sources = list_sources(model, settings)
    training.resume(run)
    texts = [prompt.text for prompt in prompts]
    pictures = draw_before(run, model, settings, texts, concepts, steps_done=training.done)
    # Before the first round and after each
    validate = Every(0, Validation(run, training, settings, pictures))
    writes = processes.is_main_process()
    train, held_out = Records(), Records()
    spent = {"draw and rank": 0.0, "train": 0.0}
    with catch_interrupts() as stop:
        for number in range(_find_round(training.done, settings), settings.rounds):
            # Sample images of every prompt with the current policy.
            started = time.perf_counter()
            folder = run / ROUNDS / f"{number:02d}"
            _draw_round(folder, settings, model, prompts, concepts, number, stop)
            # Rank: a scorer's best and worst of a prompt become a pair.
            if writes and not (folder / RANKING).exists():
                rank_samples(folder, [settings.online])
            if writes:
                append_reward(run, folder, settings, number)
            processes.barrier()  # now every process can read the pairs
            train, held_out = _read_round(folder, settings)
            training.train_on(make_preference_data(model, train, held_out, settings, concepts))
            spent["draw and rank"] += time.perf_counter() - started
            # Learn from this round's pairs.
            started = time.perf_counter()
            label = f"round {number + 1} of {settings.rounds}"
            end = _find_last_step(number, settings)
            stopped = drive(
                training, run, command=resume_command(settings), until=end, label=label, validate=validate
            )
            spent["train"] += time.perf_counter() - started
            if stopped:
                break
    training.live.nfe = int(processes.reduce_sum([training.live.nfe])[0])
    pictures.draw(AFTER)
    if not writes:
        processes.end_process()
        return run
    write_concept(run, settings, model, training.write(run, _make_header(settings)))
    pictures.write_sheet()
    seconds = {"prepare": spent["draw and rank"], "train": spent["train"], "all": time.perf_counter() - began}
    write_summary(run, training, train, held_out, concepts, seconds, pictures)
    processes.end_process()
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
    """Sample the missing images of the round's folder with the current adapter; every round has its own noise."""
    sampling = SamplingSettings(
        steps=settings.sample_steps, guidance=settings.guidance, seed=settings.seed + 1 + number
    )
    sources = {**list_sources(model, settings), "model": model.fingerprint}
    record = {
        "format": FORMAT,
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "round": number,
        "sampling": sampling,
        "per_prompt": settings.per_prompt,
        "prompts": [{"prompt": prompt.text, "category": prompt.category} for prompt in prompts],
        "sources": sources,
    }
    with processes.main_process_first():
        _refuse_other_round(folder, sources)
        if processes.is_main_process():
            write_json(folder / SAMPLES, record)
    keys = [(i, j) for i in range(len(prompts)) for j in range(settings.per_prompt)]
    missing = [key for key in keys if not (folder / image_name(*key)).exists()]
    processes.barrier()  # now every process knows which images are missing
    # In the batches of a single process, so that the images are the same to the last bit
    batches = processes.split_batches(missing, batch=sampling.batch)
    facts = {"model": settings.model, **sampling.facts(), "concepts": list(map(last_name, settings.concepts))}
    facts["round"] = number
    with progress(len(batches), "drawing") as bar:
        pictures = sample_images(model, prompts, batches, sampling, concepts, advance=bar.advance_images)
        for key, picture in zip(batches, pictures, strict=True):
            i, j = key
            text = describe_drawing(prompts[i].text, picture.size, {**facts, "prompt_number": i, "sample": j})
            save_png(folder / image_name(*key), picture, text=text)
            if stop:
                break
    if processes.any_process(bool(stop)):
        run = folder.parents[1]
        raise KeyboardInterrupt(
            f"Stopped while drawing. Continue with: {resume_command(settings)} --resume {quote(run)}"
        )


def _refuse_other_round(folder: Path, sources: Mapping[str, str]) -> None:
    """`UserError` where a round was begun with other sources, of which a run without a checkpoint knows nothing."""
    path = folder / SAMPLES
    stored = read_json(path).get("sources") if path.is_file() else None
    for name, value in sources.items():
        if isinstance(stored, dict) and stored.get(name, value) != value:
            raise UserError(
                f"{folder} holds images that were drawn or ranked with another {name} than there is now. Put the old "
                "one back, or start the run anew."
            )


def _read_round(folder: Path, settings: Settings) -> tuple[Records, Records]:
    records = make_records(check_preferences(read_preferences(folder)), settings)
    assert isinstance(records, Records)
    train, held_out = records.split(share=settings.held_out, seed=settings.seed)
    if not train:
        raise UserError(f"{folder} leaves nothing to learn from. Lower --held-out, or give more prompts.")
    notify(f"Learning from {train.describe()}; held out: {held_out.describe()}.")
    return train, held_out


def append_reward(run: Path, folder: Path, settings: Settings, number: int) -> None:
    """Log the mean score of a round's pictures, once."""
    if any(line.round == number for line in read_rewards(run)):
        return
    scores = read_json(folder / SCORES, Scores).scores
    values = [by_scorer[settings.online] for by_scorer in scores.values()]
    append_jsonl(run / REWARDS, {"round": number, "reward": sum(values) / len(values)})


# Rewards without pairs --------------------------------------------------------------------------------------


def _train_by_reward(
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
    training.sources = list_sources(model, settings)
    training.resume(run)
    texts = [prompt.text for prompt in prompts]
    pictures = draw_before(run, model, settings, texts, concepts, steps_done=training.done)

    def renew(step: int) -> None:
        if processes.is_main_process():
            write_running_report(run, settings, pictures, step)

    preview = Every(max(1, settings.steps // REPORTS), renew)
    drive(training, run, command=resume_command(settings), label=settings.loss, preview=preview)
    pictures.draw(AFTER)
    if not processes.is_main_process():
        processes.end_process()
        return run
    write_concept(run, settings, model, training.write(run, _make_header(settings)))
    _write_reward_report(run, settings, model, concepts, pictures, time.perf_counter() - began)
    processes.end_process()
    return run


def _write_reward_report(
    run: Path,
    settings: Settings,
    model: Backbone,
    concepts: Sequence[Concept],
    pictures: Pictures,
    seconds: float,
) -> None:
    """Write the summary, the sheet and the page of a finished run."""
    log = read_steps(run)
    tenth = max(1, len(log) // 10)
    first, last = mean_reward(log[:tenth]), mean_reward(log[-tenth:])
    summary = {
        "kind": "reward",
        "loss": settings.loss,
        "scorer": settings.online,
        "model": settings.model,
        "fingerprint": model.fingerprint,
        "concepts": summarize_concepts(concepts),
        "reward": {"first tenth of the steps": first, "last tenth": last},
        "steps": settings.steps,
        "seconds": round(seconds, 2),
        "settings": settings,
        "versions": package_versions(),
    }
    write_json(run / SUMMARY, summary)
    pictures.write_sheet()
    parts = [
        paragraph(f"{settings.steps} steps in {seconds:.0f} s."),
        plot_row(draw_curves(run, settings)),
        *pictures.parts(),
        table(("", "mean reward"), [("first tenth of the steps", first), ("last tenth", last)]),
        paragraph("The scorer that trained a model does not judge it: compare with another one."),
        heading("Again"),
        command_block(as_command(settings, run)),
    ]
    write_report(run / REPORT, f"{run.name}: {describe(settings)}", parts)


# Helpers ----------------------------------------------------------------------------------------------------


def _find_round(step: int, settings: Settings) -> int:
    """The round that the step after this one belongs to."""
    return next(
        (number for number in range(settings.rounds) if step < _find_last_step(number, settings)),
        settings.rounds,
    )


def _find_last_step(number: int, settings: Settings) -> int:
    """The last step of a round; the last round takes the remainder."""
    return (
        settings.steps
        if number == settings.rounds - 1
        else (number + 1) * (settings.steps // settings.rounds)
    )


def _make_header(settings: Settings) -> dict[str, str]:
    return {"base_model": settings.model, "limner_loss": settings.loss, "limner_online": settings.online}
