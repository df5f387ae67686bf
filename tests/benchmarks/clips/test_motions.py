"""The benchmark of learned motions: paths that no words name, and their tracks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backbone.io.files import read_json
from backbone.world.words import load_vocabulary
from benchmarks.clips.motions import (
    LEARNED,
    OTHERS,
    PATHS,
    PLACES,
    correlate,
    format_table,
    main,
    render_path,
    trace_path,
)
from tests.tiny import tiny_moji, tiny_motion_adapter


def test_paths_differ_and_nouns_that_are_drawn_were_not_learned_from() -> None:
    assert len(PATHS) == 8 and not set(LEARNED) & set(OTHERS)
    assert {*LEARNED, *OTHERS} <= set(load_vocabulary().nouns) and set(PLACES) <= set(
        load_vocabulary().places
    )
    tracks = [trace_path(path, 16) for path in PATHS.values()]
    assert all(np.ptp(track, axis=0).max() > 0.2 for track in tracks)


def test_the_table_has_a_row_for_each_path_and_one_of_all() -> None:
    table = format_table({name: {"[M]": [0.9, 0.9], "the base": [0.0, 0.2]} for name in PATHS})
    assert table.count("\n") == len(PATHS) + 3 and "| all | 0.90 (0.90–0.90) | 0.10" in table


@pytest.mark.font
@pytest.mark.parametrize(("name", "other"), [("leap", "pendulum"), ("pendulum", "there and back")])
def test_a_true_clip_s_track_is_its_path(name: str, other: str) -> None:
    film = render_path("dog", "in the snow", PATHS[name], 16)
    assert correlate([film], PATHS[name])[0] > 0.8 > correlate([film], PATHS[other])[0]


@pytest.mark.font
@pytest.mark.slow
def test_the_benchmark_learns_draws_and_compares(tmp_path: Path) -> None:
    tiny_motion_adapter().save_pretrained(tmp_path / "motion")
    model = str(tiny_moji(tmp_path / "moji"))
    asked = {"motion": str(tmp_path / "motion"), "model": model, "out": tmp_path / "out"}
    main(**asked, paths=1, frames=4, steps=1, drawn=1)  # type: ignore[arg-type]
    found = read_json(tmp_path / "out" / "table.json")["correlation"]["stairs"]
    assert len(found["[M]"]) == len(found["true clips"]) == len(OTHERS)
    main(**asked, paths=1, frames=4, steps=1, drawn=1)  # type: ignore[arg-type]
    assert read_json(tmp_path / "out" / "table.json")["correlation"]["stairs"] == found
