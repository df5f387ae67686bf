"""Pairs that `moji-edit` learns from: half with things on the autoencoder's grid, the same before and after."""

from __future__ import annotations

import pytest

from backbone.io.console import UserError
from backbone.world.edits import sample_edits
from backbone.world.rendering.render import place_figures
from backbone.world.scene import TRAINING_SEEDS
from recipes.moji.adapters.edit import select_edits
from recipes.moji.data.pictures import CELL


def test_things_of_the_last_pairs_stand_on_the_grid_at_one_place_before_and_after() -> None:
    edits, free = select_edits(300, 200), sample_edits(TRAINING_SEEDS, 300)
    assert edits[:100] == free[:100]
    assert [one.instruction for one in edits] == [one.instruction for one in free]
    for one in edits[100:]:
        before, after = (place_figures(scene, scene.horizon) for scene in (one.before, one.after))
        assert [(f.x, f.foot, f.size) for f in before] == [(f.x, f.foot, f.size) for f in after]
        assert all((f.x - f.size / 2) % CELL == 0 for f in after)


def test_more_aligned_pairs_than_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="--aligned 30 is more than --pairs 20"):
        select_edits(20, 30)
