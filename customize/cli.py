"""The command `customize`: example images, checking and preparing images, training, sampling, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from backbone.adapters.concept import name_call
from backbone.cli.command_line import command, settled_command
from backbone.cli.commands import command_group, print_json
from backbone.cli.conditions import CONTROL, refuse_from_source
from backbone.cli.flags import (
    CONCEPTS,
    DATA,
    DRAWING,
    MODEL,
    OUTPUT,
    SAMPLING,
    JsonOptions,
    ModelOptions,
)
from backbone.cli.options import Option
from backbone.io.console import UserError, format_count, is_main_rank, notify, on_one_line, quote, run_app
from backbone.io.files import read_json
from backbone.io.run_folder import hold_new_folder, refuse_finished, run_name
from backbone.training.settings import PANELS, find_changed_settings, find_resumed
from customize.clips import cli as clips_cli
from customize.evaluation.measure import MeasureSettings, measure
from customize.formats import cli as files_cli
from customize.sample_settings import SampleOptions
from customize.settings import (
    PrepareImages,
    Settings,
    TrainOptions,
    read_settings,
    resolve_settings,
)
from customize.sketch.settings import SketchOptions
from customize.training.control import commands as control_commands
from customize.training.start import RESUMED, as_saved, refuse_transferred, start, start_preparing
from customize.training.transfer import cli as transfer_cli

app = command_group("Teach a diffusion model a new concept from a handful of images.")


def main() -> None:
    """The console script."""
    run_app(app)


@app.command()
def example(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder to write; made when it is not there.")
    ],
) -> None:
    """Write five example images of one dog, and files to try the other commands with."""
    from customize.data.example import EXTRAS, write_example

    images, extras = write_example(folder)
    notify(f"{len(images)} images of a dog in {folder}; {folder / EXTRAS} has {_list_files(extras)}.")
    notify(f'Next: customize train --images {quote(folder)} --token "[V]" --class dog')


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ModelOptions, JsonOptions):
    """Options of `customize check`."""

    images: Annotated[
        str,
        Option(
            "A folder of images, or a dataset.",
            DATA,
            aliases=("instance-data-dir", "train-data-dir"),
            metavar="FOLDER",
        ),
    ] = ""
    pairs: Annotated[
        str,
        Option(
            "A folder of images before and after an edit, in place of --images.",
            DATA,
            metavar="FOLDER",
        ),
    ] = ""
    vram: Annotated[
        float | None,
        Option(
            "Plan for a GPU with this many GiB of memory.",
            MODEL,
            default_text="what the run needs here",
            min=0.1,
            needs={"pairs": ("",)},
        ),
    ] = None


@settled_command(app, CheckOptions)
def check(options: CheckOptions) -> None:
    """Open every image, list all bad ones, warn of what may spoil a run, and estimate what it will need."""
    if bool(options.images) == bool(options.pairs):
        raise UserError(
            "Name what to look at: images with --images FOLDER, or pairs of them with --pairs FOLDER."
        )
    if options.pairs:
        check_pairs(options)
        return
    from backbone.media.sources.pictures import check_images, describe_unused, list_images
    from customize.data.folders import describe_layout

    images = list_images(options.images)
    check_images(images)
    caption_count = sum(image.caption is not None for image in images)
    notify(
        f"{format_count(len(images), 'image')} in {options.images} can be read ({caption_count} with captions)."
    )
    for sentence in (*describe_unused(options.images, images), *describe_layout(options.images, images)):
        notify(sentence)
    from backbone.models.model import Backbone
    from customize.training.preflight import estimate, list_caption_warnings, list_warnings

    opened = Backbone.open(options.model or "moji", device=options.device, precision=options.precision)
    warnings = [*list_warnings(images, resolution=opened.resolution), *list_caption_warnings(images, opened)]
    if misfit := opened.describe_misfit([image.read_size() for image in images]):
        warnings.append(misfit)
    for warning in warnings:
        notify(f"Warning: {warning}")
    settings = resolve_settings({"images": options.images, "token": "[V]", "class_noun": ""}, opened.defaults)
    if options.vram is not None:
        from customize.training.memory import describe_plan

        sentences = describe_plan(opened, settings, options.vram)
        estimates: dict[str, Any] = {"plan": sentences}
    else:
        expected = estimate(opened, settings)
        sentences = expected.sentences()
        estimates = {
            "peak_bytes": expected.peak,
            "steps": expected.steps,
            "step_seconds": expected.step_seconds,
        }
    for sentence in sentences:
        notify(sentence)
    if options.as_json:
        print_json({"images": len(images), "captions": caption_count, "warnings": warnings, **estimates})


def check_pairs(options: CheckOptions) -> None:
    """Look at pairs before and after an edit: shape, registration, whether they differ, and their instructions."""
    from customize.data.edit_pairs import check_edit_pairs, read_edit_pairs

    pairs = read_edit_pairs(options.pairs)
    wrong, doubtful = check_edit_pairs(pairs)
    for warning in doubtful:
        notify(f"Warning: {warning}")
    if wrong:
        lines = "\n".join(f"  {on_one_line(sentence)}" for sentence in wrong)
        raise UserError(
            f"The {len(pairs)} pairs in {options.pairs} cannot be learned from as they are:\n{lines}"
        )
    notify(f"{format_count(len(pairs), 'pair')} in {options.pairs} can be used.")
    if options.as_json:
        print_json({"pairs": len(pairs), "warnings": doubtful})


@settled_command(app, PrepareImages, panels=(DATA, MODEL, OUTPUT))
def prepare(options: PrepareImages) -> None:
    """Encode all images of a source once, for `customize train` on data of any size."""
    prepared = start_preparing(options)
    if not is_main_rank():
        return
    bad = prepared.facts.bad
    left_out = f"; {format_count(bad, 'image')} that cannot be used left out" if bad else ""
    images, folder = format_count(len(prepared.order), "image"), quote(prepared.folder)
    notify(f"{images} in {prepared.folder}{left_out}. Next: customize train --images {folder}")
    if options.as_json:
        print_json({"folder": prepared.folder, "images": len(prepared.order), "bad": bad})


@command(app, Settings, TrainOptions, panels=PANELS)
def train(requested: dict[str, Any], run: TrainOptions) -> None:
    """Teach the model a subject from a few images (DreamBooth with LoRA), or edits from pairs (InstructPix2Pix)."""
    source = requested.get("pairs") or requested.get("images")
    default = None if source is None else Path("runs") / run_name(source)
    resumed = None if run.resume is None else find_resumed(run, "customize train", default)
    if resumed is None:
        finished = start(requested, out=run.out, vram=run.vram)
    else:
        saved = read_settings(resumed)  # user errors are raised before torch is imported
        refuse_transferred(resumed)
        overrides = find_changed_settings(saved, as_saved(requested, saved), run, resumed, allowed=RESUMED)
        if saved.pairs:
            from customize.training.edits import resume_edits as resume
        else:
            from customize.training.run import resume_concept as resume

        finished = resume(resumed, overrides)
    settings = read_settings(finished)
    if settings.token:
        next_command = name_call(settings.token, settings.class_noun, finished)
    else:
        next_command = f'edit instruct PHOTO --instruction "…" --concept {quote(finished)}'
    notify(f"{finished}/sheet.png shows it. Next: {next_command}")


@settled_command(app, SampleOptions, panels=(DRAWING, CONTROL, CONCEPTS, SAMPLING))
def sample(options: SampleOptions) -> None:
    """Draw images from prompts, with concepts or without."""
    from backbone.adapters.concept import checkpoint, read_concept, resolve_placeholder_tokens
    from backbone.io.prompts import load_prompts

    prompts = [prompt.text for prompt in load_prompts([*options.words, *options.prompts])]
    if not prompts:
        raise UserError('There is nothing to draw. Give words, as in: customize sample "a dog in the snow".')
    concepts = [read_concept(checkpoint(run, options.checkpoint)) for run in options.concepts]
    for prompt in [*prompts, options.negative]:
        # User errors are raised before torch is imported
        resolve_placeholder_tokens(prompt, concepts, model=options.model)
    controls, few_step = options.controls, options.few_step
    refuse_from_source(controls)
    refuse_finished(options.out)
    from customize.sampling import RECORD, ExtraInputs, sample_to_folder

    extras = ExtraInputs(options.references, controls)
    sheet = sample_to_folder(
        prompts, options, options.out, concepts=concepts, extras=extras, on=few_step, vram=options.vram
    )
    folder = sheet.parent
    notify(f"{format_count(len(prompts) * options.count, 'image')} in {folder}; {sheet} shows all.")
    if options.as_json and is_main_rank():
        print_json({"folder": folder, "sheet": sheet, **read_json(folder / RECORD)})


@settled_command(app, SketchOptions, panels=(DRAWING, CONTROL, CONCEPTS, SAMPLING))
def sketch(options: SketchOptions) -> None:
    """Draw lines on a page in your browser, and see beside them what the model makes of them."""
    from backbone.adapters.concept import checkpoint, read_concept, resolve_placeholder_tokens
    from backbone.io.local_server import check_port

    concepts = [read_concept(checkpoint(run, options.checkpoint)) for run in options.concepts]
    for text in (options.words, options.negative):
        # User errors are raised before torch is imported
        resolve_placeholder_tokens(text, concepts, model=options.model)
    check_port(options.port)
    from customize.sketch.pad import FOLDER, SketchPad
    from customize.sketch.server import serve

    with hold_new_folder(options.out, FOLDER) as folder:
        pad = SketchPad.open(options, concepts, folder)
        serve(pad, port=options.port, browser=options.browser)
    drawings = format_count(len(pad.drawings), "drawing")
    notify(f"{drawings} in {folder}." if pad.drawings else "Nothing was drawn, so no folder is kept.")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(JsonOptions, MeasureSettings):
    """Options of `customize evaluate`."""


@settled_command(app, EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure a run by the DreamBench protocol: subject and prompt fidelity, prior preservation, diversity."""
    folder, table, text = measure(options)
    if options.as_json:
        print_json({"folder": folder, **table})
    else:
        typer.echo(text)
    notify(f"{folder}/sheet.png shows the images.")


control_commands.register(app)  # map, train-control
transfer_cli.register(app)
clips_cli.register(app)  # clip
files_cli.register(app)  # export, import, info, merge, extract, resize


def _list_files(files: list[Path]) -> str:
    names = [file.name for file in files]
    return f"{', '.join(names[:-1])} and {names[-1]}"


if __name__ == "__main__":
    main()
