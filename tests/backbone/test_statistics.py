"""Intervals: known values, and that they cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backbone.statistics import bootstrap, interval, wilson


def test_wilson_s_interval_at_known_values() -> None:
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611."""
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_nothing_is_known_without_trials() -> None:
    assert wilson(0, 0) == (0.5, 0.0, 1.0)
    assert math.isnan(bootstrap([]).value)


def test_a_bootstrap_covers_the_truth_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = bootstrap(random.normal(1.0, 1.0, (60, 1)).tolist(), seed=trial, rounds=400)
        covered += found.low <= 1.0 <= found.high
    assert 180 <= covered <= 199


def test_repeating_values_within_a_cluster_does_not_narrow_the_interval() -> None:
    random = np.random.default_rng(1)
    values = random.normal(0.0, 1.0, 50)
    once = bootstrap([[float(value)] for value in values])
    often = bootstrap([[float(value)] * 10 for value in values])
    assert often.high - often.low == pytest.approx(once.high - once.low)


def test_an_interval_reads_as_a_sentence() -> None:
    assert str(wilson(50, 100)) == "50.0% (40.4% to 59.6%)"


def test_an_interval_holds_its_mean_and_is_wider_for_fewer() -> None:
    values = [0.1, 0.5, 0.9, 0.4]
    mean, low, high = interval(values)
    _, lower, higher = interval(values * 20)
    assert mean == pytest.approx(0.475)
    assert low < mean < high
    assert higher - lower < high - low
