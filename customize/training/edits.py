"""A run of `customize train --pairs`: from edit pairs to an adapter that follows instructions.

The loop, the checkpoints and the run folder are those of every training (`backbone.training.run`). The data
(`customize.data.edits`) and the loss (`customize.objectives.instruction_edits`) are its own, and `best/` is chosen on
held-out pairs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from backbone.adapters.concept import BEST, EDITS, Concept
from backbone.distributed import processes
from backbone.evaluation.clip import Scorer, load_image_encoder
from backbone.io.console import UserError, format_count, notify, notify_once, quote
from backbone.io.files import append_jsonl, read_json, write_text
from backbone.io.run_folder import CHECKPOINT, name_beside, read_log, refuse_taken, run_name, trim_log
from backbone.media.crops import CropReader
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.transforms import bucket_sizes, nearest_bucket, to_image, to_tensor
from backbone.models.by_instruction import refuse_image_guidance
from backbone.models.model import Backbone
from backbone.models.references import ReferenceImage
from backbone.training.checkpoint import refuse_other_sources
from backbone.training.models import open_configs, open_model
from backbone.training.run import Every, drive
from backbone.training.settings import resume_settings
from customize.data.changes import describe_changed_scorer, describe_changes, hash_images
from customize.data.edit_pairs import EditPair, hold_out, read_edit_pairs, select_usable_pairs
from customize.data.edits import count_references, prepare_pairs
from customize.evaluation.edits import EditMetrics, HeldOutEdits, draw_held_out, measure_edits
from customize.evaluation.metrics import EarlyStopping
from customize.methods.lora import refuse_other_encoders
from customize.objectives.dreambooth import find_share
from customize.objectives.instruction_edits import InstructionEdits
from customize.settings import FILE, SHEET, Settings, as_command, read_settings, resolve_settings
from customize.training.evaluation import EVALUATIONS
from customize.training.memory import fit_to_vram
from customize.training.preflight import refuse_idle_range, say_idle_bound, say_of_captions
from customize.training.record import write_record
from customize.training.reporting.card import format_edit_card, push
from customize.training.reporting.report import PREVIEWS, EditReport

NOT_MEASURED = "So nothing says how good the edits are, and no best/ is kept: add --held-out 1."
SHOWN = 8  # pairs on the sheet: held-out ones, or training pairs where none are held out


def train_edits(
    requested: dict[str, Any], pairs: Sequence[EditPair], *, out: Path | None, vram: float | None = None
) -> Path:
    """Train on pairs that were checked; returns the run folder. `requested` holds the user's settings.

    Raises `UserError` for a model that reads no image and cannot be made to, and a run folder that is taken.
    """
    began = time.perf_counter()
    processes.init_process(requested.get("device") or "auto")
    run = out or Path("runs") / run_name(requested["pairs"])
    refuse_taken(run, [requested["pairs"]])

    # The model's configs: its defaults complete the settings, and wrong settings are refused before weights load
    opened, requested = open_configs(requested, task="learn-to-edit")
    count_references(opened, pairs)
    if "image_guidance" in requested:
        refuse_image_guidance(opened)
    if misfit := opened.describe_misfit([pair.target.read_size() for pair in pairs[:SHOWN]]):
        notify_once(misfit)
    settings = resolve_settings({"images": "", "token": "", "class_noun": "", **requested}, opened.defaults)
    say_idle_bound(settings, opened, requested)
    refuse_idle_range(settings, opened)
    settings = replace(settings, held_out=len(hold_out(pairs, settings.held_out)[1]))
    if settings.patience and not settings.held_out:
        raise UserError(
            "No pair is held out, so no evaluation says when to stop (--steps auto, --patience). Add --held-out 1, or "
            "give a number of --steps."
        )

    # The model in the placement that the settings ask for
    model = open_model(settings, resolution=settings.resolution, task="learn-to-edit")
    if settings.train_text_encoder:
        refuse_other_encoders(model)
    if vram is not None:
        model, settings = fit_to_vram(model, settings, vram)
    find_share(settings)
    say_of_captions(list_columns(pairs)[1], model)
    with processes.hold_new_run(run) as writes:
        if writes:
            write_record(run, settings, model, command=as_command(settings, run), images=hash_pairs(pairs))
        return run_training(run, settings, model, pairs, began=began)


def resume_edits(run: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Resume a run that was stopped; the weights are the same as those of an uninterrupted run.

    `overrides` are settings that change. Raises `UserError` for a number of steps that were taken already.
    """
    settings, last_step = resume_settings(read_settings(run), run, overrides)
    processes.init_process(settings.device)
    pairs = select_usable_pairs(read_edit_pairs(settings.pairs), skip_bad=settings.skip_bad)
    with processes.hold_folder(run):
        record = read_json(run / FILE)
        changes = describe_changes(record.get("images"), list_columns(pairs))
        for sentence in (*changes, *describe_changed_scorer(record, settings)):
            notify(sentence)
        model = open_model(settings, resolution=settings.resolution, task="learn-to-edit")
        refuse_other_sources(run / CHECKPOINT, {"model": model.fingerprints})
        if overrides:
            notify(f"{run} goes on from step {last_step} to {settings.steps}.")
            if processes.is_main_process():
                write_record(
                    run, settings, model, command=as_command(settings, run), images=hash_pairs(pairs)
                )
        return run_training(run, settings, model, pairs, began=time.perf_counter())


def run_training(
    run: Path, settings: Settings, model: Backbone, pairs: Sequence[EditPair], *, began: float
) -> Path:
    """Train from the last checkpoint, if there is one, to the finished folder."""
    learned, held_out = hold_out(pairs, settings.held_out)
    read = CropReader()
    validation_pairs = prepare_held_out(model, held_out or learned[:SHOWN], settings, read)
    training = InstructionEdits(model, prepare_pairs(model, learned, settings, read=read), settings)
    training.sources = {"model": model.fingerprints}
    training.resume(run)
    unmeasured = "" if held_out else f" {NOT_MEASURED}"
    notify(f"{format_count(len(learned), 'pair')} to learn from, {len(held_out)} held out.{unmeasured}")

    # Validation along the way
    prepared = time.perf_counter()
    concept = make_concept(settings, model)
    report = EditReport(run, settings, [to_image(source) for source in validation_pairs.sources[:SHOWN]])
    validation = EditValidation(report, training, concept, validation_pairs if held_out else None)

    def preview(step: int) -> None:
        save_sheet(run / PREVIEWS / f"step-{step:06d}.png", training, validation_pairs)
        if processes.is_main_process():
            report.renew(step)

    drive(
        training,
        run,
        command="customize train",
        validate=Every(settings.evaluation_steps, validation),
        preview=Every(settings.validation_steps, preview),
        tensorboard=settings.report_to == "tensorboard",
    )

    # The finished folder, and its sheet by the best checkpoint
    times = {"prepare": prepared - began, "train": time.perf_counter() - prepared}
    if processes.is_main_process():
        header = {"limner_kind": EDITS, "base_model": concept.model}
        replace(concept, **training.write(run, header)).write(run)
    if (best := validation.earlier_best) is not None:
        training.return_to(run / BEST)  # as edit instruct draws
    save_sheet(run / SHEET, training, validation_pairs, step=best)
    if processes.is_main_process():
        validation.report_end()
        times |= {
            "show": time.perf_counter() - began - sum(times.values()),
            "all": time.perf_counter() - began,
        }
        write_readme(run, settings, model, times, learned=len(learned), held_out=len(held_out))
    processes.end_process()
    return run


def make_concept(settings: Settings, model: Backbone) -> Concept:
    """The run's concept, without its files; it has no token."""
    return Concept(
        kind=EDITS,
        model=settings.model,
        fingerprint=model.fingerprint,
        tokens={},
        class_noun="",
        resolution=settings.resolution,
    )


def prepare_held_out(
    model: Backbone, pairs: Sequence[EditPair], settings: Settings, read: CropReader
) -> HeldOutEdits:
    """The validation pairs, in pixels and as the network reads them."""
    data = prepare_pairs(model, pairs, replace(settings, flip=False), read=read)
    sides = bucket_sizes(model.resolution) if settings.aspect_buckets else [(model.resolution,) * 2]
    images = []
    for pair in pairs:
        size = nearest_bucket(pair.target.open().size, sides) if len(sides) > 1 else sides[0]
        images.append([to_tensor(read(image, size)) for image in (pair.source, pair.target)])
    references = []
    for row, pair in enumerate(pairs):
        latents = data.reference_latents(torch.tensor([row]))
        pictures = [
            read(image, find_pixel_size(model, z))
            for image, z in zip((pair.source, *pair.references), latents, strict=True)
        ]
        references.append([ReferenceImage(z, picture) for z, picture in zip(latents, pictures, strict=True)])
    return HeldOutEdits(
        [source for source, _ in images], [target for _, target in images], references, data.prompts
    )


def find_pixel_size(model: Backbone, latents: torch.Tensor) -> tuple[int, int]:
    """The size (W, H) in pixels of an image with such latents."""
    return latents.shape[-1] * model.factor, latents.shape[-2] * model.factor


def save_sheet(
    path: Path, training: InstructionEdits, pairs: HeldOutEdits, *, step: int | None = None
) -> None:
    """Write the source, the model's edit and the true edit of the first pairs, side by side.

    `step` is the weights' step, unless they are the last. Of several processes rank 0 writes; the others
    sample too where the model is sharded.
    """
    if not processes.is_participant():
        return
    settings, pairs_shown = training.settings, pairs.take_first(SHOWN)
    with training.averaged():
        edits = draw_held_out(
            training.model, pairs_shown, settings, label="drawing the sheet", steps=settings.sample_steps
        )
    cells = []
    for row, edit in enumerate(edits):
        source, target = (to_image(images[row]) for images in (pairs_shown.sources, pairs_shown.targets))
        cells.append(
            [
                Cell(source, "before"),
                Cell(to_image(edit), pairs_shown.instructions[row]),
                Cell(target, "the true edit"),
            ]
        )
    rows = [[*cells[k], *(cells[k + 1] if k + 1 < len(cells) else [])] for k in range(0, len(cells), 2)]
    sampling = (
        f"{settings.sample_steps} steps, guidance {settings.guidance:g}, image guidance "
        f"{settings.image_guidance:g}, seed {settings.seed}"
    )
    if step is not None:
        sampling += f"; the best, step {step} of {settings.steps}"
    if processes.is_main_process():
        save_png(path, draw_sheet(rows, title="edits by instruction", note=f"{settings.model}, {sampling}"))


class EditValidation:
    """Validates a run on held-out pairs as it trains, and keeps the best weights. Does nothing without such pairs."""

    def __init__(
        self, report: EditReport, training: InstructionEdits, concept: Concept, pairs: HeldOutEdits | None
    ) -> None:
        self.report, self.training, self.concept, self.pairs = report, training, concept, pairs
        settings = training.settings
        self.early_stopping: EarlyStopping[EditMetrics] = EarlyStopping(settings.patience or settings.steps)
        report.history = self.early_stopping.history
        self.scorer = find_scorer(training.model, settings)
        # The validations of an interrupted run, up to its checkpoint
        path = report.run / EVALUATIONS
        if processes.is_main_process():
            trim_log(path, training.done)
        self.early_stopping.history[:] = read_log(path, EditMetrics, done=training.done)

    def __call__(self, step: int) -> str:
        """Evaluate the run at this step, at most once; returns the reason to stop when patience has run out."""
        settings = self.training.settings
        if self.pairs is None or not settings.evaluation_steps or not processes.is_participant():
            return ""
        if not any(figures.step == step for figures in self.early_stopping.history):
            with self.training.averaged():
                edits = draw_held_out(
                    self.training.model, self.pairs, settings, label=f"evaluating step {step}"
                )
            metrics = measure_edits(step, self.pairs, edits, self.scorer)
            best = self.early_stopping.update(metrics)
            if processes.is_main_process():
                append_jsonl(self.report.run / EVALUATIONS, asdict(metrics))
                self.report.samples = list(zip(map(to_image, edits), self.pairs.instructions, strict=True))
                self.report.renew(step)
                if best and step > 0:
                    folder = self.report.run / BEST
                    folder.mkdir(exist_ok=True)
                    files = self.training.write(folder, {"limner_step": str(step)})
                    replace(self.concept, **files).write(folder)
        if settings.patience and self.early_stopping.should_stop:
            return f"{settings.patience} evaluations without a better rating."
        return ""

    @property
    def earlier_best(self) -> int | None:
        """As `EarlyStopping.find_earlier_best`."""
        return self.early_stopping.find_earlier_best(self.report.run, self.training.done)

    def report_end(self) -> None:
        """Finish the report, and say which step was best."""
        history, steps = self.early_stopping.history, self.training.settings.steps
        if not history:
            self.report.finish(f"All {steps} steps were taken.", None)
            return
        best, last = self.early_stopping.best, history[-1]
        reason = (
            f"All {steps} steps were taken."
            if last.step >= steps
            else f"Stopped at step {last.step}: no better rating since step {self.early_stopping.highest.step}."
        )
        notify(
            f"The best of {format_count(len(history), 'evaluation')} is step {best.step}, in {self.report.run / BEST}: "
            f"its edits are {best.rating:+.1f} dB nearer to the true ones than the sources are. {reason}"
        )
        self.report.finish(reason, best.step)


def find_scorer(model: Backbone, settings: Settings) -> Scorer | None:
    """The CLIP that measures structure: the user's or the model's own; None if there is neither.

    Raises `UserError` for a scorer that is no CLIP.
    """
    folder = settings.scorer or model.location.local("scorer")
    if not folder or not settings.evaluation_steps:
        return None
    scorer = load_image_encoder(folder)
    if not isinstance(scorer, Scorer):
        raise UserError(
            f"{folder} is no CLIP, by whose patches structure is measured. Name one with --scorer."
        )
    return scorer


# The run's files ---------------------------------------------------------------------------------------------


def list_columns(pairs: Sequence[EditPair]) -> list[Any]:
    """Two columns: the images before the edit, and those after it with the instructions as captions."""
    targets = [
        replace(pair.target, caption=pair.instruction, known_hash=pair.target.content_hash) for pair in pairs
    ]
    return [[pair.source for pair in pairs], targets]


def hash_pairs(pairs: Sequence[EditPair]) -> list[dict[str, str]]:
    """The beginning of the hash of each image's file, before and after."""
    return [hash_images(column) for column in list_columns(pairs)]


def write_readme(
    run: Path,
    settings: Settings,
    model: Backbone,
    seconds: dict[str, float],
    *,
    learned: int,
    held_out: int,
) -> None:
    """Write README.md and the timings, and upload the folder with --push-to-hub.

    `learned` and `held_out` are numbers of pairs.
    """
    write_record(run, settings, model, command=as_command(settings, run), timings=seconds)
    card = format_edit_card(settings, model)
    write_text(run / "README.md", card + format_readme(run, settings, learned, held_out))
    if settings.push_to_hub:
        notify(f"Uploaded to {push(run, settings.hub_model_id or run.name)} (private, if it is new).")


def format_readme(run: Path, settings: Settings, learned: int, held_out: int) -> str:
    """The run's README.md."""
    baked = name_beside(run, "-model")
    lines = [
        "# Edits by instruction",
        "",
        f"Learned by `customize train` from {learned} pairs of `{settings.pairs}` on `{settings.model}`, {held_out} "
        "held out.",
        "",
        f"![before, the model's edit, the true edit]({SHEET})",
        "",
        "Again:",
        "",
        f"    {as_command(settings, run)}",
        "",
        "Edits:",
        "",
        f'    edit instruct photo.png --instruction "…" --concept {quote(run)}',
        "",
        "As a whole model that diffusers' pipeline for edits by instruction opens:",
        "",
        f"    customize merge {quote(run)} --bake --model {quote(settings.model)} --out {quote(baked)}",
        "",
    ]
    return "\n".join(lines)
