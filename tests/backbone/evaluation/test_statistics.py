"""Intervals: known values, and that they cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backbone.evaluation.statistics import (
    bootstrap_mean,
    cluster_bootstrap,
    interval_of_clusters,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n)[1:] == pytest.approx((low, high), abs=5e-5)


def test_a_wilson_interval_mirrors_and_holds_its_share() -> None:
    for right in range(21):
        _, low, high = wilson_interval(right, 20)
        assert 0 <= low <= right / 20 <= high <= 1
        assert wilson_interval(20 - right, 20)[1:] == pytest.approx((1 - high, 1 - low))


def test_nothing_is_known_without_trials() -> None:
    assert wilson_interval(0, 0) == (0.5, 0.0, 1.0)
    assert math.isnan(cluster_bootstrap([]).value)


def test_a_bootstrap_covers_the_truth_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = cluster_bootstrap(random.normal(1.0, 1.0, (60, 1)).tolist(), seed=trial, rounds=400)
        covered += found.low <= 1.0 <= found.high
    assert 180 <= covered <= 199


def test_repeating_values_within_a_cluster_does_not_narrow_the_interval() -> None:
    random = np.random.default_rng(1)
    values = random.normal(0.0, 1.0, 50)
    once = cluster_bootstrap([[float(value)] for value in values])
    often = cluster_bootstrap([[float(value)] * 10 for value in values])
    assert often.high - often.low == pytest.approx(once.high - once.low)


def test_an_interval_reads_as_a_sentence() -> None:
    assert str(wilson_interval(50, 100)) == "50.0% (40.4% to 59.6%)"


def test_an_interval_holds_its_mean_and_is_wider_for_fewer() -> None:
    values = [0.1, 0.5, 0.9, 0.4]
    mean, low, high = bootstrap_mean(values)
    _, lower, higher = bootstrap_mean(values * 20)
    assert mean == pytest.approx(0.475)
    assert low < mean < high
    assert higher - lower < high - low


def test_a_single_pair_has_no_interval_however_often_it_is_measured() -> None:
    alone = interval_of_clusters([[1.0, 0.0, 1.0, 1.0], []])
    assert alone.value == 0.75 and math.isnan(alone.low) and str(alone) == "75.0% (no interval)"
    assert interval_of_clusters([[1.0], [0.0]]) == cluster_bootstrap([[1.0], [0.0]])
