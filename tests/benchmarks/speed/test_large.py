"""The benchmark of data that outgrows memory, in small: every part runs, and a second call measures nothing again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.pairs.prepared import Prepared
from backbone.io.files import read_json
from benchmarks.speed import large


def test_generated_pairs_are_a_prepared_folder_that_a_training_opens(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "IMAGES_SHARD", 16)
    folder = large.generate(tmp_path / "pairs", 40, str(tiny_folder))
    assert Prepared(folder).describe() == "40 pairs of 3 prompts"
    training, _ = large.open_training(folder, str(tiny_folder))
    assert len(list(large.take(training, 2))) == 2
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    large.generate(folder, 40, str(tiny_folder))
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before


@pytest.mark.slow
def test_all_of_it_runs_in_small_and_is_not_measured_twice(tiny_folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"few": 32, "many": 64, "model": str(tiny_folder), "pairs": 64}
    large.main(out=tmp_path, **asked)
    table = (tmp_path / "large.md").read_text()
    assert "| first step done, modules loaded |" in table and "left to the next try" in table
    before = (tmp_path / "large.json").stat().st_mtime_ns
    large.main(out=tmp_path, **asked)
    assert (tmp_path / "large.json").stat().st_mtime_ns == before
    found = read_json(tmp_path / "large.json")["killed"]
    assert found["kept"] + found["left"] == 64
