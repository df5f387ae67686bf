"""The commands `align train` and `align prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from align.settings import PreparePairs, Settings, read_settings
from align.training.start import start
from backbone.io.commands import print_json
from backbone.io.console import is_main_rank, notify
from backbone.io.flags import DATA, OUTPUT
from backbone.io.options import command, is_code, settled_command
from backbone.training.settings import PANELS, RunOptions, refuse_beside_resume


def register(app: typer.Typer) -> None:
    """Adds `prepare` and `train` to the commands of `align`."""
    settled_command(app, PreparePairs, panels=(DATA, "Model", OUTPUT))(prepare)
    command(app, Settings, RunOptions, panels=PANELS)(train)


def prepare(asked: PreparePairs) -> None:
    """Encode all images and prompts of a source once, for `align train` on data of any size."""
    from align.training.start import start_preparing

    prepared = start_preparing(asked)
    if not is_main_rank():
        return
    facts = prepared.facts
    left_out = f"; {facts.bad} records that cannot be used are left out" if facts.bad else ""
    notify(f"{prepared.describe()} in {prepared.folder}{left_out}. Next: align train {prepared.folder}")
    if asked.as_json:
        print_json({"folder": prepared.folder, "records": len(prepared.order), "bad": facts.bad})


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
