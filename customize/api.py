"""The API of `import customize`: the commands as functions, for notebooks and scripts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from backbone.adapters.concept import checkpoint as find_checkpoint
from backbone.adapters.concept import read_concept
from backbone.cli.conditions import ControlOptions, RequestedControl, refuse_from_source
from backbone.cli.keywords import as_tuple, build_drawing_options, out_folder, parse_vram, run_folders, takes
from backbone.cli.sampling import DrawingOptions
from backbone.cli.values.build import build
from backbone.cli.values.collect import values_from_keywords
from backbone.cli.values.effects import refuse_idle
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.prompts import require_prompts
from backbone.io.run import Run
from backbone.media.gallery import Images
from customize.evaluation.measure import MeasureSettings, measure
from customize.settings import Settings
from customize.training.start import start


@takes(Settings)
def train(
    images: str | Path | None = None,
    *,
    token: str | None = None,
    class_noun: str = "",
    model: str | Path = "moji",
    out: str | Path | None = None,
    vram: float | None = None,
    **settings: Any,
) -> Run:
    """Teach a model one subject from a folder of images or a data set, as `customize train` does.

    `settings` are the other fields of `customize.settings.Settings`, by name: `steps=250`, `method="pivotal"`,
    `prior="off"` …; those left out, or None, come from the model. The default token is [V], and an empty class noun is
    guessed. With `pairs="edits/"` in place of the images, edits by instruction are learned. `vram` is in GiB. Raises
    `UserError`, naming the argument, for settings that are unknown, do not fit, or have no effect.
    """
    requested = {
        "images": images,
        "token": token,
        "class_noun": class_noun,
        "model": model,
        **settings,
    }
    return Run(start(values_from_keywords(Settings, requested), out=out_folder(out), vram=parse_vram(vram)))


@takes(DrawingOptions, ControlOptions, without=("concepts",))
def sample(
    prompts: str | Sequence[str],
    *,
    concept: str | Path | Run | Sequence[str | Path | Run] = (),
    references: Sequence[str | Path] = (),
    on: str = "",
    vram: float | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> Images:
    """Sample `count` images of every prompt, with concepts (run folders) or without, as `customize sample` does.

    `settings` are the fields of `DrawingOptions` (`count=4`, `seed=1`, `guidance=5.0` …) and of `ControlOptions`
    (`condition="sketch=drawing.png"` …, each of them one value for all conditions or one for each), by name. `out`, new
    or empty, keeps the images in a folder; without it they are only returned. Image j of prompt i depends on the seed,
    i and j.

    `references` are files of reference images, for a model that reads some. `on` is a few-step model that samples in
    place of the one that the concepts were trained on (`own`: the known one of that model). `vram` is the memory in GiB
    of the device to plan for.

    Raises `UserError`, naming the argument, for unknown settings, a token that no concept owns, a size that the model
    cannot sample, or a bad map.
    """
    from customize.sampling import RECORD, ExtraInputs, sample_to_folder

    runs = run_folders(concept)
    texts = [prompt.text for prompt in require_prompts(prompts)]
    drawing, controls = _resolve_drawing(runs, settings)
    concepts = [read_concept(find_checkpoint(run, drawing.checkpoint)) for run in runs]
    out, vram = out_folder(out), parse_vram(vram)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else out
        extras = ExtraInputs(_read_references(references), controls)
        sheet = sample_to_folder(texts, drawing, folder, concepts=concepts, extras=extras, on=on, vram=vram)
        record = read_json(sheet.with_name(RECORD))
        return read_samples(folder, record)


def _resolve_drawing(
    runs: tuple[Path, ...], settings: Mapping[str, Any]
) -> tuple[DrawingOptions, tuple[RequestedControl, ...]]:
    """The sampling options and the conditions; `UserError`, naming the argument, for a wrong one.

    Each keyword of conditions may be one value or several.
    """
    control_names = {option.name for option in fields(ControlOptions)}
    given = {name: value for name, value in settings.items() if value is not None}
    control = {
        name: value if name in ("condition_rows", "guess_mode") else as_tuple(value)
        for name, value in given.items()
        if name in control_names
    }
    if "controlnet" in control:
        control["controlnet"] = tuple(map(str, control["controlnet"]))
    controls = build(ControlOptions, control).controls
    refuse_from_source(controls)
    drawing_settings = {name: value for name, value in settings.items() if name not in control_names}
    return build_drawing_options(DrawingOptions, drawing_settings, runs), controls


def _read_references(paths: Any) -> tuple[str, ...]:
    """The paths of reference images, from one or several; `UserError` for values that are no paths."""
    several = as_tuple(paths)
    for path in several:
        if not isinstance(path, (str, os.PathLike)):
            raise UserError(
                f"A reference is the path of an image, not {type(path).__name__}. Save it, and give its path."
            )
    return tuple(map(os.fsdecode, several))


def read_samples(folder: Path, record: dict[str, Any]) -> Images:
    """The images of a folder of `customize sample`, loaded."""
    from PIL import Image

    rows = record["pictures"]
    images = [Image.open(folder / row["file"]).convert("RGB") for row in rows]
    return Images(images, [row["prompt"] for row in rows], title=f"{record['model']}, seed {record['seed']}")


@takes(MeasureSettings, without=("run",))
def evaluate(run: str | Path | Run, **settings: Any) -> dict[str, Any]:
    """Measure a run by the DreamBench protocol on prompts of its own, as `customize evaluate` does.

    Subject fidelity, prompt fidelity, prior preservation and diversity; the table is in `RUN/dreambench`
    (`dreambench-2` … where that exists) or in `out`, which is new or empty. `settings` are the fields of
    `MeasureSettings`, by name: `count=4`, `prompts=["a {} in the snow"]`, `scorer="dino/"` … `model` is the one that
    the run was trained from, if that has moved. Raises `UserError`, naming the argument, for settings that are unknown,
    do not fit, or have no effect.
    """
    if not isinstance(run, (str, os.PathLike)) or not os.fspath(run):
        raise UserError(f"run is {run!r}, which is no run folder. Give its path.")
    given = values_from_keywords(MeasureSettings, settings)
    options = build(MeasureSettings, {"run": Path(os.fsdecode(run)), **given})
    refuse_idle(options, given)
    return measure(options)[1]
