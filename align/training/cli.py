"""The commands `align train` and `align prepare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from align.settings import PreparePairs, Settings, read_settings
from align.training.start import as_kept, start
from backbone.cli.command_line import command, settled_command
from backbone.cli.commands import print_json
from backbone.cli.flags import DATA, OUTPUT
from backbone.io.console import is_main_rank, notify, quote
from backbone.io.run_folder import run_name
from backbone.training.settings import PANELS, RunOptions, changed_settings, find_resumed

# What may be said anew beside --resume: what is learned from and on may have moved
RESUMED = ("pairs", "prompts", "concepts", "model", "device")


def register(app: typer.Typer) -> None:
    """Add `prepare` and `train` to the commands of `align`."""
    settled_command(app, PreparePairs, panels=(DATA, "Model", OUTPUT))(prepare)
    command(app, Settings, RunOptions, panels=PANELS)(train)


def prepare(asked: PreparePairs) -> None:
    """Encode all images and prompts of a source once, for `align train` on data of any size."""
    from align.pairs.records import LeftOut
    from align.training.start import start_preparing

    prepared = start_preparing(asked)
    if not is_main_rank():
        return
    facts = prepared.facts
    left = LeftOut(facts.bad, facts.unlabelled, ties=0, singles=0).count(by_pairs=True, ties=True)
    left_out = f"; left out: {left}" if left else ""
    notify(
        f"{prepared.describe()} in {prepared.folder}{left_out}. Next: align train {quote(prepared.folder)}"
    )
    if asked.as_json:
        counts = {"records": len(prepared.order), "bad": facts.bad, "without_label": facts.unlabelled}
        print_json({"folder": prepared.folder, **counts})


def train(asked: dict[str, Any], run: RunOptions) -> None:
    """Train a model on pairs, so that it draws what was preferred (Diffusion-DPO and its relatives)."""
    resumed = None if run.resume is None else find_resumed(run, "align train", _default_folder(asked))
    _done(start(asked, out=run.out, vram=run.vram) if resumed is None else _resume(resumed, asked, run))


def _default_folder(asked: dict[str, Any]) -> Path | None:
    """Where the same command writes without --out; None where it names nothing to learn from."""
    if "online" in asked and "prompts" in asked:
        return Path("runs") / f"{Path(asked['prompts']).stem}-online"
    return Path("runs") / run_name(str(asked["pairs"])) if "pairs" in asked else None


def _resume(run: Path, asked: dict[str, Any], said: RunOptions) -> Path:
    """Go on with a run; `UserError` for anything that is said otherwise beside."""
    settings = read_settings(run)  # mistakes are answered before torch is imported
    kept = as_kept(asked)
    if "model" in kept:
        from backbone.models.locate import absolute_model

        kept["model"] = absolute_model(kept["model"])
    anew = changed_settings(settings, kept, said, run, allowed=RESUMED)
    if settings.online:
        from align.training.online import resume_online

        return resume_online(run, anew, code=kept.get("online", ""))
    from align.training.run import resume_preferences

    return resume_preferences(run, anew)


def _done(run: Path) -> None:
    call = shlex.join(["align", "compare", read_settings(run).model, str(run), "--prompts", "FILE"])
    notify(f"{run}/report.html says how it went. Next: {call}")
