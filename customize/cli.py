"""The command `customize`: example images, training, sampling, checking images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from backbone.io import flags
from backbone.io.commands import command_group, print_json
from backbone.io.console import UserError, is_main_rank, notify, run_app
from backbone.io.files import read_json
from backbone.io.flags import Device, Model, Precision, option
from backbone.io.options import command
from backbone.training.settings import PANELS, refuse_beside_resume
from customize.formats import cli as files_cli
from customize.settings import Settings, TrainOptions, read_settings, resolved
from customize.training.start import start

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
    """Write five images of one particular dog, and what the other commands can be tried with."""
    from customize.data.example import EXTRAS, write_example

    images, extras = write_example(folder)
    notify(f"{len(images)} images of a dog in {folder}; {folder / EXTRAS} has {_listed(extras)}.")
    notify(f'Next: customize train --images {folder} --token "[V]"')


@app.command()
def check(
    images: Annotated[
        str,
        option(
            "--images",
            "--instance-data-dir",
            "--train-data-dir",
            metavar="FOLDER",
            help="A folder of images, or a dataset.",
            panel=flags.DATA,
        ),
    ],
    model: Model = None,
    precision: Precision = None,
    device: Device = None,
    vram: Annotated[
        float | None,
        option(
            "--vram",
            min=0.1,
            help="Plan for a GPU with so many GiB.",
            panel=flags.MODEL,
            show_default="what the run needs here",
        ),
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Open every image, list all bad ones, and say what may go wrong and what the run will need."""
    from backbone.media.pictures import check_images as check_images
    from backbone.media.pictures import list_images

    found = list_images(images)
    check_images(found)
    captions = sum(image.caption is not None for image in found)
    notify(f"{len(found)} images in {images} can be read ({captions} with captions).")
    from backbone.models.model import Backbone
    from customize.training.preflight import estimate, warnings_about

    opened = Backbone.open(model or "moji", device=device or "auto", precision=precision or "auto")
    warnings = warnings_about(found, resolution=opened.resolution)
    for warning in warnings:
        notify(f"Warning: {warning}")
    settings = resolved({"images": images, "token": "[V]", "class_noun": ""}, opened.defaults)
    needs: dict[str, Any] = {}
    if vram is not None:
        from customize.training.memory import foreseen

        sentences = foreseen(opened, settings, len(found), vram)
        needs["plan"] = sentences
    else:
        expected = estimate(opened, settings, len(found))
        sentences = expected.sentences()
        needs = {"peak_bytes": expected.peak, "steps": expected.steps, "step_seconds": expected.step_seconds}
    for sentence in sentences:
        notify(sentence)
    if as_json:
        print_json({"images": len(found), "captions": captions, "warnings": warnings, **needs})


@command(app, Settings, TrainOptions, panels=PANELS)
def train(asked: dict[str, Any], run: TrainOptions) -> None:
    """Teach the model a subject from a few images (DreamBooth with LoRA)."""
    if run.resume is not None:
        refuse_beside_resume(Settings, asked, run)
        read_settings(run.resume)  # mistakes are answered before torch is imported
        from customize.training.run import resume_concept

        finished = resume_concept(run.resume)
    else:
        finished = start(asked, out=run.out, vram=run.vram)
    token = read_settings(finished).token
    notify(
        f'{finished}/sheet.png shows it. Next: customize sample "a {token} … in the snow" --concept {finished}'
    )


@app.command()
def sample(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPTS",
            help="Words, or files with a prompt on each line; a concept's token names its subject.",
            show_default="those of --prompts",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        option(
            "--prompts",
            "--prompt",
            "--validation-prompt",
            "--from-file",
            help="The same as an option; repeatable.",
            panel=flags.DRAWING,
            show_default="none",
        ),
    ] = None,
    count: flags.Count = 1,
    negative: flags.Negative = "",
    width: flags.Width = None,
    height: flags.Height = None,
    resolution: flags.Resolution = None,
    concept: flags.Concepts = None,
    scale: flags.Scale = 1.0,
    checkpoint: flags.WhichCheckpoint = None,
    steps: flags.Steps = None,
    guidance: flags.Guidance = None,
    guidance_start: flags.GuidanceStart = 0.0,
    guidance_stop: flags.GuidanceStop = 1.0,
    sampler: flags.SamplerName = "ddim",
    seed: flags.ImageSeed = 0,
    batch: flags.Batch = 8,
    model: flags.ConceptsModel = None,
    precision: Precision = None,
    device: Device = None,
    out: Annotated[
        Path, option("--out", "--output-dir", "--outdir", help="The folder to write.", panel=flags.OUTPUT)
    ] = Path("samples"),
    as_json: flags.Json = False,
) -> None:
    """Draw images from prompts, with concepts or without."""
    from backbone.adapters.concept import checkpoint as folder_of
    from backbone.adapters.concept import read_concept, resolve_placeholder_tokens
    from backbone.io.prompts import prompts_of

    asked = [prompt.text for prompt in prompts_of([*(words or []), *(prompts or [])])]
    if not asked:
        raise UserError('There is nothing to draw. Give words, as in: customize sample "a dog in the snow".')
    if not concept:
        flags.refuse_given(ctx, "scale", "checkpoint", because="without --concept")
    size = flags.size_of(width, height, resolution)
    learned = [read_concept(folder_of(folder, checkpoint)) for folder in concept or []]
    for prompt in [*asked, negative]:
        resolve_placeholder_tokens(prompt, learned)  # mistakes are answered before torch is imported
    from customize.sampling import RECORD, sample_to_folder

    sheet = sample_to_folder(
        asked,
        concepts=learned,
        model=model,
        count=count,
        steps=steps,
        guidance=guidance,
        seed=seed,
        negative=negative,
        sampler=sampler,
        guided=(guidance_start, guidance_stop),
        scale=scale,
        size=size,
        batch=batch,
        out=out,
        precision=precision or "auto",
        device=device or "auto",
    )
    notify(f"{len(asked) * count} images in {out}; {sheet} shows them all.")
    if as_json and is_main_rank():
        print_json({"folder": out, "sheet": sheet, **read_json(out / RECORD)})


@app.command()
def evaluate(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of customize train.")],
    images: Annotated[
        Path | None,
        option(
            "--images",
            metavar="FOLDER",
            help="Compare these pNN-sNN.png instead of drawing.",
            panel=flags.DRAWING,
            show_default="none",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        option(
            "--prompts",
            "--prompt",
            help="Words with {} for the subject, a file with such a prompt on each line, or google/dreambooth's "
            "prompts_and_classes.txt; repeatable.",
            panel=flags.DRAWING,
            show_default="25 of moji's world",
        ),
    ] = None,
    living: Annotated[
        bool,
        option(
            "--living/--thing",
            help="Which of the two lists of prompts_and_classes.txt.",
            panel=flags.DRAWING,
        ),
    ] = False,
    count: flags.Count = 4,
    seed: flags.ImageSeed = 0,
    scorer: Annotated[
        Path | None,
        option(
            "--scorer",
            metavar="FOLDER",
            help="A folder of CLIP or DINO.",
            panel=flags.SCORING,
            show_default="the model's own",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "--output-dir",
            help="Where the table goes.",
            panel=flags.OUTPUT,
            show_default="RUN/dreambench",
        ),
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Measure a run by the DreamBench protocol: likeness, obedience, class, variety."""
    read_settings(run)  # mistakes are answered before torch is imported
    from customize.evaluation.dreambench import (
        TABLE,
        evaluate_images,
        evaluate_run,
        is_prompt_lists,
        moji_prompts,
        read_templates,
    )

    if not any(is_prompt_lists(given) for given in prompts or []):
        flags.refuse_given(ctx, "living", because="without a prompts_and_classes.txt")
    if images is not None:
        flags.refuse_given(ctx, "seed", because="on images that are drawn already")
    asked = read_templates(prompts, living=living) if prompts else moji_prompts()
    folder = out or run / "dreambench"
    if images is None:
        found = evaluate_run(run, prompts=asked, per_prompt=count, scorer=scorer, seed=seed, out=folder)
    else:
        found = evaluate_images(images, run, prompts=asked, per_prompt=count, scorer=scorer, out=folder)
    if as_json:
        print_json({"folder": folder, **read_json(folder / TABLE)})
    else:
        typer.echo(found["text"])
    notify(f"{folder}/sheet.png shows the images.")


files_cli.register(app)  # export, import, info, merge, extract, resize


def _listed(files: list[Path]) -> str:
    names = [file.name for file in files]
    return f"{', '.join(names[:-1])} and {names[-1]}"


if __name__ == "__main__":
    main()
