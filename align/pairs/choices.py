"""The labeller's record: an append-only file of choices, a line each, on the disk before the next pair is shown.

A line is a choice or an undo. Nothing is ever rewritten: what counts is found by replaying the file, so that a
process that is killed at any moment costs at most the choice that was being made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from backbone.io.files import append_jsonl, read_jsonl

CHOICES = "choices.jsonl"
Verdict = Literal["left", "right", "tie", "both_bad", "skip"]
VERDICTS: tuple[str, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Choice:
    """One answer: which pictures were shown on which side, and what was said.

    `pair` names the pair whichever side its pictures were on; `repeat` marks a pair that was shown before, hidden
    among the new ones, to see whether the labeller agrees with themselves.
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
        """The file that was chosen; None for a tie, both bad, a skip."""
        return {"left": self.left, "right": self.right}.get(self.verdict)


@dataclass(frozen=True)
class Undo:
    """Takes back the choice of this number."""

    undo: int
    time: str = ""


def append_entry(path: Path, entry: Choice | Undo) -> None:
    """Adds a line and returns when it is on the disk."""
    append_jsonl(path, asdict(entry))
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_choices(path: Path) -> list[Choice | Undo]:
    """Every line of the record, oldest first; lines that a crash cut off and strangers are passed over."""
    return (
        [entry for line in read_jsonl(path) if (entry := _parse_entry(line)) is not None]
        if path.exists()
        else []
    )


def replay(entries: Iterable[Choice | Undo]) -> list[Choice]:
    """The choices that count, oldest first: those not taken back; of a pair answered twice, the last answer."""
    standing: dict[int, Choice] = {}
    for entry in entries:
        if isinstance(entry, Undo):
            standing.pop(entry.undo, None)
        else:
            standing[entry.number] = entry
    last = {(choice.pair, choice.repeat): choice.number for choice in standing.values()}
    return [choice for choice in standing.values() if last[choice.pair, choice.repeat] == choice.number]


@dataclass(frozen=True)
class Consistency:
    """How often the labeller agreed with themselves on hidden repeats."""

    agreed: int
    repeats: int


def measure_consistency(choices: Sequence[Choice]) -> Consistency:
    """Of repeats whose pair has an answer too, neither of them a skip: the same picture, or none, both times."""
    first = {choice.pair: choice for choice in choices if not choice.repeat}
    again = [
        (first[choice.pair], choice)
        for choice in choices
        if choice.repeat
        and choice.pair in first
        and "skip" not in (choice.verdict, first[choice.pair].verdict)
    ]
    return Consistency(sum(before.preferred == after.preferred for before, after in again), len(again))


def _parse_entry(line: dict[str, Any]) -> Choice | Undo | None:
    try:
        return Undo(**line) if "undo" in line else Choice(**line)
    except TypeError:
        return None
