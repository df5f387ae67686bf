"""The reconstruction's benchmark runs through, goes on where it stopped, and its table says what its rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.edit import null_text


@pytest.mark.font
def test_a_small_one_runs_through_and_goes_on(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "steps": 2, "guidance": 3.0, "model": str(tiny_folder), "device": "cpu", "precision": "fp32", "out": tmp_path,
    }  # fmt: skip
    null_text.main(scenes=1, **options)
    first = json.loads((tmp_path / "null-text.json").read_text())["rows"]
    null_text.main(scenes=2, **options)
    rows = json.loads((tmp_path / "null-text.json").read_text())["rows"]
    assert rows[:1] == first and len(rows) == 2
    assert rows[0]["evaluations_0"] < rows[0]["evaluations_2"] <= rows[0]["evaluations_10"]
    assert "2 scenes, 2 steps, guidance 3" in capsys.readouterr().out
    null_text.main(scenes=1, **{**options, "guidance": 2.0})
    assert len(json.loads((tmp_path / "null-text.json").read_text())["rows"]) == 1, (
        "made for another guidance"
    )


def test_the_table_counts_the_scenes_that_got_worse() -> None:
    facts = {"model": "moji", "steps": 25, "guidance": 7.5, "machine": "cpu"}
    decibels = [{0: 20.0, 2: 22.0, 10: 24.0}, {0: 20.0, 2: 19.0, 10: 22.0}]
    rows: list[dict[str, Any]] = [
        {f"psnr_db_{k}": v for k, v in one.items()} | {f"evaluations_{k}": k for k in one} for one in decibels
    ]
    for row in rows:
        row["autoencoder_psnr_db"] = 26.0
    text = null_text.format_markdown(facts, rows)
    assert (
        "| 0 | 20.0 | – | 0 |" in text and "| 2 | 20.5 | 1 | 2 |" in text and "| 10 | 23.0 | 0 | 10 |" in text
    )
    assert "| the autoencoder alone | 26.0 |" in text
