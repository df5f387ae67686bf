"""The API of `import align`: the commands as functions, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.settings import ComparisonSettings, PairSampling, Settings
from align.training.start import start
from backbone.adapters.concept import checkpoint as find_checkpoint
from backbone.adapters.concept import read_concept
from backbone.cli.keywords import (
    build_drawing_options,
    model_path,
    out_folder,
    parse_vram,
    run_folders,
    takes,
)
from backbone.cli.values.build import build
from backbone.cli.values.collect import values_from_keywords
from backbone.cli.values.effects import refuse_idle
from backbone.io.console import UserError
from backbone.io.prompts import require_prompts, unique_prompts
from backbone.io.run import Run


@takes(PairSampling, without=("concepts",))
def sample(
    prompts: str | Sequence[str],
    out: str | Path,
    *,
    concept: Sequence[str | Path | Run] = (),
    **settings: Any,
) -> Path:
    """Sample `count` images of every prompt into a folder, to choose between, as `align sample` does.

    Prompts are words or files. `settings` are the fields of `align.settings.PairSampling`, by name: `count=4`,
    `seed=1` … An interrupted folder is continued. Raises `UserError`, naming the argument, for unknown settings, and if
    the folder was begun with other settings.
    """
    from align.collect.sample import sample_pairs

    folder = _require_folder(out)
    sampling = build_drawing_options(PairSampling, settings, run_folders(concept))
    texts = unique_prompts(require_prompts(prompts))
    concepts = [read_concept(find_checkpoint(run, sampling.checkpoint)) for run in sampling.concepts]
    sample_pairs(texts, folder, sampling, concepts=concepts)
    return folder


@takes(Settings)
def train(
    pairs: str | Path | None = None,
    *,
    online: str | None = None,
    prompts: str | Path | None = None,
    model: str | Path = "moji",
    out: str | Path | None = None,
    vram: float | None = None,
    **settings: Any,
) -> Run:
    """Fit a model to preferences, as `align train` does: to pairs, or, with `online`, to a scorer on `prompts`.

    `settings` are the other fields of `align.settings.Settings`, by name: `loss="ipo"`, `steps=400` …; those left out,
    or None, come from the model. Raises `UserError`, naming the argument, for settings that are unknown, do not fit, or
    have no effect.
    """
    requested = {
        "pairs": pairs,
        "online": online,
        "prompts": prompts,
        "model": model,
        **settings,
    }
    return Run(start(values_from_keywords(Settings, requested), out=out_folder(out), vram=parse_vram(vram)))


@takes(ComparisonSettings)
def compare(
    base: str | Path | Run,
    tuned: str | Path | Run,
    prompts: str | Sequence[str],
    out: str | Path,
    *,
    model: str | Path | None = None,
    count: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Sample the same prompts from the same noise with two models and count wins, as `align compare` does.

    `model` is the one that a run was trained from, if that has moved. `settings` are the other fields of
    `align.settings.ComparisonSettings`, by name: `scorers=["moji"]`, `seed=1` …
    Returns the contents of `compare.json`; `report.html` in the same folder shows the images side by side.
    """
    from align.comparison.compare import compare_models
    from align.comparison.sides import make_sides

    texts = unique_prompts(require_prompts(prompts))
    options = {name: value for name, value in settings.items() if value is not None}
    comparison = build(ComparisonSettings, {"count": count, **options})
    refuse_idle(comparison, options)
    sides = make_sides(
        model_path(base, "base"),
        model_path(tuned, "tuned"),
        None if model is None else model_path(model, "model"),
    )
    return compare_models(*sides, texts, _require_folder(out), comparison)


def _require_folder(out: str | Path) -> Path:
    """The output folder; `UserError` if none is named."""
    folder = out_folder(out)
    if folder is None:
        raise UserError("out names no folder. Give one.")
    return folder
