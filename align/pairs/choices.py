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

from backbone.io.console import UserError, notify_once
from backbone.io.files import append_jsonl, refuse_gone
from backbone.io.records import iterate_entries, read_as, refuse_pipe

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
    """Retracts the choice of this number, and of this user where one is named."""

    undo: int
    time: str = ""
    user: str | None = None


def append_entry(path: Path, entry: Choice | Undo) -> None:
    """Append a line and return once it is on disk (fsync). Raises `UserError` where the folder is gone."""
    refuse_gone(path.parent, "the choice")
    append_jsonl(path, asdict(entry))
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_choices(path: Path) -> list[Choice | Undo]:
    """All entries, oldest first; incomplete lines, as left by a crash or an editor, are skipped, which is printed.

    Raises `UserError` for another kind of entry.
    """
    if not path.exists():
        return []
    refuse_pipe(path)
    entries, torn = [], []
    for location, line in iterate_entries(path.read_bytes(), path):
        if isinstance(line, dict):
            entries.append(_read_entry(line, location[0].lower() + location[1:]))
        else:
            torn.append(location.split(" of ")[0].lower())
    if torn:
        notify_once(
            f"Skipped in {path}: {', '.join(torn[:3])}{' …' if torn[3:] else ''}, "
            f"{'an incomplete answer' if len(torn) == 1 else 'incomplete answers'}."
        )
    return entries


def _read_entry(line: dict[str, Any], location: str) -> Choice | Undo:
    if "undo" in line:
        return read_as(Undo, line, location)
    choice = read_as(Choice, line, location)
    if choice.verdict not in VERDICTS:
        raise UserError(f"{location} has no verdict that is known ({choice.verdict}). Remove the line.")
    return choice


def standing_choices(entries: Iterable[Choice | Undo]) -> list[Choice]:
    """Valid choices, oldest first: not retracted, and only the last answer of a person to a pair.

    Numbers need not be unique: concatenated files of two people have each of them twice. An undo retracts the last
    answer of its number before it.
    """
    standing: list[Choice] = []
    for entry in entries:
        if isinstance(entry, Choice):
            standing.append(entry)
            continue
        indices = [
            index
            for index, choice in enumerate(standing)
            if choice.number == entry.undo and entry.user in (None, choice.user)
        ]
        if indices:
            del standing[indices[-1]]
    last = {(choice.user, choice.pair, choice.repeat): index for index, choice in enumerate(standing)}
    return [standing[index] for index in sorted(last.values())]


@dataclass(frozen=True)
class Consistency:
    """Agreement of labellers with themselves: `agreed` of `repeats` hidden repeats."""

    agreed: int
    repeats: int


def measure_consistency(choices: Sequence[Choice]) -> Consistency:
    """Count the repeats of pairs (neither answer skipped), and those with the same preferred image, or none."""
    first = {(choice.user, choice.pair): choice for choice in choices if not choice.repeat}
    repeats = [
        (earlier, choice)
        for choice in choices
        if choice.repeat
        and (earlier := first.get((choice.user, choice.pair))) is not None
        and "skip" not in (choice.verdict, earlier.verdict)
    ]
    return Consistency(sum(earlier.preferred == later.preferred for earlier, later in repeats), len(repeats))
