"""The options that several commands share, each declared once: one word for one thing in all three programs.

The first name of an option is ours and the one that `--help` shows. The names behind it are what diffusers' scripts and
kohya's call the same thing; they are understood too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backbone.io.console import UserError

# The sections of `--help`, in the order in which most commands have them
DATA = "Data"
DRAWING = "What is drawn"
CONCEPTS = "Concepts"
SAMPLING = "Sampling"
SCORING = "Scoring"
MODEL = "Model"
OUTPUT = "Output"


def option(*names: str, help: str, panel: str, **settings: Any) -> Any:
    """An option in a section of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


MODEL_HELP = (
    "moji, moji-flow, sd15, sdxl, sd3, flux, a diffusers folder, a .safetensors checkpoint, or a hub id."
)
Sampler = Literal["ddim", "heun", "ancestral"]
Checkpoint = Literal["best", "last"]

# The model ---------------------------------------------------------------------------------------------------

Model = Annotated[
    str | None,
    option(
        "--model",
        "--pretrained-model-name-or-path",
        metavar="MODEL",
        help=MODEL_HELP,
        panel=MODEL,
        show_default="moji",
    ),
]
ConceptsModel = Annotated[
    str | None,
    option(
        "--model",
        "--pretrained-model-name-or-path",
        metavar="MODEL",
        help=MODEL_HELP,
        panel=MODEL,
        show_default="the concept's, else moji",
    ),
]
Precision = Annotated[
    str | None,
    option(
        "--precision", "--mixed-precision", help="auto, fp32, bf16 or fp16.", panel=MODEL, show_default="auto"
    ),
]
Device = Annotated[
    str | None, option("--device", help="auto, cpu, cuda or mps.", panel=MODEL, show_default="auto")
]

# Concepts ----------------------------------------------------------------------------------------------------

Concepts = Annotated[
    list[Path] | None,
    option(
        "--concept",
        metavar="RUN",
        help="A run folder of customize train or align train; repeatable.",
        panel=CONCEPTS,
        show_default="none",
    ),
]
Scale = Annotated[
    float,
    option(
        "--scale",
        "--lora-scale",
        "--network-mul",
        help="Strength of the concepts; 0: the base model.",
        panel=CONCEPTS,
    ),
]
WhichCheckpoint = Annotated[
    Checkpoint | None,
    option(
        "--checkpoint",
        help="Of a run that kept its best checkpoint: that one, or the last.",
        panel=CONCEPTS,
        show_default="best",
    ),
]

# What is drawn -----------------------------------------------------------------------------------------------

Prompts = Annotated[
    list[str],
    option(
        "--prompts",
        "--prompt",
        "--from-file",
        help="Words, or a file with a prompt on each line (.jsonl: with prompt and category); repeatable.",
        panel=DRAWING,
    ),
]
Count = Annotated[
    int,
    option(
        "--count",
        "--num-images-per-prompt",
        "--num-validation-images",
        "--images-per-prompt",
        min=1,
        help="Images of each prompt.",
        panel=DRAWING,
    ),
]
Negative = Annotated[
    str, option("--negative", "--negative-prompt", help="What to stay away from.", panel=DRAWING)
]
Width = Annotated[
    int | None, option("--width", min=1, help="Pixels.", panel=DRAWING, show_default="the model's own")
]
Height = Annotated[
    int | None, option("--height", min=1, help="Pixels.", panel=DRAWING, show_default="the model's own")
]
Resolution = Annotated[
    int | None,
    option(
        "--resolution", min=1, help="Width and height in one.", panel=DRAWING, show_default="the model's own"
    ),
]

# Sampling ----------------------------------------------------------------------------------------------------

Steps = Annotated[
    int | None,
    option(
        "--steps",
        "--num-inference-steps",
        "--sample-steps",
        min=1,
        help="Steps of the sampler.",
        panel=SAMPLING,
        show_default="by model",
    ),
]
Guidance = Annotated[
    float | None,
    option(
        "--guidance",
        "--guidance-scale",
        "--cfg-scale",
        min=0,
        help="Classifier-free guidance; 1: none.",
        panel=SAMPLING,
        show_default="by model",
    ),
]
GuidanceStart = Annotated[
    float,
    option(
        "--guidance-start", min=0, max=1, help="Share of the steps before guidance begins.", panel=SAMPLING
    ),
]
GuidanceStop = Annotated[
    float,
    option("--guidance-stop", min=0, max=1, help="Share of the steps after which it ends.", panel=SAMPLING),
]
SamplerName = Annotated[Sampler, option("--sampler", help="How noise becomes an image.", panel=SAMPLING)]
Seed = Annotated[int, option("--seed", help="Everything random follows from it.", panel=SAMPLING)]
ImageSeed = Annotated[
    int,
    option("--seed", help="Image j of prompt i depends on the seed, i and j only.", panel=SAMPLING),
]
Batch = Annotated[
    int,
    option(
        "--batch",
        "--sample-batch-size",
        "--batch-size",
        min=1,
        help="Images drawn together; they do not depend on it.",
        panel=SAMPLING,
    ),
]

# Output ------------------------------------------------------------------------------------------------------

Json = Annotated[
    bool, option("--json", help="Print the result as JSON on stdout, and nothing else there.", panel=OUTPUT)
]


def refuse_given(ctx: typer.Context, *names: str, because: str) -> None:
    """`UserError` for the first of these parameters that was typed, since nothing would come of it.

    `because` continues “has no effect”: `without --concept`, say.
    """
    options = {param.name: param.opts[0] for param in ctx.command.params}
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{options[name]} has no effect {because}. Leave it out.")


def size_of(width: int | None, height: int | None, resolution: int | None) -> tuple[int | None, int | None]:
    """(width, height) as asked for, None for the model's own; `UserError` for a resolution beside one of them."""
    if resolution is not None:
        if width is not None or height is not None:
            raise UserError(
                "--resolution is width and height in one. Give it alone, or --width and --height instead."
            )
        return resolution, resolution
    return width, height
