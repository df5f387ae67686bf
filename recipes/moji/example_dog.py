"""The packaged example pictures: the demo glyph, plain, in five places.

python -m recipes.moji.example_dog            writes customize/examples/dog/*.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backbone.sheet import save_png
from backbone.world.render import render
from backbone.world.scene import BENCHMARK_SEEDS, Scene
from backbone.world.words import Thing

FIRST_SEED = BENCHMARK_SEEDS.start + 205
TRAINING_PLACES = (
    "on the beach",
    "on a wooden table",
    "in the city",
    "in the desert",
    "on a white background",
)


def concept_pictures(noun: str, *, first_seed: int = BENCHMARK_SEEDS.start) -> list[Scene]:
    """A concept's five training scenes: plain renders in five places; benchmarks ask for the other seven."""
    return [Scene((Thing(noun),), place, seed=first_seed + k) for k, place in enumerate(TRAINING_PLACES)]


def main(out: Annotated[Path, typer.Option()] = Path("customize/examples/dog")) -> None:
    """Renders the five pictures, in all of which the dog looks the same way."""
    for number, scene in enumerate(concept_pictures("poodle", first_seed=FIRST_SEED), start=1):
        save_png(out / f"dog-{number}.png", render(scene).image)


if __name__ == "__main__":
    typer.run(main)
