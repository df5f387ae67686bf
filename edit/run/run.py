"""A run of `edit` from a command's options, by name, to a run folder; and its repetition from the record.

perform("sdedit", {"image": "photo.png", "prompt": "a cat in the snow"}, out=None)
replay(Path("runs/edit-photo/run.json"), out=None)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from backbone.adapters.concept import say_uncalled
from backbone.cli.conditions import AUTO, ControlOptions
from backbone.cli.values.build import UnknownSettingError
from backbone.io.console import UserError, quote
from backbone.io.files import content_hash, fill_folder, make_numbered_folder, read_json
from backbone.io.records import read_as
from backbone.io.run_folder import hold_new_folder, refuse_unwritable
from backbone.models.control import refuse_other_control
from backbone.models.defaults import parse_defaults
from edit.inversion.inversion import read_source_prompt
from edit.layout import RequestedLayout
from edit.methods.prompt_to_prompt.settings import BY_MODEL
from edit.pictures import read_image, read_mask
from edit.run.commands import COMMANDS
from edit.run.figures import (
    find_scorer,
    measure_edits,
    measure_run,
    peak_memory_mb,
    reset_peak_memory,
    say_without_change,
)
from edit.run.open import OPENING, ModelWithConcepts, Opening, load_model, pick
from edit.run.report import INVERSION, RECORD, publish

MEASURING = ("metrics", "scorer")
OF_AN_INVERSION = ("method", "steps", "iterations")  # recorded in the inversion's file, if there is one
# Options that become one `RequestedLayout`
CONTROL = (*(option.name for option in fields(ControlOptions)), "source_condition")
RUNS = Path("runs")
FILES = ("image", "inversion", "mask", "first", "second")
OPTION_TYPES: dict[str, Any] = {  # of a record's settings
    **dict.fromkeys(FILES, str | None),
    **dict.fromkeys(
        ("model", "precision", "device", "scorer", "prompt", "source", "negative", "control", "sampler"),
        str | None,
    ),
    **dict.fromkeys(("method", "word", "first_prompt", "second_prompt", "instruction", "background"), str),
    **dict.fromkeys(("steps", "seed", "iterations", "count", "draws"), int | None),
    **dict.fromkeys(
        ("vram", "scale", "strength", "guidance", "image_guidance", "source_guidance", "threshold"),
        float | None,
    ),
    **dict.fromkeys(("guidance_start", "guidance_stop"), float | None),
    **dict.fromkeys(BY_MODEL, float | None),
    **dict.fromkeys(("concepts", "targets", "keep", "heatmaps", "then", "references"), list[str]),
    **dict.fromkeys(("metrics", "film"), bool),
    **dict.fromkeys(("condition", "controlnet", "source_condition"), list[str]),
    **dict.fromkeys(("condition_scale", "condition_start", "condition_stop"), list[float]),
    "condition_rows": str,
    "guess_mode": bool,
    "blend": list[str] | None,
    "swaps": list[tuple[str, str]],
    "weights": dict[str, float],
    "windows": dict[str, tuple[float, float]],
    "toward": list[tuple[str, float]],
}
# The model's own defaults that an edit takes; its record keeps them
MODEL_DEFAULTS = ("guidance", "guidance_start", "guidance_stop", "sampler", "edit", "condition")
# Defaults of settings that older records leave out
OLD_DEFAULTS: dict[str, dict[str, Any]] = {"instruct": {"sampler": "ddim"}}
OLD_CONDITION_DEFAULTS = {"condition_rows": "both"}


@dataclass(frozen=True)
class EditRecord:
    """The part of `run.json` that is needed to repeat the run."""

    command: str
    settings: dict[str, Any]
    model: str
    precision: str
    identity: str
    files: dict[str, str] = field(default_factory=dict)
    guidance: float | None = None  # the scale that was used, independent of the model's default now
    guidance_start: float = 0.0  # likewise the share of the steps with guidance
    guidance_stop: float = 1.0
    conditions: list[dict[str, Any]] = field(default_factory=list)
    defaults: dict[str, Any] | None = None  # the model's own at that time; None in older records


def perform(name: str, options: Mapping[str, Any], *, out: Path | None, typed: str = "") -> Path:
    """Run a command of `COMMANDS` and return the folder that it wrote: `out`, or runs/edit-NAME-OF-IMAGE.

    Images among the options are paths, or `SourceImage`s that have been read already. `typed` is the command line for
    the record. Raises `UserError` for wrong options, and for a folder that is taken.
    """

    def load() -> ModelWithConcepts:
        return load_model(
            Opening(**pick(options, (*OPENING, "inversion"))), image_count=count_images(name, options)
        )

    return _run(name, options, load, out=out, typed=typed)


def count_images(name: str, options: Mapping[str, Any]) -> int:
    """The number of reference images that the model reads; 0 for commands without an instruction."""
    return 1 + len(options.get("references", ())) if COMMANDS[name].by_instruction else 0


def replay(record: Path, *, out: Path | None) -> Path:
    """Repeat the run of a `run.json` (or of its folder), with the model, image and precision that it had.

    Raises `UserError` for another kind of file, or when the model's weights or the image have changed since.
    """
    path = record / RECORD if record.is_dir() else record
    command = read_json(path).get("command")
    if isinstance(command, str) and command.startswith("edit clip "):
        raise UserError(f"{path} is the record of a clip. Repeat it with: {command}")
    if not isinstance(command, str) or command not in COMMANDS:
        raise UserError(f"{path} is no record of an edit. Name the {RECORD} of a run folder.")

    recorded = read_json(path, EditRecord)
    _refuse_changes(recorded, path)
    defaults = None if recorded.defaults is None else parse_defaults(recorded.defaults, path)

    # Settings that an older record lacks had the defaults of its time
    old_defaults = OLD_DEFAULTS.get(recorded.command, {})
    if recorded.settings.get("condition"):
        old_defaults = {**old_defaults, **OLD_CONDITION_DEFAULTS}
    options = {**old_defaults, **recorded.settings, "precision": recorded.precision}
    options |= _read_strengths(recorded, path)
    if COMMANDS[recorded.command].by_instruction:
        if options.get("guidance") is None:
            options["guidance"] = recorded.guidance
        options |= {"guidance_start": recorded.guidance_start, "guidance_stop": recorded.guidance_stop}

    def load() -> ModelWithConcepts:
        opening = {**pick(options, OPENING), "model": recorded.model}
        loaded = load_model(Opening(**opening), image_count=count_images(recorded.command, options))
        if recorded.identity not in loaded.identities:
            raise UserError(
                f"{recorded.model} or a concept has other weights than when {path} was written. "
                "Put the old ones back."
            )
        if defaults is not None:
            now = loaded.model.defaults.items()
            others = {name: value for name, value in now if name not in MODEL_DEFAULTS}
            loaded.model.defaults = others | defaults
        return loaded

    try:
        return _run(recorded.command, options, load, out=out, typed=f"edit replay {quote(path)}")
    except (TypeError, UnknownSettingError) as error:
        unknown = re.search(r"argument '(\w+)'", str(error))  # Python's own words
        raise UserError(
            f"{path} holds settings that this version does not know ({unknown[1] if unknown else error}). Update "
            "Limner, or edit anew."
        ) from error


def _refuse_changes(recorded: EditRecord, path: Path) -> None:
    """`UserError` for settings of other types, and for files and control networks that changed since the record."""
    for name, kind in OPTION_TYPES.items():
        if name in recorded.settings:
            read_as(kind, recorded.settings[name], path, name)
    for file, digest in recorded.files.items():
        if not Path(file).is_file():
            raise UserError(
                f"{file} is missing. It was looked for from {Path.cwd()}: repeat {path} where it was made, or put the "
                "file back."
            )
        if content_hash(Path(file)) != digest:
            raise UserError(f"{file} has changed since {path} was written. Put the old file back.")
    for condition in recorded.conditions:
        refuse_other_control(condition, path)


def _read_strengths(recorded: EditRecord, path: Path) -> dict[str, tuple[float, ...]]:
    """How strongly and when a record's conditions acted, if its settings left that to the control networks."""
    settings = recorded.settings
    maps = read_as(list[str], settings.get("condition") or [], path, "condition")
    of_file = settings.get("inversion") is not None  # whose own conditions come first, as its file keeps them
    acted = recorded.conditions[-len(maps) :] if of_file else recorded.conditions[: len(maps)]
    from_file = of_file and any(text.endswith(f"={AUTO}") for text in maps)
    if not maps or len(acted) != len(maps) or from_file:
        return {}
    names = [name for name in ("scale", "start", "stop") if not settings.get(f"condition_{name}")]
    return {
        f"condition_{name}": tuple(read_as(float, facts.get(name), path, name) for facts in acted)
        for name in names
    }


def _run(
    name: str,
    options: Mapping[str, Any],
    load: Callable[[], ModelWithConcepts],
    *,
    out: Path | None,
    typed: str,
) -> Path:
    """Read the images, load the model, edit, measure, write the folder: for `perform` and `replay`."""
    began = time.perf_counter()
    reset_peak_memory()
    command = COMMANDS[name]
    images, settings, files = _read_images(options)
    layout = RequestedLayout.of(options)
    files |= {path: content_hash(Path(path)) for path in layout.paths if Path(path).is_file()}
    with _claim(out):
        loaded = load()
        say_uncalled(collect_prompts(options), loaded.concepts)
        # The edit and its metrics
        arguments = {
            name: value for name, value in options.items() if name not in (*OPENING, *MEASURING, *CONTROL)
        }
        arguments |= {"requested": layout} if layout else {}
        measures = command.compared and options.get("metrics", True)
        scorer_folder = options.get("scorer") if measures else None
        # Opened here, so that its errors are raised before the edit
        scorer = find_scorer(loaded.model, scorer_folder) if scorer_folder else None
        result = command(loaded, {**arguments, **images})
        frames = command.frames(result)
        # Decoded here, so that an error leaves no files behind
        assert len(result.images) == len(result.prompts)
        say_without_change(result)
        figures = measure_edits(result, scorer or find_scorer(loaded.model)) if measures else []
        model_defaults = loaded.model.defaults
        counts = {**measure_run(result), "seconds": round(time.perf_counter() - began, 3)}
        # The run folder, written whole
        folder = out or make_numbered_folder(RUNS / f"edit-{Path(next(iter(files), name)).stem}")
        with fill_folder(folder) as unfinished:
            if len(result.inversions) == 1 and options.get("inversion") is None:
                # Made for this edit, it serves further ones
                result.inversions[0].write(unfinished / INVERSION)
            publish(
                unfinished,
                result,
                command=f"edit replay {quote(folder / RECORD)}",
                frames=frames,
                figures=figures,
                counts={**counts, "peak_memory_mb": peak_memory_mb()},
                record={
                    "command": name,
                    "said": typed,
                    "settings": settings,
                    **loaded.facts(),
                    "defaults": {
                        name: model_defaults[name] for name in MODEL_DEFAULTS if name in model_defaults
                    },
                    "files": files,
                },
            )
    return folder


def collect_prompts(options: Mapping[str, Any]) -> list[str]:
    """All prompts among the options, and the inversion file's prompt if it is the source's."""
    prompts = [options.get(name) for name in ("prompt", "source", "word", "instruction")]
    prompts += [options.get("first_prompt"), options.get("second_prompt")]
    prompts += [*(options.get("targets") or ()), *(options.get("then") or ())]
    prompts += [str(prompt) for prompt, _ in options.get("toward") or ()]
    if options.get("inversion") is not None:
        prompts.append(read_source_prompt(options["inversion"]))
    return [text for text in prompts if text]


def _read_images(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Read the images: (images by option, the options with paths in their place, file → content hash).

    Every image is read once, here or by the caller.
    """
    sources = {name: options[name] for name in FILES if options.get(name) is not None}
    images: dict[str, Any] = {
        name: read_mask(value) if name == "mask" else read_image(value)
        for name, value in sources.items()
        if name != "inversion"
    }
    settings = {**options, **{name: image.name for name, image in images.items()}}
    if options.get("inversion") is not None:
        settings = {name: value for name, value in settings.items() if name not in OF_AN_INVERSION}
    files = {
        str(settings[name]): images[name].content if name in images else content_hash(Path(value))
        for name, value in sources.items()
    }
    if "references" in options:
        images["references"] = [read_image(reference) for reference in options["references"]]
        settings["references"] = [reference.name for reference in images["references"]]
        files |= {reference.name: reference.content for reference in images["references"]}
    return images, settings, files


@contextmanager
def _claim(out: Path | None) -> Iterator[None]:
    """Hold the folder `out` inside the `with`; after an error it is removed."""
    if out is None:
        refuse_unwritable(RUNS)
        yield
        return
    with hold_new_folder(out, out):
        yield
