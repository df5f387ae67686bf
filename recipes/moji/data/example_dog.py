"""The packaged example: a guide dog, plain, in five places; a scene to edit; prompts to draw and prompts held out.

python -m recipes.moji.data.example_dog            writes customize/examples/dog/ and backbone/examples/
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backbone.cli.commands import run_main
from backbone.io.files import write_text
from backbone.media.sheet import save_png
from backbone.world.concepts import FIRST_SEED, concept_scenes
from backbone.world.rendering.render import render
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from backbone.world.words import Thing

SCENE = Scene((Thing("cat"),), "in a park", seed=BENCHMARK_SEEDS.start + 304)
PROMPT_SEED = BENCHMARK_SEEDS.start + 400
PROMPTS, HELD_OUT = 24, 12


def sample_prompts() -> list[str]:
    """Captions of scenes with one thing: first those to draw and choose from, then those held out."""
    seed, captions = PROMPT_SEED, dict[str, None]()
    while len(captions) < PROMPTS + HELD_OUT:
        scene = sample_scene(seed)
        if len(scene.things) == 1 and not scene.pair and scene.style is None and is_fair(scene):
            captions[scene.caption()] = None
        seed += 1
    return list(captions)


def main(
    out: Annotated[Path, typer.Option(help="Where the images of the dog go.")] = Path("customize/examples"),
    extras: Annotated[Path, typer.Option(help="Where the scenes to edit go.")] = Path("backbone/examples"),
) -> None:
    """Renders the scene and five pictures, in all of which the dog faces the same way; writes the prompts."""
    for number, scene in enumerate(concept_scenes("guide dog", first_seed=FIRST_SEED), start=1):
        save_png(out / "dog" / f"dog-{number}.png", render(scene).image)
        write_text(out / "dog" / f"dog-{number}.txt", f"a {{token}} {{class}} {scene.place}\n")
    captions = sample_prompts()
    save_png(extras / "scene.png", render(SCENE).image)
    write_text(extras / "scene.txt", f"{SCENE.caption()}\n")
    write_text(extras / "prompts.txt", "\n".join([*captions[:PROMPTS], ""]))
    write_text(extras / "heldout.txt", "\n".join([*captions[PROMPTS:], ""]))


if __name__ == "__main__":
    run_main(main)
