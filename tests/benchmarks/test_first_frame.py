"""The measure of clips that follow their first frame."""

from __future__ import annotations

import pytest
import torch

from benchmarks.first_frame import psnr_where, sample_cases


def test_the_measure_counts_the_place_alone() -> None:
    one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    place = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    place[:, :, :2] = True
    other[:, :, :2] = 0.2  # a tenth of the range from −1 to 1
    assert psnr_where(one, other, place) == pytest.approx(20, abs=1e-4)
    assert psnr_where(one, other, ~place) == pytest.approx(100, abs=1e-4)


@pytest.mark.font
def test_cases_are_clips_that_differ_in_their_thing_alone() -> None:
    (case,) = sample_cases(1, frames=2)
    assert case.source.move == case.target.move == "left" and case.before.shape == (2, 3, 128, 128)
    assert (
        psnr_where(case.before, case.after, ~case.place)
        > psnr_where(case.before, case.after, case.place) + 10
    )
    assert "moving left" in case.target.caption()
