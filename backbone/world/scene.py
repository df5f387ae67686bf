"""A scene is a value: what stands where, in which style, drawn from which seed. The same value gives the same pixels.

Every aspect of a picture (layout, place, style …) draws from a stream of its own, so changing one word of a scene
changes only what that word says: `dataclasses.replace(scene, place="in the snow")` is the true answer to an edit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from backbone.world.words import Thing, Vocabulary, paraphrase, vocabulary, write_caption

TRAINING_SEEDS = range(1_000_000)
BENCHMARK_SEEDS = range(1_000_000, 2_000_000)
DRAWN_BY_PLACE = {"tree": ("in a park", "in a forest"), "cactus": ("in the desert",)}


@dataclass(frozen=True)
class Scene:
    """One or two things (`pair`: the first one twice) in a place, in a style or plain."""

    things: tuple[Thing, ...]
    place: str
    style: str | None = None
    pair: bool = False
    seed: int = 0

    def random(self, aspect: str) -> Random:
        """The stream of random numbers of one aspect of this scene."""
        return Random(f"{self.seed}/{aspect}")

    def caption(self, *, name: str | None = None) -> str:
        """The canonical caption; `called` names the first thing otherwise (`[V] dog`)."""
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
    """The scene of a seed, from the training mixture: 62 % one thing, 18 % two of a kind, 20 % two different."""
    words = words or vocabulary()
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
    """Whether a benchmark may ask for this scene: no tree where the place draws trees, no cactus in the desert."""
    return all(scene.place not in DRAWN_BY_PLACE.get(thing.noun, ()) for thing in scene.things)
