"""What is left of a prompt when a thing leaves it, and which things a prompt names."""

from __future__ import annotations

import pytest

from backbone.world.scene import BENCHMARK_SEEDS, sample_scene
from edit.phrases import find_things, remove_thing


@pytest.mark.parametrize(
    ("prompt", "phrase", "left"),
    [
        # The first thing, the last, the only one
        ("a cat next to a dog in a park", "cat", "a dog in a park"),
        ("a cat next to a dog in a park", "dog", "a cat in a park"),
        ("a cat in the snow", "cat", "in the snow"),
        ("A Cat", "cat", ""),
        ("a watercolor of a cat in a park", "cat", "a watercolor in a park"),
        ("a photo of a cat", "cat", "a photo"),
        ("there is a cat in the snow", "cat", "in the snow"),
        # With its adjectives, its number and its token
        ("a small black cat next to a dog in a park", "cat", "a dog in a park"),
        ("a dog next to a small black cat in a park", "cat", "a dog in a park"),
        ("a big sleeping cat near a dog", "cat", "a dog"),
        ("two cats and a dog", "cats", "a dog"),
        ("a [V] dog next to a cat", "dog", "a cat"),
        ("a fire hydrant next to a dog", "fire hydrant", "a dog"),
        # With what it wears and does
        ("a cat wearing a crown next to a dog in a park", "cat", "a dog in a park"),
        ("a cat wearing a crown and sunglasses next to a dog", "cat", "a dog"),
        ("a cat that wears a crown beside a dog", "cat", "a dog"),
        ("a man with a beard next to a car", "man", "a car"),
        ("a cat with a dog in a park", "cat", "a dog in a park"),
        ("a cat sitting on a mat", "cat", "on a mat"),
        # And what joined it to the rest
        ("a dog wearing a crown", "crown", "a dog"),
        ("a dog wearing a crown and sunglasses", "crown", "a dog wearing sunglasses"),
        ("a dog wearing a crown next to a cat", "crown", "a dog next to a cat"),
        ("a dog wearing a crown and a cat", "crown", "a dog and a cat"),
        ("a cat sitting on a mat", "mat", "a cat"),
        ("a dog chasing cats in a park", "cats", "a dog in a park"),
        ("a bench under a tree in front of a house", "tree", "a bench in front of a house"),
        ("a photo of a dog and a cat at night", "cat", "a photo of a dog at night"),
        ("a photo of a cat next to a dog at night", "cat", "a photo of a dog at night"),
        ("a dog on a mat next to a cat", "mat", "a dog next to a cat"),
        # In lists and between commas
        ("a cat, a dog and a bird", "cat", "a dog and a bird"),
        ("a cat, a dog and a bird", "dog", "a cat and a bird"),
        ("in a park, a cat next to a dog", "cat", "in a park, a dog"),
        ("a cat beside a dog, watercolor", "dog", "a cat, watercolor"),
        ("A Cat and a Dog.", "cat", "a Dog."),
        # With what it is made to do, and where it alone is
        ("a car parked in front of a house", "car", "in front of a house"),
        ("a car parked in front of a house", "house", "a car"),
        ("a brightly painted car next to a tree", "car", "a tree"),
        ("a cat curled up on a sofa", "cat", "on a sofa"),
        ("a cat on the left and a dog on the right", "cat", "a dog on the right"),
        ("a dog on the left and a cat on the right", "cat", "a dog on the left"),
        ("a man with mountains in the background", "mountains", "a man"),
        ("a cat wearing a crown on its head in a park", "crown", "a cat in a park"),
        ("a bird with a fish in its beak on a rock", "fish", "a bird on a rock"),
        ("a woman with a dog on her sofa", "dog", "a woman on her sofa"),
        # With what it is of, but for a picture
        ("a bowl of fruit and a glass of water on a table", "glass", "a bowl of fruit on a table"),
        (
            "a bowl of fruit and a glass of water on a table",
            "water",
            "a bowl of fruit and a glass on a table",
        ),
        ("one of the cats next to a dog", "cats", "a dog"),
        ("a painting of a cat on a wall", "painting", "a cat on a wall"),
        # In brackets, with a weight or without
        ("(cat:1.2), a park", "cat", "a park"),
        ("((a cat)) and (a dog:1.3) in a park", "cat", "(a dog:1.3) in a park"),
        ("a man (with a hat) in a park", "hat", "a man in a park"),
        ("a wall — a cat — a tree", "cat", "a wall — a tree"),
        # A word that is no thing of its own goes alone
        ("an orange cat in a park", "orange", "a cat in a park"),
        ("a cat toy near a dog", "cat", "a toy near a dog"),
        ("a caterpillar and a cat", "cat", "a caterpillar"),
        ("a cat's toy near a dog", "cat", "a toy near a dog"),
        ("the dogs' bowl near a cat", "dogs", "the bowl near a cat"),
        # Its owner stays, and what is done to it or on it goes
        ("the cat's hat", "hat", "the cat"),
        ("a dog next to the cats’ red bowl in a park", "bowl", "a dog next to the cats in a park"),
        ("a cat chased by a dog", "cat", "a dog"),
        ("a cat chased by a dog", "dog", "a cat"),
        ("a castle destroyed in a war", "castle", "in a war"),
        ("a spotted cat and a dog", "cat", "a dog"),
        ("a black spotted cat", "black", "a spotted cat"),
        ("a white steed in a field", "steed", "in a field"),
        ("a table with a vase of flowers on it", "vase", "a table"),
        ("a plate of food with a fork", "food", "a plate with a fork"),
        ("A cat. A dog.", "dog", "A cat."),
        ("A cat. A dog... A bird", "dog", "A cat. A bird"),
        # No part of another word
        ("two cats in a park", "cat", "two cats in a park"),
        ("a cat-like dog", "cat", "a cat-like dog"),
        # Without spaces
        ("公园里的猫", "猫", "公园里的"),
        ("公园里的白猫和狗", "白猫", "公园里的和狗"),
        ("แมวในหิมะ", "แมว", "ในหิมะ"),
        ("공원의 고양이는", "고양이", "공원의 는"),
        ("a dog", "cat", "a dog"),
        ("a dog", " ", "a dog"),
    ],
)
def test_what_is_left_of_a_prompt(prompt: str, phrase: str, left: str) -> None:
    assert remove_thing(prompt, phrase) == left


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a cat next to a dog in a park", ["cat", "dog"]),
        ("a neon drawing of a crab on the beach", ["crab"]),
        ("a bee wearing a crown under the sea", ["bee", "crown"]),
        ("in a park, a cat and two dogs", ["cat", "dogs"]),
        ("in a park", []),
        ("there is a cat and a dog", ["cat", "dog"]),
        ("a cat chased by a spotted dog", ["cat", "dog"]),
    ],
)
def test_things_are_neither_places_nor_ways_to_draw(prompt: str, named: list[str]) -> None:
    assert find_things(prompt) == named


def test_of_a_scene_s_caption_the_caption_of_the_other_thing_is_left() -> None:
    scenes = (sample_scene(seed) for seed in BENCHMARK_SEEDS[:2000])
    two = [scene for scene in scenes if len(scene.things) == 2 and not scene.pair]
    assert len(two) > 300
    for scene in two:
        for which in (0, 1):
            style = f"{scene.style} " if scene.style else ""
            rest = f"{style}{scene.things[1 - which].phrase()} {scene.place}"
            assert remove_thing(scene.caption(), scene.things[which].noun) == rest
