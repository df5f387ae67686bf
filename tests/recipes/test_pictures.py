"""Aligned scenes: a thing of one size is the same pixels in the cells of the autoencoder, wherever it stands."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from backbone.world.rendering.render import draw_sprite, place_figures
from backbone.world.scene import Scene, sample_scene
from recipes.moji.data.pictures import ALONE, CELL, LOWEST, OF_TWO, SMALL, align_to_grid

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
