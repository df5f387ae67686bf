"""What `customize clip` is asked for. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from backbone.io.console import UserError
from backbone.io.flags import DRAWING, OUTPUT, SAMPLING, JsonOptions
from backbone.io.options import Option
from backbone.io.sampling import DrawingOptions

MOTION = "Motion"
SHORTEST = 2  # frames


@dataclass(frozen=True, kw_only=True)
class ClipOptions(DrawingOptions, JsonOptions):
    """What `customize clip` draws.

    Raises `UserError`, naming the argument, for what does not fit.
    """

    words: Annotated[
        tuple[str, ...],
        Option(
            "Words, or files with a prompt on each line; a concept's token names its subject.",
            DRAWING,
            argument=True,
            metavar="PROMPTS",
            default_text="those of --prompts",
        ),
    ] = ()
    prompts: Annotated[
        tuple[str, ...],
        Option("The same as an option; repeatable.", DRAWING, aliases=("prompt",), metavar="PROMPTS"),
    ] = ()
    frames: Annotated[
        int,
        Option("Frames of a clip.", MOTION, aliases=("num-frames", "video-length"), min=SHORTEST, max=1024),
    ] = 16
    fps: Annotated[float, Option("Frames a second.", MOTION, min=0.1, max=240)] = 8.0
    motion: Annotated[
        str,
        Option(
            "A motion adapter: a folder, an original AnimateDiff .safetensors, or a hub id.",
            MOTION,
            aliases=("motion-adapter", "motion-module"),
            metavar="ADAPTER",
        ),
    ] = ""
    lora: Annotated[
        tuple[Path, ...],
        Option(
            "A motion LoRA's file, or a run of train-motion; repeatable.",
            MOTION,
            aliases=("motion-lora",),
            needs={"motion": ()},
            metavar="FILE",
        ),
    ] = ()
    motion_scale: Annotated[
        float,
        Option("Strength of the motion LoRAs; 0: none.", MOTION, needs=({"lora": ()}, {"concepts": ()})),
    ] = 1.0
    context_length: Annotated[
        int,
        Option(
            "Frames that go through the network together, in windows that overlap; 0: all.",
            MOTION,
            min=0,
            needs={"motion": ()},
            off=0,
        ),
    ] = 0
    context_stride: Annotated[
        int,
        Option("Frames between two windows.", MOTION, min=1, needs={"context_length": ()}),
    ] = 4
    shared_noise: Annotated[
        float,
        Option("Share of the starting noise that all frames have in common.", MOTION, min=0, max=1),
    ] = 0.0
    decode_chunk_size: Annotated[
        int, Option("Frames decoded together; 0: as many as fit.", SAMPLING, min=0)
    ] = 0
    batch: Annotated[
        int,
        Option("Clips drawn together; they do not depend on it.", SAMPLING, aliases=("batch-size",), min=1),
    ] = 1
    mp4: Annotated[bool, Option("Also write an .mp4 of each clip (needs PyAV).", OUTPUT)] = False
    out: Annotated[
        Path | None,
        Option(
            "The folder to write, new or empty.",
            OUTPUT,
            aliases=("output-dir",),
            metavar="FOLDER",
            default_text="clips, clips-2 …",
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_length and self.context_length < SHORTEST:
            raise UserError(
                f"--context-length {self.context_length} is no clip. Give {SHORTEST} or more, or 0."
            )
        if self.context_length and self.context_stride >= self.context_length:
            raise UserError(
                f"Windows of {self.context_length} frames, {self.context_stride} apart, do not overlap. Give a "
                f"--context-stride below {self.context_length}."
            )
