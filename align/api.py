"""What `import align` offers: the commands as functions, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.settings import ComparisonSettings, PairSampling
from align.training.start import start
from backbone.adapters.concept import checkpoint as find_checkpoint
from backbone.adapters.concept import read_concept
from backbone.io.prompts import prompts_of, unique_prompts
from backbone.io.run import Run
from backbone.io.sampling import Sampler


def sample(
    prompts: str | Sequence[str],
    out: str | Path,
    *,
    count: int = 4,
    concept: Sequence[str | Path | Run] = (),
    model: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    scale: float = 1.0,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch: int = 8,
    device: str = "auto",
    precision: str = "auto",
) -> Path:
    """Sample `count` images of every prompt into a folder, to choose between, as `align sample` does.

    Prompts are words or files. A folder that was begun is gone on with. Raises `UserError` when it was begun with
    other settings.
    """
    from align.collect.sample import sample_pairs

    asked = unique_prompts(prompts_of([prompts] if isinstance(prompts, str) else prompts))
    settings = PairSampling(
        count=count,
        model=None if model is None else str(model),
        steps=steps,
        guidance=guidance,
        negative=negative,
        scale=scale,
        sampler=sampler,
        seed=seed,
        batch=batch,
        device=device,
        precision=precision,
    )
    concepts = [read_concept(find_checkpoint(str(folder))) for folder in concept]
    sample_pairs(asked, Path(out), settings, concepts=concepts)
    return Path(out)


def train(
    pairs: str | Path | None = None,
    *,
    online: str | None = None,
    prompts: str | Path | None = None,
    model: str | Path = "moji",
    loss: str | None = None,
    out: str | Path | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    vram: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    **settings: Any,
) -> Run:
    """Fit a model to preferences, as `align train` does: to pairs, or, with `online`, to a scorer on `prompts`.

    What is None comes from the model. `settings` are further fields of `align.settings.Settings`, by name. Raises
    `UserError`, naming the argument, for what is not known, does not fit, or has no effect.
    """
    asked = {
        "pairs": None if pairs is None else str(pairs),
        "online": online,
        "prompts": None if prompts is None else str(prompts),
        "model": str(model),
        "loss": loss,
        "steps": steps,
        "learning_rate": learning_rate,
        "seed": seed,
        "device": device,
        "precision": precision,
        **settings,
    }
    known = {name: value for name, value in asked.items() if value is not None}
    return Run(start(known, out=None if out is None else Path(out), vram=vram))


def compare(
    base: str | Path | Run,
    tuned: str | Path | Run,
    prompts: str | Sequence[str],
    out: str | Path,
    *,
    count: int = 1,
    scorers: Sequence[str] = ("moji",),
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 8,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Sample the same prompts from the same noise with two models and count wins, as `align compare` does.

    Gives what `compare.json` holds; `report.html` beside it shows the images side by side.
    """
    from align.comparison.compare import compare_models
    from align.comparison.sides import Side

    asked = unique_prompts(prompts_of([prompts] if isinstance(prompts, str) else prompts))
    settings = ComparisonSettings(
        count=count,
        scorers=tuple(scorers),
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch=batch,
        device=device,
        precision=precision,
    )
    return compare_models(Side.from_name(str(base)), Side.from_name(str(tuned)), asked, Path(out), settings)
