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
from backbone.io.files import content_hash, read_metadata, read_tensors, write_tensors
from backbone.io.records import parse_json, read_as
from backbone.io.run_folder import damaged_checkpoint, reading_checkpoint

LRSchedule = Callable[[int], float]


# What Prodigy finds while it runs, and keeps in its groups in place of its state
FOUND = ("d", "d_max", "d_numerator", "k")
READ_EVERY = 10  # steps on a GPU between two reads of their losses, unless somebody asks earlier


class NotFiniteError(UserError):
    """Training stopped at a loss or a gradient that is not finite."""


@dataclass(frozen=True)
class Report:
    """The metrics of one optimiser step. `step` counts from 1; `seconds` is the time of this step.

    For steps whose metrics were read together, `seconds` is their mean.
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
        """The step for the log."""
        return Report(self.step, self.loss, self.gradient_norm, self.learning_rate, self.seconds)

    def _read(self) -> dict[str, float]:
        if not self.numbers:
            self._readings.read()
        return self.numbers


class Readings:
    """Metrics of steps, kept on the device until they are read, all of them in one transfer."""

    def __init__(self, explain: Callable[[int, float, float], str]) -> None:
        self.explain = explain
        self.unread: list[tuple[Step, dict[str, Tensor | float]]] = []

    def add(self, step: Step, shown: Mapping[str, Tensor | float]) -> None:
        """Keep a step's metrics, numbers [] on any device."""
        self.unread.append((step, dict(shown)))

    def read(self) -> None:
        """Read all that is unread; `NotFiniteError` at the first step that was not finite."""
        unread, self.unread = self.unread, []
        began = time.perf_counter()
        on_device = [value for _, shown in unread for value in shown.values() if isinstance(value, Tensor)]
        values = iter(read_numbers(on_device))
        for step, shown in unread:
            numbers = {
                name: next(values) if isinstance(value, Tensor) else float(value)
                for name, value in shown.items()
            }
            loss, norm = numbers["loss"], numbers["gradient_norm"]
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise NotFiniteError(
                    f"Training stopped at step {step.step}: {self.explain(step.step, loss, norm)}"
                )
            step.numbers = numbers
        waited = time.perf_counter() - began
        if len(unread) > 1:  # the device was still computing them: the wait is shared out
            mean = (sum(step.seconds for step, _ in unread) + waited) / len(unread)
            for step, _ in unread:
                step.seconds = mean


def read_numbers(values: Sequence[Tensor]) -> list[float]:
    """Numbers [] as floats, with one transfer for each device."""
    found: list[float] = [0.0] * len(values)
    for device in {value.device for value in values}:
        places = [place for place, value in enumerate(values) if value.device == device]
        exact = torch.float32 if device.type == "mps" else torch.float64
        read = torch.stack([values[place].detach().to(exact) for place in places]).tolist()
        for place, number in zip(places, read, strict=True):
            found[place] = number
    return found


@dataclass(frozen=True)
class Update:
    """How the gradients of a step become an update of the weights.

    clip     clips the norm of the gradients; 0: no clipping
    reduce   replaces the gradients and the loss by their means over processes
    average  a moving average of the weights, updated after each step
    """

    clip: float = 1.0
    reduce: Callable[[Sequence[Tensor]], None] | None = None
    average: Average | None = None


@dataclass(frozen=True)
class Monitor:
    """Further metrics of a step, and the error message for one that is not finite.

    figures     further metrics, numbers [] that may lie on the device
    explain     the reason why a step was not finite; "": unknown
    scales      options that the message then says to lower
    read_every  steps between two reads of the metrics on a GPU; 0: READ_EVERY
    """

    figures: Callable[[], Mapping[str, Tensor | float]] = dict
    explain: Callable[[int], str] = lambda step: ""
    scales: Sequence[str] = ("--learning-rate",)
    read_every: int = 0

    def reason(self, step: int, loss: float, norm: float) -> str:
        """Why training stopped at a step, and what helps."""
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
    """Trains from step `done + 1` to `steps`.

    `losses(step)` yields the scalar losses of one step, one for each micro-batch (their gradients are averaged);
    `lr_schedule(step)` gives the learning rate's factor.

    A loss or gradient that is not finite never reaches the weights or the optimiser's state. On a GPU the metrics are
    read only every `monitor.read_every` steps, or when somebody asks for them: the device itself skips the update and
    all later ones (`can_skip`). Elsewhere every step is read before its update. Then `NotFiniteError` says which step
    it was and why.
    """
    update, monitor = update or Update(), monitor or Monitor()
    bases = [group["lr"] for group in optimizer.param_groups]
    skips = can_skip(optimizer, parameters)
    every = (monitor.read_every or choose_read_every(parameters)) if skips else 1
    readings = Readings(monitor.reason)
    finite: Tensor | None = None  # [], on the device: whether all steps so far were
    for number in range(done + 1, steps + 1):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        trained, loss = accumulate_gradients(losses(number), parameters)
        if update.reduce is not None:  # mean over processes, of the loss too
            gradients = _gradients(trained)
            loss = loss.to(gradients[0], copy=True)
            update.reduce([*gradients, loss])
        norm = torch.nn.utils.clip_grad_norm_(trained, update.clip or math.inf)
        # the step itself, at this step's learning rate
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * lr_schedule(number)
        step = Step(readings, number, optimizer.param_groups[0]["lr"])
        readings.add(step, {"loss": loss, "gradient_norm": norm, **monitor.figures()})
        if every == 1:
            readings.read()
            optimizer.step()
        else:
            now = loss.isfinite() & norm.isfinite()
            finite = now if finite is None else finite & now
            step_where(optimizer, finite)
        if update.average is not None:
            update.average.update(number)
        # back to the base rates, so that a checkpoint holds them and not those of one step
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base
        step.seconds = time.perf_counter() - began
        if every > 1 and (number % every == 0 or number == steps):
            readings.read()
        yield step


def accumulate_gradients(
    losses: Iterator[Tensor], parameters: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Forward and backward of every micro-batch; returns the parameters that have a gradient, and the mean loss [].

    A parameter without a gradient (pivotal tuning trains its parts one after the other) is not updated.
    """
    parts = []
    for loss in losses:
        loss.backward()
        parts.append(loss.detach())
    trained = [parameter for parameter in parameters.values() if parameter.grad is not None]
    if len(parts) > 1:  # sum → mean over micro-batches
        torch._foreach_div_(_gradients(trained), len(parts))
    return trained, _mean(parts)


def _gradients(trained: Sequence[Tensor]) -> list[Tensor]:
    return [gradient for parameter in trained if (gradient := parameter.grad) is not None]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """The mean [] of the losses of micro-batches, in float64 where the device has it."""
    if not parts:
        return torch.zeros(())
    exact = torch.float32 if parts[0].device.type == "mps" else torch.float64
    total = parts[0].to(exact)
    for part in parts[1:]:
        total = total + part
    return total / len(parts)


def can_skip(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the optimiser can skip an update by a flag on the device: fused AdamW, all on one device."""
    fused = type(optimizer) is torch.optim.AdamW and bool(optimizer.defaults["fused"])
    return fused and len({value.device for value in parameters.values()}) == 1


def choose_read_every(parameters: Mapping[str, Tensor]) -> int:
    """Steps between two reads of the metrics: on a CPU every step, since nothing has to be waited for."""
    return READ_EVERY if any(value.device.type == "cuda" for value in parameters.values()) else 1


def step_where(optimizer: Optimizer, finite: Tensor) -> None:
    """A step of fused AdamW where `finite` [] is true; else weights, moments and its count stay as they are.

    This is the flag by which torch's own gradient scaling skips a step.
    """
    fused: Any = optimizer
    fused.found_inf = (~finite).float()
    optimizer.step()
    del fused.found_inf


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

    Training can go on from the weights before the decay, so the number of steps need not be known in advance.
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
        """Inside the `with`, the parameters hold the averages."""
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
        "optimizer": type(optimizer).__name__,
        "groups": json.dumps(numbers, default=_plain_number),
        "facts": json.dumps({name: _alike(fact)[0] for name, fact in (facts or {}).items()}),
        "tensors": _hash_kinds(tensors),
        "sums": _hash_sums(tensors),
    }
    write_tensors(path, {name: value.contiguous() for name, value in tensors.items()}, header)


def _plain_number(value: Any) -> Any:
    """A number of an optimiser's group that is kept as a tensor; other things by their names."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else str(value)


def _hash_kinds(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the names, dtypes and shapes of tensors."""
    kinds = sorted((name, str(value.dtype), list(value.shape)) for name, value in tensors.items())
    return content_hash(json.dumps(kinds).encode())


def _hash_sums(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the sums of the tensors' bits, which another bit, or a block of zeros, makes another."""
    sums = [(name, _sum_bits(value)) for name, value in sorted(tensors.items())]
    return content_hash(json.dumps(sums).encode())


def _sum_bits(value: Tensor) -> int:
    bits = value.detach().contiguous().reshape(-1).view(torch.uint8)
    is_aligned = bits.numel() % 4 == 0 and bits.storage_offset() % 4 == 0
    words = bits.view(torch.int32) if is_aligned else bits
    return int(words.sum(dtype=torch.int64))


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

    Raises `UserError`, before anything is changed, when the file holds other parameters than these, was saved with
    other `facts` or by another optimiser, or is not as it was saved.
    """
    with reading_checkpoint(path):
        tensors, header = read_tensors(path)
        step = read_as(int, parse_json(header.get("step", "null"), path), path, "step")
        found = _read_found(path, header)
    known = _refuse_other_facts(path, header, facts or {})
    _refuse_changed(path, tensors, header, step)
    kind = type(optimizer).__name__
    if header.get("optimizer", kind) != kind:
        raise UserError(
            f"{path} was saved by another kind of run (its optimiser is {header['optimizer']}, and {kind} is wanted). "
            "Start anew or resume that one."
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
                key = full.split("/", 2)[1]
                state[key] = _state_like(saved_value, value, _state_device(optimizer, key, value))
        if state:
            optimizer.state[value] = state
    if average is not None:
        for name, value in average.values.items():
            value.copy_(tensors[f"average/{name}"])
    for group, numbers in zip(optimizer.param_groups, found, strict=False):
        group.update({name: number for name, number in numbers.items() if name in group})
    return step, known


def _read_found(path: Path, header: Mapping[str, str]) -> list[dict[str, float]]:
    """What an optimiser had found by itself, of each of its groups."""
    groups = read_as(list[dict[str, Any]], parse_json(header.get("groups", "[]"), path), path, "groups")
    return [
        {
            name: read_as(int if name == "k" else float, group[name], path, name)
            for name in FOUND
            if name in group
        }
        for group in groups
    ]


def _refuse_changed(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], step: int) -> None:
    """`UserError` for a checkpoint whose tensors are not those that were saved in it, or not finite numbers."""
    complaint = ""
    if step < 0:
        complaint = f"its step is {step}"
    elif header.get("tensors") not in (None, _hash_kinds(tensors)):
        complaint = "it holds other tensors than were saved in it"
    else:
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
                complaint = f"{name} holds values that are not finite numbers"
        if not complaint and header.get("sums") not in (None, _hash_sums(tensors)):
            complaint = "its numbers are not those that were saved in it"
    if complaint:
        raise damaged_checkpoint(path, complaint)


def refuse_other_sources(path: Path, facts: Mapping[str, Any]) -> None:
    """`UserError` where a checkpoint was saved with other `facts`; one that is not there was saved with any.

    A fact that is a sequence is saved as its first value, and any of them is the same.
    """
    if path.exists():
        with reading_checkpoint(path):
            header = read_metadata(path)
        _refuse_other_facts(path, header, facts)


def _refuse_other_facts(path: Path, header: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    with reading_checkpoint(path):
        known = read_as(dict[str, Any], parse_json(header.get("facts", "null"), path), path, "facts")
    for name, fact in facts.items():
        if name in known and known[name] not in _alike(fact):
            raise UserError(
                f"{path} was saved with another {name} than there is now. Put the old one back, or start the run anew."
            )
    return known


def _alike(fact: Any) -> Sequence[Any]:
    return fact if isinstance(fact, Sequence) and not isinstance(fact, str) else (fact,)


def _state_like(saved: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """A piece of an optimiser's state, of a parameter's shape in its memory layout: fused kernels go by memory."""
    if saved.shape != parameter.shape:
        return saved.clone().to(device)
    return torch.empty_like(parameter, dtype=saved.dtype, device=device, requires_grad=False).copy_(saved)


def _state_device(optimizer: Optimizer, key: str, parameter: Tensor) -> torch.device:
    """Where a piece of an optimiser's state belongs: beside its parameter, but for the count of a plain AdamW."""
    counted_on_host = key == "step" and not optimizer.defaults.get("fused")
    return torch.device("cpu") if counted_on_host else parameter.device


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
