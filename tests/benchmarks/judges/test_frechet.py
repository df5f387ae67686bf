"""The Fréchet distance is the closed form between normal distributions."""

from __future__ import annotations

import pytest
import torch

from benchmarks.judges.frechet import frechet_distance


def features(count: int = 400, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, 7)


def test_a_set_is_at_no_distance_from_itself() -> None:
    assert frechet_distance(features(), features()) == pytest.approx(0, abs=1e-9)


def test_a_shift_counts_by_its_square() -> None:
    assert frechet_distance(features(), features() + 0.5) == pytest.approx(6 * 0.25)


def test_a_spread_counts_by_the_difference_of_deviations() -> None:
    """Of commuting covariances the distance is Σ (σ − τ)²."""
    variances = features().double().var(0)
    assert frechet_distance(features(), 3 * features()) == pytest.approx(
        float(4 * variances.sum() + (2 * features().double().mean(0)).square().sum())
    )


def test_fewer_features_than_dimensions_are_no_obstacle() -> None:
    few = features(4)
    # Rounding of the roots of empty directions
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(few, features(4, seed=1)) > 0
