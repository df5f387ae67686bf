"""The options of `customize sample`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from backbone.cli.conditions import ControlOptions
from backbone.cli.flags import DRAWING, MODEL, OUTPUT, JsonOptions, PromptWords
from backbone.cli.options import Option
from backbone.cli.sampling import DrawingOptions, FewStepOptions


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ControlOptions, FewStepOptions, DrawingOptions, JsonOptions):
    """Options of `customize sample`."""

    words: PromptWords = ()
    prompts: Annotated[
        tuple[str, ...],
        Option(
            "Prompts given as an option; repeatable.",
            DRAWING,
            aliases=("prompt", "validation-prompt", "from-file"),
            metavar="PROMPTS",
        ),
    ] = ()
    references: Annotated[
        tuple[str, ...],
        Option(
            "An image beside the prompts, for a model that reads some; repeatable.",
            DRAWING,
            flag="reference",
            aliases=("ref-image",),
            metavar="IMAGE",
        ),
    ] = ()
    vram: Annotated[
        float | None,
        Option("Plan for a device with this many GiB of memory, and draw so that it fits.", MODEL, min=0.1),
    ] = None
    out: Annotated[
        Path | None,
        Option(
            "The folder to write, new or empty.",
            OUTPUT,
            aliases=("output-dir", "outdir"),
            metavar="FOLDER",
            default_text="samples, samples-2 …",
        ),
    ] = None
