"""`moji-edit`: an adapter with which `moji` does what an instruction says, from rendered pairs.

    python -m recipes.moji.adapters.edit train --out build/moji-edit                     two hours of one core
    python -m recipes.moji.adapters.edit train --model build/second --out runs/try    on any pipeline of the world
    python -m recipes.moji.adapters.edit train --tiny --out build/try    a few steps of everything: does it run?
    python -m recipes.moji.adapters.edit export build/moji-edit --out backbone/moji-edit

The world gives the true edit of every instruction (`backbone.world.edits`): another noun, a colour, an accessory put on
or taken off, a place, a style, a thing removed, a thing added next to another. Pairs are written like a user's own,
and `customize train --pairs` learns from them; nothing here trains. `--out` is that run's folder. An edit needs
only its adapter and input channels: `export` writes them in fp16, at most 15 MB. Needs the emoji font.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from backbone.adapters.concept import checkpoint, read_concept
from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.flags import DATA, MODEL, OUTPUT
from backbone.cli.options import Option
from backbone.io.console import UserError, run_app
from backbone.io.files import write_text
from backbone.io.progress import progress
from backbone.world.edits import WorldEdit, sample_edits
from backbone.world.rendering.render import find_font
from backbone.world.scene import TRAINING_SEEDS
from customize.training.start import start
from recipes.moji.data.pictures import align_to_grid
from recipes.moji.training.run import export_adapter, make_readable

LARGEST = 15_000_000  # bytes of the folder that is carried along
LIST = "metadata.jsonl"
HARD = ("one of two", "thing removed")  # kinds of edits that are learned last
CARD = """# moji-edit

An adapter with which `{model}` edits an image by an instruction: further input channels for the input image
(InstructPix2Pix, Brooks et al. 2023), and a LoRA of the denoiser and the text encoder, in fp16.
`customize train --pairs` trained it on rendered scenes and their true edits (`recipes/moji/adapters/edit.py`).

    edit instruct photo.png --instruction "put it in the snow"

To export a whole model for diffusers' `StableDiffusionInstructPix2PixPipeline`:

    customize merge PATH/TO/moji-edit --bake --model {model} --out moji-edit-whole

Apache-2.0; the glyphs are Noto Color Emoji by Google, SIL Open Font License 1.1.
"""
FORWARDED = (
    "model",
    "steps",
    "batch",
    "rank",
    "learning_rate",
    "text_encoder_lr",
    "timestep_bias_multiplier",
    "held_out",
    "device",
)  # to `customize train`
app = script_app()


@dataclass(frozen=True, kw_only=True)
class EditorSettings:
    """Settings of the training of `moji-edit`."""

    out: Annotated[Path, Option("The run folder.", OUTPUT)]
    model: Annotated[str, Option("moji, or a pipeline of its world.", MODEL)] = "moji"
    pairs: Annotated[int, Option("Pairs to learn from and to hold out.", DATA, min=20)] = 24_000
    aligned: Annotated[
        int, Option("Of these, how many whose things stand on the autoencoder's grid.", DATA, min=0)
    ] = 12_000
    hard: Annotated[
        int, Option("Of these, how many are of the kinds that are learned last.", DATA, min=0)
    ] = 12_000
    steps: Annotated[int, Option("Optimiser steps.", "Training", min=1)] = 4_400
    batch: Annotated[int, Option("Pairs in a batch.", "Training", min=1)] = 16
    rank: Annotated[int, Option("Rank of the adapter.", "Training", min=1)] = 48
    learning_rate: Annotated[
        float, Option("Learning rate of the adapter and the new input channels.", "Training", min=0)
    ] = 1e-3
    text_encoder_lr: Annotated[
        float, Option("Learning rate of the text encoder's adapter.", "Training", min=0)
    ] = 5e-4
    timestep_bias_multiplier: Annotated[
        float,
        Option("How many times as often the noisier quarter of the levels is drawn.", "Training", min=0),
    ] = 4.0
    begin_from: Annotated[
        str,
        Option(
            "Begin with a run's weights, or moji-edit's.", "Training", metavar="RUN", default_text="new ones"
        ),
    ] = ""
    held_out: Annotated[
        int, Option("Held-out pairs, by which the best checkpoint is chosen; ten choose badly.", DATA, min=0)
    ] = 60
    device: Annotated[str, Option("cpu or cuda.", MODEL)] = "cpu"
    workdir: Annotated[Path, Option("Where the pairs are kept.", OUTPUT)] = Path("build/moji")
    tiny: Annotated[bool, Option("Few pairs and steps.", "Training")] = False


@settled_command(app, EditorSettings)
def train(settings: EditorSettings) -> None:
    """Renders the pairs that are missing, and trains."""
    if settings.tiny:
        settings = replace(settings, pairs=20, aligned=10, hard=6, steps=2, batch=2, held_out=1)
    folder = settings.workdir / f"edits-{settings.pairs}-{settings.aligned}-{settings.hard}"
    write_pairs(folder, select_edits(settings.pairs, settings.aligned, settings.hard))
    steps = settings.steps
    options: dict[str, Any] = {
        "pairs": str(folder), "lora_layers": "all", "train_text_encoder": True, "lr_warmup_steps": min(200, steps),
        "evaluation_steps": max(1, steps // 10), "ema_decay": 0.999, "skip_bad": True,
        "timestep_bias_strategy": "later",
        **{name: getattr(settings, name) for name in FORWARDED},
        **({"begin_from": settings.begin_from} if settings.begin_from else {}),
    }  # fmt: skip
    start(options, out=settings.out)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run folder of `train`.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/moji/moji-edit"),
) -> None:
    """Writes the best checkpoint in fp16, on the grid, as a run folder for edits; `UserError` if it is too large."""
    concept = read_concept(checkpoint(run))
    out.mkdir(parents=True, exist_ok=True)
    concept.write(out)
    for name in (concept.weights, concept.changed):
        export_adapter(concept.folder / name, out / name)
    write_text(out / "README.md", CARD.format(model=concept.model))
    make_readable(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    if size > LARGEST:
        raise UserError(
            f"{out} takes {size / 1e6:.1f} MB, and at most {LARGEST / 1e6:.0f} are carried along. Train at a lower "
            "--rank."
        )
    print(f"{out}: {size / 1e6:.1f} MB")


def select_edits(count: int, aligned: int, hard: int = 0) -> list[WorldEdit]:
    """`count` edits of the world, shuffled: `hard` of them of `HARD` kinds, the others as the world has them.

    Things of the last `aligned` stand on the autoencoder's grid.
    """
    for name, part in (("aligned", aligned), ("hard", hard)):
        if part > count:
            raise UserError(f"--{name} {part} is more than --pairs {count}. Lower it.")
    seeds = iter(TRAINING_SEEDS)
    edits = sample_edits(seeds, count - hard)
    edits += sample_edits(seeds, hard, kinds=HARD)
    Random(0).shuffle(edits)
    free = count - aligned
    return [
        *edits[:free],
        *(
            replace(edit, before=align_to_grid(edit.before), after=align_to_grid(edit.after))
            for edit in edits[free:]
        ),
    ]


def write_pairs(folder: Path, edits: list[WorldEdit], *, workers: int = 2) -> None:
    """Renders pairs into source/ and target/, and lists them with their instructions; nothing if that was done."""
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
            {
                "source": f"source/{k:06d}.png",
                "target": f"target/{k:06d}.png",
                "instruction": edit.instruction,
            }
        )
        for k, edit in enumerate(edits)
    ]
    write_text(folder / LIST, "\n".join([*lines, ""]))


def _write_pair(folder: Path, number: int, edit: WorldEdit) -> None:
    for side, image in zip(("source", "target"), edit.rendered(), strict=True):
        image.save(folder / side / f"{number:06d}.png")


if __name__ == "__main__":
    run_app(app)
