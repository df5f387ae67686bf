"""Splits of a dataset: which of its files, folders and tables are for training, and which for evaluation.

They follow the hub's names: `train-00000-of-00003.parquet` beside `test-00000-of-00001.parquet`, `train/` beside
`validation/`, a saved dataset of two tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.io.console import notify_once

TRAINING = frozenset({"train", "training", "trainval", "trainset"})
EVALUATION = frozenset(
    {"test", "testing", "testset", "validation", "valid", "val", "valset", "holdout", "heldout"}
)
EVALUATION |= {"dev", "eval", "evaluation"}


def drop_evaluation_splits(paths: Sequence[Path], source: Path) -> list[Path]:
    """A dataset's files or folders without its evaluation splits, which are named in a line.

    All of them if none is named like a training split: then such names are no splits.
    """
    words = {path: frozenset(_split_words(path.name)) for path in paths}
    if not any(name_words & TRAINING for name_words in words.values()):
        return list(paths)
    evaluation = [path for path in words if words[path] & EVALUATION and not words[path] & TRAINING]
    if evaluation:
        names = ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in evaluation[:3])
        more = f" and {len(evaluation) - 3} more" if len(evaluation) > 3 else ""
        notify_once(f"Not used from {source}: {names}{more}, of other splits than train.")
    return [path for path in paths if path not in evaluation]


def _split_words(name: str) -> list[str]:
    joined = re.sub(r"\b(held|hold)[^a-z]out\b", r"\1out", name.lower().replace("_", "-"))
    return re.split(r"[^a-z]+", joined)


def choose_table(tables: Mapping[str, Any], source: str) -> Any:
    """The table of a dataset's training split, or its first if none has such a name; a line names the others."""
    chosen = next((name for name in tables if name.lower() in TRAINING), next(iter(tables)))
    others = [f"{name} ({len(table)} rows)" for name, table in tables.items() if name != chosen]
    if others or chosen.lower() not in TRAINING:
        note = f"; left out: {', '.join(others)}" if others else ""
        notify_once(f"The split {chosen} of {source} is learned from{note}.")
    return tables[chosen]
