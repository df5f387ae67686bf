"""`customize transfer RUN --to TURBO`: a run on a base becomes one on its few-step model."""

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
from backbone.models.locate import absolute_model
from backbone.models.model import Backbone
from backbone.models.sample import Request
from backbone.training.models import open_model
from backbone.training.run import drive
from customize.data.prepared import read_stored_images
from customize.objectives.transfer import ClassAnswers, SubjectAnswers, Transfer, draw_class, draw_subject
from customize.settings import FILE, SHEET, Settings, read_subject_settings
from customize.training.evaluation import Previews
from customize.training.record import weights_metadata
from customize.training.transfer.settings import OF_THE_RUN, TransferOptions

ADAPTER = "concept_0"  # as `load_concepts` calls the first
SHOWN = 8
MOVABLE = ("run", "to", "model")


def transfer_run(asked: TransferOptions) -> Path:
    """Fit a run's adapter to a few-step model; gives the new run folder, an ordinary one of that model.

    Raises `UserError`, before anything is drawn, for a model that does not go with the run's, and a folder that is
    taken, or that another transfer began.
    """
    began = time.perf_counter()
    settings, concept = read_subject_settings(asked.run, asked.model), read_concept(checkpoint(asked.run))
    base = open_model(settings, resolution=settings.resolution)
    check_concept_fits(concept, base)
    few = open_few_step(base, asked.to)
    drawing = get_sampling_defaults(few)
    rate = OF_THE_RUN * settings.learning_rate if asked.learning_rate is None else asked.learning_rate
    asked, out = replace(asked, learning_rate=rate, out=asked.folder), asked.folder
    moved = replace(carry_over(concept, base, few), model=absolute_model(asked.to))
    own = settings_of(settings, asked, moved, drawing)
    with hold_folder(out) if asked.resume else processes.hold_new_run(out):
        begin(out, asked, own)
        fit = prepare_fit(asked, settings, base, concept, few, moved)
        fit.sources = {"model": few.fingerprints, "run": content_hash(concept.weights_path)}
        fit.resume(out)
        drive(fit, out, command=asked.command(), label="transferring")
        return finish(out, fit, own, moved, asked, seconds=time.perf_counter() - began)


def settings_of(
    settings: Settings, asked: TransferOptions, moved: Concept, drawing: SamplingDefaults
) -> Settings:
    """The settings of the new run, which are its base run's but for the model, the fit and how it is drawn with."""
    return replace(
        settings,
        model=moved.model,
        steps=asked.steps,
        batch=asked.batch,
        learning_rate=asked.learning_rate or 0.0,
        seed=asked.seed,
        sample_steps=drawing.steps,
        guidance=drawing.guidance,
        preview_on="",
        preview_on_steps=0,
        preview_on_guidance=None,
    )


def begin(out: Path, asked: TransferOptions, own: Settings) -> None:
    """Write the record of a new folder, or see that it is the same command's that goes on."""
    if asked.resume is not None:
        kept = read_json(out / FILE).get("transfer") if (out / FILE).is_file() else None
        now = asked.kept()  # the run and the model may have moved: the checkpoint knows what is in them
        if not isinstance(kept, dict) or {**kept, **{name: now[name] for name in MOVABLE}} != now:
            raise UserError(
                f"{out} is no transfer that this command began, so it cannot go on there. Leave out --resume, or "
                "repeat the command as it was."
            )
        return
    write_json(out / FILE, record_of(asked, own, read_json(asked.run / FILE).get("images")))


def record_of(asked: TransferOptions, own: Settings, images: Any, **more: Any) -> dict[str, Any]:
    """The new run's `settings.json`."""
    return {
        "settings": own,
        "command": f"{asked.command()} --out {quote(asked.folder)}",
        "transfer": asked.kept(),
        "images": images,
        "versions": package_versions(),
        "timings": {},
        **more,
    }


def prepare_fit(
    asked: TransferOptions,
    settings: Settings,
    base: Backbone,
    concept: Concept,
    few: Backbone,
    moved: Concept,
) -> Transfer:
    """Both sets of answers, and the adapter on the few-step model, ready to be fitted."""
    subject, others = list_requests(asked, settings, concept)
    drawing = get_sampling_defaults(few)
    # the few-step model answers before it carries anything; then the base answers, and makes room
    prior: ClassAnswers = draw_class(few, others, drawing, asked.seed)
    few.free("denoiser")
    load_concepts(base, [concept])
    drawn_as = get_sampling_defaults(base, steps=settings.sample_steps, guidance=settings.guidance)
    answers: SubjectAnswers = draw_subject(base, subject, drawn_as, asked.seed)
    base.free("denoiser", "autoencoder", "text_encoder")
    load_concepts(few, [replace(moved, folder=concept.folder)])
    if settings.gradient_checkpointing:
        enable: Any = few.denoiser
        enable.enable_gradient_checkpointing()
    fit = Transfer(
        few,
        drawing,
        ADAPTER,
        (answers, prior),
        asked,
        file=concept.weights,
        with_text=has_text_encoder_weights(concept.weights_path),
    )
    few.free("text_encoder")
    return fit


def list_requests(
    asked: TransferOptions, settings: Settings, concept: Concept
) -> tuple[list[Request], list[Request]]:
    """What is drawn for the fit: the prompts of the run's sheet, with the subjects and with their classes, in turn."""
    subjects, templates = settings.subjects(), settings.sheet_prompts
    own, others = [], []
    for number in range(asked.answers):
        one = subjects[number % len(subjects)]
        template = templates[number // len(subjects) % len(templates)]
        prompt = resolve_placeholder_tokens(template.replace("{}", one.called()), [concept], runs=None)
        own.append(Request(prompt, (number, 0)))
        others.append(Request(template.replace("{}", one.class_noun), (number, 1)))
    return own, others


def finish(
    out: Path, fit: Transfer, own: Settings, moved: Concept, asked: TransferOptions, *, seconds: float
) -> Path:
    """Write the adapter, the words beside it, the concept, a sheet and the record."""
    files = fit.write(out, weights_metadata(moved))
    if moved.words:
        shutil.copyfile(moved.folder / moved.words, out / moved.words)
    replace(moved, **files).write(out)
    side = fit.model.resolution
    shown: list[Image] = [
        crop_square(image.open(), side) for image in list(read_stored_images(own.images))[:SHOWN]
    ]
    previews = Previews(fit.model, own, moved)
    previews.save(out / SHEET, count=SHOWN, subject=shown)
    images = read_json(asked.run / FILE).get("images")
    write_json(out / FILE, record_of(asked, own, images, timings={"all": round(seconds, 2)}))
    write_text(out / "README.md", "\n".join(describe(own, asked)))
    notify(f"{out} is a run on {moved.model}.")
    return out


def describe(own: Settings, asked: TransferOptions) -> Sequence[str]:
    """The lines of the new run's README.md."""
    return [
        f"# {own.called()}",
        "",
        f"The adapter of `{asked.run}`, fitted to the few-step model `{own.model}` by `customize transfer` in "
        f"{asked.steps} steps. It is drawn with in {own.sample_steps} steps at guidance {own.guidance:g}.",
        "",
        f"![the subject above, samples below]({SHEET})",
        "",
        "Again:",
        "",
        f"    {asked.command()} --out {quote(asked.folder)}",
        "",
    ]
