"""The commands `align train` and `align prepare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from align.settings import PreparePairs, Settings, read_settings
from align.training.start import as_saved, start
from backbone.cli.command_line import command, settled_command
from backbone.cli.commands import print_json
from backbone.cli.flags import DATA, OUTPUT
from backbone.io.console import is_main_rank, notify, quote
from backbone.io.run_folder import run_name
from backbone.training.settings import PANELS, RunOptions, find_changed_settings, find_resumed

# Settings that may change with --resume: the data and the model may have moved
RESUMED = ("pairs", "prompts", "concepts", "model", "device")


def register(app: typer.Typer) -> None:
    """Add `prepare` and `train` to the commands of `align`."""
    settled_command(app, PreparePairs, panels=(DATA, "Model", OUTPUT))(prepare)
    command(app, Settings, RunOptions, panels=PANELS)(train)


def prepare(options: PreparePairs) -> None:
    """Encode all images and prompts of a source once, for `align train` on data of any size."""
    from align.pairs.records import LeftOut
    from align.training.start import start_preparing

    prepared = start_preparing(options)
    if not is_main_rank():
        return
    facts = prepared.facts
    omitted = LeftOut(facts.bad, facts.unlabelled, ties=0, singles=0).count(by_pairs=True, ties=True)
    left_out = f"; left out: {omitted}" if omitted else ""
    notify(
        f"{prepared.describe()} in {prepared.folder}{left_out}. Next: align train {quote(prepared.folder)}"
    )
    if options.as_json:
        counts = {"records": len(prepared.order), "bad": facts.bad, "without_label": facts.unlabelled}
        print_json({"folder": prepared.folder, **counts})


def train(requested: dict[str, Any], run: RunOptions) -> None:
    """Train a model on pairs, so that it draws what was preferred (Diffusion-DPO and its relatives)."""
    resumed = (
        None if run.resume is None else find_resumed(run, "align train", _find_default_folder(requested))
    )
    _say_done(
        start(requested, out=run.out, vram=run.vram) if resumed is None else _resume(resumed, requested, run)
    )


def _find_default_folder(requested: dict[str, Any]) -> Path | None:
    """The default of --out for this command; None if it names no data."""
    if "online" in requested and "prompts" in requested:
        return Path("runs") / f"{Path(requested['prompts']).stem}-online"
    return Path("runs") / run_name(str(requested["pairs"])) if "pairs" in requested else None


def _resume(run: Path, requested: dict[str, Any], run_options: RunOptions) -> Path:
    """Resume a run; `UserError` for settings that differ from its own."""
    settings = read_settings(run)  # user errors are raised before torch is imported
    saved = as_saved(requested)
    if "model" in saved:
        from backbone.models.locate import make_model_absolute

        saved["model"] = make_model_absolute(saved["model"])
    overrides = find_changed_settings(settings, saved, run_options, run, allowed=RESUMED)
    if settings.online:
        from align.training.online import resume_online

        return resume_online(run, overrides, code=saved.get("online", ""))
    from align.training.run import resume_preferences

    return resume_preferences(run, overrides)


def _say_done(run: Path) -> None:
    call = shlex.join(["align", "compare", read_settings(run).model, str(run), "--prompts", "FILE"])
    notify(f"{run}/report.html says how it went. Next: {call}")
