"""`moji`'s denoiser, fitted to its scorer: what is asked for is there more often.

    python -m recipes.moji.fitted --out build/fitted         20 minutes of one core

The denoiser learned to predict noise, which says nothing of whether a crown is on a head. `align train --loss draft`
(DRaFT, Clark et al. 2024) follows the scorer's gradient through the decoder and the last steps of the sampler, on
prompts of the world's training seeds of which most wear something, in every style and size. It exaggerates what the
scorer looks for, so that half of the LoRA that it learns is baked into the weights (`customize merge --bake`): as many
things are worn then as with all of it, and glyphs are as true as before (`benchmarks/results/moji.md`). The judge of
that is the classifier, which has never seen the scorer.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from backbone.cli.commands import script_app
from backbone.cli.flags import OUTPUT
from backbone.cli.options import Option, settled_command
from backbone.io.console import notify, run_app
from backbone.world.scene import Scene
from recipes.align.experiment import train
from recipes.align.prompts import STEPS, TRAINING, TRAINING_PROMPTS, select_scenes, write_prompts

WORN, TWO, ANY = 400, 120, 200  # prompts of each kind

app = script_app()


@dataclass(frozen=True, kw_only=True)
class FittedSettings:
    """What the fitting is asked for."""

    model: Annotated[str, Option("moji, or a diffusers folder of its world.", TRAINING)] = "moji"
    steps: Annotated[int, Option("Optimiser steps, of eight images each.", TRAINING, min=1)] = 120
    learning_rate: Annotated[float, Option("Peak learning rate.", TRAINING, min=0)] = 8e-4
    share: Annotated[float, Option("How much of the LoRA is baked.", TRAINING, min=0, max=1)] = 0.5
    out: Annotated[Path, Option("Where everything goes; the model is in moji/.", OUTPUT)] = Path(
        "build/fitted"
    )


@settled_command(app, FittedSettings)
def main(settings: FittedSettings) -> None:
    """Trains the LoRA, once, and bakes its share."""
    prompts = write_prompts(settings.out / "prompts.jsonl", select_prompts())
    run, seconds = train(
        settings.out, "draft", "--online", "moji", "--loss-type", "draft", "--prompts", prompts,
        "--model", settings.model, "--steps", settings.steps, "--learning-rate", settings.learning_rate,
        "--train-batch-size", 8, "--lr-scheduler", "cosine", "--reward-steps", 5, "--sample-steps", STEPS[1],
    )  # fmt: skip
    words = ("merge", f"{run}:{settings.share}", "--bake", "--model", settings.model)
    subprocess.run(
        [sys.executable, "-m", "customize.cli", *words, "--out", str(settings.out / "moji")], check=True
    )
    notify(f"{settings.out / 'moji'}: trained in {seconds:.0f} s")


def select_prompts() -> list[Scene]:
    """Scenes with something worn, with two things, and any, each sentence once."""
    worn = select_scenes(TRAINING_PROMPTS, WORN, lambda scene: len(scene.things) == 1 and wears(scene))
    two = select_scenes(TRAINING_PROMPTS, TWO, lambda scene: len(scene.things) == 2, without=worn)
    usual = select_scenes(TRAINING_PROMPTS, ANY, lambda scene: True)
    known = {scene.caption() for scene in (*worn, *two)}
    return [*worn, *two, *(scene for scene in usual if scene.caption() not in known)]


def wears(scene: Scene) -> bool:
    """Whether the first thing wears something."""
    return bool(scene.things[0].accessory)


if __name__ == "__main__":
    run_app(app)
