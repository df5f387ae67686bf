"""Helpers of every run: graceful interruption, the step log, package versions, peak memory."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from backbone.io.console import UserError, end_signals, looks_like_prompt, notify, quote
from backbone.io.files import (
    fill_folder,
    json_text,
    make_empty_folder,
    make_numbered_folder,
    read_json,
    read_jsonl,
    read_metadata,
    refuse_existing,
    refuse_filled,
    remove_abandoned,
    write_bytes,
    write_json,
    write_text,
)
from backbone.io.records import parse_json, read_as
from backbone.io.written import describe_link, find_dead_link, written_path

FORWARDED_SIGNAL_SECONDS = 2.0  # seconds
RECORD = "settings.json"  # of a run
CHECKPOINT = "checkpoint.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers names them
CONCEPT_FILE = "concept.json"  # of what a run learned
CONDITION_FILE = "condition.json"  # of a control network, in its place
FINISHED = (CONCEPT_FILE, CONDITION_FILE)  # written at the end of a run, each of its kinds
# With any of these a folder holds a run
SAVED = (CHECKPOINT, f"best/{CONCEPT_FILE}", *FINISHED)
BEFORE_AND_AFTER = "before-and-after"  # pictures of `align train`
LEFT_BEHIND = (
    *("log.jsonl", "evaluations.jsonl", "rewards.jsonl", "condition_fidelity.jsonl", "report.html"),
    *("previews", "evaluations", "on", BEFORE_AND_AFTER, "tensorboard"),
)
UNFINISHED = "unfinished.json"  # of a folder that a command is filling, or was stopped in
WRITTEN = ("README.md", "sheet.png", "pytorch_lora_weights.safetensors")  # at the end of a run, among others
FOLDERS = (
    "best",
    "previews",
    "evaluations",
    "on",
    BEFORE_AND_AFTER,
    "tensorboard",
    "rounds",
    "pictures",
)  # of all kinds
FILES = (".png", ".html", ".md", ".json", ".jsonl", ".safetensors")  # as what is written into a folder ends
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
OF_A_FILE = (
    *PICTURES,
    *(".mp4", ".mov", ".mkv", ".avi", ".webm"),
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin"),
    *(".json", ".jsonl", ".yaml", ".yml", ".toml", ".csv", ".parquet"),
    *(".txt", ".md", ".html", ".pdf", ".log", ".tar", ".zip", ".gz"),
)
PREPARED = "prepared.json"  # of a folder of `customize prepare` or `align prepare`
MODEL_INDEX = "model_index.json"
# The files that tell a folder → what it is
MADE = {
    (PREPARED,): "a folder of prepared data",
    ("samples.json", "pictures"): "a folder of align sample",
    ("run.json", "sheet.png", "report.html"): "the folder of an edit",
}
Line = TypeVar("Line", bound="StepRecord")
PACKAGES = ("limner", "torch", "diffusers", "transformers", "peft", "accelerate")


class StepRecord(Protocol):
    """A line of a log: what it says is of this step."""

    @property
    def step(self) -> int: ...


def is_prepared(source: str | Path) -> bool:
    """Whether a source is a folder that `customize prepare` or `align prepare` has made."""
    return (written_path(source) / PREPARED).is_file()


def refuse_taken(run: Path, sources: Sequence[str] = ()) -> None:
    """`UserError` for a folder that holds a run: one of which a step has been saved, or a finished one.

    Settings alone do not take it, so that a command that failed can be repeated, corrected. One that cannot be written
    is refused too, and one of `sources`, what is learned from, or of somebody's own images or files of such names.
    """
    refuse_unwritable(run)
    refuse_among_others(run)
    if any(run.resolve() == written_path(source).resolve() for source in sources if source):
        raise UserError(
            f"{run} holds what is learned from, and a run writes images there too. Choose another --out."
        )
    refuse_in_the_way(run)
    own = [name for name in (*LEFT_BEHIND, *WRITTEN, "best") if (run / name).exists()]
    if own and not (run / RECORD).is_file():
        raise UserError(
            f"{run} is no run's folder, and a run would replace its {own[0]}. Choose another --out."
        )
    if run.is_dir() and not (run / RECORD).is_file():
        images = [entry.name for entry in run.iterdir() if entry.suffix.lower() in PICTURES]
        if images:
            raise UserError(
                f"{run} holds images ({min(images)}), and a run writes its own there too, which would be taken for "
                "more of them. Choose another --out."
            )
    if any((run / name).exists() for name in SAVED):
        raise UserError(
            f"{run} already holds a run. Continue it with --resume {quote(run)}, or choose another --out."
        )


def refuse_in_the_way(folder: Path) -> None:
    """`UserError` where a folder is called as a file that is written beside it, or a file as a folder that is."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        is_folder = entry.is_dir()
        if is_folder and entry.suffix in FILES:
            raise UserError(
                f"{entry} is a folder, and a file of such a name may be written there. Move it "
                "away, or choose another --out."
            )
        if not is_folder and entry.name in FOLDERS:
            raise UserError(
                f"{entry} is a file, and a folder of that name may be made there. Move it away, "
                "or choose another --out."
            )


def refuse_among_others(out: Path) -> None:
    """`UserError` for a new file or folder that would lie among the files of a model, or of what a command made.

    A new folder in that of a run is refused where the run gives its name to one of its own.
    """
    here = Path.cwd()
    for folder in out.absolute().parents:
        if here.is_relative_to(folder):  # the user works in it
            return
        first, *below = out.absolute().relative_to(folder).parts
        index = folder / MODEL_INDEX
        what = ""
        if any((folder / name).exists() for name in SAVED):
            among = (not below and out.suffix == ".safetensors") or first in (*LEFT_BEHIND, "best")
            what = "the folder of a run" if among else ""
        elif index.is_file():
            among = bool(below) and f'"{first}"' in index.read_text(encoding="utf-8", errors="replace")
            what = "a model, which would be another one then" if among else ""
        else:
            known = (what for names, what in MADE.items() if all((folder / name).exists() for name in names))
            what = next(known, "")
        if what:
            raise UserError(f"{out} would lie in {folder}, {what}. Name a place outside of it.")


def refuse_new_file(path: Path) -> None:
    """`UserError` for a file that exists, or that cannot be made or has no business where it would lie."""
    refuse_existing(path)
    refuse_among_others(path)
    refuse_unwritable(path.parent)


def no_run_folder(folder: Path) -> UserError:
    """The error of a run folder that is not there."""
    if looks_like_prompt(folder):
        return UserError(
            f"A run folder is wanted, and “{folder}” reads as a prompt. Name the folder that a training wrote."
        )
    return UserError(
        f"There is no run folder {folder}. Check the spelling, and the folder that it is named from."
    )


def refuse_unwritable(folder: Path) -> None:
    """`UserError` for a folder that cannot be made or written, which is said before anything is computed for it.

    One to be made that is called as a file is refused: a file was meant.
    """
    if folder.suffix.lower() in OF_A_FILE and not folder.exists():
        raise UserError(
            f"{folder} would be a folder that is called as a file. Name a folder: --out "
            f"{quote(folder.with_suffix(''))}."
        )
    if (link := find_dead_link(folder)) is not None:
        raise UserError(f"{link} {describe_link(link)}. Make a folder there, or choose another --out.")
    above = folder.absolute()
    place = next(path for path in (above, *above.parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{place} is a file, not a folder. Name another folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} is read-only. Change its permissions, or choose another place.")


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep a folder for this process: of two that start in the same moment, the second gets a `UserError`.

    The folder is made. Nothing is left in it: the lock is on the folder itself, and goes with the process. What killed
    writers left behind is removed.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder. Name another folder.")
    refuse_unwritable(folder)
    refuse_in_the_way(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process is writing {folder}. Wait for it, or choose another --out."
            ) from error
        except OSError:  # a file system without locks
            pass
        remove_abandoned(folder)
        yield
    finally:
        os.close(descriptor)


def refuse_new_folder(named: Path | None, default: Path, what: Mapping[str, Any] | None = None) -> None:
    """`UserError` for a folder that `hold_new_folder` could not make, to be called before anything is computed."""
    refuse_unwritable(named or default.parent)
    if named is not None and not _is_continued(named, what):
        refuse_among_others(named)
        refuse_filled(named)


def refuse_finished(folder: Path | None) -> None:
    """`UserError` for a named folder with contents, before it is known what a command that was stopped there wrote."""
    if folder is not None and not (folder / UNFINISHED).is_file():
        refuse_filled(folder)


@contextmanager
def hold_new_folder(
    named: Path | None, default: Path, what: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """The folder that a command writes, kept for it: `named`, new or empty, or `default`, numbered where that exists.

    Where nothing is in it at the end, or after a failure, it is gone again. `what` is all that its files depend on:
    where a command of the same was stopped, or killed, `named` is taken as it is, and its files, each of them whole,
    need not be made again. UNFINISHED says so until the end.
    """
    refuse_new_folder(named, default, what)
    goes_on = named is not None and _is_continued(named, what)
    folder = named if named is not None and goes_on else None
    if folder is None:
        folder = make_numbered_folder(default) if named is None else make_empty_folder(named)
    with hold_folder(folder):
        if not (goes_on and _is_continued(folder, what)):
            refuse_filled(folder)  # by a command that has been quicker
        if what is not None:
            write_json(folder / UNFINISHED, what)
        try:
            yield folder
        finally:
            if folder.is_dir() and not {entry.name for entry in folder.iterdir()} - {UNFINISHED}:
                shutil.rmtree(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)


@contextmanager
def fill_new_folder(named: Path | None, default: Path) -> Iterator[tuple[Path, Path]]:
    """The folder of `hold_new_folder`, and one inside it to write into, whose files are moved up when all are whole.

    So what a full disk or a kill ends leaves nothing of a table, or an image, that its other half is not beside.
    """
    with hold_new_folder(named, default) as folder, fill_folder(folder) as unfinished:
        yield folder, unfinished


def _is_continued(folder: Path, what: Mapping[str, Any] | None) -> bool:
    """Whether a command that writes `what` was stopped in a folder; `UserError` where one of something else was."""
    if what is None or not (folder / UNFINISHED).is_file():
        return False
    if read_json(folder / UNFINISHED) != json.loads(json_text(what)):
        raise UserError(
            f"{folder} holds what another command was writing when it was stopped. Repeat that one, name another "
            "folder, or remove this one."
        )
    return True


def name_beside(run: Path, end: str) -> Path:
    """The folder beside a run's whose name is the run's with `end` behind it; `.` and `..` have names too."""
    named = run if run.name not in ("", "..") else run.resolve()
    return named.with_name(f"{named.name}{end}")


def clear_failed_try(run: Path) -> None:
    """Remove what a try left behind that never saved a step: it would be taken for this run's.

    A folder without its settings is none of a run, and keeps what it holds.
    """
    if not (run / RECORD).is_file():
        return
    for path in (run / name for name in LEFT_BEHIND):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_bare_record(run: Path, *, whole: bool) -> None:
    """Remove a run's record if nothing else is in its folder, the `whole` folder where it was made for the run."""
    if not run.is_dir() or [entry.name for entry in run.iterdir()] != [RECORD]:
        return
    (run / RECORD).unlink()
    if whole:
        run.rmdir()


def read_record(run: Path) -> bytes | None:
    """The record of a run as it stands, to be put back by `restore_record`; None where there is none."""
    record = run / RECORD
    return record.read_bytes() if record.is_file() else None


def restore_record(run: Path, record: bytes | None) -> None:
    """Put a run's record back, and say so, where its folder was moved or removed while it was trained.

    So what is learned is a run's, which goes on and is drawn with.
    """
    if record is None or (run / RECORD).is_file():
        return
    write_bytes(run / RECORD, record)
    notify(f"{run} was moved or removed while it was trained. What is learned is written there all the same.")


_stopping: list[list[int]] = []  # the lists of the `stopping` contexts that are open


@contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Yield a list that stays empty until Ctrl-C, SIGTERM or SIGHUP arrives; a second one raises `KeyboardInterrupt`.

    Inside another `catch_interrupts` it is that one's list. In another thread than the main one none arrives.

    A launcher of several processes forwards a signal that the terminal has already sent to each of them: there a
    second one counts only after FORWARDED_SIGNAL_SECONDS.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield []
        return
    if _stopping:
        yield _stopping[-1]
        return
    caught: list[int] = []
    distributed = os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")
    next_counts_at = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal next_counts_at
        if caught and time.monotonic() >= next_counts_at:
            raise KeyboardInterrupt
        if caught:
            return
        next_counts_at = time.monotonic() + (FORWARDED_SIGNAL_SECONDS if distributed else 0.0)
        caught.append(number)
        notify("Stopping after this step …")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, *end_signals())}
    _stopping.append(caught)
    try:
        yield caught
    finally:
        _stopping.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def reading_checkpoint(path: Path) -> Iterator[None]:
    """What is wrong with a run's checkpoint while it is read is said with what can be done about it."""
    try:
        yield
    except UserError as error:
        raise damaged_checkpoint(path, f"it {first_sentence(error, path)}") from error


def damaged_checkpoint(path: Path, complaint: str) -> UserError:
    """The error of a run's checkpoint that is not as it was saved: no one else has another."""
    run = path.parent
    if any((run / name).is_file() for name in FINISHED):
        anew = f"What {run} has learned lies beside it, and is drawn with as before; to train anew, give another --out."
    else:
        anew = f"Or remove it: --resume {quote(run)} begins anew then, at step 0."
    return UserError(f"{path} is damaged: {complaint}. Put a copy of it back, if there is one. {anew}")


def first_sentence(error: UserError, path: Path) -> str:
    """What an error says of a file, without the file's name and without what to do."""
    said, _, _ = str(error).removeprefix(f"{path} ").partition(". ")
    return said.rstrip(".")


def read_steps_taken(run: Path) -> int:
    """The step of a run's last checkpoint, 0 where there is none."""
    path = run / CHECKPOINT
    if not path.exists():
        return 0
    with reading_checkpoint(path):
        return read_as(int, parse_json(read_metadata(path).get("step", "null"), path), path, "step")


def trim_log(path: Path, done: int) -> None:
    """Drop the log lines of steps after `done`, which a resumed run takes again."""
    if not path.exists():
        return
    lines = [(read_as(int, line.get("step"), path, "step"), line) for line in read_jsonl(path)]
    kept = [json.dumps(line) + "\n" for step, line in lines if step <= done]
    write_text(path, "".join(kept))  # atomic: a kill leaves the old log or the new one


def read_log(path: Path, kind: type[Line], *, done: int) -> list[Line]:
    """The lines of a log of the steps up to `done`, with or without `trim_log`; [] where there is no log."""
    return [line for line in read_jsonl(path, kind) if line.step <= done] if path.exists() else []


def package_versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES, those that are installed."""
    from importlib.metadata import PackageNotFoundError, version  # which imports half of `email`

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def peak_memory() -> int | None:
    """The peak resident set of this process in bytes; None where the system does not say.

    On Linux from /proc: `ru_maxrss` of a new program starts at the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        high_water_mark = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if high_water_mark:
            return 1024 * int(high_water_mark[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB elsewhere


def make_absolute(path: str) -> str:
    """An existing path with its whole name; everything else, as the id of a dataset, is left as it is."""
    place = written_path(path)
    return str(place.absolute()) if path and place.exists() else path


def run_name(images: str) -> str:
    """A run's default name: that of its image folder, or of its image file without the suffix."""
    path = written_path(images).resolve()
    return (path.stem if path.is_file() else path.name) or "run"
