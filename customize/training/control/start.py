"""The first steps of `customize train-control`, before torch is imported: mistakes in what was asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbone.cli.values.effects import refuse_idle, require_packages
from backbone.io.console import UserError
from backbone.io.progress import progress
from backbone.io.run_folder import make_absolute
from customize.control_settings import default_folder, resolve_settings


def start(asked: Mapping[str, Any], *, out: Path | None = None, vram: float | None = None) -> Path:
    """Train from settings as they were asked for, by field of `ControlSettings`; gives the run folder.

    `vram` is the device's memory in GiB to plan for.
    """
    for name, example in (("images", "--images FOLDER"), ("condition", "--condition sketch")):
        if not asked.get(name):
            raise UserError(f"Say {example}: images with their maps, and of which kind these are.")
    kept = as_kept(asked)
    wanted = resolve_settings(kept, {})
    refuse_idle(wanted, kept)
    require_packages(wanted)
    for path in wanted.validation_image:
        if not Path(path).is_file():
            raise UserError(f"--validation-image {path} is no file. Check the spelling.")
    out = out or default_folder(asked["images"], wanted.condition)
    with progress(None, "starting", brief=True):  # torch and diffusers
        from customize.training.control.run import train_control

    return train_control(kept, out=out, vram=vram)


def as_kept(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for as a run's settings hold it: whole paths, so that it is resumed from anywhere."""
    kept = dict(asked)
    for name in ("images", "begin_from"):
        if kept.get(name) and Path(kept[name]).expanduser().exists():
            kept[name] = make_absolute(kept[name])
    if kept.get("model"):
        from backbone.models.locate import absolute_model

        kept["model"] = absolute_model(kept["model"])
    if kept.get("validation_image"):
        kept["validation_image"] = tuple(make_absolute(one) for one in kept["validation_image"])
    return kept
