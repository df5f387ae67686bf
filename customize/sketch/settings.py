"""The options of `customize sketch`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from backbone.cli.conditions import CONTROL
from backbone.cli.flags import DRAWING, OUTPUT, PageOptions
from backbone.cli.options import Option
from backbone.cli.sampling import DrawingOptions, FewStepOptions
from backbone.io.prompts import parse_prompt


@dataclass(frozen=True, kw_only=True)
class SketchOptions(FewStepOptions, DrawingOptions, PageOptions):
    """Options of `customize sketch`."""

    words: Annotated[
        str,
        Option(
            "The prompt that the page begins with.",
            DRAWING,
            argument=True,
            metavar="PROMPT",
            convert=parse_prompt,
            default_text="a dog in a park",
        ),
    ] = "a dog in a park"
    controlnet: Annotated[
        str,
        Option(
            "The control network for sketches: a run of train-control, a diffusers folder, a file, or a hub id.",
            CONTROL,
            aliases=("controlnet-model-name-or-path", "t2i-adapter", "control-net-name"),
            metavar="NETWORK",
            default_text="the model's own",
        ),
    ] = ""
    out: Annotated[
        Path | None,
        Option(
            "The folder that keeps every drawing, new or empty.",
            OUTPUT,
            aliases=("output-dir", "outdir"),
            metavar="FOLDER",
            default_text="drawings, drawings-2 …",
        ),
    ] = None
