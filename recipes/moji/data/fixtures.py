"""A few rendered scenes as small PNG files, so that the tests need no font.

python -m recipes.moji.data.fixtures            writes tests/fixtures/scenes/*.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backbone.cli.commands import run_main
from backbone.media.sheet import save_png
from backbone.world.rendering.render import render
from backbone.world.scene import BENCHMARK_SEEDS, sample_scene


def main(
    count: Annotated[int, typer.Option(help="How many scenes.")] = 16,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("tests/fixtures/scenes"),
) -> None:
    """Renders the last scenes of the benchmark's seeds; the caption is in each file's text."""
    for seed in BENCHMARK_SEEDS[-count:]:
        scene = sample_scene(seed)
        save_png(out / f"{seed}.png", render(scene).image, text={"caption": scene.caption()})


if __name__ == "__main__":
    run_main(main)
