"""A preference run's logs as typed records: an error for a line of another type names the file and the key.

Numbers that are not finite are written as null.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from align.settings import EVALUATIONS, REWARDS
from backbone.io.files import read_jsonl
from backbone.training.run import LOG, LoggedLoss

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class LoggedInterval:
    """An estimate with its 95 % interval."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class LoggedFigures:
    """`align.objectives.metrics.Figures` as they were written."""

    accuracy: LoggedInterval
    by_level: tuple[float | None, ...]
    winner_change: float | None
    loser_change: float | None
    records: int
    draws: int


@dataclass(frozen=True)
class LoggedEvaluation:
    """A line of `evaluations.jsonl`."""

    step: int
    noise_gap: float | None = None
    held_out: LoggedFigures | None = None
    training: LoggedFigures | None = None


@dataclass(frozen=True)
class LoggedReward:
    """A line of `rewards.jsonl`: the mean score of a round's images."""

    round: int
    reward: float | None


@dataclass(frozen=True)
class LoggedStep(LoggedLoss):
    """A line of `log.jsonl`, with the mean score of the step's images where it drew some."""

    reward: float | None = None


def read_evaluations(run: Path) -> list[LoggedEvaluation]:
    """The evaluations so far; none of a run that has not evaluated."""
    return _read_lines(run / EVALUATIONS, LoggedEvaluation)


def read_rewards(run: Path) -> list[LoggedReward]:
    """The rounds so far."""
    return _read_lines(run / REWARDS, LoggedReward)


def read_steps(run: Path) -> list[LoggedStep]:
    """The steps so far."""
    return _read_lines(run / LOG, LoggedStep)


def _read_lines(path: Path, kind: type[Kind]) -> list[Kind]:
    return read_jsonl(path, kind) if path.exists() else []
