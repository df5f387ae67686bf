"""Training pictures on disk: rendered scenes with their captions, and textures for the autoencoder.

    python -m recipes.moji.data.pictures --scenes 24000 --textures 4000      about 80 s on two cores, 1.4 GB
    python -m recipes.moji.data.pictures --askew 6000 --others 6000      and some of the further kinds

Scenes are of four kinds. The usual ones are what prompts ask for. Aligned ones have their things on the autoencoder's
grid, at few sizes, so that a glyph is the same latents wherever it stands. Askew ones have their things anywhere,
turned, mirrored, one before the other, and say so at the end of their captions: what a map may ask for, and no prompt
does by itself. Others show glyphs that have no name ("a thing wearing a crown in a park"), more than half of those
that are alone with something on: what is worn, and places and styles, belong to any thing then, so to a concept too.

Shards of 2,000 pictures (uint8) under build/moji/; finished shards are kept, so the command continues where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from backbone.cli.commands import run_main
from backbone.world.rendering.render import find_font, place_figures, render, to_array
from backbone.world.rendering.textures import Pixels, draw_texture
from backbone.world.scene import TRAINING_SEEDS, Pose, Scene, sample_posed_scene, sample_scene
from backbone.world.words import load_vocabulary

SHARD = 2000
CELL = 8  # pixels a side of a latent
LOWEST = 120  # the lowest foot of a thing
SMALL, ALONE, OF_TWO = (32, 40), (64, 72, 80), (48, 56)  # sizes of aligned things
ASKEW = ", askew"  # the end of captions of things in any pose
THING = "thing"  # the name of glyphs without one
WORN = 0.5  # share of lone things without a name that are given something to wear
CaptionedScene = tuple[Scene, list[str]]
"""A scene, its canonical caption and another way to say it."""


def main(
    scenes: Annotated[int, typer.Option(help="How many usual scenes, from seed 0.")] = 24_000,
    aligned: Annotated[int, typer.Option(help="How many scenes on the autoencoder's grid, from seed 0.")] = 0,
    askew: Annotated[int, typer.Option(help="How many scenes with things held in any way, from seed 0.")] = 0,
    others: Annotated[int, typer.Option(help="How many scenes of things without a name, from seed 0.")] = 0,
    textures: Annotated[int, typer.Option(help="How many texture pictures.")] = 4_000,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Renders scenes and textures into shards."""
    counts = {"scenes": scenes, "aligned": aligned, "askew": askew, "others": others, "textures": textures}
    assert max(counts.values()) <= len(TRAINING_SEEDS)
    for path in write_missing(workdir, counts, workers):
        print(path, flush=True)


def write_missing(workdir: Path, counts: Mapping[str, int], workers: int | None) -> Iterator[str]:
    """Draws the missing shards of this many pictures of each kind and yields their paths; `workers` None: all cores.

    `UserError` if one has to be drawn and the emoji font is missing.
    """
    (workdir / "pictures").mkdir(parents=True, exist_ok=True)
    jobs = [(workdir, kind, first) for kind, count in counts.items() for first in range(0, count, SHARD)]
    if todo := [job for job in jobs if not shard_path(*job).exists()]:
        find_font()
        with ProcessPoolExecutor(workers) as pool:
            yield from pool.map(write_shard, todo)


def shard_path(workdir: Path, kind: str, first: int) -> Path:
    return workdir / "pictures" / f"{kind}-{first:06d}.npy"


def write_shard(job: tuple[Path, str, int]) -> str:
    """Draws one shard; captions of scenes go beside it as JSON."""
    workdir, kind, first = job
    path = shard_path(workdir, kind, first)
    seeds = range(first, first + SHARD)
    if kind in SCENES:
        captioned = [SCENES[kind](seed) for seed in seeds]
        batch = np.stack([to_array(render(scene).image) for scene, _ in captioned])
        path.with_suffix(".json").write_text(json.dumps([captions for _, captions in captioned]))
    else:
        batch = np.stack([draw_texture(seed) for seed in seeds])
    partial = path.with_name(path.name + ".partial.npy")
    np.save(partial, batch)
    partial.rename(path)
    return str(path)


def make_usual(seed: int) -> CaptionedScene:
    """A scene, its canonical caption and another way to say it."""
    return add_captions(sample_scene(seed))


def make_aligned(seed: int) -> CaptionedScene:
    """A scene with its things on the autoencoder's grid."""
    return add_captions(align_to_grid(sample_scene(seed)))


def make_askew(seed: int) -> CaptionedScene:
    """A scene with its things in any pose, which its captions say at the end."""
    scene, captions = add_captions(sample_posed_scene(seed))
    return scene, [caption + ASKEW for caption in captions]


def make_nameless(seed: int) -> CaptionedScene:
    """A scene of things without a name."""
    words = load_vocabulary()
    scene = sample_scene(seed, nouns=tuple(words.other_nouns))
    random = scene.random("others")
    if len(scene.figures) == 1 and random.random() < WORN:
        dressed = replace(scene.things[0], accessory=random.choice(tuple(words.accessories)))
        scene = replace(scene, things=(dressed,))
    _, captions = add_captions(
        replace(scene, things=tuple(replace(thing, noun=THING) for thing in scene.things))
    )
    return scene, captions


def add_captions(scene: Scene) -> CaptionedScene:
    return scene, [scene.caption(), scene.caption_for_training()]


def align_to_grid(scene: Scene) -> Scene:
    """The scene with every thing's box moved to the nearest free place on the autoencoder's grid."""
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


SCENES: dict[str, Callable[[int], CaptionedScene]] = {
    "scenes": make_usual,
    "aligned": make_aligned,
    "askew": make_askew,
    "others": make_nameless,
}
"""The kinds of scenes, and the function that makes one from a seed."""


def list_shards(workdir: Path, *kinds: str) -> list[Path]:
    """The shards of these kinds that are there, in the kinds' order."""
    return [path for kind in kinds for path in sorted((workdir / "pictures").glob(f"{kind}-??????.npy"))]


def load(workdir: Path, *kinds: str) -> list[Pixels]:
    """All shards of these kinds, memory-mapped: uint8 [2000, 128, 128, 3] each."""
    return [np.load(path, mmap_mode="r") for path in list_shards(workdir, *kinds)]


def load_captions(shard: Path) -> list[list[str]]:
    """Two captions of every scene of a shard: the canonical one and a paraphrase."""
    captions: list[list[str]] = json.loads(shard.with_suffix(".json").read_text())
    return captions


if __name__ == "__main__":
    run_main(main)
