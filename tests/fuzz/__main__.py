"""Goes through every door with damaged input and counts what comes of it.

    python -m tests.fuzz --cases 1500 --seed 0
    python -m tests.fuzz --door concept.json --case 12       one case again, with its traceback

A case is refused (one sentence), or accepted. It fails by any other exception, by hanging, by leaving something half
written, and where damaged input is accepted. The exit status is 1 when any failed.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import FrameType

OUTCOMES = ("refused", "accepted", "traceback", "hang", "half-written", "silent success")
FAILURES = OUTCOMES[2:]
LIMIT_SECONDS = 20
WHOLE = -1  # the case whose input is not damaged, so that it must be accepted


class Hang(BaseException):
    """A case took longer than LIMIT_SECONDS."""


def run_case(place: object, door: str, number: int, seed: int) -> tuple[str, str]:
    """(outcome, what was said) of one case, which depends on door, number and seed alone; −1 damages nothing."""
    from backbone.io.console import UserError, format_error
    from tests.fuzz.damage import Untouched
    from tests.fuzz.doors import DOORS, Place

    assert isinstance(place, Place)
    place.folder = place.root / "case"
    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir()
    before = Path.cwd()
    os.chdir(place.folder)
    try:
        with limited():
            random = Untouched(number) if number == WHOLE else Random(f"{seed}/{door}/{number}")
            damaged = DOORS[door](place, random)
    except Hang:
        return "hang", f"more than {LIMIT_SECONDS} s"
    except (UserError, OSError) as error:
        said = format_error(error)
        left = [path.name for path in place.folder.rglob("*.partial")]
        if said is None:
            return "traceback", traceback.format_exc()
        return ("half-written", ", ".join(left)) if left else ("refused", said)
    except Exception:  # noqa: BLE001 (that is what is counted)
        return "traceback", traceback.format_exc()
    finally:
        os.chdir(before)
    return ("silent success", "damaged input was taken") if damaged else ("accepted", "")


@contextmanager
def limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    root: Path, *, cases: int, seed: int, seconds: float | None = None
) -> dict[str, collections.Counter[str]]:
    """Counts of outcomes by door; doors take turns. Failures are printed as they come. Ends early after `seconds`.

    `AssertionError` where a door refuses what is whole.
    """
    from tests.fuzz.doors import DOORS, Place

    place = Place(root)
    for door in DOORS:
        outcome, said = run_case(place, door, WHOLE, seed)
        if outcome != "accepted":
            raise AssertionError(f"{door} is closed for what is whole: {outcome}, {said}")
    counts = {door: collections.Counter[str]() for door in DOORS}
    began = time.monotonic()
    for number in range(cases):
        door = list(DOORS)[number % len(DOORS)]
        outcome, said = run_case(place, door, number // len(DOORS), seed)
        counts[door][outcome] += 1
        if outcome in FAILURES:
            print(
                f"{outcome}: --door {door!r} --case {number // len(DOORS)} --seed {seed}\n{said}", flush=True
            )
        if seconds is not None and time.monotonic() - began > seconds:
            break
    return counts


def table(counts: dict[str, collections.Counter[str]]) -> str:
    """The counts as Markdown."""
    lines = [f"| door | {' | '.join(OUTCOMES)} |", "| --- |" + " --- |" * len(OUTCOMES)]
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    for door, count in {**counts, f"**all {total.total()}**": total}.items():
        lines.append(f"| {door} | {' | '.join(str(count[name]) for name in OUTCOMES)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The command."""
    from backbone.models.cache import VARIABLE

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--door")
    parser.add_argument("--case", type=int, default=0)
    asked = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        os.environ[VARIABLE] = f"{folder}/cache"
        if asked.door is not None:
            from tests.fuzz.doors import Place

            outcome, said = run_case(Place(Path(folder)), asked.door, asked.case, asked.seed)
            print(f"{outcome}\n{said}")
            return int(outcome in FAILURES)
        counts = fuzz(Path(folder), cases=asked.cases, seed=asked.seed)
    print(table(counts))
    return int(any(count[name] for count in counts.values() for name in FAILURES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
