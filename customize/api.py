"""What `import customize` offers: the commands as functions, for notebooks and scripts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbone.adapters.concept import checkpoint as find_checkpoint
from backbone.adapters.concept import read_concept
from backbone.io.conditions import ControlOptions, refuse_from_source
from backbone.io.files import read_json
from backbone.io.prompts import prompts_of
from backbone.io.run import Run
from backbone.io.run_folder import hold_new_folder
from backbone.io.sampling import DrawingOptions, Sampler
from backbone.media.gallery import Images
from customize.training.start import start


def train(
    images: str | Path | None = None,
    *,
    token: str | None = None,
    class_noun: str = "",
    model: str | Path = "moji",
    out: str | Path | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    vram: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    **settings: Any,
) -> Run:
    """Teach a model one subject from a folder of images or a data set, as `customize train` does.

    What is None comes from the model, the token is [V], and an empty class noun is guessed. `settings` are further
    fields of `customize.settings.Settings`, by name: `method="pivotal"`, `prior="off"` … With `pairs="edits/"` in place
    of the images what an instruction does is learned. `vram` is in GiB. Raises
    `UserError`, naming the argument, for what is not known, does not fit, or has no effect.
    """
    asked = {
        "images": None if images is None else str(images),
        "token": token,
        "class_noun": class_noun,
        "model": str(model),
        "steps": steps,
        "learning_rate": learning_rate,
        "rank": rank,
        "seed": seed,
        "device": device,
        "precision": precision,
        **settings,
    }
    known = {name: value for name, value in asked.items() if value is not None}
    return Run(start(known, out=None if out is None else Path(out), vram=vram))


def sample(
    prompts: str | Sequence[str],
    *,
    concept: str | Path | Run | Sequence[str | Path | Run] = (),
    model: str | Path | None = None,
    count: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    scale: float = 1.0,
    references: Sequence[str | Path] = (),
    sampler: Sampler | None = None,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    resolution: int | None = None,
    batch: int = 8,
    condition: str | Sequence[str] = (),
    controlnet: str | Path | Run | Sequence[str | Path | Run] = (),
    condition_scale: float | Sequence[float] = (),
    condition_start: float | Sequence[float] = (),
    condition_stop: float | Sequence[float] = (),
    guess_mode: bool = False,
    out: str | Path | None = None,
    on: str = "",
    device: str = "auto",
    precision: str = "auto",
) -> Images:
    """Sample `count` images of every prompt, with concepts (run folders) or without, as `customize sample` does.

    `out`, new or empty, keeps the images in a folder; without it they are only returned. Image j of prompt i depends on
    the seed, i and j.

    `references` are files of images beside every prompt, for a model that reads some. `condition` is
    `"sketch=drawing.png"` or several; `controlnet` and its strengths are one for all or one for each. `on` is a
    few-step model that draws in place of the one that the concepts were trained on (`own`: that which goes with it).

    Raises `UserError` for a token that no concept owns, a size that the model cannot draw, or a map that is none.
    """
    from customize.sampling import RECORD, sample_to_folder

    folders = [concept] if isinstance(concept, (str, Path, Run)) else concept
    asked = [one.text for one in prompts_of([prompts] if isinstance(prompts, str) else prompts)]
    settings = DrawingOptions(
        model=None if model is None else str(model),
        count=count,
        steps=steps,
        guidance=guidance,
        negative=negative,
        scale=scale,
        sampler=sampler,
        seed=seed,
        width=width,
        height=height,
        resolution=resolution,
        batch=batch,
        device=device,
        precision=precision,
    )
    controls = ControlOptions(
        condition=_several(condition),
        controlnet=tuple(map(str, _several(controlnet))),
        condition_scale=_several(condition_scale),
        condition_start=_several(condition_start),
        condition_stop=_several(condition_stop),
        guess_mode=guess_mode,
    ).controls
    refuse_from_source(controls)
    concepts = [read_concept(find_checkpoint(str(one))) for one in folders]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else Path(out)
        files = [str(one) for one in references]
        sheet = sample_to_folder(
            asked, settings, folder, concepts=concepts, references=files, controls=controls, on=on
        )
        record = read_json(sheet.with_name(RECORD))
        return read_samples(folder, record)


def _several(given: Any) -> tuple[Any, ...]:
    """What was given as one or several, as several."""
    return (given,) if isinstance(given, (str, Path, Run, int, float)) else tuple(given)


def read_samples(folder: Path, record: dict[str, Any]) -> Images:
    """The images of a folder of `customize sample`, loaded."""
    from PIL import Image

    rows = record["pictures"]
    images = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    return Images(images, [row["prompt"] for row in rows], title=f"{record['model']}, seed {record['seed']}")


def evaluate(
    run: str | Path | Run,
    *,
    count: int = 4,
    seed: int = 0,
    against_references: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a run by the DreamBench protocol on prompts of its own, as `customize evaluate` does.

    Subject fidelity, prompt fidelity, prior preservation and diversity; the table is in `RUN/dreambench`
    (`dreambench-2` … where that exists) or in `out`, which is new or empty. `against_references` measures the base with
    the subject's own images as references beside it.
    """
    from customize.evaluation.dreambench import DREAMBENCH, TABLE, evaluate_run, moji_prompts

    place, prompts = Path(str(run)), moji_prompts()
    with hold_new_folder(None if out is None else Path(out), place / DREAMBENCH) as folder:
        evaluate_run(
            place, prompts=prompts, per_prompt=count, scorer=None, seed=seed, out=folder,
            against_references=against_references,
        )  # fmt: skip
        return read_json(folder / TABLE)
