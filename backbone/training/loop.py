"""The one training loop: a generator that takes an optimiser step and yields a report.

A method brings four things: which parameters, the loss of a step, a learning-rate schedule, and what it does with the
reports (log, preview, save, stop) in the body of its own `for`. Every random choice of a step is drawn from
`generator(seed, step, …)`, so a run is a function of its seed and resuming needs only the saved tensors and the number
of the next step: the weights come out bit for bit as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.io.records import parse_json, read_as

LRSchedule = Callable[[int], float]


class NotFiniteError(UserError):
    """A loss or a gradient that is not finite, so that training has stopped."""


@dataclass(frozen=True)
class Report:
    """What one optimiser step did. `step` counts from 1; `seconds` is the time of this step."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float


def train(
    losses: Callable[[int], Iterator[Tensor]],
    parameters: Mapping[str, Tensor],
    *,
    optimizer: Optimizer,
    lr_schedule: LRSchedule,
    steps: int,
    done: int = 0,
    clip: float = 1.0,
    average: Average | None = None,
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
    scales: Sequence[str] = ("--learning-rate",),
) -> Iterator[Report]:
    """Trains from step `done + 1` to `steps`.

    `losses(step)` yields the scalar losses of one step, one for each micro-batch (their gradients are averaged);
    `reduce` then replaces the gradients and the loss by their means over processes;
    `lr_schedule(step)` gives the learning rate's factor; `clip` bounds the gradient's norm (0: nothing does).

    `scales` are options that may be too large; `NotFiniteError` names them at the first loss or gradient
    that is not finite, before it reaches the weights.
    """
    bases = [group["lr"] for group in optimizer.param_groups]
    for step in range(done + 1, steps + 1):
        began = time.perf_counter()
        # forward and backward, micro-batch after micro-batch: gradients add up in place
        optimizer.zero_grad(set_to_none=True)
        total, count = 0.0, 0
        for loss in losses(step):
            loss.backward()
            total, count = total + float(loss.detach()), count + 1
        # what got no gradient (pivotal tuning trains its parts one after the other) is left as it is
        trained = [parameter for parameter in parameters.values() if parameter.grad is not None]
        gradients = [gradient for parameter in trained if (gradient := parameter.grad) is not None]
        if count > 1:  # sum → mean over micro-batches
            torch._foreach_div_(gradients, count)
        loss_now = total / max(count, 1)
        if reduce is not None:  # mean over processes; the loss travels along
            shared = torch.tensor(loss_now, device=gradients[0].device)
            reduce([*gradients, shared])
            loss_now = float(shared)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, clip or math.inf))
        if not math.isfinite(loss_now) or not math.isfinite(norm):
            raise NotFiniteError(
                f"Training stopped at step {step}: the loss is {loss_now} and its gradient {norm}. "
                f"Lower {' or '.join(scales)}."
            )
        # the step itself, at this step's learning rate
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * lr_schedule(step)
        optimizer.step()
        if average is not None:
            average.update(step)
        # back to the base rates, so that a checkpoint holds them and not those of one step
        rate = optimizer.param_groups[0]["lr"]
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base
        yield Report(step, loss_now, norm, rate, time.perf_counter() - began)


def warm_cosine(steps: int, *, warmup: int = 0, floor: float = 0.0) -> LRSchedule:
    """Linear warm-up, then half a cosine down to `floor` at `steps` (Loshchilov & Hutter 2017, eq. 5)."""

    def factor(step: int) -> float:
        if step <= warmup:
            return step / max(warmup, 1)
        share = min(1.0, (step - warmup) / max(steps - warmup, 1))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

    return factor


def warm_stable_decay(steps: int, *, warmup: int = 0, decay: int = 0) -> LRSchedule:
    """Linear warm-up, constant, and linearly down to zero over the last `decay` steps (Hu et al. 2024, "MiniCPM", §4).

    The weights before the decay are as good a start as any for going on, so a run need not know its end in advance.
    """

    def factor(step: int) -> float:
        return min(1.0, step / max(warmup, 1), (steps + 1 - step) / (decay + 1))

    return factor


def warm_constant(*, warmup: int = 0) -> LRSchedule:
    """Linear warm-up, then constant."""
    return lambda step: min(1.0, step / max(warmup, 1))


class Average:
    """An exponential moving average of parameters, with the warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the parameters after optimiser step `step`."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in the parameters' place inside the `with`."""
        own = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


@torch.no_grad()
def save_checkpoint(
    path: Path,
    *,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    average: Average | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes one safetensors file, atomically: parameters, optimiser state, average, and the step in the header."""
    tensors = {f"parameter/{name}": value.detach() for name, value in parameters.items()}
    names = {id(value): name for name, value in parameters.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer/{key}/{names[id(parameter)]}"] = torch.as_tensor(value)
    if average is not None:
        tensors.update({f"average/{name}": value for name, value in average.values.items()})
    numbers = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    header = {
        "step": str(step),
        "groups": json.dumps(numbers, default=str),
        "facts": json.dumps(dict(facts or {})),
    }
    write_tensors(path, {name: value.contiguous() for name, value in tensors.items()}, header)


@torch.no_grad()
def load_checkpoint(
    path: Path,
    *,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    average: Average | None = None,
    facts: Mapping[str, Any] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Restores what `save_checkpoint` wrote into the same parameters and optimiser; gives (step, facts).

    Raises `UserError`, before anything is changed, when the file holds other parameters than these, or was saved with
    other `facts`.
    """
    tensors, header = read_tensors(path)
    step = read_as(int, parse_json(header.get("step", "null"), path), path, "step")
    known = read_as(dict[str, Any], parse_json(header.get("facts", "null"), path), path, "facts")
    for name, fact in (facts or {}).items():
        if known.get(name, fact) != fact:
            raise UserError(
                f"{path} was saved with another {name} than there is now. Put the old one back, or start the run anew."
            )
    saved = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if saved != set(parameters):
        odd = sorted(saved ^ set(parameters))[0]
        raise UserError(
            f"{path} was saved by another kind of run ({odd} differs). Start anew or resume that one."
        )
    _refuse_other_shapes(path, tensors, parameters, average)
    for name, value in parameters.items():
        value.copy_(tensors[f"parameter/{name}"])
        state = {}
        for full, saved_value in tensors.items():
            if full.startswith("optimizer/") and full.split("/", 2)[2:] == [name]:
                state[full.split("/", 2)[1]] = saved_value.clone()
        if state:
            optimizer.state[value] = state
    if average is not None:
        for name, value in average.values.items():
            value.copy_(tensors[f"average/{name}"])
    return step, known


def _refuse_other_shapes(
    path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], average: Average | None
) -> None:
    """`UserError` where a checkpoint's tensors are not of the shapes of these parameters."""
    wanted = {f"parameter/{name}": value for name, value in parameters.items()}
    if average is not None:
        wanted |= {f"average/{name}": value for name, value in average.values.items()}
    for name, value in wanted.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(value.shape):
            raise UserError(
                f"{path} was saved by another kind of run ({name} is {found}, and {tuple(value.shape)} is wanted). "
                "Start anew or resume that one."
            )
