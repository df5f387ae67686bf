"""What the tests let two processes do together, and one process alone for comparison."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from align.collect.sample import sample_pairs
from align.pairs.prepared import Prepared
from align.pairs.read import read_preferences
from align.pairs.records import check_preferences
from align.settings import PairSampling
from align.training import run as runs
from align.training.online import train_online
from align.training.prepare import prepare_pairs
from align.training.run import train_preferences
from backbone.distributed import processes
from backbone.io.console import UserError
from backbone.io.files import append_jsonl
from backbone.io.prompts import read_prompts
from backbone.models.cache import VARIABLE
from backbone.models.model import Backbone
from backbone.training.run import LOG

CASES: dict[str, dict[str, Any]] = {
    "rows": {"batch": 3},
    "micros": {"batch": 4, "micro_batch": 2, "precision": "bf16"},
    "kto": {"batch": 4, "loss": "kto"},
    "kto-micros": {"batch": 4, "loss": "kto", "micro_batch": 2},  # whose mean is of both processes
    "full": {"batch": 2, "full": True, "learning_rate": 1e-6},
}
ONLINE: dict[str, dict[str, Any]] = {
    # To the last bit: what is drawn is learned from
    "rounds": {"rounds": 2, "per_prompt": 2, "micro_batch": 1},
    "policy": {"rounds": 2, "per_prompt": 2, "loss": "ddpo"},
    "climb": {"loss": "draft", "online": "moji"},
}
LONGER: dict[str, Any] = {"batch": 2, "steps": 6, "checkpointing_steps": 4}
USUAL: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "steps": 4,
    "rank": 2,
    "draws": 2,
    "held_out": 0.3,
    "evaluation_draws": 1,
    "evaluation_steps": 2,
    "lr_warmup_steps": 0,
    "any_model": True,
}


def train(folder: Path, model: Path, pairs: Path, name: str, asked: Mapping[str, Any]) -> None:
    """A run of these settings in `folder / name`."""
    said = {**USUAL, "model": str(model), "pairs": str(pairs), **asked}
    train_preferences(said, check_preferences(read_preferences(str(pairs))), out=folder / name)


def prepare(folder: Path, model: Path, pairs: Path) -> None:
    """The folder `prepared`, to which each process encodes its share."""
    opened = Backbone.open(str(model), device="cpu", precision="fp32")
    prepare_pairs(read_preferences(str(pairs)), opened, folder / "prepared", any_model=True)


def train_prepared(folder: Path, model: Path, name: str) -> None:
    """The longer run, from what was prepared."""
    said = {**USUAL, **LONGER, "model": str(model), "pairs": str(folder / "prepared")}
    train_preferences(said, Prepared(folder / "prepared"), out=folder / name)


def interrupted(run: Callable[[], None]) -> None:
    """A run in which one of the processes gets a signal while it logs step 3."""

    def log(path: Path, line: Mapping[str, Any]) -> None:
        append_jsonl(path, line)
        if path.name == LOG and line["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with patch("backbone.training.run.append_jsonl", log), suppress(KeyboardInterrupt):
        run()


def sample(folder: Path, model: Path, prompts: Path) -> None:
    asked = PairSampling(model=str(model), steps=2, batch=3, precision="fp32", device="cpu")
    sample_pairs(read_prompts(prompts), folder / "drawn", asked)


def everything(folder: Path, model: Path, pairs: Path, prompts: Path) -> None:
    """All cases from pairs, one after the other, and pictures."""
    for name, asked in CASES.items():
        train(folder, model, pairs, name, asked)
    train(folder, model, pairs, "longer", LONGER)
    prepare(folder, model, pairs)
    train_prepared(folder, model, "longer-prepared")
    sample(folder, model, prompts)


def online(folder: Path, model: Path, prompts: Path, scorer: Path) -> None:
    """All cases from a scorer, one after the other."""
    for name, asked in ONLINE.items():
        drawn = {
            "online": str(scorer),
            "prompts": str(prompts),
            "sample_steps": 2,
            "guidance": 2.0,
            "batch": 2,
        }
        said = {**USUAL, "model": str(model), "pairs": "", **drawn, **asked}
        train_online(said, out=folder / name)


def cold(rank: int, folder: Path, model: Path, pairs: Path, times: int) -> None:
    """Two runs that know nothing of each other start together, again and again, each time with one empty cache."""
    with patch.object(processes, "rank", lambda: 0), patch.object(processes, "world_size", lambda: 1):
        for number in range(times):
            os.environ[VARIABLE] = str(folder / f"cold-{number}")
            processes.barrier()
            asked = {"batch": 2, "steps": 2, "evaluation_steps": 9, "seed": number}
            train(folder, model, pairs, f"cold-{number}-of-{rank}", asked)


def worker(rank: int, folder: Path, model: Path, pairs: Path, prompts: Path) -> None:
    """One of two processes: all cases in the folder `two`, and a run that cannot be shared."""
    os.environ.update({VARIABLE: str(folder / "cache"), "RANK": str(rank), "WORLD_SIZE": "2"})
    with patch.object(processes, "end_process", processes.barrier):
        everything(folder / "two", model, pairs, prompts)
        for name in ("resumed", "half-way"):
            interrupted(partial(train, folder / "two", model, pairs, name, LONGER))
        interrupted(partial(train_prepared, folder / "two", model, "half-way-prepared"))
        runs.resume_preferences(folder / "two" / "resumed")
        try:
            train(folder / "two", model, pairs, "alone", {"batch": 1})
        except UserError as error:
            (folder / f"refused-{rank}.txt").write_text(str(error))


def online_worker(rank: int, folder: Path, model: Path, prompts: Path, scorer: Path) -> None:
    """One of two processes that learn from a scorer."""
    os.environ.update({VARIABLE: str(folder / "cache"), "RANK": str(rank), "WORLD_SIZE": "2"})
    with patch.object(processes, "end_process", processes.barrier):
        online(folder / "two", model, prompts, scorer)


def cold_worker(rank: int, folder: Path, model: Path, pairs: Path, times: int) -> None:
    """One of two processes: cold starts alone."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    with patch.object(processes, "end_process", processes.barrier):
        cold(rank, folder, model, pairs, times)
