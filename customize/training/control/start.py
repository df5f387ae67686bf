"""The start of `customize train-control`, before torch is imported: errors in the settings are raised here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbone.cli.values.effects import refuse_idle, require_packages
from backbone.io.console import UserError
from backbone.io.progress import progress
from backbone.io.run_folder import make_absolute, refuse_taken
from customize.control_settings import default_folder, resolve_settings


def start(requested: Mapping[str, Any], *, out: Path | None = None, vram: float | None = None) -> Path:
    """Train with the given settings, by field of `ControlSettings`; returns the run folder.

    `vram` is the device's memory in GiB to plan for.
    """
    for name, example in (("images", "--images FOLDER"), ("condition", "--condition sketch")):
        if not requested.get(name):
            raise UserError(f"Say {example}: images with their maps, and of which kind these are.")
    saved = as_saved(requested)
    settings = resolve_settings(saved, {})
    refuse_idle(settings, saved)
    require_packages(settings)
    for path in settings.validation_image:
        if not Path(path).is_file():
            raise UserError(f"--validation-image {path} is no file. Check the spelling.")
    run = out or default_folder(requested["images"], settings.condition)
    refuse_taken(run, [requested["images"]])
    with progress(None, "starting", brief=True):  # torch and diffusers
        from customize.training.control.run import train_control

    return train_control(saved, out=run, vram=vram)


def as_saved(requested: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings in the form in which a run saves them: absolute paths, so that it resumes from anywhere."""
    saved = dict(requested)
    for name in ("images", "begin_from"):
        if saved.get(name) and Path(saved[name]).expanduser().exists():
            saved[name] = make_absolute(saved[name])
    if saved.get("model"):
        from backbone.models.locate import make_model_absolute

        saved["model"] = make_model_absolute(saved["model"])
    if saved.get("validation_image"):
        saved["validation_image"] = tuple(make_absolute(path) for path in saved["validation_image"])
    return saved
