"""A run of `customize train`: from images to trained weights, the preview sheet and the run folder."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from backbone.adapters.concept import BEST, Concept, mentions, resolve_placeholder_tokens
from backbone.distributed import processes
from backbone.io.console import UserError, notify, notify_once
from backbone.io.files import read_json, write_json, write_text
from backbone.io.run_folder import CHECKPOINT, refuse_taken, run_name
from backbone.media.crops import CropReader
from backbone.media.sources.record import ImageRecord
from backbone.models.model import Backbone
from backbone.training.checkpoint import refuse_other_sources
from backbone.training.models import open_configs, open_model
from backbone.training.run import Every, drive
from backbone.training.settings import resume_settings
from customize.data.changes import describe_changed_scorer, describe_changes, hash_images
from customize.data.dataset import SubjectGroup, make_training_data, preserves
from customize.data.folders import list_class_images, read_class_images, read_images
from customize.data.masks import save_masks
from customize.data.prepared import KEPT
from customize.methods.lora import refuse_other_encoders
from customize.objectives.dreambooth import DreamBooth, find_share
from customize.settings import FILE, SHEET, Settings, Subject, as_command, read_settings, resolve_settings
from customize.training.evaluation import Previews, Validation
from customize.training.few_step import ON, FewStepValidation, open_few_step_model
from customize.training.memory import fit_to_vram
from customize.training.preflight import refuse_idle_range, say_idle_bound
from customize.training.record import make_weights_metadata, write_record
from customize.training.reporting.card import format_card, format_readme, push
from customize.training.reporting.report import PREVIEWS, RunReport
from customize.training.subjects import choose_words, list_subject_fields, make_group, name_classes

MASKS = "masks.png"
SHOWN = 8  # of the subjects' own images on the preview sheet


def train_concept(
    requested: dict[str, Any],
    subjects: Sequence[Subject],
    *,
    images: list[list[ImageRecord]] | None = None,
    out: Path | None,
    vram: float | None = None,
) -> Path:
    """Train a new concept; returns its run folder. `requested` holds the user's settings; the rest are the model's.

    `images` are each subject's, already checked; read here if left out. `vram` is in GiB. An empty class noun is
    guessed, empty token words are chosen. Raises `UserError` for bad images, all of them listed, a bad token, or a run
    folder that is taken.
    """
    began = time.perf_counter()
    processes.init_process(requested.get("device") or "auto")
    pictures = images or read_images(
        subjects, requested.get("caption_column", ""), requested.get("image_column", "")
    )
    run = out or Path("runs") / run_name(subjects[0].images)
    refuse_taken(run, [subject.images for subject in subjects])
    read_class_images(requested.get("class_images", ()), pictures)

    # The model's configs: its defaults complete the settings, and wrong settings are refused before weights load
    opened, requested = open_configs(requested)
    sizes = [picture.read_size() for folder in pictures for picture in folder[:KEPT]]
    if misfit := opened.describe_misfit(sizes):
        notify_once(misfit)
    subjects = name_classes(opened, subjects, pictures)
    settings = resolve_run_settings(requested | list_subject_fields(subjects), opened.defaults, pictures)
    refuse_unmeasured(settings, opened, requested)
    say_idle_bound(settings, opened, requested)
    refuse_idle_range(settings, opened)

    # The model in the placement that the settings ask for
    model = open_model(settings, resolution=settings.resolution)
    if vram is not None:
        model, settings = fit_to_vram(model, settings, vram)
    if settings.train_text_encoder:
        refuse_other_encoders(model)
    settings = dataclasses.replace(
        settings, **list_subject_fields(choose_words(model, subjects, pictures, settings))
    )
    find_share(settings)
    open_few_step_model(model, settings)  # raises for a few-step model that does not fit
    concept, groups = make_prompts(settings, model, pictures)
    with processes.hold_new_run(run) as writes:
        if writes:
            begin_record(run, settings, model, pictures)
        return run_training(run, settings, model, concept, groups, began=began)


def resolve_run_settings(
    requested: Mapping[str, Any], defaults: Mapping[str, Any], pictures: Sequence[list[ImageRecord]]
) -> Settings:
    """The settings of a run on these images; prints if the model's prior prompts are left out for lack of captions."""
    captioned = all((picture.caption or "").strip() for folder in pictures for picture in folder)
    settings = resolve_settings(requested, defaults, captioned=captioned)
    further = defaults.get("prior_prompts") and not requested.get("prior_prompts")
    if further and not captioned and preserves(settings) and settings.prior == "base":
        notify(
            "Not every image has a caption, so the model's further prior prompts are left out. Captions that say where "
            "the subject stands would let them keep places and what it wears."
        )
    return settings


def refuse_unmeasured(settings: Settings, model: Backbone, requested: Mapping[str, Any]) -> None:
    """`UserError` for early stopping where nothing can be evaluated; prints that requested evaluations are skipped."""
    if settings.scorer or model.location.local("scorer") or not settings.evaluation_steps:
        return
    blind = f"{settings.model} has no scorer of its own, so nothing is evaluated"
    if settings.patience:
        raise UserError(
            f"{blind}, and no evaluation says when to stop (--steps auto, --patience). Name the folder of a CLIP or "
            "DINO with --scorer, or give a number of --steps."
        )
    if "evaluation_steps" in requested:
        notify(f"{blind}: --evaluation-steps has no effect without --scorer, the folder of a CLIP or DINO.")


def resume_concept(run: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Resume a run that was stopped; the weights are the same as those of an uninterrupted run.

    `overrides` are settings that change (`customize.training.start.RESUMED`): more steps, another learning rate,
    another device, images and a model that moved. The learning-rate schedule is then that of the new number of steps.
    Raises `UserError` for a number of steps that were taken already.
    """
    settings, last_step = resume_settings(read_settings(run), run, overrides)
    processes.init_process(settings.device)
    pictures = read_images(settings.subjects(), settings.caption_column, settings.image_column)
    with processes.hold_folder(run):
        record = read_json(run / FILE)
        changes = describe_changes(record.get("images"), pictures)
        changes += describe_changes(
            record.get("class_images"), list_class_images(settings), noun="class images"
        )
        changes += describe_changed_scorer(record, settings)
        for sentence in changes:
            notify(sentence)
        model = open_model(settings, resolution=settings.resolution)
        refuse_other_sources(run / CHECKPOINT, {"model": model.fingerprints})
        concept, groups = make_prompts(settings, model, pictures)
        if overrides:
            notify(f"{run} goes on from step {last_step} to {settings.steps}.")
            if processes.is_main_process():
                begin_record(run, settings, model, pictures)
        return run_training(run, settings, model, concept, groups, began=time.perf_counter())


def make_prompts(
    settings: Settings, model: Backbone, pictures: Sequence[list[ImageRecord]]
) -> tuple[Concept, list[SubjectGroup]]:
    """The run's concept, and each subject's images with their training prompts.

    Raises `UserError` for an instance prompt or a prompt of the sheet with a token that the run does not have.
    """
    subjects = settings.subjects()
    concept = Concept(
        kind=settings.method,
        model=settings.model,
        fingerprint=model.fingerprint,
        tokens={subject.token: subject.token_words for subject in subjects},
        class_noun=settings.class_noun,
        resolution=settings.resolution,
    )
    for prompt in settings.sheet_prompts:
        check_sheet_prompt(prompt, concept)
    return concept, [
        make_group(subject, folder, settings, concept, model)
        for subject, folder in zip(subjects, pictures, strict=True)
    ]


def check_sheet_prompt(prompt: str, concept: Concept) -> None:
    """Print that a prompt of the sheet names no subject. `UserError` for an unknown token or placeholder."""
    resolve_placeholder_tokens(prompt, [concept], runs=None)
    if odd := re.findall(r"\{\w+\}", prompt):
        raise UserError(
            f"The prompt “{prompt}” of the sheet has {odd[0]}, and {{}} alone is filled in. Write {{}}."
        )
    if "{}" not in prompt and not any(mentions(prompt, token) for token in concept.tokens):
        notify_once(
            f"“{prompt}” has no {{}} and no {next(iter(concept.tokens))}: its image on the sheet shows no subject, and "
            "the run is measured by it too."
        )


def run_training(
    run: Path,
    settings: Settings,
    model: Backbone,
    concept: Concept,
    groups: Sequence[SubjectGroup],
    *,
    began: float,
) -> Path:
    """Train from the last checkpoint, or from the start, and complete the run folder."""
    pictures = [list(group.pictures) for group in groups]

    # The data; `read` decodes each image once, for its latents, and keeps those that are needed again
    images = [picture for folder in pictures for picture in folder]
    evaluated = pictures[0][:KEPT] if settings.evaluation_steps else []
    read, side = CropReader([*images[:SHOWN], *evaluated]), (model.resolution, model.resolution)
    training = DreamBooth(model, make_training_data(model, groups, settings, read=read), settings)
    training.sources = {"model": model.fingerprints}
    training.resume(run)
    if processes.is_main_process() and settings.mask == "auto":
        save_masks(run / MASKS, pictures, training.data.masks or [], most=KEPT)
    subject_images = [read(picture, side) for picture in images[:SHOWN]]
    prepared = time.perf_counter()

    # Previews and validation along the way
    previews = Previews(model, settings, concept)
    report = RunReport(run, settings, subject_images)
    few_step_model = open_few_step_model(model, settings)
    few_step = None if few_step_model is None else FewStepValidation(run, training, concept, few_step_model)
    validation = Validation(
        report, training, concept, lambda: [read(picture, side) for picture in pictures[0][:KEPT]], few_step
    )
    read.forget()

    def preview(step: int) -> None:
        draw_sheets(run, f"{PREVIEWS}/step-{step:06d}.png", training, previews, few_step, count=4)
        if processes.is_main_process():
            report.samples = previews.drawn
            report.renew(step)

    drive(
        training,
        run,
        command="customize train",
        validate=Every(settings.evaluation_steps, validation),
        preview=Every(settings.validation_steps, preview),
        tensorboard=settings.report_to == "tensorboard",
    )
    times = {"prepare": prepared - began, "train": time.perf_counter() - prepared}

    # The finished folder
    write_concept(run, training, concept)
    prompts = draw_best_sheet(run, training, previews, few_step, validation, subject_images)
    report.samples = previews.drawn
    if processes.is_main_process():
        validation.report_end()
        times |= {
            "show": time.perf_counter() - began - sum(times.values()),
            "all": time.perf_counter() - began,
        }
        write_survival(run, validation)
        write_readme(run, settings, model, prompts, times)
    processes.end_process()
    return run


def draw_sheets(
    run: Path,
    name: str,
    training: DreamBooth,
    previews: Previews,
    few_step: FewStepValidation | None,
    **options: Any,
) -> list[str]:
    """Draw a sheet of the run and one of its few-step model, each to its file `name`; returns the prompts."""
    with training.averaged():
        prompts = previews.save(run / name, **options)
    if few_step is not None:
        previews.save(run / ON / name, few_step=few_step, **options)
    return prompts


def draw_best_sheet(
    run: Path,
    training: DreamBooth,
    previews: Previews,
    few_step: FewStepValidation | None,
    validation: Validation,
    subject: Sequence[Image],
) -> list[str]:
    """Draw the sheet from `best/`, as `customize sample` does; training cannot continue. Returns the prompts."""
    if (best := validation.earlier_best) is not None:
        training.return_to(run / BEST)
    return draw_sheets(run, SHEET, training, previews, few_step, count=8, subject=subject, step=best)


# The run's files ---------------------------------------------------------------------------------------------


def begin_record(
    run: Path, settings: Settings, model: Backbone, pictures: Sequence[list[ImageRecord]]
) -> None:
    """Write `settings.json` of a run that starts, or resumes with other settings, with each subject's image hashes."""
    subject_hashes, class_hashes = (
        [hash_images(part) for part in parts] for parts in (pictures, list_class_images(settings))
    )
    write_record(
        run,
        settings,
        model,
        command=as_command(settings, run),
        images=subject_hashes,
        class_images=class_hashes,
    )


def write_concept(run: Path, training: DreamBooth, concept: Concept) -> None:
    """Write the trained weights and `concept.json`."""
    if not processes.is_main_process():
        return
    dataclasses.replace(concept, **training.write(run, make_weights_metadata(concept))).write(run)


def write_survival(run: Path, validation: Validation) -> None:
    """Write the fidelity on the few-step model, if the run has one, into `settings.json`."""
    survival = validation.measure_survival()
    if survival is not None:
        write_json(run / FILE, {**read_json(run / FILE), "survival": survival.record()})


def write_readme(
    run: Path,
    settings: Settings,
    model: Backbone,
    prompts: list[str],
    seconds: dict[str, float],
) -> None:
    """Write README.md and the timings, and upload the folder with --push-to-hub."""
    write_record(run, settings, model, command=as_command(settings, run), timings=seconds)
    write_text(
        run / "README.md",
        format_card(settings, model) + format_readme(run, settings, model, prompts, seconds),
    )
    if settings.push_to_hub:
        notify(f"Uploaded to {push(run, settings.hub_model_id or run.name)} (private, if it is new).")
