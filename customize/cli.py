"""The command `customize`: example pictures, training, sampling, checking pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backbone.io.console import UserError, run, say
from backbone.io.help import Group
from backbone.io.options import command, refuse_idle
from backbone.training.settings import MODEL_HELP, PANELS, refuse_beside_resume
from customize.formats import cli as files_cli
from customize.settings import Settings, Subject, TrainOptions, read_settings, read_subject, resolved

app = typer.Typer(
    help="Teach a diffusion model a new concept from a handful of pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=Group,
)

Sampler = Literal["ddim", "heun", "ancestral"]
Model = Annotated[str | None, typer.Option("--model", "--pretrained_model_name_or_path", help=MODEL_HELP)]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "--mixed_precision", help="auto, fp32, bf16 or fp16.", show_default="auto"),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.", show_default="auto")]


def main() -> None:
    """The console script."""
    run(app)


@app.command()
def example(
    folder: Annotated[Path, typer.Argument(help="The folder to write; made when it is not there.")],
) -> None:
    """Write the packaged pictures of one particular dog."""
    from customize.data.example import write_example

    written = write_example(folder)
    say(f'{len(written)} pictures in {folder}. Next: customize train --images {folder} --token "[V]"')


@app.command()
def check(
    images: Annotated[
        str, typer.Option("--images", "--instance_data_dir", help="A folder of pictures, or a dataset.")
    ],
    model: Model = None,
    precision: Precision = None,
    device: Device = None,
    vram: Annotated[
        float | None,
        typer.Option(
            "--vram", min=0.1, help="Plan for a GPU with so many GiB.", show_default="what the run needs here"
        ),
    ] = None,
) -> None:
    """Open every picture, list all bad ones, and say what may go wrong and what the run will need."""
    from backbone.media.pictures import check as check_pictures
    from backbone.media.pictures import read_folder

    pictures = read_folder(images)
    check_pictures(pictures)
    captions = sum(picture.caption is not None for picture in pictures)
    say(f"{len(pictures)} pictures in {images} can be read ({captions} with captions).")
    from backbone.models.model import Backbone
    from customize.train.preflight import estimate, warnings_about

    opened = Backbone.open(model or "moji", device=device or "auto", precision=precision or "auto")
    for warning in warnings_about(pictures, resolution=opened.resolution):
        say(f"Warning: {warning}")
    settings = resolved({"images": images, "token": "[V]", "class_noun": ""}, opened.defaults)
    if vram is not None:
        from customize.train.memory import foreseen

        for sentence in foreseen(opened, settings, len(pictures), vram):
            say(sentence)
        return
    for sentence in estimate(opened, settings, len(pictures)).sentences():
        say(sentence)


@command(app, Settings, TrainOptions, panels=PANELS)
def train(asked: dict[str, Any], run: TrainOptions) -> None:
    """Teach the model a subject from a few images (DreamBooth with LoRA)."""
    if run.resume is not None:
        refuse_beside_resume(Settings, asked, run)
        read_settings(run.resume)  # mistakes are answered before torch is imported
        from customize.train.run import resume_concept

        finished = resume_concept(run.resume)
    else:
        said = asked
        subjects, asked = subjects_of(said)
        named = {"images": "", "token": "", "class_noun": "", "subject": [one.flag() for one in subjects[1:]]}
        refuse_idle(resolved({**named, **asked}, {}), said)  # before torch is imported, as contradictions
        from backbone.media.pictures import check as check_pictures
        from backbone.media.pictures import read_folder

        columns = {name: asked.get(name) or None for name in ("caption_column", "image_column")}
        for subject in subjects:
            check_pictures(read_folder(subject.images, **columns))
        from customize.train.run import train_concept

        finished = train_concept(asked, subjects, out=run.out, vram=run.vram)
    token = read_settings(finished).token
    say(
        f'{finished}/sheet.png shows it. Next: customize sample "a {token} … in the snow" --concept {finished}'
    )


def subjects_of(asked: Mapping[str, Any]) -> tuple[list[Subject], dict[str, Any]]:
    """What is to be learned, and the settings with what a layout of other trainers says beside it.

    Raises `UserError` where nothing is named, or a flag says otherwise than the layout.
    """
    from customize.data.folders import is_concepts, read_subjects

    rest = dict(asked)
    images, token = rest.pop("images", None), rest.pop("token", None)
    noun, words = rest.pop("class_noun", ""), rest.pop("token_words", "")
    more = [read_subject(flag) for flag in rest.pop("subject", ())]
    if images is None:
        if not more:
            raise UserError(
                "Say where the images are: --images FOLDER (customize example dog/ writes some to try)."
            )
        for name, value in (("token", token), ("class", noun), ("token-words", words)):
            if value:
                raise UserError(
                    f"--{name} belongs to --images, which is not there. Add it, or leave that out."
                )
        return more, rest
    if not is_concepts(images):
        return [Subject(images, token or "[V]", noun, words), *more], rest
    found, prompts = read_subjects(images)
    for flag, value, own in (
        ("--token", token, found[0].token),
        ("--class", noun, found[0].class_noun),
        ("--token-words", words, found[0].token_words),
    ):
        if value and (value != own or len(found) > 1):
            raise UserError(
                f"{images} says what its subjects are called, so {flag} has no effect. Leave it out."
            )
    for subject in found:
        say(f"{subject.images}: {subject.token} {subject.class_noun}, all subjects equally often.")
    if "class_images" in prompts and rest.get("prior") != "class-images":
        say(f"The class_data_dir of {images} is for --prior class-images, and is left aside.")
        del prompts["class_images"]
    return [*found, *more], {**prompts, **rest}


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; a concept's token names its subject.")],
    concept: Annotated[
        list[Path] | None,
        typer.Option("--concept", help="A run folder of customize train; repeatable.", show_default="none"),
    ] = None,
    model: Model = None,
    count: Annotated[
        int, typer.Option("--count", "--num_images_per_prompt", min=1, help="Pictures of each prompt.")
    ] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", "--num_inference_steps", min=1, show_default="by model")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", "--guidance_scale", min=0, help="1: none.", show_default="by model"),
    ] = None,
    guidance_start: Annotated[
        float,
        typer.Option("--guidance_start", min=0, max=1, help="The share of the steps before guidance begins."),
    ] = 0.0,
    guidance_stop: Annotated[
        float,
        typer.Option("--guidance_stop", min=0, max=1, help="The share of the steps after which it ends."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Picture (i, j) depends on the seed, i and j only.")] = 0,
    negative: Annotated[
        str, typer.Option("--negative", "--negative_prompt", help="What to stay away from.")
    ] = "",
    sampler: Annotated[Sampler, typer.Option(help="How noise is walked down.")] = "ddim",
    scale: Annotated[float, typer.Option("--scale", help="How strongly the concepts work.")] = 1.0,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("samples"),
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Draw pictures from prompts, with concepts or without."""
    from backbone.adapters.concept import read_concept, spoken

    learned = [read_concept(folder) for folder in concept or []]
    for prompt in [*prompts, negative]:
        spoken(prompt, learned)  # mistakes are answered before torch is imported
    from customize.sample import draw

    sheet = draw(
        prompts,
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
        out=out,
        precision=precision or "auto",
        device=device or "auto",
    )
    say(f"{len(prompts) * count} pictures in {out}; {sheet} shows them all.")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of customize train.")],
    pictures: Annotated[
        Path | None,
        typer.Option("--pictures", help="Compare these pNN-sNN.png instead of drawing.", show_default="none"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A prompts_and_classes.txt of google/dreambooth.", show_default="moji's world"
        ),
    ] = None,
    living: Annotated[
        bool, typer.Option("--living/--thing", help="Which of that file's two lists of prompts.")
    ] = False,
    per_prompt: Annotated[int, typer.Option("--per-prompt", min=1, help="Pictures of each prompt.")] = 4,
    scorer: Annotated[
        Path | None,
        typer.Option("--scorer", help="A folder of CLIP or DINO.", show_default="the model's own"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the pictures.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where the table goes.", show_default="RUN/dreambench")
    ] = None,
) -> None:
    """Measure a run by the DreamBench protocol: likeness, obedience, class, variety."""
    read_settings(run)  # mistakes are answered before torch is imported
    from customize.evaluate.dreambench import evaluate_pictures, evaluate_run, own_prompts, read_prompts

    if prompts is None:
        asked = own_prompts()
    else:
        lists = read_prompts(prompts)
        asked = lists.living if living else lists.things
    folder = out or run / "dreambench"
    if pictures is None:
        found = evaluate_run(run, prompts=asked, per_prompt=per_prompt, scorer=scorer, seed=seed, out=folder)
    else:
        found = evaluate_pictures(
            pictures, run, prompts=asked, per_prompt=per_prompt, scorer=scorer, out=folder
        )
    typer.echo(found["text"])
    say(f"{folder}/sheet.png shows the pictures.")


files_cli.register(app)  # export, import, info, merge, extract, resize


if __name__ == "__main__":
    main()
