"""A pipeline folder of `moji` with its weights on the grid of exported ones, which packs in three fifths of the room.

    python -m recipes.moji.rounding backbone/moji --out build/moji/rounded
    python -m recipes.moji.denoiser compare backbone/moji build/moji/rounded

For weights that were trained before exports were rounded. Nothing is trained: what the rounded denoiser predicts
differs from what it did by about as much as the way its sums are made in half precision (`benchmarks/results/moji.md`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from backbone.cli.commands import run_main
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from recipes.moji.training.run import make_readable, round_to_grid

FILES = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def main(
    folder: Annotated[Path, typer.Argument(help="The pipeline folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/moji/rounded"),
) -> None:
    """Copies a pipeline folder, its denoiser and text encoder on the grid."""
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the folder that is rounded. Name another by --out.")
    shutil.copytree(folder, out, dirs_exist_ok=True)
    for name in FILES:
        tensors, metadata = read_tensors(folder / name)
        write_tensors(out / name, round_to_grid(tensors), metadata)
    make_readable(out)


if __name__ == "__main__":
    run_main(main)
