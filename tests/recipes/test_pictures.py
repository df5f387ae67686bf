"""Scenes to train on: aligned ones are the same pixels in the autoencoder's cells, further kinds say what they are."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from backbone.io.console import UserError
from backbone.io.files import write_tensors
from backbone.models.locate import EMBEDDED
from backbone.world.rendering.render import draw_sprite, place_figures
from backbone.world.scene import Scene, sample_scene
from backbone.world.words import load_vocabulary
from recipes.moji.data.pictures import (
    ALONE,
    CELL,
    LOWEST,
    OF_TWO,
    SCENES,
    SMALL,
    align_to_grid,
    shard_path,
)
from recipes.moji.denoiser import Latents, latents_path

SEEDS = range(400)


def scenes() -> list[Scene]:
    return [sample_scene(seed, nouns=("dog", "bicycle", "umbrella")) for seed in SEEDS]


def test_things_lie_on_the_grid_at_one_of_few_sizes_near_where_they_were() -> None:
    for scene in scenes():
        before = place_figures(scene, scene.horizon)
        after = place_figures(align_to_grid(scene), scene.horizon)
        sizes = SMALL if scene.things[0].small else ALONE if len(before) == 1 else OF_TWO
        for was, now in zip(before, after, strict=True):
            assert (now.x - now.size / 2) % CELL == 0 and now.foot % CELL == 0 and now.foot <= LOWEST
            assert now.size in sizes and abs(now.size - was.size) <= 10 and abs(now.x - was.x) <= CELL
            assert now.shadow == was.shadow and not now.mirrored and now.angle == 0


def test_a_thing_of_one_size_begins_at_the_same_pixel_of_a_cell_everywhere() -> None:
    starts, places = defaultdict(set), defaultdict(set)
    for scene in scenes():
        for figure in place_figures(align_to_grid(scene), scene.horizon):
            plain = replace(figure, thing=replace(figure.thing, accessory=None, colour=None))
            _, left, top = draw_sprite(plain)
            key = plain.thing.noun, plain.size
            starts[key].add((left % CELL, top % CELL))
            places[key].add((left, top))
    assert all(len(found) == 1 for found in starts.values())
    assert max(map(len, places.values())) > 5


def test_scenes_held_in_any_way_say_so_and_others_have_no_name() -> None:
    words = load_vocabulary()
    kept = {
        *words.development_concepts.values(),
        *words.demo_concept.values(),
        *words.example_concept.values(),
    }
    assert not kept & set(words.other_nouns.values())  # what concepts are measured by is never seen
    assert not set(words.nouns.values()) & set(words.other_nouns.values())
    worn = 0
    for seed in SEEDS:
        scene, captions = SCENES["askew"](seed)
        assert scene.poses is not None and all(caption.endswith(", askew") for caption in captions)
        other, captions = SCENES["others"](seed)
        assert {thing.noun for thing in other.things} <= set(words.other_nouns)
        assert all("thing" in caption and other.things[0].noun not in caption.split() for caption in captions)
        worn += other.things[0].accessory is not None
    assert 0.25 * len(SEEDS) < worn < 0.4 * len(SEEDS)


def test_a_batch_has_the_shares_of_kinds_that_are_asked_and_nothing_held_out(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "latents").mkdir()
    for number, (kind, first) in enumerate((("scenes", 0), ("scenes", 2000), ("others", 0))):
        shard = shard_path(tmp_path, kind, first)
        shard.touch()
        shard.with_suffix(".json").write_text(json.dumps([[f"a {kind}", f"one {kind}"]] * 400))
        means = torch.full((400, 1, 1, 1), float(number))
        write_tensors(latents_path(tmp_path, shard), {"mean": means, "std": torch.zeros_like(means)}, {})
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    data, random = Latents(tmp_path, tokenizer, "cpu"), torch.Generator().manual_seed(0)
    clean, tokens = data.batch(4000, random, {"hard": 0.5, "others": 0.25})
    assert not (clean == 1).any()  # the last shard of usual scenes
    others = (clean == 2).flatten()
    assert abs(others.float().mean() - 0.25) < 0.03
    said = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert {text for text, other in zip(said, others, strict=True) if other} == {"a others", "one others", ""}
    with pytest.raises(UserError, match="No askew scenes"):
        data.batch(4, random, {"askew": 0.5})
    small = [seed for seed in range(400) if any(thing.small for thing in sample_scene(seed).things)]
    assert data.rows["small"].tolist() == small and set(small) <= set(data.rows["hard"].tolist())
