"""Splits of a dataset: what of its files, folders and tables is to learn from, and what is kept to measure with.

The hub's names say it: `train-00000-of-00003.parquet` beside `test-00000-of-00001.parquet`, `train/` beside
`validation/`, a saved dataset of two tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.io.console import notify_once

TRAINING = frozenset({"train", "training", "trainval", "trainset"})
MEASURED = frozenset(
    {"test", "testing", "testset", "validation", "valid", "val", "valset", "holdout", "heldout"}
)
MEASURED |= {"dev", "eval", "evaluation"}


def leave_out_measured(paths: Sequence[Path], source: Path) -> list[Path]:
    """Those of a dataset's files or folders that are no split to measure with; what is left out is said.

    All of them, where none is called a training split: then such names are no splits.
    """
    words = {path: frozenset(_words(path.name)) for path in paths}
    if not any(of & TRAINING for of in words.values()):
        return list(paths)
    out = [path for path, of in words.items() if of & MEASURED and not of & TRAINING]
    if out:
        named = ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in out[:3])
        more = f" and {len(out) - 3} more" if len(out) > 3 else ""
        notify_once(f"Not learned from in {source}: {named}{more}, of other splits than train.")
    return [path for path in paths if path not in out]


def _words(name: str) -> list[str]:
    joined = re.sub(r"\b(held|hold)[^a-z]out\b", r"\1out", name.lower().replace("_", "-"))
    return re.split(r"[^a-z]+", joined)


def choose_table(tables: Mapping[str, Any], source: str) -> Any:
    """The table of a dataset's training split, or its first where none is called so; what is left out is said."""
    chosen = next((name for name in tables if name.lower() in TRAINING), next(iter(tables)))
    others = [f"{name} ({len(table)} rows)" for name, table in tables.items() if name != chosen]
    if others or chosen.lower() not in TRAINING:
        left = f"; left out: {', '.join(others)}" if others else ""
        notify_once(f"The split {chosen} of {source} is learned from{left}.")
    return tables[chosen]
