"""Training scenes of a concept: one glyph in several places, as a user would photograph one subject."""

from __future__ import annotations

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


def concept_scenes(noun: str, *, first_seed: int = BENCHMARK_SEEDS.start) -> list[Scene]:
    """A concept's five training scenes, without style, in TRAINING_PLACES; benchmarks use the other seven places."""
    return [Scene((Thing(noun),), place, seed=first_seed + k) for k, place in enumerate(TRAINING_PLACES)]
