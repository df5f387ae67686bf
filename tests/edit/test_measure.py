"""Figures of edits, on pictures whose figures are known."""

from __future__ import annotations

import math

import pytest
import torch

from backbone.evaluation import image_metrics as measure


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_pictures_are_equal() -> None:
    x = picture()
    assert measure.mse(x, x) == 0 and measure.psnr(x, x) == pytest.approx(100)
    assert measure.ssim(x, x) == pytest.approx(1, abs=1e-5)


def test_a_known_error_has_its_decibels() -> None:
    x = torch.zeros(3, 32, 32)
    assert measure.psnr(x, x + 0.2) == pytest.approx(20, abs=1e-4), "0.1 of a range of 1"
    assert measure.ssim(x - 1, x + 1) == pytest.approx(0.01**2 / (1 + 0.01**2), rel=1e-3)


def test_the_background_is_measured_over_its_own_pixels_and_pie_flatters_large_masks() -> None:
    before = torch.zeros(3, 32, 32)
    after = before + 0.2
    small, large = torch.zeros(32, 32), torch.zeros(32, 32)
    small[:8], large[:24] = 1, 1
    narrow, wide = (measure.background_metrics(before, after, mask) for mask in (small, large))
    assert narrow["background_psnr_db"] == wide["background_psnr_db"] == pytest.approx(20, abs=1e-4)
    assert narrow["background_pie_psnr_db"] == pytest.approx(20 - 10 * math.log10(0.75), abs=1e-3)
    assert wide["background_pie_psnr_db"] == pytest.approx(20 - 10 * math.log10(0.25), abs=1e-3)


def test_what_changed_inside_the_mask_is_not_the_backgrounds() -> None:
    before, mask = picture(), torch.zeros(32, 40)
    mask[4:20, 4:20] = 1
    after = torch.where(mask > 0, -before, before)
    assert measure.background_metrics(before, after, mask)["background_psnr_db"] == pytest.approx(100)


def test_without_a_background_there_is_no_figure() -> None:
    for mask in (None, torch.ones(32, 40)):
        assert set(measure.background_metrics(picture(), picture(1), mask).values()) == {None}
    assert measure.mean_of_defined([None, 1.0, 3.0]) == 2.0 and measure.mean_of_defined([None]) is None
