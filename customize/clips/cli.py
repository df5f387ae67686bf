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
from backbone.io.console import UserError, format_count, notify, quote, quote_text
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


def clip(options: ClipOptions) -> None:
    """Draw clips from prompts, with or without a motion adapter and concepts, or animate an image."""
    from backbone.adapters import concept as learning
    from backbone.adapters.concept import checkpoint, read_concept, resolve_placeholder_tokens
    from backbone.io.prompts import load_prompts

    prompts = [prompt.text for prompt in load_prompts([*options.words, *options.prompts])]
    if options.by_picture_alone:
        animate_pictures(options)
        return
    if not prompts:
        raise UserError('There is nothing to draw. Give words, as in: customize clip "a dog, moving left".')
    concepts = [read_concept(checkpoint(run, options.checkpoint)) for run in options.concepts]
    refuse_other_scales(options, [concept.kind == learning.MOTION for concept in concepts])
    adapter_files = [
        concept.folder / ADAPTER_FILE for concept in concepts if (concept.folder / ADAPTER_FILE).is_file()
    ]
    if not options.motion and adapter_files:
        options = replace(
            options,
            motion=read_as(str, read_json(adapter_files[0]).get("adapter"), adapter_files[0], "adapter"),
        )
    if not options.motion:
        refuse_camera_adapter(options)
    if not options.motion and options.sparsectrl:
        raise UserError(
            "SparseCtrl works beside a motion adapter. Name one with --motion, or leave --sparsectrl out."
        )
    for prompt in [*prompts, options.negative]:
        resolve_placeholder_tokens(
            prompt, concepts, model=options.model
        )  # user errors are raised before torch is imported
    refuse_from_source(options.controls)
    for prompt in prompts if options.camera else ():
        refuse_other_camera(prompt, options.camera)
    refuse_finished(options.out)
    from customize.clips.draw import draw_clips

    report_clips(draw_clips(prompts, options, concepts=concepts), len(prompts) * options.count, options)


def refuse_other_scales(options: ClipOptions, motions: Sequence[bool]) -> None:
    """Raise `UserError` for a motion scale without motions, or a subject scale without subjects."""
    if options.motion_scale != 1 and not options.lora and not any(motions):
        raise UserError(
            "--motion-scale has no effect: no --concept is a motion. Give --scale, the strength of subjects."
        )
    if options.scale != 1 and motions and all(motions):
        raise UserError("--scale has no effect: every --concept is a motion. Give --motion-scale.")


def refuse_camera_adapter(options: ClipOptions) -> None:
    """Raise `UserError` for camera options that need a motion adapter; without one the camera pans over one drawing."""
    for name, value in (
        ("--camera-adapter", options.camera_adapter),
        ("--camera-scale", options.camera_scale != 1),
    ):
        if value:
            raise UserError(f"{name} has no effect without --motion: the camera then moves over one drawing.")
    if options.camera and options.condition:
        raise UserError(
            "Without --motion the camera moves over one drawing, and --condition gives maps of frames. Leave one out."
        )


def animate_pictures(options: ClipOptions) -> None:
    """Draw clips with a model that reads a picture and no prompt."""
    refuse_finished(options.out)
    from customize.clips.picture import draw_pictures

    report_clips(draw_pictures(options), len(options.images) * options.count, options)


def report_clips(folder: Path, count: int, options: ClipOptions) -> None:
    """Print where the clips are."""
    notify(f"{format_count(count, 'clip')} in {folder}; {folder}/report.html plays them.")
    if options.as_json:
        print_json({"folder": folder, "sheet": folder / "sheet.png", **read_json(folder / "run.json")})


def train_motion(requested: dict[str, Any], run_folder: RunFolderOptions) -> None:
    """Learn a motion from a few clips, apart from what they look like."""
    from customize.clips.train import PROGRAM
    from customize.clips.train import train_motion as learn

    run = learn(requested, run_folder)
    notify(f"Next: {format_motion_command(read_run_settings(TrainMotionOptions, run, PROGRAM), run)}")


def format_motion_command(settings: TrainMotionOptions, run: Path) -> str:
    """The command that samples clips with a learned motion, with its model and number of frames."""
    if (run / ADAPTER_FILE).is_file():
        arguments = f"{quote_text(f'a dog in a park, {settings.token}')} --concept {quote(run)}"
    else:
        model = "" if settings.model == "moji" else f" --model {quote(settings.model)}"
        arguments = f'"a dog in a park" --motion {quote(run)}{model}'
    frames = "" if settings.frames == DEFAULT_FRAMES else f" --frames {settings.frames}"
    return f"customize clip {arguments}{frames}"


def evaluate_clip(options: EvaluateClipOptions) -> None:
    """Measure clips: motion, flicker, consistency over the frames, and agreement with their prompts."""
    from customize.clips.evaluate import TABLE, describe
    from customize.clips.evaluate import evaluate_clip as measure

    folder = measure(options)
    table = read_json(folder / TABLE)
    if options.as_json:
        print_json({"folder": folder, **table})
    else:
        for title, value, clips in describe(table["figures"]):
            typer.echo(f"{title:36} {value}, {format_count(clips, 'clip')}")
    notify(f"{folder}/report.html plays the clips.")
