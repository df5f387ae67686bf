"""A preference-training run from pairs to a folder that serves as a concept, with its summary and its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from align.objectives.dataset import make_preference_data, make_records, reread_preferences
from align.objectives.preference import PreferenceTraining, find_share
from align.pairs.prepared import Prepared, PreparedRecords
from align.pairs.records import (
    Preferences,
    Records,
    describe_shared_images,
    refuse_another_model,
)
from align.settings import (
    FILE,
    Settings,
    as_command,
    read_settings,
    refuse_out_of_reach,
    resolve_settings,
)
from align.training.monitor import Validation
from align.training.reporting.pictures import AFTER, draw_before
from align.training.reporting.report import write_summary
from backbone.adapters.apply import check_concept_fits as refuse_another_concept
from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import Concept, read_concept
from backbone.distributed import processes
from backbone.io.console import UserError, notify
from backbone.io.files import content_hash, write_json
from backbone.io.prompts import describe_mirrored
from backbone.io.run_folder import CHECKPOINT, package_versions, refuse_taken, run_name
from backbone.models.model import Backbone
from backbone.training.checkpoint import refuse_other_sources
from backbone.training.hardware import describe_hardware
from backbone.training.models import open_configs, open_model
from backbone.training.run import Every, drive
from backbone.training.settings import refuse_gone


def train_preferences(
    requested: dict[str, Any],
    preferences: Preferences | Prepared,
    *,
    out: Path | None,
    vram: float | None = None,
) -> Path:
    """Train on checked preferences; returns the run folder. `requested` holds the user's settings, `vram` is in GiB.

    Raises `UserError`, before any weights load, for a run folder that is taken, pairs of another model, and settings
    that contradict each other.
    """
    began = time.perf_counter()
    processes.init_process(requested.get("device", "auto"))
    run = out or Path("runs") / run_name(requested["pairs"])
    refuse_taken(run, [requested["pairs"]])
    model, requested = open_configs(requested)
    settings = resolve_settings(requested, model.defaults)
    refuse_out_of_reach(settings, requested)
    _refuse_other_model(preferences, settings, model)
    records = make_records(preferences, settings)
    if left_out := _describe_left_out(preferences, settings):
        notify(left_out)
    if settings.flip and (
        warning := describe_mirrored((text, f"the prompt “{text}”") for text in records.texts())
    ):
        notify(warning)
    if idle := describe_idle_ties(settings, records):
        notify(idle)
    model = open_model(settings)
    if vram is not None:
        from align.training.memory import fit_to_vram

        model, settings = fit_to_vram(model, settings, vram)
    find_share(settings)
    with processes.hold_new_run(run) as writes:
        if writes:
            write_record(run, settings, model)
        return run_training(run, settings, model, records, began=began)


def describe_idle_ties(settings: Settings, records: Records | PreparedRecords) -> str:
    """A sentence if ties should be learned from and there are none; else ""."""
    if settings.ties != "model" or records.has_ties():
        return ""
    return f"--ties model has no effect: there are no ties in {settings.pairs}. Leave it out."


def _describe_left_out(preferences: Preferences | Prepared, settings: Settings) -> str:
    by_pairs, ties = settings.by_pairs, settings.ties == "model"
    if isinstance(preferences, Preferences):
        return preferences.describe_left_out(by_pairs=by_pairs, ties=ties)
    return preferences.describe_left_out(
        by_pairs=by_pairs, ties=ties, user=settings.user or None, limit=settings.limit or None
    )


def resume_preferences(run: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Resume a run that was stopped; the weights are the same as those of an uninterrupted run.

    `overrides` are settings that change (`align.training.cli.RESUMED`): the data and the model may have moved.
    """
    began = time.perf_counter()
    settings = dataclasses.replace(read_settings(run), **(overrides or {}))
    refuse_gone(run, settings)
    processes.init_process(settings.device)
    preferences = reread_preferences(settings, skip_bad=settings.skip_bad)
    model = open_model(settings)
    _refuse_other_model(preferences, settings, model)
    records = make_records(preferences, settings)
    with processes.hold_folder(run):
        if overrides:
            train, _ = records.split(share=settings.held_out, seed=settings.seed)
            refuse_other_sources(run / CHECKPOINT, list_sources(model, settings, train))
            if processes.is_main_process():
                write_record(run, settings, model)
        return run_training(run, settings, model, records, began=began)


def list_sources(model: Backbone, settings: Settings, train: Records | PreparedRecords) -> dict[str, Any]:
    """The sources of a checkpoint, by name: it can only be resumed with the same ones."""
    return {
        "model": model.fingerprints,
        "images": train.fingerprint(),
        "set of prompts and choices": train.choices(),
        **hash_concepts(settings.concepts),
    }


def hash_concepts(folders: Sequence[str]) -> dict[str, str]:
    """The hash of the weights of the concepts that a run builds on; empty without any."""
    concepts = [read_concept(folder) for folder in folders]
    files = [path for concept in concepts for path in concept.files]
    tokens = [str(concept.tokens) for concept in concepts]
    return (
        {"concept": content_hash(" ".join([*map(content_hash, files), *tokens]).encode())} if concepts else {}
    )


def run_training(
    run: Path, settings: Settings, model: Backbone, records: Records | PreparedRecords, *, began: float
) -> Path:
    """Train from the last checkpoint, if there is one, to the finished folder.

    Raises `UserError` if nothing is left to learn from.
    """
    train, held_out = records.split(share=settings.held_out, seed=settings.seed)
    if not len(train):
        raise UserError(f"{settings.pairs} leaves nothing to learn from. Lower --held-out.")
    notify(f"Learning from {train.describe()}; held out: {held_out.describe()}.")
    if isinstance(train, Records) and (shared := describe_shared_images(train, cast(Records, held_out))):
        notify(shared)

    # The reference is the model with these concepts, as it is before training
    concepts = [read_concept(folder) for folder in settings.concepts]
    base = load_concepts(model, concepts)
    data = make_preference_data(model, train, held_out, settings, concepts)
    training = PreferenceTraining(model, data, settings, base, concepts)
    training.sources = list_sources(model, settings, train)
    training.resume(run)
    prepared = time.perf_counter()

    # The steps, with images drawn before and after
    texts = chain(held_out.texts(), train.texts())
    pictures = draw_before(run, model, settings, texts, concepts, steps_done=training.done)
    model.free("autoencoder", "text_encoder")
    validate = Every(settings.evaluation_steps, Validation(run, training, settings, pictures))
    drive(training, run, command="align train", validate=validate)
    trained = time.perf_counter()
    training.live.nfe = int(processes.reduce_sum([training.live.nfe])[0])
    pictures.draw(AFTER)
    if not processes.is_main_process():
        processes.end_process()
        return run

    # The finished folder
    header = {
        "base_model": settings.model,
        "limner_loss": settings.loss,
        "limner_beta": f"{settings.beta:g}",
    }
    files = training.write(run, header)
    write_concept(run, settings, model, files)
    pictures.write_sheet()
    seconds = {"prepare": prepared - began, "train": trained - prepared, "all": time.perf_counter() - began}
    write_summary(run, training, train, held_out, concepts, seconds, pictures)
    processes.end_process()
    return run


def write_concept(run: Path, settings: Settings, model: Backbone, files: dict[str, str]) -> None:
    """Write `concept.json`: the run can be used like any concept, and has no token."""
    weights, changed = files.get("weights", ""), files.get("changed", "")
    concept = Concept("preference", settings.model, model.fingerprint, {}, "", weights, changed=changed)
    concept.write(run)


def write_record(run: Path, settings: Settings, model: Backbone) -> None:
    """Write the run's `settings.json`: resolved settings, repeating command, versions and hardware."""
    write_json(
        run / FILE,
        {
            "settings": settings,
            "command": as_command(settings, run),
            "versions": package_versions(),
            "hardware": describe_hardware(model, settings),
        },
    )


def _refuse_other_model(preferences: Preferences | Prepared, settings: Settings, model: Backbone) -> None:
    if isinstance(preferences, Prepared):
        crops = settings.random_crop
        preferences.refuse_other_use(model, flip=settings.flip, crops=crops, seed=settings.seed)
    elif not settings.any_model:
        refuse_another_model(preferences, model)
    for folder in settings.concepts:
        refuse_another_concept(read_concept(folder), model)
