"""The packaged example pictures: the demo glyph, plain, in five places.

python -m recipes.moji.example_dog            writes customize/examples/dog/*.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backbone.media.sheet import save_png
from backbone.world.concepts import FIRST_SEED, concept_scenes
from backbone.world.render import render


def main(out: Annotated[Path, typer.Option()] = Path("customize/examples/dog")) -> None:
    """Renders the five pictures, in all of which the dog looks the same way."""
    for number, scene in enumerate(concept_scenes("poodle", first_seed=FIRST_SEED), start=1):
        save_png(out / f"dog-{number}.png", render(scene).image)


if __name__ == "__main__":
    typer.run(main)
