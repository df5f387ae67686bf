"""`customize transfer RUN --to TURBO`: from a run on a base to a run on its few-step model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from backbone.adapters.apply import carry_over, check_concept_fits, load_concepts
from backbone.adapters.concept import Concept, checkpoint, read_concept, resolve_placeholder_tokens
from backbone.adapters.lora import has_text_encoder_weights
from backbone.distributed import processes
from backbone.io.console import UserError, notify, quote
from backbone.io.files import content_hash, read_json, write_json, write_text
from backbone.io.run_folder import hold_folder, package_versions
from backbone.media.transforms import crop_square
from backbone.models.few_step.model import SamplingDefaults, get_sampling_defaults, open_few_step
from backbone.models.locate import make_model_absolute
from backbone.models.model import Backbone
from backbone.models.sample import Request
from backbone.training.models import open_model
from backbone.training.run import drive
from customize.data.prepared import read_stored_images
from customize.objectives.transfer import ClassAnswers, SubjectAnswers, Transfer, draw_class, draw_subject
from customize.settings import FILE, SHEET, Settings, read_subject_settings
from customize.training.evaluation import Previews
from customize.training.record import make_weights_metadata
from customize.training.transfer.settings import OF_THE_RUN, TransferOptions

ADAPTER = "concept_0"  # `load_concepts`'s name of the first adapter
SHOWN = 8
MOVABLE = ("run", "to", "model")


def transfer_run(options: TransferOptions) -> Path:
    """Fit a run's adapter to a few-step model; returns the new run folder, an ordinary one of that model.

    Raises `UserError`, before anything is sampled, for a model that does not belong to the run's, and a folder that is
    taken, or that another transfer began.
    """
    began = time.perf_counter()
    settings, concept = (
        read_subject_settings(options.run, options.model),
        read_concept(checkpoint(options.run)),
    )
    base = open_model(settings, resolution=settings.resolution)
    check_concept_fits(concept, base)
    few_step = open_few_step(base, options.to)
    drawing = get_sampling_defaults(few_step)
    rate = OF_THE_RUN * settings.learning_rate if options.learning_rate is None else options.learning_rate
    options, out = replace(options, learning_rate=rate, out=options.folder), options.folder
    transferred = replace(carry_over(concept, base, few_step), model=make_model_absolute(options.to))
    new_settings = make_settings(settings, options, transferred, drawing)
    with hold_folder(out) if options.resume else processes.hold_new_run(out):
        begin(out, options, new_settings)
        fit = prepare_fit(options, settings, base, concept, few_step, transferred)
        # Older checkpoints know the adapter alone
        files = (concept.hash_files(), content_hash(concept.weights_path))
        fit.sources = {"model": few_step.fingerprints, "run": files}
        fit.resume(out)
        drive(fit, out, command=options.command(), label="transferring")
        return finish(out, fit, new_settings, transferred, options, seconds=time.perf_counter() - began)


def make_settings(
    settings: Settings, options: TransferOptions, transferred: Concept, drawing: SamplingDefaults
) -> Settings:
    """The settings of the new run: the base run's, except for the model, the fit and the sampling defaults."""
    return replace(
        settings,
        model=transferred.model,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate or 0.0,
        seed=options.seed,
        sample_steps=drawing.steps,
        guidance=drawing.guidance,
        preview_on="",
        preview_on_steps=0,
        preview_on_guidance=None,
    )


def begin(out: Path, options: TransferOptions, settings: Settings) -> None:
    """Write the record of a new folder, or check that the folder's record is of the same command."""
    if options.resume is not None:
        recorded = read_json(out / FILE).get("transfer") if (out / FILE).is_file() else None
        # The run and the model may have moved: the checkpoint knows their contents
        requested = options.list_kept_options()
        if (
            not isinstance(recorded, dict)
            or {**recorded, **{name: requested[name] for name in MOVABLE}} != requested
        ):
            raise UserError(
                f"{out} is no transfer that this command began, so it cannot go on there. Leave out --resume, or "
                "repeat the command as it was."
            )
        return
    write_json(out / FILE, make_record(options, settings, read_json(options.run / FILE).get("images")))


def make_record(options: TransferOptions, settings: Settings, images: Any, **further: Any) -> dict[str, Any]:
    """The new run's `settings.json`."""
    return {
        "settings": settings,
        "command": f"{options.command()} --out {quote(options.folder)}",
        "transfer": options.list_kept_options(),
        "images": images,
        "versions": package_versions(),
        "timings": {},
        **further,
    }


def prepare_fit(
    options: TransferOptions,
    settings: Settings,
    base: Backbone,
    concept: Concept,
    few_step: Backbone,
    transferred: Concept,
) -> Transfer:
    """Both sets of targets, and the adapter on the few-step model, ready to be fitted."""
    subject_requests, class_requests = list_requests(options, settings, concept)
    drawing = get_sampling_defaults(few_step)
    # the few-step model answers before it carries anything; then the base answers, and makes room
    prior: ClassAnswers = draw_class(few_step, class_requests, drawing, options.seed)
    few_step.free("denoiser")
    load_concepts(base, [concept])
    base_drawing = get_sampling_defaults(base, steps=settings.sample_steps, guidance=settings.guidance)
    answers: SubjectAnswers = draw_subject(base, subject_requests, base_drawing, options.seed)
    base.free("denoiser", "autoencoder", "text_encoder")
    load_concepts(few_step, [replace(transferred, folder=concept.folder)])
    if settings.gradient_checkpointing:
        enable: Any = few_step.denoiser
        enable.enable_gradient_checkpointing()
    fit = Transfer(
        few_step,
        drawing,
        ADAPTER,
        (answers, prior),
        options,
        file=concept.weights,
        with_text=has_text_encoder_weights(concept.weights_path),
    )
    few_step.free("text_encoder")
    return fit


def list_requests(
    options: TransferOptions, settings: Settings, concept: Concept
) -> tuple[list[Request], list[Request]]:
    """Requests for the fit: the prompts of the run's sheet, with the subjects, and with their classes, in turn."""
    subjects, templates = settings.subjects(), settings.sheet_prompts
    subject_requests, class_requests = [], []
    for number in range(options.answers):
        subject = subjects[number % len(subjects)]
        template = templates[number // len(subjects) % len(templates)]
        prompt = resolve_placeholder_tokens(
            template.replace("{}", subject.name_in_prompt()), [concept], runs=None
        )
        subject_requests.append(Request(prompt, (number, 0)))
        class_requests.append(Request(template.replace("{}", subject.class_noun), (number, 1)))
    return subject_requests, class_requests


def finish(
    out: Path,
    fit: Transfer,
    settings: Settings,
    transferred: Concept,
    options: TransferOptions,
    *,
    seconds: float,
) -> Path:
    """Write the adapter, its words, the concept, a sheet and the record."""
    files = fit.write(out, make_weights_metadata(transferred))
    if transferred.words:
        shutil.copyfile(transferred.folder / transferred.words, out / transferred.words)
    replace(transferred, **files).write(out)
    side = fit.model.resolution
    subject_images: list[Image] = [
        crop_square(image.open(), side) for image in list(read_stored_images(settings.images))[:SHOWN]
    ]
    previews = Previews(fit.model, settings, transferred)
    previews.save(out / SHEET, count=SHOWN, subject=subject_images)
    images = read_json(options.run / FILE).get("images")
    write_json(out / FILE, make_record(options, settings, images, timings={"all": round(seconds, 2)}))
    write_text(out / "README.md", "\n".join(describe(settings, options)))
    notify(f"{out} is a run on {transferred.model}.")
    return out


def describe(settings: Settings, options: TransferOptions) -> Sequence[str]:
    """The lines of the new run's README.md."""
    return [
        f"# {settings.name_in_prompt()}",
        "",
        f"The adapter of `{options.run}`, fitted to the few-step model `{settings.model}` by `customize transfer` in "
        f"{options.steps} steps. It is drawn with in {settings.sample_steps} steps at guidance {settings.guidance:g}.",
        "",
        f"![the subject above, samples below]({SHEET})",
        "",
        "Again:",
        "",
        f"    {options.command()} --out {quote(options.folder)}",
        "",
    ]
