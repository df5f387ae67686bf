"""95 % confidence intervals: Wilson's for proportions, the cluster bootstrap for means. Plain numbers in and out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval, whose ends are NaN where nothing says how far it may be off."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.1%} (no interval)"
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def wilson_interval(successes: float, trials: int) -> Interval:
    """A proportion with Wilson's score interval (Wilson 1927); a tie may count ½. Without trials: ½, from 0 to 1."""
    if trials == 0:
        return Interval(0.5, 0.0, 1.0)
    share, z2 = successes / trials, Z95 * Z95

    # (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def cluster_bootstrap(clusters: Sequence[Sequence[float]], *, seed: int = 0, rounds: int = 2000) -> Interval:
    """The mean over all values with a percentile interval, resampling whole clusters (Efron & Tibshirani 1993, ch. 13).

    Values of one cluster (noise samples of one pair, images of one prompt) are dependent: more of them alone do not
    narrow the interval. NaN without values.
    """
    import numpy as np

    filled = [cluster for cluster in clusters if len(cluster)]
    if not filled:
        return Interval(math.nan, math.nan, math.nan)
    sums = np.array([float(np.sum(cluster)) for cluster in filled])
    counts = np.array([len(cluster) for cluster in filled])
    random = np.random.default_rng(seed)

    # In each round as many clusters as there are, drawn with replacement [rounds, clusters]
    indices = random.integers(0, len(filled), (rounds, len(filled)))
    means = sums[indices].sum(1) / counts[indices].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def interval_of_clusters(clusters: Sequence[Sequence[float]]) -> Interval:
    """`cluster_bootstrap`, without ends where there is one cluster: it would be drawn again and again."""
    estimate = cluster_bootstrap(clusters)
    is_alone = sum(len(cluster) > 0 for cluster in clusters) < 2
    return Interval(estimate.value, math.nan, math.nan) if is_alone else estimate


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of independent values with its percentile bootstrap interval; NaN without values."""
    return cluster_bootstrap([[value] for value in values], seed=seed)
