"""What every kind of run folder needs: a polite end, a log without lost steps, the versions it was made with."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from backbone.io.console import notify
from backbone.io.files import read_jsonl, write_text

FORWARDED_SIGNAL_SECONDS = 2.0  # seconds
PACKAGES = ("limner", "torch", "diffusers", "transformers", "peft", "accelerate")


@contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM comes; the second one interrupts at once.

    A launcher of several processes passes on the signal that the terminal has sent them already, so there the second
    one counts when it comes later than that.
    """
    caught: list[int] = []
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    again = 0.0  # when another signal counts

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal again
        if caught and time.monotonic() >= again:
            raise KeyboardInterrupt
        if caught:
            return
        again = time.monotonic() + (FORWARDED_SIGNAL_SECONDS if several else 0.0)
        caught.append(number)
        notify("Saving, then stopping …")

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def trim_log(path: Path, done: int) -> None:
    """Forgets log lines of steps that will be taken again."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_jsonl(path) if line["step"] <= done]
    write_text(path, "".join(kept))  # at once, so that a kill leaves the old log or the new one


def package_versions() -> dict[str, str]:
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
