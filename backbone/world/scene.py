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
HORIZONS = 62.0, 84.0  # pixels from the upper edge
DRAWN_BY_PLACE = {"tree": ("in a park", "in a forest"), "cactus": ("in the desert",)}


@dataclass(frozen=True)
class Pose:
    """A thing's position and orientation, in pixels and degrees.

    x         of its middle
    foot      y of its lower edge, when it stands upright
    size      its longest side
    angle     clockwise, about its middle
    mirrored  whether it looks the other way
    depth     0 far … 1 near: of overlapping things the nearer one is in front, of equally near ones the later
    """

    x: float
    foot: float
    size: float
    angle: float = 0.0
    mirrored: bool = False
    depth: float = 0.5


@dataclass(frozen=True)
class Scene:
    """One or two things (`pair`: the first one twice) in a place, with or without a style.

    `poses` are the things' poses; None: sampled from the seed, upright on the ground, side by side.
    """

    things: tuple[Thing, ...]
    place: str
    style: str | None = None
    pair: bool = False
    seed: int = 0
    poses: tuple[Pose, ...] | None = None

    @property
    def figures(self) -> tuple[Thing, ...]:
        """The things that are drawn; a pair's one thing twice."""
        return self.things * 2 if self.pair else self.things

    @property
    def horizon(self) -> float:
        """The height of the horizon, in pixels from the upper edge: the first number of the place's stream."""
        return self.random(f"place/{self.place}").uniform(*HORIZONS)

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
    seed: int, *, vocabulary: Vocabulary | None = None, nouns: tuple[str, ...] | None = None
) -> Scene:
    """Sample the scene of a seed from the training mixture: 62 % one thing, 18 % two of a kind, 20 % two different."""
    vocabulary = vocabulary or load_vocabulary()
    nouns = nouns or tuple(vocabulary.nouns)
    random = Random(f"{seed}/scene")
    chance = random.random()
    place = random.choice(vocabulary.places)
    style = random.choice(vocabulary.styles) if random.random() < 0.3 else None
    first = random.choice(nouns)
    if chance < 0.62:
        thing = Thing(
            first,
            colour=random.choice(tuple(vocabulary.colours)) if random.random() < 0.25 else None,
            accessory=random.choice(tuple(vocabulary.accessories)) if random.random() < 0.2 else None,
            small=random.random() < 0.15,
        )
        return Scene((thing,), place, style, seed=seed)
    colour = random.choice(tuple(vocabulary.colours)) if random.random() < 0.12 else None
    if chance < 0.8:
        return Scene((Thing(first, colour=colour),), place, style, pair=True, seed=seed)
    second = random.choice([noun for noun in nouns if noun != first])
    return Scene((Thing(first, colour=colour), Thing(second)), place, style, seed=seed)


def sample_posed_scene(seed: int) -> Scene:
    """Sample a scene of the training mixture with things anywhere, turned, and overlapping.

    Half of the things stand upright, a quarter leans by up to 25 degrees, a quarter is turned by any angle; half of
    the things stand on the ground, the others are anywhere; of two things half the time one hides a part of the other.
    """
    scene = sample_scene(seed)
    random, horizon = scene.random("poses"), scene.horizon
    poses: list[Pose] = []
    for thing in scene.figures:
        single = len(scene.figures) == 1
        # Size in pixels, turn in degrees, and the foot's place, all independent
        size = random.uniform(26, 40) if thing.small else random.uniform(46, 88 if single else 64)
        lean = random.random()
        angle = 0.0 if lean < 0.5 else random.uniform(-25, 25) if lean < 0.75 else random.uniform(-180, 180)
        x = random.uniform(size / 2 - 6, 134 - size / 2)
        foot, depth = random.uniform(size - 6, 130), random.random()
        if random.random() < 0.5:  # on the ground, which says how near it is
            foot = random.uniform(horizon + 6, 124)
            depth = (foot - horizon) / (128 - horizon)
        # Beside the first thing, nearer than half of both sizes: the two overlap
        if poses and random.random() < 0.5:
            first, away = poses[0], (poses[0].size + size) * random.uniform(0.2, 0.4)
            x = min(max(first.x + random.choice((-1, 1)) * away, 12.0), 116.0)
            foot = min(max(first.foot + random.uniform(-12, 12), size - 6), 130.0)
        poses.append(Pose(x, foot, size, angle, random.random() < 0.5, depth))
    return replace(scene, poses=tuple(poses))


def is_fair(scene: Scene) -> bool:
    """Whether a benchmark may use this scene: no tree where the place draws trees, no cactus in the desert."""
    return all(scene.place not in DRAWN_BY_PLACE.get(thing.noun, ()) for thing in scene.things)
