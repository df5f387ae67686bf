"""Prefetching in worker processes, with results in order: decoding for preparation, batches for training.

A result is a function of its item alone, so it does not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbone.diffusion.transfer import send
from backbone.io.console import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Movable:
    """A batch: a dataclass whose fields are tensors, `Conditions` or None, moved to a device together.

    The fields named in `on_host` stay in CPU memory, where they index tables.
    """

    on_host: ClassVar[tuple[str, ...]] = ()

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return self._apply(lambda value: send(value, device), lambda part: part.to(device))

    def pin_memory(self) -> Self:
        """The same batch in pinned memory."""
        return self._apply(lambda value: value.contiguous().pin_memory(), lambda part: part.pin_memory())

    def tensors(self) -> list[Tensor]:
        """The tensors that lie on the device."""
        parts = self._list_fields().values()
        lists = ([part] if isinstance(part, Tensor) else part.tensors() for part in parts)
        return [tensor for tensors in lists for tensor in tensors]

    def _list_fields(self) -> dict[str, Any]:
        """The fields that lie on the device."""
        names = [field.name for field in fields(cast(Any, self)) if field.name not in self.on_host]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _apply(self, tensor: Callable[[Tensor], Tensor], part: Callable[[Any], Any]) -> Self:
        """Apply `tensor` to every tensor that lies on the device, and `part` to every field that holds some."""
        changed = {
            name: tensor(value) if isinstance(value, Tensor) else part(value)
            for name, value in self._list_fields().items()
        }
        return cast(Self, replace(cast(Any, self), **changed))


Batch = TypeVar("Batch", bound=Movable)


def map_in_workers(
    work: Callable[[Item], Result], items: Iterable[Item], *, workers: int = 0, pin: bool = False
) -> Iterator[Result]:
    """`map(work, items)` in `workers` processes, each two items ahead, in order; 0: in this process, lazily.

    A worker is a fork of this process, so `work` may be any callable; items (which may be a generator) and results are
    sent between processes. A `UserError` of a worker is raised here. `pin` returns tensors in pinned memory. Raises
    `UserError` for workers on a system that cannot fork.
    """
    if not workers and not pin:
        yield from map(work, items)
        return
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        raise UserError("This system cannot fork, so there are no worker processes. Ask for 0 of them.")
    loader: DataLoader[Any] = DataLoader(
        _Work(work),
        sampler=items,
        batch_size=None,
        collate_fn=_keep_result,
        generator=torch.Generator(),  # otherwise it draws from the global generator
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_ignore_signals if workers else None,
    )
    try:
        for result in loader:
            if isinstance(result, _Failure):
                raise UserError(result.message)
            yield cast(Result, result)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A worker process has ended ({str(error).splitlines()[0]}). Where memory is short, ask for fewer of them, "
            "or for 0."
        ) from error


class StepLoader(Generic[Batch]):
    """Prefetches the batches of a training's steps: `at` returns those of one step, on the device.

    `make` builds a step's batches from its number alone; steps are read in order, from any step up to `last`.
    On a GPU the next step's batches are copied on a separate stream during this step.
    """

    def __init__(
        self, make: Callable[[int], list[Batch]], last: int, device: torch.device, *, workers: int = 0
    ) -> None:
        self.make, self.last, self.device, self.workers = make, last, device, workers
        self._next = self._end = -1
        self._batches: Iterator[list[Batch]] = iter(())
        self._upcoming: list[Batch] | None = None
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu and workers else None

    def at(self, step: int) -> list[Batch]:
        """The batches of a step, on the device."""
        if step != self._next or step > self._end:
            self.close()
            self._end = max(self.last, step)
            self._batches = map_in_workers(
                self.make,
                range(step, self._end + 1),
                workers=self.workers,
                pin=self.device.type == "cuda",
            )
        batches = self._upcoming if self._upcoming is not None else self._move(next(self._batches))
        self._upcoming, self._next = None, step + 1
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._stream)
            for tensor in (tensor for batch in batches for tensor in batch.tensors()):
                tensor.record_stream(stream)  # so that the next copy does not reuse its memory too early
            upcoming = next(self._batches, None)
            self._upcoming = None if upcoming is None else self._move(upcoming)
        return batches

    def close(self) -> None:
        """End the worker processes."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches, self._upcoming, self._next = iter(()), None, -1

    def _move(self, batches: list[Batch]) -> list[Batch]:
        if self._stream is None:
            return [batch.to(self.device) for batch in batches]
        with torch.cuda.stream(self._stream):
            return [batch.to(self.device) for batch in batches]


@dataclass(frozen=True)
class _Failure:
    message: str


class _Work(Dataset[Any]):
    """A dataset whose index is the item itself."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.work(item)
        except UserError as error:
            return _Failure(str(error))


def _keep_result(result: Any) -> Any:
    """The result unchanged, which torch's own `collate_fn` would convert."""
    return result


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and a closed terminal, which reach every process: the parent ends the workers."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
