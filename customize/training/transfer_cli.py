"""`customize transfer`: its options, checked before torch is imported."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from backbone.adapters.concept import checkpoint, read_concept
from backbone.io.commands import print_json
from backbone.io.console import UserError, notify
from backbone.io.flags import DATA, MODEL, OUTPUT, JsonOptions
from backbone.io.options import Option, check_values, settled_command
from customize.settings import read_settings

TRAINING = "Training"
OF_THE_RUN = 0.25  # of the run's learning rate


@dataclass(frozen=True, kw_only=True)
class TransferOptions(JsonOptions):
    """What `customize transfer` is told."""

    run: Annotated[
        Path, Option("A run folder of customize train, on the base.", DATA, argument=True, metavar="RUN")
    ]
    to: Annotated[str, Option("The few-step model, made from the run's base.", MODEL, metavar="MODEL")]
    steps: Annotated[
        int, Option("Optimiser steps; each takes every level of the few-step model.", TRAINING, min=1)
    ] = 60
    batch: Annotated[int, Option("Answers of either kind a level.", TRAINING, min=1)] = 2
    learning_rate: Annotated[
        float | None,
        Option("Of the adapter.", TRAINING, default_text="a quarter of the run's", min=0),
    ] = None
    prior_loss_weight: Annotated[
        float, Option("Of the few-step model's own answers on the class; 0: none.", TRAINING, min=0)
    ] = 1.0
    answers: Annotated[
        int,
        Option(
            "Images that the base run draws for it, and the few-step model of the class.", TRAINING, min=1
        ),
    ] = 32
    lr_warmup_steps: Annotated[int, Option("Steps in which the learning rate rises.", TRAINING, min=0)] = 5
    max_grad_norm: Annotated[
        float, Option("Longer gradients are cut to this length; 0: never.", TRAINING, min=0)
    ] = 1.0
    checkpointing_steps: Annotated[int, Option("A checkpoint every so many steps.", OUTPUT, min=1)] = 20
    seed: Annotated[int, Option("Everything random follows from it.", TRAINING)] = 0
    out: Annotated[
        Path | None,
        Option(
            "The run folder.",
            OUTPUT,
            aliases=("output-dir",),
            metavar="FOLDER",
            default_text="RUN and the model's name",
        ),
    ] = None
    resume: Annotated[
        Path | None,
        Option("Go on with this folder, where the same command was stopped.", OUTPUT, metavar="FOLDER"),
    ] = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.resume is not None and self.out not in (None, self.resume):
            raise UserError(
                f"--resume goes on with {self.resume}, so --out {self.out} has no effect. Leave it out."
            )

    @property
    def folder(self) -> Path:
        """The run folder that is written."""
        return (
            self.resume
            or self.out
            or self.run.with_name(f"{self.run.resolve().name}-on-{Path(self.to).stem}")
        )

    @property
    def lr_scheduler(self) -> str:
        """The learning rate's course after the warm-up."""
        return "cosine"

    def kept(self) -> dict[str, Any]:
        """What the run's record keeps, and what a resumed command has to say alike."""
        beside = {"out", "resume", "as_json"}
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
            if name not in beside
        }

    def command(self) -> str:
        """The command that repeats it."""
        words = ["customize", "transfer", str(self.run), "--to", self.to]
        for name, value in self.kept().items():
            default = type(self).__dataclass_fields__[name].default
            if name not in ("run", "to") and value != default:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def register(app: typer.Typer) -> None:
    """Add the command to `customize`."""

    @settled_command(app, TransferOptions, panels=(DATA, MODEL, TRAINING, OUTPUT))
    def transfer(asked: TransferOptions) -> None:
        """Fit a run's adapter to a few-step model, which keeps its own answers on the class."""
        settings = read_settings(asked.run)  # mistakes are answered before torch is imported
        refuse_what_is_no_adapter(asked.run)
        from customize.training.transfer import transfer_run

        finished = transfer_run(asked)
        where = shlex.quote(str(finished))
        measured = f"customize evaluate {shlex.quote(str(asked.run))} --on {where}"
        drawn = f'customize sample "a {settings.token} … in the snow" --concept {where}'
        notify(f"{finished}/sheet.png shows it. Next: {drawn}, and what survives: {measured}")
        if asked.as_json:
            print_json({"folder": finished})


def refuse_what_is_no_adapter(run: Path) -> None:
    """`UserError` for a run that is not finished, or that learned no adapter."""
    concept = read_concept(checkpoint(run, "last"))
    if not concept.weights:
        what = "the model's own weights" if concept.changed else "words alone"
        remedy = (
            "Make an adapter of it: customize extract"
            if concept.changed
            else "They are used on the few-step model as they are: customize sample --on"
        )
        raise UserError(f"A transfer fits an adapter, and {run} learned {what}. {remedy}.")
