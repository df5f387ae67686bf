"""Training pictures on disk: rendered scenes with their captions, and textures for the autoencoder.

    python -m recipes.moji.data.pictures --scenes 24000 --textures 4000      about 80 s on two cores, 1.4 GB
    python -m recipes.moji.data.pictures --scenes 12000 --aligned 24000      and some on the autoencoder's grid

Aligned scenes have their things on the autoencoder's grid, at few sizes: a glyph is then the same latents wherever it
stands, and a small denoiser draws it whole instead of the mean of its offsets.

Shards of 2,000 pictures (uint8) under build/moji/; finished shards are kept, so the command continues where it was.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from backbone.cli.commands import run_main
from backbone.world.rendering.render import find_font, place_figures, render, to_array
from backbone.world.rendering.textures import Pixels, draw_texture
from backbone.world.scene import TRAINING_SEEDS, Pose, Scene, sample_scene

SHARD = 2000
CELL = 8  # pixels a side of a latent
LOWEST = 120  # the lowest foot of a thing
SMALL, ALONE, OF_TWO = (32, 40), (64, 72, 80), (48, 56)  # sizes of aligned things
SCENES = ("scenes", "aligned")


def main(
    scenes: Annotated[int, typer.Option(help="How many scenes, from seed 0.")] = 24_000,
    aligned: Annotated[int, typer.Option(help="How many scenes on the autoencoder's grid, from seed 0.")] = 0,
    textures: Annotated[int, typer.Option(help="How many texture pictures.")] = 4_000,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Renders scenes and textures into shards."""
    find_font()
    assert max(scenes, aligned) <= len(TRAINING_SEEDS)
    (workdir / "pictures").mkdir(parents=True, exist_ok=True)
    jobs = [("scenes", first) for first in range(0, scenes, SHARD)]
    jobs += [("aligned", first) for first in range(0, aligned, SHARD)]
    jobs += [("textures", first) for first in range(0, textures, SHARD)]
    todo = [(workdir, kind, first) for kind, first in jobs if not shard_path(workdir, kind, first).exists()]
    with ProcessPoolExecutor(workers) as pool:
        for done in pool.map(write_shard, todo):
            print(done, flush=True)


def shard_path(workdir: Path, kind: str, first: int) -> Path:
    return workdir / "pictures" / f"{kind}-{first:06d}.npy"


def write_shard(job: tuple[Path, str, int]) -> str:
    """Draws one shard; captions of scenes go beside it as JSON."""
    workdir, kind, first = job
    path = shard_path(workdir, kind, first)
    seeds = range(first, first + SHARD)
    if kind in SCENES:
        values = [sample_scene(seed) for seed in seeds]
        if kind == "aligned":
            values = [align_to_grid(scene) for scene in values]
        batch = np.stack([to_array(render(scene).image) for scene in values])
        captions = [[scene.caption(), scene.caption_for_training()] for scene in values]
        path.with_suffix(".json").write_text(json.dumps(captions))
    else:
        batch = np.stack([draw_texture(seed) for seed in seeds])
    partial = path.with_name(path.name + ".partial.npy")
    np.save(partial, batch)
    partial.rename(path)
    return str(path)


def align_to_grid(scene: Scene) -> Scene:
    """The scene with the box of every thing on the autoencoder's grid, as near to where it was as there is a place."""
    figures, poses = place_figures(scene, scene.horizon), []
    for figure in figures:
        alone = len(figures) == 1
        sizes = SMALL if figure.thing.small else ALONE if alone else OF_TWO
        size = min(sizes, key=lambda one: abs(one - figure.size))
        x = CELL * round((figure.x - size / 2) / CELL) + size / 2
        room = CELL * -(-(size + 16) // CELL) if alone else 0  # above it, for what it wears
        foot = min(max(CELL * round(figure.foot / CELL), room), LOWEST)
        poses.append(Pose(x, foot, size))
    return replace(scene, poses=tuple(poses))


def load(workdir: Path, *kinds: str) -> list[Pixels]:
    """All shards of these kinds, memory-mapped: uint8 [2000, 128, 128, 3] each."""
    paths = [path for kind in kinds for path in sorted((workdir / "pictures").glob(f"{kind}-??????.npy"))]
    return [np.load(path, mmap_mode="r") for path in paths]


def load_captions(workdir: Path) -> list[list[str]]:
    """Of every rendered scene: its canonical caption and another way to say it."""
    paths = [path for kind in SCENES for path in sorted((workdir / "pictures").glob(f"{kind}-??????.json"))]
    return [pair for path in paths for pair in json.loads(path.read_text())]


if __name__ == "__main__":
    run_main(main)
