"""`customize transfer` on the command line: errors are raised before torch is imported."""

from __future__ import annotations

from pathlib import Path

import typer

from backbone.adapters.concept import checkpoint, name_call, read_concept
from backbone.cli.command_line import settled_command
from backbone.cli.commands import print_json
from backbone.cli.flags import DATA, MODEL, OUTPUT
from backbone.io.console import UserError, notify, quote
from customize.settings import read_subject_settings
from customize.training.transfer.settings import TRAINING, TransferOptions


def register(app: typer.Typer) -> None:
    """Add the command to `customize`."""

    @settled_command(app, TransferOptions, panels=(DATA, MODEL, TRAINING, OUTPUT))
    def transfer(options: TransferOptions) -> None:
        """Fit a run's adapter to the few-step model of its base, preserving that model's class."""
        settings = read_subject_settings(options.run)  # mistakes are answered before torch is imported
        refuse_no_adapter(options.run)
        from customize.training.transfer.run import transfer_run

        finished = transfer_run(options)
        measured = f"customize evaluate {quote(options.run)} --on {quote(finished)}"
        drawn = name_call(settings.token, settings.class_noun, finished)
        notify(f"{finished}/sheet.png shows it. Next: {drawn}, and what survives: {measured}")
        if options.as_json:
            print_json({"folder": finished})


def refuse_no_adapter(run: Path) -> None:
    """`UserError` for a run that is not finished, or that learned no adapter."""
    concept = read_concept(checkpoint(run, "last"))
    if not concept.weights:
        learned = "the model's own weights" if concept.changed else "words alone"
        remedy = (
            "Make an adapter of it: customize extract"
            if concept.changed
            else "They are used on the few-step model as they are: customize sample --on"
        )
        raise UserError(f"A transfer fits an adapter, and {run} learned {learned}. {remedy}.")
