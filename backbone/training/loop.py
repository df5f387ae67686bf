"""The one training loop: a generator that takes an optimiser step and yields a report.

A method brings four things: its parameters, the loss of a step, a learning-rate schedule, and the body of its own `for`
over the reports (log, preview, save, stop). Every random choice of a step is drawn from `generator(seed, step, …)`, so
a run is a function of its seed, and resuming needs only the saved tensors (`backbone.training.checkpoint`) and the
number of the next step: the weights are bit for bit those of an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from backbone.io.console import UserError
from backbone.training.loss_scale import LossScale
from backbone.training.optimizer import LRSchedule

READ_EVERY = 10  # steps on a GPU between two reads of their losses, unless they are requested earlier


class NotFiniteError(UserError):
    """Training stopped at a loss or a gradient that is not finite."""


@dataclass(frozen=True)
class Report:
    """The metrics of one optimiser step. `step` counts from 1; `seconds` is the time of this step.

    Where the metrics of several steps were read together, `seconds` is the mean over them.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float


class Step:
    """One optimiser step. Its metrics stay on the device until they are read.

    Reading `loss`, `gradient_norm`, `figures` or `report` synchronises with the device, and reads all earlier steps
    too; raises `NotFiniteError` where one of them was not finite.
    """

    def __init__(self, readings: Readings, step: int, learning_rate: float) -> None:
        self.step, self.learning_rate = step, learning_rate
        self.seconds = 0.0
        self._readings = readings
        self.numbers: dict[str, float] = {}

    @property
    def is_read(self) -> bool:
        """Whether its metrics are in the host's memory, so that reading them does not wait."""
        return bool(self.numbers)

    @property
    def loss(self) -> float:
        """The mean over micro-batches and processes."""
        return self._read()["loss"]

    @property
    def gradient_norm(self) -> float:
        """The norm of the gradient of all trained parameters, before clipping."""
        return self._read()["gradient_norm"]

    @property
    def figures(self) -> dict[str, float]:
        """Its other metrics."""
        return {name: value for name, value in self._read().items() if name not in ("loss", "gradient_norm")}

    @property
    def report(self) -> Report:
        """The step's metrics for the log."""
        return Report(self.step, self.loss, self.gradient_norm, self.learning_rate, self.seconds)

    def _read(self) -> dict[str, float]:
        if not self.numbers:
            self._readings.read()
        return self.numbers


class Readings:
    """Metrics of steps, kept on the device until they are read in one transfer.

    explain  (step, loss, gradient norm) → the reason for a non-finite step, and a remedy
    """

    def __init__(self, explain: Callable[[int, float, float], str]) -> None:
        self.explain = explain
        self.unread: list[tuple[Step, dict[str, Tensor | float]]] = []

    def add(self, step: Step, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep a step's metrics, numbers [] on any device."""
        self.unread.append((step, dict(metrics)))

    def read(self) -> None:
        """Read all unread metrics; `NotFiniteError` at the first non-finite step."""
        unread, self.unread = self.unread, []
        began = time.perf_counter()
        on_device = [
            value for _, metrics in unread for value in metrics.values() if isinstance(value, Tensor)
        ]
        values = iter(read_numbers(on_device))
        for step, metrics in unread:
            numbers = {
                name: next(values) if isinstance(value, Tensor) else float(value)
                for name, value in metrics.items()
            }
            loss, norm = numbers["loss"], numbers["gradient_norm"]
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise NotFiniteError(
                    f"Training stopped at step {step.step}: {self.explain(step.step, loss, norm)}"
                )
            step.numbers = numbers
        wait = time.perf_counter() - began
        if len(unread) > 1:  # the device was still computing them, so the wait is divided among the steps
            mean = (sum(step.seconds for step, _ in unread) + wait) / len(unread)
            for step, _ in unread:
                step.seconds = mean


def read_numbers(values: Sequence[Tensor]) -> list[float]:
    """Scalars [] as floats, with one transfer for each device."""
    numbers: list[float] = [0.0] * len(values)
    for device in {value.device for value in values}:
        indices = [index for index, value in enumerate(values) if value.device == device]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        transferred = torch.stack([values[index].detach().to(dtype) for index in indices]).tolist()
        for index, number in zip(indices, transferred, strict=True):
            numbers[index] = number
    return numbers


@dataclass(frozen=True)
class Update:
    """How the gradients of a step become an update of the weights.

    clip     largest norm of the gradients; 0: no clipping
    reduce   replaces tensors (the gradients and the loss) by their means over processes, in place
    average  a moving average of the weights, updated after each step
    scale    the scale of losses whose gradients are computed in fp16
    """

    clip: float = 1.0
    reduce: Callable[[Sequence[Tensor]], None] | None = None
    average: Average | None = None
    scale: LossScale | None = None


@dataclass(frozen=True)
class Monitor:
    """Further metrics of a step, and the error message for a non-finite one.

    figures     further metrics of the step just computed, scalars [], also on the device
    explain     step → the reason why it was not finite; "": unknown
    scales      options that the message then says to lower
    read_every  steps between two reads of the metrics on a GPU; 0: READ_EVERY
    """

    figures: Callable[[], Mapping[str, Tensor | float]] = dict
    explain: Callable[[int], str] = lambda step: ""
    scales: Sequence[str] = ("--learning-rate",)
    read_every: int = 0

    def reason(self, step: int, loss: float, norm: float) -> str:
        """The reason why training stopped at a non-finite step, and a remedy."""
        usual = f"the loss is {loss} and its gradient {norm}. Lower {' or '.join(self.scales)}."
        return self.explain(step) or usual


def train(
    losses: Callable[[int], Iterator[Tensor]],
    parameters: Mapping[str, Tensor],
    *,
    optimizer: Optimizer,
    lr_schedule: LRSchedule,
    steps: int,
    done: int = 0,
    update: Update | None = None,
    monitor: Monitor | None = None,
) -> Iterator[Step]:
    """Train from step `done + 1` to `steps`; yields each step after its update.

    `losses(step)` yields the scalar losses of one step, one for each micro-batch (their gradients are averaged);
    `lr_schedule(step)` gives the learning rate's factor.

    A loss or gradient that is not finite never reaches the weights or the optimiser's state. On a GPU the metrics are
    read only every `monitor.read_every` steps, or when the caller asks for them, so the device itself skips that update
    and all later ones (`can_skip`). Elsewhere the metrics are read before every update. `NotFiniteError` then names
    the step and the reason.
    """
    update, monitor = update or Update(), monitor or Monitor()

    # Whether the device can skip updates itself; the interval between reads of its metrics
    base_rates = [group["lr"] for group in optimizer.param_groups]
    device_skips = can_skip(optimizer, parameters)
    read_every = (monitor.read_every or choose_read_every(parameters)) if device_skips else 1
    readings = Readings(monitor.reason)
    finite: Tensor | None = None  # [], on the device: whether all steps so far were finite
    for number in range(done + 1, steps + 1):
        # Forward and backward: gradients averaged over micro-batches, then over processes, then clipped
        began = time.perf_counter()
        loss, norm = compute_gradients(losses, parameters, number, optimizer, update)
        # the step itself, at this step's learning rate
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base * lr_schedule(number)
        # Read before the update (raises where not finite), or let the device leave the update out
        step = Step(readings, number, optimizer.param_groups[0]["lr"])
        readings.add(step, {"loss": loss, "gradient_norm": norm, **monitor.figures()})
        if read_every == 1:
            readings.read()
            optimizer.step()
        else:
            is_finite = loss.isfinite() & norm.isfinite()
            finite = is_finite if finite is None else finite & is_finite
            step_where(optimizer, finite)
        if update.average is not None:
            update.average.update(number)
        if update.scale is not None:
            update.scale.end_step(number)
        # back to the base rates, which a checkpoint is to hold
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base
        step.seconds = time.perf_counter() - began
        if read_every > 1 and (number % read_every == 0 or number == steps):
            readings.read()
        yield step


def compute_gradients(
    losses: Callable[[int], Iterator[Tensor]],
    parameters: Mapping[str, Tensor],
    number: int,
    optimizer: Optimizer,
    update: Update,
) -> tuple[Tensor, Tensor]:
    """The gradients of step `number`, clipped; returns its loss [] and their norm [] before clipping.

    With a loss scale the step is computed again, with a lower one, while gradients overflow. That waits for the device.
    """
    scale = update.scale
    while True:
        optimizer.zero_grad(set_to_none=True)
        trained, loss = accumulate_gradients(losses(number), parameters, scale.value if scale else 1.0)
        if update.reduce is not None:  # mean over processes, of the loss too
            gradients = _list_gradients(trained)
            loss = loss.to(gradients[0], copy=True)
            update.reduce([*gradients, loss])
        norm = torch.nn.utils.clip_grad_norm_(trained, update.clip or math.inf)
        if scale is None or bool(norm.isfinite()) or not bool(loss.isfinite()) or not scale.lower():
            return loss, norm


def accumulate_gradients(
    losses: Iterator[Tensor], parameters: Mapping[str, Tensor], scale: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    """Backward pass of every micro-batch's loss; returns the parameters with a gradient, and the mean loss [].

    The others are not updated (pivotal tuning trains its parts one after another). Losses are multiplied by `scale` for
    the backward pass, and their gradients divided by it.
    """
    parts = []
    for loss in losses:
        (loss if scale == 1 else loss * scale).backward()
        parts.append(loss.detach())
    trained = [parameter for parameter in parameters.values() if parameter.grad is not None]
    if len(parts) > 1 or scale != 1:  # sum → mean over micro-batches
        torch._foreach_div_(_list_gradients(trained), len(parts) * scale)
    return trained, _mean(parts)


def _list_gradients(trained: Sequence[Tensor]) -> list[Tensor]:
    return [gradient for parameter in trained if (gradient := parameter.grad) is not None]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean [] of the losses of micro-batches, in float64 where the device has it."""
    if not parts:
        return torch.zeros(())
    dtype = torch.float32 if parts[0].device.type == "mps" else torch.float64
    total = parts[0].to(dtype)
    for part in parts[1:]:
        total = total + part
    return total / len(parts)


def can_skip(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the optimiser can skip an update by a flag on the device: fused AdamW, all on one device."""
    fused = type(optimizer) is torch.optim.AdamW and bool(optimizer.defaults["fused"])
    return fused and len({value.device for value in parameters.values()}) == 1


def choose_read_every(parameters: Mapping[str, Tensor]) -> int:
    """Steps between two reads of the metrics: READ_EVERY on a GPU, 1 on a CPU, where reading does not wait."""
    return READ_EVERY if any(value.device.type == "cuda" for value in parameters.values()) else 1


def step_where(optimizer: Optimizer, finite: Tensor) -> None:
    """A step of fused AdamW where `finite` [] is true; else weights, moments and step count do not change.

    torch's own gradient scaler skips steps by the same flag, `found_inf`.
    """
    fused: Any = optimizer
    fused.found_inf = (~finite).float()
    optimizer.step()
    del fused.found_inf


class Average:
    """An exponential moving average of parameters, with the warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters after optimiser step `step`, from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the `with`, the parameters hold their averages."""
        current = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(current)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
