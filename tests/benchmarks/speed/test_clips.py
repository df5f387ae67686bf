"""The clips' speed beside diffusers: both sides draw the same clip, and each has its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.models.model import Backbone
from benchmarks.speed.clips import AGAINST, time_sides, write_results


@pytest.mark.slow
def test_both_sides_draw_the_same_clip_and_are_timed_in_alternation(tiny: Backbone, tmp_path: Path) -> None:
    found, apart = time_sides(tiny, frames=3, steps=2, trained=2, repeats=1)
    assert apart < 1e-4 and set(found) == {*AGAINST, *AGAINST.values()}
    assert all(0 < low <= middle <= high for low, middle, high in found.values())
    write_results(tmp_path, "moji", found, "tiny")
    table = (tmp_path / "clips_speed-moji.md").read_text()
    assert table.count("\n| a ") == 4 and "AnimateDiffPipeline" in table
