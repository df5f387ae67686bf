"""The measure of clips that follow their first frame."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backbone.io.files import read_json
from benchmarks.clips.first_frame import main, measure_psnr_in, sample_cases
from tests.tiny import tiny_moji, tiny_motion_adapter


def test_the_measure_counts_the_place_alone() -> None:
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    place = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    place[:, :, :2] = True
    other[:, :, :2] = 0.2  # a tenth of the range from −1 to 1
    assert measure_psnr_in(one, other, place) == pytest.approx(20, abs=1e-4)
    assert measure_psnr_in(one, other, ~place) == pytest.approx(100, abs=1e-4)


@pytest.mark.font
def test_cases_are_clips_that_differ_in_their_thing_alone() -> None:
    (case,) = sample_cases(1, frames=2)
    assert case.source.move == case.target.move == "left" and case.before.shape == (2, 3, 128, 128)
    assert (
        measure_psnr_in(case.before, case.after, ~case.place)
        > measure_psnr_in(case.before, case.after, case.place) + 10
    )
    assert "moving left" in case.target.caption()


@pytest.mark.font
@pytest.mark.slow
def test_the_benchmark_writes_its_table_beside_source_and_bound(tmp_path: Path) -> None:
    tiny_motion_adapter().save_pretrained(tmp_path / "motion")
    model = str(tiny_moji(tmp_path / "moji"))
    main(model=model, motion=str(tmp_path / "motion"), clips=1, frames=3, steps=2, out=tmp_path / "out")
    rows = read_json(tmp_path / "out" / "table.json")["rows"]
    assert list(rows)[:3] == ["source", "bound", "words"] and len(rows) == 8
    assert rows["source"]["flicker"]["value"] > 0 and rows["source"]["noun"]["value"] in (0, 50, 100)
    assert "track, px off" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "000.png").is_file()
