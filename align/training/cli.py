"""The command `align train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from align.settings import Settings, read_settings
from align.training.start import start
from backbone.io.console import notify
from backbone.io.options import command, is_code
from backbone.training.settings import PANELS, RunOptions, refuse_beside_resume


def register(app: typer.Typer) -> None:
    """Adds `train` to the commands of `align`."""
    command(app, Settings, RunOptions, panels=PANELS)(train)


def train(asked: dict[str, Any], run: RunOptions) -> None:
    """Train a model on pairs, so that it draws what was preferred (Diffusion-DPO and its relatives)."""
    if run.resume is not None:
        _done(_resumed(run.resume, asked, run))
        return
    _done(start(asked, out=run.out, vram=run.vram))


def _resumed(run: Path, asked: dict[str, Any], said: RunOptions) -> Path:
    """Goes on with a run; `UserError` for anything that was said beside."""
    code = asked.get("online", "")
    # A Python file is run when it is named here, and only then.
    named = {"online"} if is_code(code) else set()
    refuse_beside_resume(Settings, {name: asked[name] for name in asked if name not in named}, said)
    settings = read_settings(run)  # mistakes are answered before torch is imported
    if named and code != settings.online:
        refuse_beside_resume(Settings, asked, said)
    if settings.online:
        from align.training.online import resume_online

        return resume_online(run, code=code)
    from align.training.run import resume_taste

    return resume_taste(run)


def _done(run: Path) -> None:
    notify(f"{run}/report.html says how it went. Next: align compare moji {run} --prompts FILE")
