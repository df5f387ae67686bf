"""Options of `customize transfer`. No torch."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from backbone.cli.flags import DATA, MODEL, OUTPUT, RUNS_MODEL, JsonOptions, out_option
from backbone.cli.options import Option
from backbone.cli.values.build import check_values
from backbone.io.console import UserError
from backbone.io.run_folder import name_beside

TRAINING = "Training"
OF_THE_RUN = 0.25  # of the run's learning rate


@dataclass(frozen=True, kw_only=True)
class TransferOptions(JsonOptions):
    """Options of `customize transfer`."""

    run: Annotated[
        Path, Option("A run folder of customize train, on the base.", DATA, argument=True, metavar="RUN")
    ]
    to: Annotated[str, Option("The few-step model, made from the run's base.", MODEL, metavar="MODEL")]
    model: Annotated[str | None, RUNS_MODEL] = None
    steps: Annotated[
        int, Option("Optimiser steps; each takes every level of the few-step model.", TRAINING, min=1)
    ] = 60
    batch: Annotated[int, Option("Samples of either kind at each noise level.", TRAINING, min=1)] = 2
    learning_rate: Annotated[
        float | None,
        Option("Peak learning rate of the adapter.", TRAINING, default_text="a quarter of the run's", min=0),
    ] = None
    prior_loss_weight: Annotated[
        float,
        Option(
            "Weight of prior preservation, on class samples of the few-step model itself; 0: none.",
            TRAINING,
            min=0,
        ),
    ] = 1.0
    answers: Annotated[
        int,
        Option(
            "Images of the subject drawn by the run, and as many of the class drawn by the few-step model.",
            TRAINING,
            min=1,
        ),
    ] = 32
    lr_warmup_steps: Annotated[int, Option("Steps of linear learning-rate warm-up.", TRAINING, min=0)] = 5
    max_grad_norm: Annotated[
        float, Option("Clip the gradient's norm to this; 0: no clipping.", TRAINING, min=0)
    ] = 1.0
    checkpointing_steps: Annotated[int, Option("Save a checkpoint every N steps.", OUTPUT, min=1)] = 20
    seed: Annotated[int, Option("Seed of everything random.", TRAINING)] = 0
    out: Annotated[Path | None, out_option("The run folder.", "RUN and the model's name")] = None
    resume: Annotated[
        Path | None,
        Option("Resume this run folder, where the same command was stopped.", OUTPUT, metavar="FOLDER"),
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
        return self.resume or self.out or name_beside(self.run, f"-on-{Path(self.to).stem}")

    @property
    def lr_scheduler(self) -> str:
        """The learning rate's course after the warm-up."""
        return "cosine"

    def list_kept_options(self) -> dict[str, Any]:
        """The options that the run's record keeps, and that a resumed command must repeat."""
        excluded = {"out", "resume", "as_json"}
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
            if name not in excluded
        }

    def command(self) -> str:
        """The command that repeats it."""
        words = ["customize", "transfer", str(self.run), "--to", self.to]
        for name, value in self.list_kept_options().items():
            default = type(self).__dataclass_fields__[name].default
            if name not in ("run", "to") and value != default:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)
