"""Scenes: values that determine an image's pixels (things, place, style, seed).

Every aspect of a scene (layout, place, style …) has its own random stream, so changing one word changes only what the
word describes: `dataclasses.replace(scene, place="in the snow")` renders the ground truth of an edit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from backbone.world.words import Thing, Vocabulary, load_vocabulary, paraphrase, write_caption

TRAINING_SEEDS = range(1_000_000)
BENCHMARK_SEEDS = range(1_000_000, 2_000_000)
DRAWN_BY_PLACE = {"tree": ("in a park", "in a forest"), "cactus": ("in the desert",)}


@dataclass(frozen=True)
class Scene:
    """One or two things (`pair`: the first one twice) in a place, with or without a style."""

    things: tuple[Thing, ...]
    place: str
    style: str | None = None
    pair: bool = False
    seed: int = 0

    def random(self, aspect: str) -> Random:
        """The random stream of one aspect of this scene."""
        return Random(f"{self.seed}/{aspect}")

    def caption(self, *, name: str | None = None) -> str:
        """The canonical caption; `name` replaces the first thing's noun (`[V] dog`)."""
        return write_caption(self.things, pair=self.pair, place=self.place, style=self.style, name=name)

    def caption_for_training(self) -> str:
        """Mostly the canonical caption, often a paraphrase, sometimes without the place."""
        random = self.random("caption")
        place = None if random.random() < 0.08 else self.place
        if random.random() < 0.5:
            return write_caption(self.things, pair=self.pair, place=place, style=self.style)
        return paraphrase(self.things, pair=self.pair, place=place, style=self.style, random=random)

    def plain(self) -> Scene:
        """The same scene without its style."""
        return replace(self, style=None)


def sample_scene(
    seed: int, *, words: Vocabulary | None = None, nouns: tuple[str, ...] | None = None
) -> Scene:
    """Sample the scene of a seed from the training mixture: 62 % one thing, 18 % two of a kind, 20 % two different."""
    words = words or load_vocabulary()
    nouns = nouns or tuple(words.nouns)
    random = Random(f"{seed}/scene")
    kind = random.random()
    place = random.choice(words.places)
    style = random.choice(words.styles) if random.random() < 0.3 else None
    first = random.choice(nouns)
    if kind < 0.62:
        thing = Thing(
            first,
            colour=random.choice(tuple(words.colours)) if random.random() < 0.25 else None,
            accessory=random.choice(tuple(words.accessories)) if random.random() < 0.2 else None,
            small=random.random() < 0.15,
        )
        return Scene((thing,), place, style, seed=seed)
    colour = random.choice(tuple(words.colours)) if random.random() < 0.12 else None
    if kind < 0.8:
        return Scene((Thing(first, colour=colour),), place, style, pair=True, seed=seed)
    second = random.choice([noun for noun in nouns if noun != first])
    return Scene((Thing(first, colour=colour), Thing(second)), place, style, seed=seed)


def is_fair(scene: Scene) -> bool:
    """Whether a benchmark may use this scene: no tree where the place draws trees, no cactus in the desert."""
    return all(scene.place not in DRAWN_BY_PLACE.get(thing.noun, ()) for thing in scene.things)
