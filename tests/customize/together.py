"""What the tests let two processes do together, and one process alone for comparison."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from backbone.cli.sampling import DrawingOptions
from backbone.distributed import processes
from backbone.io.console import UserError
from backbone.io.files import append_jsonl
from backbone.models.cache import VARIABLE
from customize.sampling import sample_to_folder
from customize.settings import Subject
from customize.training import run as runs

CASES: dict[str, dict[str, Any]] = {
    "rows": {"batch": 3, "steps": 4},
    "half": {"batch": 2, "steps": 4, "precision": "bf16"},
    "micros": {"batch": 1, "gradient_accumulation_steps": 2, "steps": 4, "precision": "bf16"},
    "pivotal": {"batch": 2, "steps": 4, "method": "pivotal", "ema_decay": 0.9},
}
LONGER: dict[str, Any] = {"batch": 2, "steps": 6, "checkpointing_steps": 4}
PROMPTS = ("a [V] dog", "a dog in the snow", "the red cat")


def train(folder: Path, model: Path, pictures: Path, name: str, asked: Mapping[str, Any]) -> None:
    """A run of these settings in `folder / name`."""
    usual = {"model": str(model), "device": "cpu", "precision": "fp32", "lr_warmup_steps": 0}
    usual |= {"sample_steps": 2, "prior_draws": 8}  # quick
    subject = Subject(str(pictures), "[V]", "dog")
    runs.train_concept({**usual, **asked}, [subject], out=folder / name)


def sample(folder: Path, model: Path, *, count: int, out: str) -> None:
    asked = DrawingOptions(model=str(model), count=count, steps=2, precision="fp32", device="cpu")
    sample_to_folder(PROMPTS[1:], asked, folder / out)


def interrupted(folder: Path, model: Path, pictures: Path, name: str) -> None:
    """The longer run, in which one of the processes gets a signal while it logs step 3."""

    def log(path: Path, line: Mapping[str, Any]) -> None:
        append_jsonl(path, line)
        if line["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with patch("backbone.training.run.append_jsonl", log), suppress(KeyboardInterrupt):
        train(folder, model, pictures, name, LONGER)


def everything(folder: Path, model: Path, pictures: Path) -> None:
    """All cases, one after the other."""
    for name, asked in CASES.items():
        train(folder, model, pictures, name, asked)
    train(folder, model, pictures, "longer", LONGER)
    sample(folder, model, count=10, out="many")
    sample(folder, model, count=1, out="few")


def cold(rank: int, folder: Path, model: Path, pictures: Path, times: int) -> None:
    """Two runs that know nothing of each other start together, again and again, each time with one empty cache."""
    with patch.object(processes, "rank", lambda: 0), patch.object(processes, "world_size", lambda: 1):
        for number in range(times):
            os.environ[VARIABLE] = str(folder / f"cold-{number}")
            processes.barrier()
            train(
                folder, model, pictures, f"cold-{number}-of-{rank}", {"batch": 1, "steps": 1, "seed": number}
            )


def worker(rank: int, folder: Path, model: Path, pictures: Path) -> None:
    """One of two processes: all cases in the folder `two`, and a run that cannot be shared."""
    os.environ.update({VARIABLE: str(folder / "cache"), "RANK": str(rank), "WORLD_SIZE": "2"})
    stay: Callable[[], None] = processes.barrier
    with patch.object(processes, "end_process", stay):
        everything(folder / "two", model, pictures)
        for name in ("resumed", "half-way"):
            interrupted(folder / "two", model, pictures, name)
        runs.resume_concept(folder / "two" / "resumed")
        try:
            train(folder / "two", model, pictures, "alone", {"batch": 1})
        except UserError as error:
            (folder / f"refused-{rank}.txt").write_text(str(error))


def cold_worker(rank: int, folder: Path, model: Path, pictures: Path, times: int) -> None:
    """One of two processes: cold starts alone."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with patch.object(processes, "end_process", processes.barrier):
        cold(rank, folder, model, pictures, times)
