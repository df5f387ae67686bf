"""What every kind of run folder needs: a polite end, a log without lost steps, the versions it was made with."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from backbone.io.console import UserError, say
from backbone.io.files import read_jsonl, write_text

PASSED_ON_WITHIN = 2.0  # seconds
CHECKPOINT = "checkpoint.safetensors"
SAVED = (CHECKPOINT, "concept.json", "best/concept.json")  # with any of these a folder holds a run
LEFT_BEHIND = ("log.jsonl", "evaluations.jsonl", "rewards.jsonl", "previews", "evaluations", "tensorboard")
PACKAGES = ("limner", "torch", "diffusers", "transformers", "peft", "accelerate")


def refuse_taken(run: Path) -> None:
    """`UserError` for a folder that holds a run: one of which a step has been saved, or a finished one.

    Settings alone do not take it, so that a command that failed can be repeated, corrected.
    """
    if any((run / name).exists() for name in SAVED):
        raise UserError(
            f"{run} already holds a run. Continue it with --resume {run}, or choose another --out."
        )


def clear_failed_try(run: Path) -> None:
    """Removes what a try left behind that never saved a step: it would be taken for this run's."""
    for path in (run / name for name in LEFT_BEHIND):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


_stopping: list[list[int]] = []  # the lists of the `stopping` contexts that are open


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM comes; the second one interrupts at once.

    Inside another `stopping` it is that one's list.

    A launcher of several processes passes on the signal that the terminal has sent them already, so there the second
    one counts when it comes later than that.
    """
    if _stopping:
        yield _stopping[-1]
        return
    caught: list[int] = []
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    again = 0.0  # when another signal counts

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal again
        if caught and time.monotonic() >= again:
            raise KeyboardInterrupt
        if caught:
            return
        again = time.monotonic() + (PASSED_ON_WITHIN if several else 0.0)
        caught.append(number)
        say("Saving, then stopping …")

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    _stopping.append(caught)
    try:
        yield caught
    finally:
        _stopping.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


def trim_log(path: Path, done: int) -> None:
    """Forgets log lines of steps that will be taken again."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_jsonl(path) if line["step"] <= done]
    write_text(path, "".join(kept))  # at once, so that a kill leaves the old log or the new one


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> int | None:
    """The most bytes that this process has had in memory; None where the system does not say.

    On Linux from the process's own status: the kernel's `ru_maxrss` of a new program begins with what the process that
    started it had.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def run_name(images: str) -> str:
    """A run's name from its pictures: the folder's, or the file's without its ending."""
    path = Path(images).expanduser().resolve()
    return (path.stem if path.is_file() else path.name) or "run"
