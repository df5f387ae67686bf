"""A labelling session: the next question and the answers so far, determined by the folder, the seed and the log.

Pairs come in a fixed random order, blind, with random sides. About one question in ten is a hidden repeat of an earlier
pair, with random sides again, to estimate the labeller's consistency: no model can be expected to agree with them more.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

from align.pairs.choices import (
    CHOICES,
    VERDICTS,
    Choice,
    Undo,
    append_entry,
    measure_consistency,
    read_choices,
    standing_choices,
)
from backbone.evaluation.statistics import Interval, wilson_interval
from backbone.io.console import UserError, notify
from backbone.io.progress import progress
from backbone.media.sources.decode import BadImageError
from backbone.media.sources.record import ImageRecord

REPEAT_SHARE = 0.1  # probability that a question is a hidden repeat
REPEAT_DISTANCE = 5  # least number of questions between a pair and its repeat


@dataclass(frozen=True)
class LabelPair:
    """Two images of one prompt to choose between, files relative to the folder."""

    name: str
    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class Question:
    """The pair that is shown as question `number`, and its sides."""

    number: int
    pair: LabelPair
    left: str
    right: str
    repeat: bool


class StaleAnswer(Exception):
    """An answer to a question that is no longer the open one (a second window, a double click)."""


class Session:
    """One labeller's work on a folder, independent of others' choices there.

    State is read from the log at the start, and each answer is on disk before the next question is given.
    """

    def __init__(self, folder: Path, pairs: Sequence[LabelPair], *, seed: int = 0, user: str = "") -> None:
        if not pairs:
            raise UserError(f"{folder} holds no two pictures of one prompt. Draw some with `align sample`.")
        self.folder, self.seed, self.user = folder, seed, user
        self.pairs = {pair.name: pair for pair in pairs}
        self.path = folder / CHOICES
        entries = read_choices(self.path)
        self.choices = [
            choice
            for choice in standing_choices(entries)
            if choice.pair in self.pairs and choice.user == user
        ]
        self.next_number = 1 + max(
            (entry.number for entry in entries if isinstance(entry, Choice)), default=-1
        )
        self.shown_at = time.monotonic()

    @property
    def question(self) -> Question | None:
        """The open question; None when every pair has an answer."""
        pair, repeat = self._choose_next()
        if pair is None:
            return None
        is_swapped = self._make_random("side").random() < 0.5
        left, right = (pair.second, pair.first) if is_swapped else (pair.first, pair.second)
        return Question(self.next_number, pair, left, right, repeat)

    def answer(self, number: int, verdict: str) -> None:
        """Log an answer. Raises `StaleAnswer` unless `number` is the open question's, ValueError for a bad verdict."""
        question = self.question
        if verdict not in VERDICTS:
            raise ValueError(f"no verdict is called {verdict!r}")
        if question is None or number != question.number:
            raise StaleAnswer
        choice = Choice(
            number=number,
            pair=question.pair.name,
            prompt=question.pair.prompt,
            left=question.left,
            right=question.right,
            verdict=verdict,
            repeat=question.repeat,
            user=self.user,
            time=_now(),
            seconds=round(time.monotonic() - self.shown_at, 2),
        )
        append_entry(self.path, choice)
        self.choices.append(choice)
        self.next_number += 1
        self.shown_at = time.monotonic()

    def undo(self, number: int) -> None:
        """Retract the last answer; its pair is asked again. Raises `StaleAnswer` unless `number` is the open one's."""
        if number != self.next_number or not self.choices:
            raise StaleAnswer
        append_entry(self.path, Undo(self.choices[-1].number, _now(), self.user))
        self.choices.pop()
        self.next_number += 1  # an answer in another window to the question before is stale
        self.shown_at = time.monotonic()

    @property
    def answered(self) -> int:
        """Number of pairs with an answer."""
        return len({choice.pair for choice in self.choices if not choice.repeat})

    @property
    def agreement(self) -> tuple[Interval, int]:
        """(self-agreement with Wilson interval, number of repeats)."""
        consistency = measure_consistency(self.choices)
        return wilson_interval(consistency.agreed, consistency.repeats), consistency.repeats

    def _choose_next(self) -> tuple[LabelPair | None, bool]:
        done = {choice.pair for choice in self.choices if not choice.repeat}
        remaining = [pair for name, pair in self.pairs.items() if name not in done]
        if not remaining:
            return None, False
        repeated = {choice.pair for choice in self.choices if choice.repeat}
        settled = self.choices[: max(0, len(self.choices) - REPEAT_DISTANCE)]
        old = [
            choice.pair
            for choice in settled
            if not choice.repeat and choice.verdict != "skip" and choice.pair not in repeated
        ]
        draw = self._make_random("repeat")
        if old and draw.random() < REPEAT_SHARE:
            return self.pairs[draw.choice(old)], True
        return remaining[0], False

    def _make_random(self, purpose: str) -> random.Random:
        """Random generator of the open question: the same after a restart, and after an undo."""
        return random.Random(f"{self.seed}/{len(self.choices)}/{purpose}")


def leave_out_unreadable(folder: Path, pictures: Sequence[Sequence[str]]) -> list[list[str]]:
    """The images of each prompt that can be shown; prints a line for each that cannot.

    Raises `UserError` where no prompt has two left.
    """
    readable: list[list[str]] = []
    with progress(sum(map(len, pictures)), "reading") as bar:
        for names in pictures:
            readable.append([])
            for name in names:
                try:
                    ImageRecord(folder / name).open(at_least=64)
                    readable[-1].append(name)
                except BadImageError as error:
                    notify(f"{error.name} {error.reason}, so it is not asked about.")
                bar.advance(images=1)
    if all(len(names) < 2 for names in readable):
        raise UserError(
            f"{folder} holds no two usable pictures of one prompt. Draw them with `align sample`."
        )
    return readable


def list_label_pairs(
    prompts: Sequence[str], pictures: Sequence[Sequence[str]], *, seed: int = 0
) -> list[LabelPair]:
    """All pairs of images of each prompt, in the order of the questions.

    In rounds: in each no two pairs share an image, over all prompts in random order. So every prompt has been seen
    about equally often whenever the labeller stops.
    """
    rounds: dict[int, list[LabelPair]] = {}
    for prompt, names in zip(prompts, pictures, strict=True):
        shuffled = list(names)
        random.Random(f"{seed}/{prompt}").shuffle(shuffled)
        pair_counts: dict[str, int] = {}
        for first, second in _order_disjoint_first(shuffled):
            turn = max(pair_counts.get(first, 0), pair_counts.get(second, 0))
            pair_counts[first] = pair_counts[second] = turn + 1
            name = "+".join(sorted(Path(file).stem for file in (first, second)))
            rounds.setdefault(turn, []).append(LabelPair(name, prompt, first, second))
    ordered = []
    for turn in sorted(rounds):
        random.Random(f"{seed}/round {turn}").shuffle(rounds[turn])
        ordered += rounds[turn]
    return ordered


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder while it is labelled; `UserError` if another session holds it, or choices cannot be saved."""
    choices = folder / CHOICES
    target = choices if choices.exists() else folder
    if not os.access(target, os.W_OK):
        raise UserError(
            f"{target} is read-only, so no choice could be kept. Change its permissions, or copy the folder."
        )
    path = folder / ".labelling"
    # The file stays: another person who labels the folder next has to be able to open it
    descriptor = os.open(path, os.O_CREAT | os.O_RDONLY, 0o666)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{folder} is being labelled by another `align` already. Use its window, or end it."
        ) from error
    except OSError:  # a file system without locks
        pass


def _order_disjoint_first(names: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs of names, first those that share none (01, 23, …), then the rest."""
    first = list(zip(names[::2], names[1::2], strict=False))
    return first + [pair for pair in combinations(names, 2) if pair not in first]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
