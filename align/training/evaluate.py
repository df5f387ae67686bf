"""Evaluating a finished preference run on preferences."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import torch

from align.objectives.dataset import make_preference_data, make_records, reread_preferences
from align.objectives.metrics import Figures, make_evaluation
from align.objectives.reference import LiveReference
from align.pairs.prepared import Prepared, PreparedRecords
from align.pairs.records import Preferences, Records, is_of_another_model
from align.settings import EVALUATION, ROUNDS, Settings
from backbone.adapters.apply import add_weight_differences, load_concepts
from backbone.adapters.apply import check_concept_fits as refuse_another_concept
from backbone.adapters.concept import read_concept
from backbone.adapters.lora import use_adapters
from backbone.io.console import UserError, format_count, notify, quote
from backbone.io.files import write_json
from backbone.io.run_folder import refuse_unwritable
from backbone.models.model import Backbone


def evaluate_run(
    run: Path, settings: Settings, *, source: str | None = None, draws: int = 8, skip_bad: bool = False
) -> str:
    """Measure a finished run on preferences, by default its own held-out ones; return the text to print.

    Writes `evaluation.json` into the run.
    """
    refuse_unwritable(run)  # before anything is measured
    concept = read_concept(run)
    preferences, records = read_records(run, settings, source, skip_bad=skip_bad or settings.skip_bad)

    # The reference is the model without the run's adapter
    model = Backbone.open(settings.model, device=settings.device, precision=settings.precision)
    refuse_another_concept(concept, model)
    if (
        isinstance(preferences, Preferences)
        and not settings.any_model
        and is_of_another_model(preferences, model)
    ):
        notify(
            f"{preferences.source} was drawn by {preferences.provenance.get('model')}, and {run} was trained from "
            f"{settings.model}: images of another model say little of what it has learned."
        )
    base_concepts = [read_concept(folder) for folder in settings.concepts]
    data = make_preference_data(model, records.empty(), records, settings, base_concepts)
    names = load_concepts(model, [*base_concepts, concept] if concept.weights else base_concepts)
    live = LiveReference(
        model,
        model.denoiser,
        partial(use_adapters, model.denoiser, names[: len(names) - bool(concept.weights)]),
    )
    evaluation_settings = dataclasses.replace(settings, evaluation_draws=draws)
    evaluation = make_evaluation(model, data, data.held_out, live, evaluation_settings, "held-out")
    if concept.changed:
        model.denoiser.float()  # differences are small
        add_weight_differences(model, concept)
    with torch.no_grad():
        figures = evaluation(model.denoiser)
    write_json(
        run / EVALUATION,
        {"source": source or "held out", "records": records.describe(), **figures.as_json()},
    )
    return format_evaluation(figures, records)


def read_records(
    run: Path, settings: Settings, source: str | None, *, skip_bad: bool
) -> tuple[Preferences | Prepared, Records | PreparedRecords]:
    """What a run is measured on: all preferences of `source`, or for None those that the run held out.

    A run that drew its own preferences held out some of its last round's. Raises `UserError` where nothing is left.
    """
    if source is not None:
        settings_of_source = dataclasses.replace(settings, pairs=source, user="", limit=0, split="train")
        preferences = reread_preferences(settings_of_source, skip_bad=skip_bad)
        records = make_records(preferences, settings_of_source)
        if settings.pairs and Path(source).expanduser().resolve() == Path(settings.pairs).resolve():
            learned, _ = records.split(share=settings.held_out, seed=settings.seed)
            notify(
                f"{run} has learned from these: {learned.describe()}, which it judges better than others. Its "
                f"held-out ones alone: align evaluate {quote(run)}."
            )
    else:
        if not settings.pairs:
            rounds = sorted((run / ROUNDS).glob("*"))
            if not rounds:
                raise UserError(
                    f"{run} was trained without pairs. Name some: align evaluate {quote(run)} PAIRS."
                )
            settings = dataclasses.replace(settings, pairs=str(rounds[-1]))
        preferences = reread_preferences(settings, skip_bad=skip_bad)
        _, records = make_records(preferences, settings).split(share=settings.held_out, seed=settings.seed)
    if not len(records):
        raise UserError(f"{source or settings.pairs} leaves nothing to judge by. Name other pairs.")
    return preferences, records


def format_evaluation(figures: Figures, records: Records | PreparedRecords) -> str:
    """The accuracy, its course over noise levels, and how the errors changed, in three lines."""
    levels = ", ".join("–" if math.isnan(share) else f"{share:.0%}" for share in figures.by_level)
    return (
        f"accuracy {figures.accuracy} on {records.describe()}, {format_count(figures.draws, 'draw')} each\n"
        f"by noise, clean to noisy: {levels}\n"
        f"change of error: winners {figures.winner_change:+.2%}, losers {figures.loser_change:+.2%}"
    )
