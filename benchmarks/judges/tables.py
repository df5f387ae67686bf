"""How the benchmarks' tables write shares and means with their 95 % intervals, and the interval over concepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backbone.cli.sampling import ALL_STEPS
from backbone.evaluation.statistics import bootstrap_mean, wilson_interval


def format_percent(share: float) -> str:
    """`84.0 %`; – for NaN."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def format_interval(low: float, high: float) -> str:
    """`84.0–91.2 %`, of two shares."""
    return f"{format_percent(low).removesuffix(' %')}–{format_percent(high)}"


def format_share(right: Sequence[bool]) -> str:
    """`87.5 % (84.0–91.2 %)`: the share that is right, with Wilson's interval."""
    value, *interval = wilson_interval(sum(right), len(right))
    return f"{format_percent(value)} ({format_interval(*interval)})"


def format_mean_share(shares: Sequence[float]) -> str:
    """`87.5 % (84.0–91.2 %)`: the mean of shares, with the bootstrap's interval."""
    value, *interval = bootstrap_mean(shares)
    return f"{format_percent(value)} ({format_interval(*interval)})"


def format_mean(values: Sequence[float], style: str = ".2f") -> str:
    """`1.50 (1.20 to 1.80)`: a mean with the bootstrap's interval, each number in this style; – without values."""
    if not values:
        return "–"
    return "{} ({} to {})".format(*(format(number, style) for number in bootstrap_mean(values)))


def concept_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean share when the concepts themselves are drawn anew."""
    return bootstrap(np.asarray(values), lambda sample: float(sample.mean()))


def bootstrap(rows: Any, statistic: Callable[[Any], float], *, draws: int = 4000) -> tuple[float, float]:
    """The percentile interval, 95 %, of a statistic of rows drawn with replacement (Efron 1979)."""
    random = np.random.default_rng(0)
    statistics = [statistic(rows[random.integers(len(rows), size=len(rows))]) for _ in range(draws)]
    low, high = np.quantile(statistics, (0.025, 0.975))
    return float(low), float(high)


def name_drawing(steps: int, guidance: float, sampler: str, guided: tuple[float, float]) -> str:
    """How images are drawn, as the name of their folder."""
    stepped = "" if sampler == "ddim" else f"-{sampler}"
    share = "" if guidance == 1 or guided == ALL_STEPS else "-{:g}-{:g}".format(*guided)
    return f"{steps}-{guidance:g}{stepped}{share}"
