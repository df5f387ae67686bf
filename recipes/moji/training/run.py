"""What the trainings of `moji`'s parts share: their settings, one file that a longer run goes on from, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.optim import Optimizer

from backbone.cli.options import Option
from backbone.distributed.processes import any_process, gradient_averaging
from backbone.io.files import read_tensors, write_bytes, write_tensors
from backbone.training.checkpoint import load_checkpoint, save_checkpoint
from backbone.training.loop import Average, Update, train
from backbone.training.optimizer import LRSchedule
from recipes.moji.training.logbook import Logbook

TRAINING, OUTPUT = "Training", "Output"
GRID, FINE_GRID = 16, 256  # steps of the grids that exported weights lie on, to a row's deviation
FEW = 2**16  # weights of a matrix that lies on the fine one
ADAPTER_GRID = 32  # of LoRAs, whose matrices are all of few weights


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of every training; each recipe has its own defaults."""

    steps: Annotated[int, Option("Optimiser steps in all.", TRAINING, min=1)] = 4_000
    batch: Annotated[int, Option("Images in a batch, in each process.", TRAINING, min=1)] = 64
    learning_rate: Annotated[
        float, Option("Learning rate of AdamW, which trains everything but the hidden matrices.", TRAINING)
    ] = 1e-3
    minutes: Annotated[float, Option("Stop, and save, after this many minutes.", TRAINING)] = 1e9
    device: Annotated[str, Option("Where to train.", TRAINING, choices=("cpu", "cuda"))] = "cpu"
    seed: Annotated[int, Option("Seed of everything random.", TRAINING)] = 0
    workdir: Annotated[Path, Option("Where intermediate files go.", OUTPUT)] = Path("build/moji")


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(LoopSettings):
    """The same for recipes whose inner matrices are stepped by Muon."""

    matrix_rate: Annotated[
        float, Option("Learning rate of Muon, which trains the hidden matrices.", TRAINING)
    ] = 2e-3


def read_trained(checkpoint: Path, *, averaged: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A training's moving averages or last weights, by name, and the checkpoint's metadata."""
    tensors, header = read_tensors(checkpoint)
    kind = "average/" if averaged else "parameter/"
    return {key.removeprefix(kind): value for key, value in tensors.items() if key.startswith(kind)}, header


def round_to_grid(tensors: Mapping[str, Tensor], grid: int | None = None) -> dict[str, Tensor]:
    """The same weights, each row of a matrix rounded to multiples of a power of two near 1/`grid` of its deviation.

    A deviation is the root mean square of a row, in convolutions of one output channel's weights. Training multiplies
    with eight bits of each weight; in fp16 the others are noise, which packs badly: a wheel's deflate makes half of
    such weights, and 0.93 of them without the grid. Without a `grid` it depends on the size: a matrix of few weights,
    as at a network's ends and where pixels are many, takes little room and would carry most of the error. Vectors stay
    as they are.
    """
    return {
        name: _round_rows(value, grid or (FINE_GRID if value.numel() < FEW else GRID))
        if value.ndim > 1
        else value
        for name, value in tensors.items()
    }


def export_adapter(source: Path, out: Path) -> None:
    """Writes an adapter's file in fp16, its matrices on the adapters' grid; `out` may be `source`."""
    tensors, metadata = read_tensors(source)
    rounded = round_to_grid(tensors, ADAPTER_GRID)
    write_tensors(out, {key: value.half() for key, value in rounded.items()}, metadata)


def _round_rows(weights: Tensor, grid: int) -> Tensor:
    """A matrix or convolution on its grid, in its own memory layout: fused optimisers go by memory."""
    exact = weights.detach().float()
    deviation = exact.square().mean(tuple(range(1, exact.ndim)), keepdim=True).sqrt()
    step = torch.exp2((deviation.clamp(min=torch.finfo(torch.float16).tiny) / grid).log2().round())
    return ((exact / step).round() * step).to(weights.dtype)


@contextmanager
def on_grid(parameters: Mapping[str, Tensor], grid: int | None = None) -> Iterator[None]:
    """These weights are on the grid until the end of the `with`, with gradients there, and as they were after it.

    So a training learns weights that are right once they are rounded (the straight-through estimator of Bengio et
    al. 2013; Courbariaux et al. 2015, algorithm 1).
    """
    exact = {name: value.data for name, value in parameters.items()}
    for name, value in round_to_grid(exact, grid).items():
        parameters[name].data = value
    try:
        yield
    finally:
        for name, value in exact.items():
            parameters[name].data = value


def losses_on_grid(
    losses: Callable[[int], Iterator[Tensor]], parameters: Mapping[str, Tensor], grid: int | None = None
) -> Callable[[int], Iterator[Tensor]]:
    """The same losses of each step, and their gradients, with these weights on the grid."""

    def rounded_losses(step: int) -> Iterator[Tensor]:
        with on_grid(parameters, grid):
            yield from losses(step)

    return rounded_losses


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Copy trained weights into these, by name."""
    for name, parameter in parameters.items():
        parameter.copy_(trained[name])


def make_readable(folder: Path) -> None:
    """Lets everybody read what lies in a folder: safetensors are written for their owner alone."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


class Training:
    """Weights with their optimiser and average, resumed from the last checkpoint if there is one.

    `weights` are those that are trained, and statistics that are averaged and stored with them. The learning rate
    falls over the last `decay_steps`. A longer run cannot go on from there, so the last checkpoint before is kept too,
    as `NAME-stable.safetensors`.
    """

    def __init__(
        self,
        settings: LoopSettings,
        checkpoint: Path,
        weights: Mapping[str, Tensor],
        optimizer: Optimizer,
        *,
        decay: float,
        decay_steps: int | None = None,
    ) -> None:
        self.settings, self.checkpoint = settings, checkpoint
        self.weights, self.optimizer = weights, optimizer
        self.decay_steps = decay_steps
        self.average = Average(weights, decay=decay)
        self.facts: dict[str, str] = {}
        self.done = 0
        if checkpoint.exists():
            self.done, _ = load_checkpoint(
                checkpoint, parameters=weights, optimizer=optimizer, average=self.average
            )

    def run(
        self,
        losses: Callable[[int], Iterator[Tensor]],
        lr_schedule: LRSchedule,
        *,
        every: int,
        clip: float = 1.0,
        aloud: bool = True,
        on_save: Callable[[int], object] = lambda step: None,
    ) -> None:
        """Steps until the end, or until the minutes are over.

        If `aloud`, it reports; it also saves and calls `on_save` with the step, every so many steps and at the last.
        """
        settings, logbook = self.settings, Logbook(batch=self.settings.batch)
        for report in train(
            losses,
            self.weights,
            optimizer=self.optimizer,
            lr_schedule=lr_schedule,
            steps=settings.steps,
            done=self.done,
            update=Update(clip, gradient_averaging(), self.average),
        ):
            logbook.note(report, aloud=aloud)
            last = report.step == settings.steps or any_process(logbook.minutes > settings.minutes)
            if (report.step % every == 0 or last) and aloud:
                self.save(report.step)
                on_save(report.step)
            if last:
                break

    def save(self, step: int) -> None:
        """Writes the checkpoint, and until the learning rate falls also the one where a longer run goes on."""
        save_checkpoint(
            self.checkpoint,
            step=step,
            parameters=self.weights,
            optimizer=self.optimizer,
            average=self.average,
            facts=self.facts,
        )
        if self.decay_steps is not None and step <= self.settings.steps - self.decay_steps:
            stable = self.checkpoint.with_name(f"{self.checkpoint.stem}-stable.safetensors")
            write_bytes(stable, self.checkpoint.read_bytes())
