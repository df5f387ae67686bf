"""Options that several commands share, declared once: the same names in all three programs.

`--help` shows the name. The aliases are the names in diffusers' and kohya's scripts, and are accepted too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from backbone.cli.options import Option
from backbone.io.prompts import parse_prompt

# The sections of `--help`, in their usual order
DATA = "Data"
DRAWING = "What is drawn"
CONCEPTS = "Concepts"
SAMPLING = "Sampling"
SCORING = "Scoring"
MODEL = "Model"
OUTPUT = "Output"

MODEL_HELP = (
    "moji, moji-flow, sd15, sdxl, sd3, flux, z-image, flux2-klein, a diffusers folder, a .safetensors checkpoint, or a "
    "hub id."
)
SPLIT_FILES = {  # the parts that a transformer's file does not hold
    "vae": "File of the autoencoder, where --model is a transformer's file.",
    "text-encoder": "File of the text encoder, where --model is a transformer's file.",
}
Checkpoint = Literal["best", "last"]
WITH_CONCEPTS: dict[str, tuple[Any, ...]] = {"concepts": ()}


def model_option(default_text: str) -> Option:
    """The option --model, with its default in words."""
    return Option(
        MODEL_HELP,
        MODEL,
        aliases=("pretrained-model-name-or-path",),
        metavar="MODEL",
        default_text=default_text,
        joined=SPLIT_FILES,
    )


RUNS_MODEL = Option(
    "The model that a run was trained from, where it lies elsewhere now.",
    MODEL,
    aliases=("pretrained-model-name-or-path",),
    metavar="MODEL",
    default_text="the run's",
)


def out_option(text: str, default_text: str, *, metavar: str = "FOLDER") -> Option:
    """The option --out, with its help and its default in words."""
    return Option(text, OUTPUT, aliases=("output-dir",), metavar=metavar, default_text=default_text)


def negative_option(panel: str) -> Option:
    """The option --negative, in a section of the help."""
    return Option(
        "Negative prompt: what the image should not show, in words or in a file.",
        panel,
        aliases=("negative-prompt",),
        metavar="PROMPT",
        convert=parse_prompt,
    )


def option(*names: str, help: str, panel: str, **settings: Any) -> Any:
    """An option in a section of the help, for a command whose options are its function's parameters."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


Json = Annotated[
    bool, option("--json", help="Print the result as JSON on stdout, and nothing else there.", panel=OUTPUT)
]


RunsModel = Annotated[  # for commands whose options are parameters of a function
    str | None,
    option(
        "--model",
        *(f"--{name}" for name in RUNS_MODEL.aliases),
        metavar=RUNS_MODEL.metavar,
        help=RUNS_MODEL.help,
        panel=RUNS_MODEL.panel,
        show_default=RUNS_MODEL.default_text,
    ),
]


PromptWords = Annotated[
    tuple[str, ...],
    Option(
        "Words, or files with a prompt on each line; a concept's token names its subject.",
        DRAWING,
        argument=True,
        metavar="PROMPTS",
        default_text="those of --prompts",
    ),
]


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """The option of a command that can print its result as JSON."""

    as_json: Annotated[
        bool, Option("Print the result as JSON on stdout, and nothing else there.", OUTPUT, flag="json")
    ] = False


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """The port of a page on this machine, and whether a browser opens it."""

    port: Annotated[int, Option("Port of the page; 0: any free one.", OUTPUT, min=0, max=65535)] = 0
    browser: Annotated[bool, Option("Open the page, where there is a screen.", OUTPUT)] = True


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """The device that a model runs on, and its precision."""

    precision: Annotated[
        str,
        Option(
            "Precision of the weights.",
            MODEL,
            aliases=("mixed-precision",),
            choices=("auto", "fp32", "bf16", "fp16"),
            words={"no": {"precision": "fp32"}},
        ),
    ] = "auto"
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1 or mps.", MODEL, metavar="DEVICE")] = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PlaceOptions):
    """The model, and the device that it runs on."""

    model: Annotated[str | None, model_option("moji")] = None


@dataclass(frozen=True, kw_only=True)
class ConceptOptions(ModelOptions):
    """The model, the concepts that are loaded into it, and whether its blocks are compiled."""

    compile: Annotated[
        bool,
        Option(
            "Compile the denoiser's repeated blocks: quicker steps after a slow first one.",
            MODEL,
        ),
    ] = False
    model: Annotated[str | None, model_option("the concept's, else moji")] = None
    concepts: Annotated[
        tuple[Path, ...],
        Option(
            "A run folder of customize train or align train; repeatable.",
            CONCEPTS,
            flag="concept",
            metavar="RUN",
        ),
    ] = ()
    scale: Annotated[
        float,
        Option(
            "Strength of the concepts; 0: the base model.",
            CONCEPTS,
            aliases=("lora-scale", "network-mul"),
            needs=WITH_CONCEPTS,
        ),
    ] = 1.0
    checkpoint: Annotated[
        Checkpoint | None,
        Option(
            "Which weights of a run that kept its best checkpoint: those, or the last.",
            CONCEPTS,
            choices=get_args(Checkpoint),
            default_text="best",
            needs=WITH_CONCEPTS,
        ),
    ] = None
