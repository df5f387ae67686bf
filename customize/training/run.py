"""A training run from pictures to pictures, and the folder that it leaves behind."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbone.adapters.concept import Concept
from backbone.distributed import processes
from backbone.io.console import notify
from backbone.io.files import write_json, write_text
from backbone.io.run_folder import clear_failed_try, package_versions, refuse_taken, run_name
from backbone.media.crops import CropReader
from backbone.media.pictures import ImageRecord, check_images, list_images
from backbone.models.model import Backbone
from backbone.models.placement import get_placement
from backbone.training.run import Every, drive
from customize.data.dataset import prepare
from customize.data.folders import read_images
from customize.data.masks import save_masks
from customize.methods.lora import refuse_other_encoders
from customize.objectives.dreambooth import DreamBooth, share_of
from customize.settings import FILE, SHEET, Settings, Subject, as_flags, read_settings, resolved
from customize.training.card import card, push, readme
from customize.training.evaluation import Previews, Validation
from customize.training.memory import budgeted
from customize.training.subjects import fields_of_subjects, group_of, with_nouns, with_words

MASKS = "masks.png"
SHOWN = 8  # of the subjects' own images, on the sheet
KEPT = 64  # images whose crops are kept in memory for the evaluations; what is beyond is read anew


def train_concept(
    asked: dict[str, Any],
    subjects: Sequence[Subject],
    *,
    images: list[list[ImageRecord]] | None = None,
    out: Path | None,
    vram: float | None = None,
) -> Path:
    """Train a new concept and give its run folder. `asked` holds what the user set; the rest comes from the model.

    `images` are each subject's, checked already; read here if left out. `vram` is in GiB. An empty class noun is
    guessed, empty token words are chosen. Raises `UserError` for bad images, all of them listed, a bad token, or a run
    folder that is taken.
    """
    began = time.perf_counter()
    processes.init_process(asked.get("device") or "auto")
    pictures = images or read_images(subjects, asked.get("caption_column", ""), asked.get("image_column", ""))
    run = out or Path("runs") / run_name(subjects[0].images)
    refuse_taken(run)
    for folder in asked.get("class_images", ()):
        check_images(list_images(folder))
    # First the model's configs, which say what is usual; then how it is held, which the settings say
    place = {name: asked.get(name, "auto") for name in ("device", "precision")}
    opened = Backbone.open(asked.get("model", "moji"), **place, resolution=asked.get("resolution", 0))
    subjects = with_nouns(opened, subjects, pictures)
    settings = resolved(asked | fields_of_subjects(subjects), opened.defaults)
    model = open_model(settings)
    if vram is not None:
        processes.require_whole_model("--vram counts for a process alone; it")
        model, settings = budgeted(model, settings, sum(map(len, pictures)), vram)
    if settings.train_text_encoder:
        refuse_other_encoders(model)
    settings = dataclasses.replace(
        settings, **fields_of_subjects(with_words(model, subjects, pictures, settings))
    )
    share_of(settings)
    processes.barrier()  # now every process has seen that the folder is free
    if processes.is_main_process():
        clear_failed_try(run)
        write_record(run, settings, timings={})
    return carry_on(run, settings, model, pictures, began=began)


def resume_concept(run: Path) -> Path:
    """Goes on with a run that was stopped; the weights come out as if it had not been."""
    settings = read_settings(run)
    processes.init_process(settings.device)
    pictures = read_images(settings.subjects(), settings.caption_column, settings.image_column)
    return carry_on(run, settings, open_model(settings), pictures, began=time.perf_counter())


def carry_on(
    run: Path, settings: Settings, model: Backbone, pictures: Sequence[list[ImageRecord]], *, began: float
) -> Path:
    """Trains from the last checkpoint, if there is one, to the finished folder."""
    subjects = settings.subjects()
    concept = Concept(
        kind=settings.method,
        model=settings.model,
        fingerprint=model.fingerprint,
        tokens={subject.token: subject.token_words for subject in subjects},
        class_noun=settings.class_noun,
        resolution=settings.resolution,
    )
    groups = [
        group_of(subject, folder, settings, concept)
        for subject, folder in zip(subjects, pictures, strict=True)
    ]
    # Every image is decoded once more than it was checked: for its latents, the evaluations and the sheet together
    everything = [picture for folder in pictures for picture in folder]
    measured = pictures[0][:KEPT] if settings.evaluation_steps else []
    read, side = CropReader([*everything[:SHOWN], *measured]), (model.resolution, model.resolution)
    training = DreamBooth(model, prepare(model, groups, settings, read=read), settings)
    training.resume(run)
    if processes.is_main_process() and settings.mask == "auto":
        save_masks(run / MASKS, pictures, training.data.masks or [], flip=settings.flip)
    shown = [read(picture, side) for picture in everything[:SHOWN]]
    prepared = time.perf_counter()
    previews = Previews(model, settings, concept)
    validation = Validation(run, training, concept, lambda: [read(picture, side) for picture in pictures[0]])
    read.forget()

    def preview(step: int) -> None:
        with training.averaged():
            previews.save(run / "previews" / f"step-{step:06d}.png", count=4)

    drive(
        training,
        run,
        command="customize train",
        validate=Every(settings.evaluation_steps, validation),
        preview=Every(settings.validation_steps, preview),
        tensorboard=settings.report_to == "tensorboard",
    )
    times = {"prepare": prepared - began, "train": time.perf_counter() - prepared}
    finish(run, training, concept, validation)
    with training.averaged():
        prompts = previews.save(run / SHEET, count=8, subject=shown)
    times |= {"show": time.perf_counter() - began - sum(times.values()), "all": time.perf_counter() - began}
    if processes.is_main_process():
        describe(run, settings, model, prompts, {name: round(value, 2) for name, value in times.items()})
    processes.end_process()
    return run


# The run's files ---------------------------------------------------------------------------------------------


def open_model(settings: Settings) -> Backbone:
    """The model of a run, held as its settings say."""
    return Backbone.open(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        placement=get_placement(settings),
        resolution=settings.resolution,
    )


def finish(run: Path, training: DreamBooth, concept: Concept, validation: Validation) -> None:
    """Writes what was learned, and the report of its evaluations."""
    if not processes.is_main_process():
        return
    header = {
        "limner_token": " ".join(concept.tokens),
        "limner_words": " ".join(concept.tokens.values()),
        "base_model": concept.model,
    }
    dataclasses.replace(concept, **training.write(run, header)).write(run)
    validation.report(training.settings)


def describe(
    run: Path, settings: Settings, model: Backbone, prompts: list[str], seconds: dict[str, float]
) -> None:
    """Writes the run's record with its timings and its README, and uploads the folder where that is asked for."""
    write_record(run, settings, timings=seconds)
    write_text(run / "README.md", card(settings, model) + readme(run, settings, prompts, seconds))
    if settings.push_to_hub:
        notify(f"Uploaded to {push(run, settings.hub_model_id or run.name)}.")


def write_record(run: Path, settings: Settings, *, timings: dict[str, float]) -> None:
    """Writes the run's `settings.json`: what was resolved, how to repeat it, and with which versions."""
    command = as_flags(settings, run)
    write_json(
        run / FILE,
        {"settings": settings, "command": command, "versions": package_versions(), "timings": timings},
    )
