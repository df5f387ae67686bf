"""Counts what would make a processor wait for a GPU, on a machine without one.

    with HostSyncs() as waits:
        waits.own(model.denoiser)                   # what lies on the device
        step()
    assert waits.found == []

On a CPU every tensor lies in one memory, so the device is marked: parameters and buffers that the test names, whatever
is computed from these, and whatever `send` copies there. Found are reads of such a tensor by the processor (`.item()`,
`.tolist()`, `.cpu()`, `.numpy()`, `bool`, `float`, `int`, an index), operations whose shape depends on values
(`nonzero`, a mask as an index), copies to the device that wait (`.to(device)` of the processor's own tensors,
`torch.tensor(…, device=…)`), and operations that mix both memories, which a GPU refuses.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from backbone.data.prefetch import StepLoader
from backbone.models.model import Backbone
from backbone.training.run import Objective, take_steps

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "is_nonzero")
FACTORIES = ("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "rand", "randn")
READ_EVERY = 4
BY_VALUE = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
}
PUTS = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class HostSyncs(TorchDispatchMode):
    """Inside the `with`, every wait is a line of `found`: what waited, and where in the project."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self._device: dict[int, StorageWeakRef] = {}  # by storage: views lie where their base does
        self._patches = ExitStack()
        self._busy = self._elsewhere = False

    # What lies on the device ---------------------------------------------------------------------------------

    def own(self, *things: Any) -> None:
        """Marks tensors, modules' parameters and buffers, and what containers hold of them, as the device's."""
        for thing in things:
            for tensor in _tensors_of(thing):
                self._mark(tensor)

    def has(self, tensor: object) -> bool:
        """Whether a tensor lies on the device."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return False
        known = self._device.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired() and not self._elsewhere

    def on_the_processor(self, make: Callable[[int], list[Any]]) -> Callable[[int], list[Any]]:
        """A step's batches as they are made ahead, in other processes or here: what is done there meets no device."""

        def made(step: int) -> list[Any]:
            self._elsewhere = True
            try:
                return make(step)
            finally:
                self._elsewhere = False

        return made

    def _mark(self, tensor: Tensor) -> None:
        if self._elsewhere:
            return
        storage = tensor.untyped_storage()
        self._device[storage._cdata] = StorageWeakRef(storage)

    # What waits ----------------------------------------------------------------------------------------------

    def __enter__(self) -> HostSyncs:
        for name in READS:
            self._patches.enter_context(patch.object(Tensor, name, self._reading(name)))
        self._patches.enter_context(patch.object(Tensor, "to", self._moving(Tensor.to)))
        for name in ("tensor", "as_tensor", *FACTORIES):
            self._patches.enter_context(patch.object(torch, name, self._making(getattr(torch, name))))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._patches.close()

    def _reading(self, name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def read(tensor: Tensor, *given: Any, **named: Any) -> Any:
            if self.has(tensor) and not self._busy:
                self._note(f".{name}()")
                self._busy = True  # one wait, whatever it calls
                try:
                    value = original(tensor, *given, **named)
                    return value.clone() if value is tensor else value  # the processor's own copy
                finally:
                    self._busy = False
            return original(tensor, *given, **named)

        return read

    def _moving(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def to(tensor: Tensor, *given: Any, **named: Any) -> Tensor:
            result = original(tensor, *given, **named)
            where = [*given[:1], named.get("device"), named.get("other")]
            moves = any(isinstance(one, (torch.device, str)) or self.has(one) for one in where)
            if moves and not self.has(tensor):
                if not (named.get("non_blocking") or (len(given) > 2 and given[2])):
                    self._note(".to(device)")
                result = result.clone()  # the processor keeps its own
                self._mark(result)
            return result

        return to

    def _making(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*given: Any, **named: Any) -> Tensor:
            result = original(*given, **named)
            there = named.get("device") is not None and named.get("generator") is None
            if there and not (given and self.has(given[0])):
                if original.__name__ not in FACTORIES:
                    self._note("torch.tensor(…, device=…)")
                self._mark(result)
            return result

        return make

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().partition(".")[0]
        inputs = list(_tensors_of((args, kwargs or {})))
        ours = [tensor for tensor in inputs if self.has(tensor)]
        if ours and not self._busy:
            if name in BY_VALUE:
                self._note(name)
            elif name in PUTS and any(one.dtype is torch.bool for one in _tensors_of(args[1])):
                self._note(f"{name} by a mask")
            strangers = [one for one in inputs if one.ndim and not self.has(one) and one.device.type == "cpu"]
            # (`quantile` fills a rank that it made itself, where its input lies)
            fits = (name in PUTS and self.has(args[0])) or name in ("aten::_to_copy", "aten::masked_fill")
            if strangers and not fits:
                self._note(f"{name} of both memories")
        result = func(*args, **(kwargs or {}))
        if ours and not self._busy:
            for tensor in _tensors_of(result):
                self._mark(tensor)
        return result

    def _note(self, what: str) -> None:
        if self._elsewhere:
            return
        frames = [
            frame for frame in traceback.extract_stack() if not frame.filename.endswith("tests/syncs.py")
        ]
        place = next((frame for frame in reversed(frames) if "/torch/" not in frame.filename), frames[-1])
        self.found.append(f"{what} at {place.filename.rpartition('/s')[2]}:{place.lineno} {place.line}")


def _tensors_of(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from thing.parameters()
        yield from thing.buffers()
    elif isinstance(thing, Mapping):
        for one in thing.values():
            yield from _tensors_of(one)
    elif isinstance(thing, (list, tuple)):
        for one in cast(Iterable[Any], thing):
            yield from _tensors_of(one)


def count_waits(training: Objective, model: Backbone, *device: Any) -> list[str]:
    """What waited in the steps between two reads, after one read's worth of them."""
    for group in training.optimizer.param_groups:
        group["fused"] = True
    training.optimizer.defaults["fused"] = True
    waits = HostSyncs()
    for batches in (one for one in vars(training).values() if isinstance(one, StepLoader)):
        batches.make = waits.on_the_processor(batches.make)
    steps = take_steps(training, read_every=READ_EVERY)
    for _ in range(READ_EVERY):
        next(steps)
    with waits:
        waits.own(model.denoiser, training.parameters, [*training.optimizer.state.values()], *device)
        waits.own([slot.model for slot in model.text_encoder.slots] if model.text_learned else [])
        for _ in range(READ_EVERY - 1):
            next(steps)
    last = next(steps)
    assert last.is_read and last.loss > -1e9
    return waits.found
