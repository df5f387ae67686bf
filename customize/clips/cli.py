"""The commands of `customize` for clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from backbone.cli.command_line import command, settled_command
from backbone.cli.commands import print_json
from backbone.cli.conditions import CONTROL, refuse_from_source
from backbone.cli.flags import CONCEPTS, DATA, DRAWING, SAMPLING, SCORING
from backbone.io.console import UserError, count_of, notify, quote, quote_text
from backbone.io.files import read_json
from backbone.io.records import read_as
from backbone.io.run_folder import refuse_finished
from backbone.training.settings import RunFolderOptions, read_run_settings
from customize.clips.picture_settings import PICTURE
from customize.clips.settings import (
    ADAPTER_FILE,
    DEFAULT_FRAMES,
    MOTION,
    TRAINING,
    ClipOptions,
    EvaluateClipOptions,
    TrainMotionOptions,
    refuse_other_camera,
)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    settled_command(app, ClipOptions, panels=(DRAWING, MOTION, PICTURE, CONTROL, CONCEPTS, SAMPLING))(clip)
    command(app, TrainMotionOptions, RunFolderOptions, panels=(DATA, MOTION, TRAINING))(train_motion)
    settled_command(app, EvaluateClipOptions, panels=(DATA, DRAWING, MOTION, SAMPLING, SCORING))(
        evaluate_clip
    )


def clip(asked: ClipOptions) -> None:
    """Draw clips from prompts, with or without a motion adapter and concepts, or animate an image."""
    from backbone.adapters import concept as learning
    from backbone.adapters.concept import checkpoint, read_concept, resolve_placeholder_tokens
    from backbone.io.prompts import prompts_of

    prompts = [prompt.text for prompt in prompts_of([*asked.words, *asked.prompts])]
    if asked.by_picture_alone:
        clip_of_pictures(asked)
        return
    if not prompts:
        raise UserError('There is nothing to draw. Give words, as in: customize clip "a dog, moving left".')
    concepts = [read_concept(checkpoint(run, asked.checkpoint)) for run in asked.concepts]
    refuse_other_scales(asked, [one.kind == learning.MOTION for one in concepts])
    learned = [one.folder / ADAPTER_FILE for one in concepts if (one.folder / ADAPTER_FILE).is_file()]
    if not asked.motion and learned:
        asked = replace(
            asked, motion=read_as(str, read_json(learned[0]).get("adapter"), learned[0], "adapter")
        )
    if not asked.motion:
        refuse_camera_adapter(asked)
    if not asked.motion and asked.sparsectrl:
        raise UserError(
            "SparseCtrl works beside a motion adapter. Name one with --motion, or leave --sparsectrl out."
        )
    for prompt in [*prompts, asked.negative]:
        resolve_placeholder_tokens(
            prompt, concepts, model=asked.model
        )  # mistakes are answered before torch is imported
    refuse_from_source(asked.controls)
    for prompt in prompts if asked.camera else ():
        refuse_other_camera(prompt, asked.camera)
    refuse_finished(asked.out)
    from customize.clips.draw import draw_clips

    report_clips(draw_clips(prompts, asked, concepts=concepts), len(prompts) * asked.count, asked)


def refuse_other_scales(asked: ClipOptions, motions: Sequence[bool]) -> None:
    """`UserError` for a strength of motions or of subjects where the concepts, motions or not, are the others alone."""
    if asked.motion_scale != 1 and not asked.lora and not any(motions):
        raise UserError(
            "--motion-scale has no effect: no --concept is a motion. Give --scale, the strength of subjects."
        )
    if asked.scale != 1 and motions and all(motions):
        raise UserError("--scale has no effect: every --concept is a motion. Give --motion-scale.")


def refuse_camera_adapter(asked: ClipOptions) -> None:
    """`UserError` for what a camera has beside a motion adapter alone: without one it looks over a drawing."""
    for name, given in (
        ("--camera-adapter", asked.camera_adapter),
        ("--camera-scale", asked.camera_scale != 1),
    ):
        if given:
            raise UserError(f"{name} has no effect without --motion: the camera then moves over one drawing.")
    if asked.camera and asked.condition:
        raise UserError(
            "Without --motion the camera moves over one drawing, and --condition gives maps of frames. Leave one out."
        )


def clip_of_pictures(asked: ClipOptions) -> None:
    """Clips of a model that reads a picture and no words."""
    refuse_finished(asked.out)
    from customize.clips.picture import draw_pictures

    report_clips(draw_pictures(asked), len(asked.images) * asked.count, asked)


def report_clips(folder: Path, count: int, asked: ClipOptions) -> None:
    """Say where the clips are."""
    notify(f"{count_of(count, 'clip')} in {folder}; {folder}/report.html plays them.")
    if asked.as_json:
        print_json({"folder": folder, "sheet": folder / "sheet.png", **read_json(folder / "run.json")})


def train_motion(asked: dict[str, Any], run_folder: RunFolderOptions) -> None:
    """Learn a motion from a few clips, apart from what they look like."""
    from customize.clips.train import PROGRAM
    from customize.clips.train import train_motion as learn

    run = learn(asked, run_folder)
    notify(f"Next: {call_of_motion(read_run_settings(TrainMotionOptions, run, PROGRAM), run)}")


def call_of_motion(settings: TrainMotionOptions, run: Path) -> str:
    """The command that draws clips with a motion that was learned, to be copied: this many frames, by its own model."""
    if (run / ADAPTER_FILE).is_file():
        how = f"{quote_text(f'a dog in a park, {settings.token}')} --concept {quote(run)}"
    else:
        model = "" if settings.model == "moji" else f" --model {quote(settings.model)}"
        how = f'"a dog in a park" --motion {quote(run)}{model}'
    frames = "" if settings.frames == DEFAULT_FRAMES else f" --frames {settings.frames}"
    return f"customize clip {how}{frames}"


def evaluate_clip(asked: EvaluateClipOptions) -> None:
    """Measure clips: motion, flicker, consistency over the frames, and agreement with their prompts."""
    from customize.clips.evaluate import TABLE, describe
    from customize.clips.evaluate import evaluate_clip as measure

    folder = measure(asked)
    found = read_json(folder / TABLE)
    if asked.as_json:
        print_json({"folder": folder, **found})
    else:
        for title, value, clips in describe(found["figures"]):
            typer.echo(f"{title:36} {value}, {count_of(clips, 'clip')}")
    notify(f"{folder}/report.html plays the clips.")
