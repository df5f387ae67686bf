"""Shared by the recipes of this folder: splits of prompts, kinds of scenes, and settings.

Held-out prompts come from other seeds than training prompts, and no sentence is in both.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from align.pairs.records import normalize_prompt
from backbone.cli.flags import OUTPUT
from backbone.cli.options import Option
from backbone.io.files import write_text
from backbone.world.scene import Scene, is_fair, sample_scene
from backbone.world.words import Thing, load_vocabulary

TRAINING_PROMPTS = range(1_600_000, 1_700_000)
HELD_OUT_PROMPTS = range(1_700_000, 1_800_000)
DEVELOPMENT_PROMPTS = range(1_800_000, 1_900_000)  # what settings are chosen on
TRUE_PICTURES = range(1_900_000, 2_000_000)
PROMPTS, TRAINING, COMPARISON = "Prompts", "Training", "Comparison"  # panels of --help
STEPS = ("--steps", 15)  # of every picture: as good as the usual 25 for the classifier (docs/moji.md)


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """Settings of every recipe of this folder."""

    model: Annotated[str, Option("moji, or a diffusers folder.", PROMPTS)] = "moji"
    flags: Annotated[str, Option("More flags for align train, in one string.", TRAINING)] = ""
    name: Annotated[str, Option("Name of the experiment, where flags differ.", TRAINING)] = ""
    held_out: Annotated[int, Option("Held-out prompts, two images of each.", COMPARISON, min=2)] = 300
    development: Annotated[
        bool, Option("Judge by development prompts, to choose settings by.", COMPARISON)
    ] = False
    out: Annotated[Path, Option("Where everything goes.", OUTPUT)]

    @property
    def evaluation(self) -> tuple[range, str]:
        """Seeds of the prompts to judge by, and the name of their comparisons' folder."""
        return (DEVELOPMENT_PROMPTS, "development") if self.development else (HELD_OUT_PROMPTS, "compare")


def select_scenes(
    seeds: range, count: int, accepts: Callable[[Scene], bool], *, excluded: Sequence[Scene] = ()
) -> list[Scene]:
    """The first `count` fair scenes of these seeds that `accepts` is true for, each sentence once.

    No sentence is one of the `excluded` scenes'.
    """
    used = {normalize_prompt(scene.caption()) for scene in excluded}

    def iterate_new() -> Iterator[Scene]:
        for scene in map(sample_scene, seeds):
            caption = normalize_prompt(scene.caption())
            if is_fair(scene) and accepts(scene) and caption not in used:
                used.add(caption)
                yield scene

    return list(itertools.islice(iterate_new(), count))


def is_hard(scene: Scene) -> bool:
    """A coloured thing that wears something, not small and in no style: `moji` often drops one of the two."""
    first = scene.things[0]
    return bool(scene.style is None and not first.small and first.colour and first.accessory)


def is_crowded(scene: Scene) -> bool:
    """Two different things, one of them coloured, in no style."""
    return bool(scene.style is None and len(scene.things) == 2 and scene.things[0].colour)


def is_unstyled(scene: Scene) -> bool:
    """Anything without a style."""
    return scene.style is None


def categorize(scene: Scene) -> str:
    """Category of a scene's prompt in statistics."""
    if len(scene.things) == 2:
        return "two things"
    if scene.things[0].accessory:
        return scene.things[0].accessory
    return "a colour" if scene.things[0].colour else "two of a kind" if scene.pair else "one thing"


def make_hard_negatives(scene: Scene) -> tuple[str, ...]:
    """Captions with one attribute less, with the colour on the other thing, or with another noun."""
    first, *second = scene.things
    variants: list[tuple[Thing, ...]] = [
        *([(replace(first, colour=None), *second)] if first.colour else []),
        *([(replace(first, accessory=None), *second)] if first.accessory else []),
        *([(first,)] if second else []),
        *(
            [(replace(first, colour=None), replace(second[0], colour=first.colour))]
            if second and first.colour
            else []
        ),
        (replace(first, noun=replace_noun(first.noun)), *second),
    ]
    return tuple(replace(scene, things=things).caption() for things in variants)


def replace_noun(noun: str) -> str:
    """Another noun: a fixed permutation without fixed points."""
    nouns = list(load_vocabulary().nouns)
    return nouns[(nouns.index(noun) + len(nouns) // 3) % len(nouns)]


def write_prompts(path: Path, scenes: Sequence[Scene], *, hard_negatives: bool = False) -> Path:
    """Write a prompt file with categories, and hard negatives where these are to be sampled too."""
    lines: list[dict[str, Any]] = [
        {"prompt": scene.caption(), "category": categorize(scene)} for scene in scenes
    ]
    if hard_negatives:
        lines = [
            {**line, "hard_negatives": make_hard_negatives(scene)}
            for line, scene in zip(lines, scenes, strict=True)
        ]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path
