"""Pairs that `moji-edit` learns from: half with things on the autoencoder's grid, more of what is learned last."""

from __future__ import annotations

from collections import Counter

import pytest

from backbone.io.console import UserError
from backbone.world.edits import sample_edits
from backbone.world.rendering.render import place_figures
from backbone.world.scene import TRAINING_SEEDS
from recipes.moji.adapters.edit import HARD, select_edits
from recipes.moji.data.pictures import CELL


def test_things_of_the_last_pairs_stand_on_the_grid_at_one_place_before_and_after() -> None:
    edits, free = select_edits(300, 200), select_edits(300, 0)
    assert edits[:100] == free[:100]
    assert [one.instruction for one in edits] == [one.instruction for one in free]
    for one in edits[100:]:
        before, after = (place_figures(scene, scene.horizon) for scene in (one.before, one.after))
        assert [(f.x, f.foot, f.size) for f in before] == [(f.x, f.foot, f.size) for f in after]
        assert all((f.x - f.size / 2) % CELL == 0 for f in after)


def test_so_many_hard_pairs_are_added_and_no_scene_comes_twice() -> None:
    usual, with_hard = (
        Counter(one.kind for one in edits) for edits in (select_edits(200, 0), select_edits(300, 0, 100))
    )
    assert {kind: with_hard[kind] for kind in usual if kind not in HARD} == {
        kind: count for kind, count in usual.items() if kind not in HARD
    }
    assert sum(with_hard[kind] - usual[kind] for kind in HARD) == 100
    assert len({one.before.seed for one in select_edits(300, 0, 100)}) == 300


def test_edits_of_one_kind_alone_are_those_that_all_have() -> None:
    seeds = TRAINING_SEEDS[:400]
    every = sample_edits(seeds, 400)
    assert sample_edits(seeds, 400, kinds=("style",)) == [one for one in every if one.kind == "style"]


@pytest.mark.parametrize(("name", "parts"), [("aligned", (30, 0)), ("hard", (0, 30))])
def test_a_larger_part_than_there_are_pairs_is_refused(name: str, parts: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"--{name} 30 is more than --pairs 20"):
        select_edits(20, *parts)
