"""Helpers of every run: graceful interruption, the step log, package versions, peak memory."""

from __future__ import annotations

import difflib
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

FORWARDED_SIGNAL_SECONDS = 2.0
RECORD = "settings.json"  # of a run
CHECKPOINT = "checkpoint.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers names them
CONCEPT_FILE = "concept.json"  # describes what a run learned
CONDITION_FILE = "condition.json"  # the same for a control network
FINISHED = (CONCEPT_FILE, CONDITION_FILE)  # one of them is written at the end of a run
# A folder with any of these holds a run
SAVED = (CHECKPOINT, f"best/{CONCEPT_FILE}", *FINISHED)
BEFORE_AND_AFTER = "before-and-after"  # pictures of `align train`
LEFT_BEHIND = (
    *("log.jsonl", "evaluations.jsonl", "rewards.jsonl", "condition_fidelity.jsonl", "report.html"),
    *("previews", "evaluations", "on", BEFORE_AND_AFTER, "tensorboard"),
)
UNFINISHED = "unfinished.json"  # in a folder that a command is filling, or was filling when it was stopped
# Some of the files that the end of a run writes
FINAL_FILES = ("README.md", "sheet.png", LORA_WEIGHTS)
# Folders that commands write into one
FOLDERS = ("best", "previews", "evaluations", "on", BEFORE_AND_AFTER, "tensorboard", "rounds", "pictures")
FILES = (".png", ".html", ".md", ".json", ".jsonl", ".safetensors")  # suffixes of files that commands write
DRAWN_RECORD = "run.json"  # of an edit or a clip
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
FILE_SUFFIXES = (
    *PICTURES,
    *(".mp4", ".mov", ".mkv", ".avi", ".webm"),
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin"),
    *(".json", ".jsonl", ".yaml", ".yml", ".toml", ".csv", ".parquet"),
    *(".txt", ".md", ".html", ".pdf", ".log", ".tar", ".zip", ".gz"),
)
PREPARED = "prepared.json"  # in a folder of `customize prepare` or `align prepare`
MODEL_INDEX = "model_index.json"
# The files that identify a folder → what it is
COMMAND_FOLDERS = {
    (PREPARED,): "a folder of prepared data",
    ("samples.json", "pictures"): "a folder of align sample",
    ("run.json", "sheet.png", "report.html"): "the folder of an edit",
}
Line = TypeVar("Line", bound="StepRecord")
PACKAGES = ("limner", "torch", "diffusers", "transformers", "peft", "accelerate")


class StepRecord(Protocol):
    """A line of a log, with its step."""

    @property
    def step(self) -> int: ...


def is_prepared(source: str | Path) -> bool:
    """Whether a source is a folder of `customize prepare` or `align prepare`."""
    return (written_path(source) / PREPARED).is_file()


def refuse_taken(run: Path, sources: Sequence[str] = ()) -> None:
    """Raise `UserError` for a folder that holds a run with a saved step, or a finished one.

    A folder with settings alone is free, so that a failed command can be corrected and repeated. Also refused: a folder
    that cannot be written, one of `sources` (the training data), and one with images or files that a run would replace.
    """
    refuse_unwritable(run)
    refuse_among_others(run)
    # Data that is not there is said to be missing by what reads it
    if os.path.lexists(run) and any(
        run.resolve() == written_path(source).resolve() for source in sources if source
    ):
        raise UserError(
            f"{run} holds what is learned from, and a run writes images there too. Choose another --out."
        )
    refuse_in_the_way(run)
    existing = [name for name in (*LEFT_BEHIND, *FINAL_FILES, "best") if (run / name).exists()]
    if existing and not (run / RECORD).is_file():
        raise UserError(
            f"{run} is no run's folder, and a run would replace its {existing[0]}. Choose another --out."
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
    """Raise `UserError` for a folder with a file's name that a command may write, or a file with a folder's."""
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
    """Raise `UserError` for a new file or folder inside a model's folder, or inside one that a command made.

    Inside a run's folder only names that the run itself uses are refused.
    """
    working_folder = Path.cwd()
    for folder in out.absolute().parents:
        if working_folder.is_relative_to(folder):  # the working folder is inside
            return
        first, *below = out.absolute().relative_to(folder).parts
        index = folder / MODEL_INDEX
        description = ""
        if any((folder / name).exists() for name in SAVED):
            is_among = (not below and out.suffix == ".safetensors") or first in (*LEFT_BEHIND, "best")
            description = "the folder of a run" if is_among else ""
        elif index.is_file():
            is_among = bool(below) and f'"{first}"' in index.read_text(encoding="utf-8", errors="replace")
            description = "a model, which would be another one then" if is_among else ""
        else:
            descriptions = (
                description
                for names, description in COMMAND_FOLDERS.items()
                if all((folder / name).exists() for name in names)
            )
            description = next(descriptions, "")
        if description:
            raise UserError(f"{out} would lie in {folder}, {description}. Name a place outside of it.")


def check_new_file(path: Path) -> None:
    """Raise `UserError` for an existing file, one in another command's folder, or one that cannot be written."""
    refuse_existing(path)
    refuse_among_others(path)
    refuse_unwritable(path.parent)


def no_run_folder(folder: Path) -> UserError:
    """The error for a run folder that does not exist."""
    if looks_like_prompt(folder):
        return UserError(
            f"A run folder is wanted, and “{folder}” reads as a prompt. Name the folder that a training wrote."
        )
    near = find_near_run(folder)
    remedy = "Check the spelling, and the folder that it is named from."
    return UserError(f"There is no run folder {folder}. {f'Did you mean {near}?' if near else remedy}")


def find_near_run(folder: Path) -> Path | None:
    """The run that this name was probably to be: the one of that name in runs/, or of a similar one beside it."""
    for place in (folder.parent, Path("runs") / folder.parent):
        runs = {path.parent.name for path in place.glob(f"*/{RECORD}")} if not folder.is_absolute() else set()
        if matches := difflib.get_close_matches(folder.name, sorted(runs), n=1):
            return place / matches[0]
    return None


def refuse_unwritable(folder: Path) -> None:
    """Raise `UserError` for a folder that cannot be made or written, before anything is computed for it.

    A new folder with the suffix of a file is refused too.
    """
    if folder.suffix.lower() in FILE_SUFFIXES and not folder.exists():
        raise UserError(
            f"{folder} would be a folder that is called as a file. Name a folder: --out "
            f"{quote(folder.with_suffix(''))}."
        )
    if (link := find_dead_link(folder)) is not None:
        raise UserError(f"{link} {describe_link(link)}. Make a folder there, or choose another --out.")
    absolute = folder.absolute()
    nearest = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file, not a folder. Name another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{nearest} is read-only. Change its permissions, or choose another place.")


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make a folder and lock it for this process: another one that wants it meanwhile gets a `UserError`.

    The lock is on the folder itself, leaves no file, and ends with the process. Temporary files of killed writers are
    removed.
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


def check_new_folder(out: Path | None, default: Path, inputs: Mapping[str, Any] | None = None) -> None:
    """Raise `UserError` for a folder that `hold_new_folder` would refuse, before anything is computed."""
    refuse_unwritable(out or default.parent)
    if out is not None and not _is_continued(out, inputs):
        refuse_among_others(out)
        refuse_filled(out)


def refuse_finished(folder: Path | None) -> None:
    """Raise `UserError` for a folder with contents, unless a command was stopped there (checked again later)."""
    if folder is not None and not (folder / UNFINISHED).is_file():
        refuse_filled(folder)


@contextmanager
def hold_new_folder(
    out: Path | None, default: Path, inputs: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield a locked folder to write into: `out`, new or empty, or `default`, numbered if that exists.

    An empty folder is removed at the end. `inputs` is all that the files depend on: if a command with equal inputs
    was stopped in `out`, the folder is continued, and its files, each of them complete, need not be made again.
    UNFINISHED holds the inputs until the end.
    """
    check_new_folder(out, default, inputs)
    is_continued = out is not None and _is_continued(out, inputs)
    if out is not None and is_continued:
        folder = out
    elif out is not None:
        folder = make_empty_folder(out)
    else:
        folder = make_numbered_folder(default)
    with hold_folder(folder):
        if not (is_continued and _is_continued(folder, inputs)):
            refuse_filled(folder)  # another command may have written it meanwhile
        if inputs is not None:
            write_json(folder / UNFINISHED, inputs)
        try:
            yield folder
        finally:
            if folder.is_dir() and not {entry.name for entry in folder.iterdir()} - {UNFINISHED}:
                shutil.rmtree(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)


@contextmanager
def fill_new_folder(out: Path | None, default: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the folder of `hold_new_folder`, and one inside it, whose files are moved up when all are complete.

    So a full disk or a kill leaves no table without its images.
    """
    with hold_new_folder(out, default) as folder, fill_folder(folder) as unfinished:
        yield folder, unfinished


def _is_continued(folder: Path, inputs: Mapping[str, Any] | None) -> bool:
    """Whether a command with these inputs was stopped in a folder; `UserError` if one with other inputs was."""
    if inputs is None or not (folder / UNFINISHED).is_file():
        return False
    if read_json(folder / UNFINISHED) != json.loads(json_text(inputs)):
        raise UserError(
            f"{folder} holds what another command was writing when it was stopped. Repeat that one, name another "
            "folder, or remove this one."
        )
    return True


def name_beside(run: Path, end: str) -> Path:
    """The folder beside a run with the run's name plus `end`; `.` and `..` are resolved to their names."""
    folder = run if run.name not in ("", "..") else run.resolve()
    return folder.with_name(f"{folder.name}{end}")


def clear_failed_try(run: Path) -> None:
    """Remove the files of an earlier try that saved no step, which would be taken for this run's.

    A folder without settings is not a run's, and nothing in it is removed.
    """
    if not (run / RECORD).is_file():
        return
    for path in (run / name for name in LEFT_BEHIND):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_bare_record(run: Path, *, is_new: bool) -> None:
    """Remove a run's record if nothing else is in its folder, and the folder too if `is_new`.

    A new folder without a record, as of a run that was refused before it was written, is removed as well.
    """
    if not run.is_dir() or {entry.name for entry in run.iterdir()} - {RECORD}:
        return
    (run / RECORD).unlink(missing_ok=True)
    if is_new:
        run.rmdir()


def read_record(run: Path) -> bytes | None:
    """A run's record, for `restore_record`; None if there is none."""
    record = run / RECORD
    return record.read_bytes() if record.is_file() else None


def restore_record(run: Path, record: bytes | None) -> None:
    """Write a run's record again, and say so, if its folder was moved or removed during training.

    So the new folder is a run's too, which can be resumed and sampled from.
    """
    if record is None or (run / RECORD).is_file():
        return
    write_bytes(run / RECORD, record)
    notify(f"{run} was moved or removed during training. Its results are written there all the same.")


_open_lists: list[list[int]] = []  # the lists of the open `catch_interrupts`


@contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Yield a list that stays empty until Ctrl-C, SIGTERM or SIGHUP arrives; a second one raises `KeyboardInterrupt`.

    Inside another `catch_interrupts` it is that one's list. In other threads than the main one it stays empty.

    A launcher of several processes forwards a signal that the terminal has already sent to each of them: there a
    second one counts only after FORWARDED_SIGNAL_SECONDS.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield []
        return
    if _open_lists:
        yield _open_lists[-1]
        return
    caught: list[int] = []
    distributed = os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")
    second_counts_at = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal second_counts_at
        if caught and time.monotonic() >= second_counts_at:
            raise KeyboardInterrupt
        if caught:
            return
        second_counts_at = time.monotonic() + (FORWARDED_SIGNAL_SECONDS if distributed else 0.0)
        caught.append(number)
        notify("Stopping after this step …")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, *end_signals())}
    _open_lists.append(caught)
    try:
        yield caught
    finally:
        _open_lists.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def explain_damaged_checkpoint(path: Path) -> Iterator[None]:
    """Inside the `with`, a `UserError` about a run's checkpoint gets the remedy of `damaged_checkpoint`."""
    try:
        yield
    except UserError as error:
        raise damaged_checkpoint(path, f"it {first_sentence(error, path)}") from error


def damaged_checkpoint(path: Path, complaint: str) -> UserError:
    """The error for a damaged checkpoint of a run, which cannot be downloaded again."""
    run = path.parent
    if any((run / name).is_file() for name in FINISHED):
        advice = (
            f"What {run} has learned lies beside it, and is drawn with as before; to train anew, give another "
            "--out."
        )
    else:
        advice = f"Or remove it: --resume {quote(run)} begins anew then, at step 0."
    return UserError(f"{path} is damaged: {complaint}. Put a copy of it back, if there is one. {advice}")


def first_sentence(error: UserError, path: Path) -> str:
    """An error's first sentence, without the file's name and the remedy."""
    sentence, _, _ = str(error).removeprefix(f"{path} ").partition(". ")
    return sentence.rstrip(".")


def read_steps_taken(run: Path) -> int:
    """The step of a run's last checkpoint; 0 if there is none."""
    path = run / CHECKPOINT
    if not path.exists():
        return 0
    with explain_damaged_checkpoint(path):
        return read_as(int, parse_json(read_metadata(path).get("step", "null"), path), path, "step")


def trim_log(path: Path, done: int) -> None:
    """Drop the log lines of steps after `done`, which a resumed run will take again."""
    if not path.exists():
        return
    lines = [(read_as(int, line.get("step"), path, "step"), line) for line in read_jsonl(path)]
    remaining = [json.dumps(line) + "\n" for step, line in lines if step <= done]
    write_text(path, "".join(remaining))  # atomic: a kill leaves the old log or the new one


def read_log(path: Path, kind: type[Line], *, done: int) -> list[Line]:
    """The log lines of the steps up to `done`; [] if there is no log."""
    return [line for line in read_jsonl(path, kind) if line.step <= done] if path.exists() else []


def package_versions() -> dict[str, str]:
    """The versions of Python and of the installed PACKAGES."""
    from importlib.metadata import PackageNotFoundError, version  # which imports half of `email`

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def peak_memory() -> int | None:
    """The peak resident set of this process in bytes; None if the system does not say.

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
    """An existing path made absolute; anything else, such as the id of a dataset, unchanged."""
    full_path = written_path(path)
    return str(full_path.absolute()) if path and full_path.exists() else path


def run_name(images: str) -> str:
    """A run's default name: that of its image folder, or of its image file without the suffix."""
    path = written_path(images).resolve()
    return (path.stem if path.is_file() else path.name) or "run"
