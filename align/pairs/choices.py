"""The labeller's append-only log: one line per choice or undo, flushed to disk before the next pair is shown.

Lines are never rewritten; `standing_choices` leaves out what was retracted. A process that is killed at any moment
costs at most the choice that was being made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from backbone.io.console import UserError
from backbone.io.files import append_jsonl, read_jsonl
from backbone.io.records import read_as

CHOICES = "choices.jsonl"
Verdict = Literal["left", "right", "tie", "both_bad", "skip"]
VERDICTS: tuple[str, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Choice:
    """One answer: the images on either side and the verdict.

    `pair` names the pair independently of the sides; `repeat` marks a pair that was shown before, hidden among the
    new ones, to measure the labeller's consistency.
    """

    number: int
    pair: str
    prompt: str
    left: str
    right: str
    verdict: str
    repeat: bool = False
    user: str = ""
    time: str = ""
    seconds: float = 0.0

    @property
    def preferred(self) -> str | None:
        """File of the preferred image; None for a tie, both bad, or a skip."""
        return {"left": self.left, "right": self.right}.get(self.verdict)


@dataclass(frozen=True)
class Undo:
    """Retracts the choice of this number."""

    undo: int
    time: str = ""


def append_entry(path: Path, entry: Choice | Undo) -> None:
    """Append a line and return once it is on disk (fsync). Raises `UserError` where the folder is gone."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is gone, so the choice was not kept. Put the folder back.")
    append_jsonl(path, asdict(entry))
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_choices(path: Path) -> list[Choice | Undo]:
    """All entries, oldest first; lines that a crash truncated are skipped.

    Raises `UserError` for another kind of entry.
    """
    lines = read_jsonl(path) if path.exists() else []
    return [_read_entry(line, f"entry {number} of {path}") for number, line in enumerate(lines, start=1)]


def _read_entry(line: dict[str, Any], where: str) -> Choice | Undo:
    if "undo" in line:
        return read_as(Undo, line, where)
    choice = read_as(Choice, line, where)
    if choice.verdict not in VERDICTS:
        raise UserError(f"{where} has no verdict that is known ({choice.verdict}). Remove the line.")
    return choice


def standing_choices(entries: Iterable[Choice | Undo]) -> list[Choice]:
    """Choices that stand, oldest first: not retracted, and of a pair that a person answered twice the last answer."""
    standing: dict[int, Choice] = {}
    for entry in entries:
        if isinstance(entry, Undo):
            standing.pop(entry.undo, None)
        else:
            standing[entry.number] = entry
    last = {(choice.user, choice.pair, choice.repeat): choice.number for choice in standing.values()}
    return [
        choice
        for choice in standing.values()
        if last[choice.user, choice.pair, choice.repeat] == choice.number
    ]


@dataclass(frozen=True)
class Consistency:
    """Agreement of labellers with themselves: `agreed` of `repeats` hidden repeats."""

    agreed: int
    repeats: int


def measure_consistency(choices: Sequence[Choice]) -> Consistency:
    """Count repeats whose pair was answered too (neither a skip), and those with the same preferred image, or none."""
    first = {(choice.user, choice.pair): choice for choice in choices if not choice.repeat}
    again = [
        (before, choice)
        for choice in choices
        if choice.repeat
        and (before := first.get((choice.user, choice.pair))) is not None
        and "skip" not in (choice.verdict, before.verdict)
    ]
    return Consistency(sum(before.preferred == after.preferred for before, after in again), len(again))
