"""The commands of `customize` for clips."""

from __future__ import annotations

import typer

from backbone.io.commands import print_json
from backbone.io.console import UserError, count_of, notify
from backbone.io.files import read_json, refuse_filled
from backbone.io.flags import CONCEPTS, DRAWING, SAMPLING
from backbone.io.options import settled_command
from customize.clips.settings import MOTION, ClipOptions


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    settled_command(app, ClipOptions, panels=(DRAWING, MOTION, CONCEPTS, SAMPLING))(clip)


def clip(asked: ClipOptions) -> None:
    """Draw clips from prompts with a motion adapter, with concepts or without."""
    from backbone.adapters.concept import checkpoint, read_concept, resolve_placeholder_tokens
    from backbone.io.prompts import prompts_of

    prompts = [prompt.text for prompt in prompts_of([*asked.words, *asked.prompts])]
    if not prompts:
        raise UserError('There is nothing to draw. Give words, as in: customize clip "a dog, moving left".')
    if not asked.motion:
        raise UserError(
            "Without a motion adapter every frame is another picture. Name one with --motion (a folder, an original "
            "AnimateDiff file, or a hub id like guoyww/animatediff-motion-adapter-v1-5-3 for sd15)."
        )
    concepts = [read_concept(checkpoint(run, asked.checkpoint)) for run in asked.concepts]
    for prompt in [*prompts, asked.negative]:
        resolve_placeholder_tokens(prompt, concepts)  # mistakes are answered before torch is imported
    if asked.out is not None:
        refuse_filled(asked.out)
    from customize.clips.draw import RECORD, draw_clips

    folder = draw_clips(prompts, asked, concepts=concepts)
    notify(f"{count_of(len(prompts) * asked.count, 'clip')} in {folder}; {folder}/report.html plays them.")
    if asked.as_json:
        print_json({"folder": folder, "sheet": folder / "sheet.png", **read_json(folder / RECORD)})
