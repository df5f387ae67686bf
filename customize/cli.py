"""The command `customize`: example pictures, training, sampling, checking pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backbone.console import UserError, run, say

app = typer.Typer(
    help="Teach a diffusion model a new concept from a handful of pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Sampler = Literal["ddim", "heun", "ancestral"]
MODEL_HELP = "moji, sd15, sdxl, sd3, flux, a diffusers folder, a checkpoint file (.safetensors), or a hub id."
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
    from customize.example import write_example

    written = write_example(folder)
    say(f'{len(written)} pictures in {folder}. Next: customize train --images {folder} --token "[V]"')


@app.command()
def check(
    images: Annotated[
        str, typer.Option("--images", "--instance_data_dir", help="A folder of pictures, or a dataset.")
    ],
) -> None:
    """Open every picture and list all bad ones."""
    from backbone.images import check as check_pictures
    from backbone.images import read_folder

    pictures = read_folder(images)
    check_pictures(pictures)
    captions = sum(picture.caption is not None for picture in pictures)
    say(f"{len(pictures)} pictures in {images} are fine ({captions} with captions).")


@app.command()
def train(
    images: Annotated[
        str | None,
        typer.Option(
            "--images", "--instance_data_dir", help="The subject: a folder of pictures, or a dataset's id."
        ),
    ] = None,
    token: Annotated[
        str, typer.Option("--token", "--trigger_word", help="What you will write in prompts for the subject.")
    ] = "[V]",
    class_noun: Annotated[
        str | None,
        typer.Option(
            "--class", help="What the subject is, in a word (dog).", show_default="guessed from the pictures"
        ),
    ] = None,
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/NAME-OF-PICTURES")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", "--resume_from_checkpoint", help="Go on with this run folder.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "--max_train_steps", min=1, show_default="by model", help="Optimiser steps."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    learning_rate: Annotated[
        float | None, typer.Option("--learning_rate", min=0, show_default="by model")
    ] = None,
    lr_scheduler: Annotated[
        str | None, typer.Option("--lr_scheduler", help="cosine or constant.", show_default="cosine")
    ] = None,
    lr_warmup_steps: Annotated[
        int | None, typer.Option("--lr_warmup_steps", min=0, show_default="20")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--train_batch_size", min=1, show_default="by model", help="Pictures a step."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "--network_dim", min=1, show_default="by model")
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option("--lora_alpha", "--network_alpha", show_default="the rank", help="Strength, α/rank."),
    ] = None,
    lora_dropout: Annotated[
        float | None, typer.Option("--lora_dropout", min=0, max=0.99, show_default="0")
    ] = None,
    lora_layers: Annotated[
        str | None, typer.Option("--lora_layers", help="attention or all.", show_default="by model")
    ] = None,
    instance_prompt: Annotated[
        str | None,
        typer.Option(
            "--instance_prompt",
            help="What pictures without a caption show.",
            show_default="a {token} {class}",
        ),
    ] = None,
    class_prompt: Annotated[str | None, typer.Option("--class_prompt", show_default="a {class}")] = None,
    token_words: Annotated[
        str | None,
        typer.Option("--token_words", help="The rare words behind the token.", show_default="found"),
    ] = None,
    prior_loss_weight: Annotated[
        float | None,
        typer.Option("--prior_loss_weight", min=0, help="0: no prior preservation.", show_default="1"),
    ] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip/--no-flip", help="Mirrored pictures too.", show_default="by model")
    ] = None,
    checkpointing_steps: Annotated[
        int | None, typer.Option("--checkpointing_steps", min=1, show_default="100")
    ] = None,
    validation_steps: Annotated[
        int | None,
        typer.Option("--validation_steps", min=1, help="A preview sheet every so often.", show_default="150"),
    ] = None,
    validation_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--validation_prompt",
            help="A prompt of the sheet, repeatable; {} is the subject.",
            show_default="eight",
        ),
    ] = None,
    max_grad_norm: Annotated[float | None, typer.Option("--max_grad_norm", min=0, show_default="1")] = None,
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Teach the model a subject from a few pictures (DreamBooth with LoRA)."""
    from backbone.images import check as check_pictures
    from backbone.images import read_folder

    if resume is not None:
        from customize.settings import read_settings

        read_settings(resume)  # mistakes are answered before torch is imported
        from customize.runs import resume_concept

        finished = resume_concept(resume)
    elif images is None:
        raise UserError(
            "Say where the pictures are: --images FOLDER (customize example dog/ writes some to try)."
        )
    else:
        asked: dict[str, Any] = {
            "model": model,
            "steps": steps,
            "seed": seed,
            "learning_rate": learning_rate,
            "lr_scheduler": lr_scheduler,
            "lr_warmup_steps": lr_warmup_steps,
            "batch": batch,
            "rank": rank,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "lora_layers": lora_layers,
            "instance_prompt": instance_prompt,
            "class_prompt": class_prompt,
            "token_words": token_words,
            "prior_loss_weight": prior_loss_weight,
            "flip": flip,
            "checkpointing_steps": checkpointing_steps,
            "validation_steps": validation_steps,
            "sheet_prompts": tuple(validation_prompt or ()),
            "max_grad_norm": max_grad_norm,
            "precision": precision,
            "device": device,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        pictures = read_folder(images)
        check_pictures(pictures)
        from customize.runs import train_concept

        finished = train_concept(asked, pictures, images=images, token=token, class_noun=class_noun, out=out)
    say(
        f'{finished}/sheet.png shows it. Next: customize sample "a {token} … in the snow" --concept {finished}'
    )


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
    from backbone.concept import read_concept, spoken

    learned = [read_concept(folder) for folder in concept or []]
    for prompt in [*prompts, negative]:
        spoken(prompt, learned)  # mistakes are answered before torch is imported
    from customize.sampling import draw

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
        scale=scale,
        out=out,
        precision=precision or "auto",
        device=device or "auto",
    )
    say(f"{len(prompts) * count} pictures in {out}; {sheet} shows them all.")


if __name__ == "__main__":
    main()
