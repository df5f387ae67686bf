"""The command `align train`, and the options that several commands of `align` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from align.settings import SOURCE_HELP, Settings, read_settings
from align.training.start import start
from backbone.io.console import notify
from backbone.io.options import command, hyphens
from backbone.training.settings import MODEL_HELP, PANELS, RunOptions, refuse_beside_resume

__all__ = ["SOURCE_HELP", "hyphens"]  # for the other commands


Model = Annotated[
    str | None,
    typer.Option("--model", "--pretrained-model-name-or-path", help=MODEL_HELP, show_default="moji"),
]
Concepts = Annotated[
    list[Path] | None,
    typer.Option(
        "--concept", help="A run folder of customize or align train; repeatable.", show_default="none"
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "--mixed-precision", help="auto, fp32, bf16 or fp16.", show_default="auto"),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.", show_default="auto")]
User = Annotated[
    str | None, typer.Option("--user", help="Only this person's choices.", show_default="everybody's")
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Only the first so many rows; a dataset is then streamed.", show_default="all"
    ),
]
Split = Annotated[str, typer.Option("--split", help="Of a dataset on the hub.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad records out instead of stopping.")]


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
    refuse_beside_resume(Settings, asked, said)
    settings = read_settings(run)  # mistakes are answered before torch is imported
    if settings.online:
        from align.training.online import resume_online

        return resume_online(run)
    from align.training.run import resume_taste

    return resume_taste(run)


def _done(run: Path) -> None:
    notify(f"{run}/report.html says how it went. Next: align compare moji {run} --prompts FILE")
