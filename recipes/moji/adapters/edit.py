"""`moji-edit`: an adapter with which `moji` does what an instruction says, from rendered pairs.

    python -m recipes.moji.adapters.edit --out build/moji-edit                       hours on two cores
    python -m recipes.moji.adapters.edit --model build/moji-second --out runs/try    on any pipeline of the world
    python -m recipes.moji.adapters.edit --tiny --out build/try                  a few steps of everything: does it run?

The world gives the true edit of every instruction (`backbone.world.edits`): another noun, a colour, an accessory put on
or taken off, a place, a style, a thing removed, a thing added next to another. Pairs are written as anybody's lie on a
disk, and `customize train --pairs` learns from them; nothing here trains. Left in `--out` is that run's folder, whose
adapter and input channels, at most 15 MB, are all that an edit needs. Needs the emoji font.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from backbone.adapters.concept import CONCEPT_FILE, read_concept
from backbone.cli.flags import DATA, MODEL, OUTPUT
from backbone.cli.options import Option, settled_command
from backbone.io.console import UserError, notify, progress, run_app
from backbone.io.files import write_text
from backbone.world.edits import WorldEdit, sample_edits
from backbone.world.render import find_font
from backbone.world.scene import TRAINING_SEEDS
from customize.training.start import start

LARGEST = 15_000_000  # bytes of the weights that an edit needs
LIST = "metadata.jsonl"
TOLD = ("model", "steps", "batch", "rank", "learning_rate", "held_out", "device")  # to `customize train`


app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class EditorSettings:
    """What `moji-edit` learns from, and for how long."""

    out: Annotated[Path, Option("The run folder.", OUTPUT)]
    model: Annotated[str, Option("moji, or a pipeline of its world.", MODEL)] = "moji"
    pairs: Annotated[int, Option("Pairs to learn from and to hold out.", DATA, min=20)] = 20_000
    steps: Annotated[int, Option("Optimiser steps.", "Training", min=1)] = 20_000
    batch: Annotated[int, Option("Pairs in a batch.", "Training", min=1)] = 16
    rank: Annotated[int, Option("Rank of the adapter.", "Training", min=1)] = 16
    learning_rate: Annotated[
        float, Option("Learning rate of the adapter and the new input channels.", "Training", min=0)
    ] = 1e-3
    held_out: Annotated[
        int, Option("Held-out pairs, by which the best checkpoint is chosen.", DATA, min=0)
    ] = 32
    device: Annotated[str, Option("cpu or cuda.", MODEL)] = "cpu"
    workdir: Annotated[Path, Option("Where the pairs are kept.", OUTPUT)] = Path("build/moji")
    tiny: Annotated[bool, Option("Few pairs and steps.", "Training")] = False


@settled_command(app, EditorSettings)
def main(wanted: EditorSettings) -> None:
    """Renders what is missing, trains, and says how large what was learned is."""
    if wanted.tiny:
        wanted = replace(wanted, pairs=20, steps=2, batch=2, held_out=1)
    folder = wanted.workdir / f"edits-{wanted.pairs}"
    write_pairs(folder, sample_edits(TRAINING_SEEDS, wanted.pairs))
    steps = wanted.steps
    asked: dict[str, Any] = {
        "pairs": str(folder), "lora_layers": "all", "lr_warmup_steps": min(200, steps),
        "evaluation_steps": max(1, steps // 10), "ema_decay": 0.999, "skip_bad": True,
        **{name: getattr(wanted, name) for name in TOLD},
    }  # fmt: skip
    run = start(asked, out=wanted.out)
    notify(f"What an edit needs of {run} is {size_of(run) / 1e6:.1f} MB.")


def write_pairs(folder: Path, edits: list[WorldEdit], *, workers: int = 2) -> None:
    """Renders pairs into source/ and target/, and lists them with their instructions; nothing where that was done."""
    if (folder / LIST).is_file():
        return
    find_font()
    for side in ("source", "target"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool, progress(len(edits), "rendering") as bar:
        for _ in pool.map(partial(_write_pair, folder), range(len(edits)), edits, chunksize=20):
            bar.advance(images=2)
    lines = [
        json.dumps(
            {"source": f"source/{k:06d}.png", "target": f"target/{k:06d}.png", "instruction": one.instruction}
        )
        for k, one in enumerate(edits)
    ]
    write_text(folder / LIST, "\n".join([*lines, ""]))


def _write_pair(folder: Path, number: int, edit: WorldEdit) -> None:
    for side, image in zip(("source", "target"), edit.rendered(), strict=True):
        image.save(folder / side / f"{number:06d}.png")


def size_of(run: Path) -> int:
    """Bytes of the weights that an edit needs. Raises `UserError` for more than may be."""
    concept = read_concept(run)
    size = sum(
        (run / name).stat().st_size for name in (CONCEPT_FILE, concept.weights, concept.changed) if name
    )
    if size > LARGEST:
        raise UserError(
            f"{run} holds {size / 1e6:.1f} MB of weights, and {LARGEST / 1e6:.0f} are what may be. Take a smaller "
            "--rank."
        )
    return size


if __name__ == "__main__":
    run_app(app)
