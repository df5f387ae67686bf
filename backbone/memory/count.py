"""Count the bytes of a forward or training pass without computing it, on torch's `meta` device.

`saved` is what the forward pass keeps for the backward pass; `peak` is the maximum during both, with gradients and
without weights. A pass on a device with storage is counted in the same way, so that the two can be compared. What
`meta` lacks is emulated: autocast, by the op lists of the intended device, and fused attention, which saves its
operands, its output and one number per query (Dao et al. 2022, algorithm 1) where `meta` would materialise the
attention matrix. Kernel workspaces are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from backbone.training.attention import fast_attention_backward
from backbone.training.fast import fast_steps

Forward = Callable[[], Tensor]
AUTOCAST_LOWER = frozenset(
    {F.linear, F.conv2d, torch.conv2d, F.conv3d, torch.conv3d, torch.matmul, torch.bmm, torch.baddbmm}
    | {torch.Tensor.matmul, torch.Tensor.__matmul__, F.scaled_dot_product_attention}
)
AUTOCAST_FP32 = {  # operations that autocast computes in fp32, by device
    "cuda": frozenset(
        {F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm, F.rms_norm, F.softmax, torch.softmax}
        | {torch.Tensor.softmax, torch.pow, torch.Tensor.pow, torch.exp, torch.rsqrt, torch.Tensor.rsqrt}
    ),
    "cpu": frozenset[Any](),
}
HALF_DTYPES = (torch.float16, torch.bfloat16)
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # size, strides, dtype

# Layouts of the outputs of operations on `meta`, by their inputs; () where the operation must be called
_OUTPUTS: dict[Any, tuple[Layout, ...]] = {}


class StepBytes(NamedTuple):
    """Bytes of a training step: saved for the backward pass, and the peak."""

    saved: int
    peak: int


def training_step_bytes(
    network: nn.Module,
    forward: Forward,
    *,
    device: str = "cuda",
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    inputs: Sequence[Tensor] = (),
) -> StepBytes:
    """Count a forward and backward pass; `forward` calls `network` and returns a prediction. Gradients are dropped.

    `device` and `autocast` are those of the run; `inputs`, the batch, are alive throughout. A network with storage is
    counted while it computes.
    """
    weights = {value.untyped_storage()._cdata for value in network.parameters()}
    with (
        fast_steps(network, device=device),
        _enable_checkpointing(network, device, autocast, checkpointing),
        LiveStorageTracker(weights, inputs) as tracker,
    ):
        with _emulate(network, device, autocast), _count_saved(weights) as saved:
            loss = forward().float().square().mean()
        loss.backward()
    network.zero_grad(set_to_none=True)
    return StepBytes(sum(saved.values()), tracker.peak)


@torch.no_grad()
def forward_peak_bytes(
    network: nn.Module,
    call: Callable[[], object],
    *,
    device: str = "cuda",
    autocast: torch.dtype | None = None,
    inputs: Sequence[Tensor] = (),
) -> int:
    """The peak bytes of a call without gradients with its `inputs`, the network's weights not counted."""
    weights = {value.untyped_storage()._cdata for value in network.parameters()}
    with (
        fast_attention_backward(network, device=device),
        _emulate(network, device, autocast),
        LiveStorageTracker(weights, inputs) as tracker,
    ):
        call()
    return int(tracker.peak)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The total bytes of tensors, on `meta` too."""
    return sum(value.numel() * value.element_size() for value in tensors)


class LiveStorageTracker(TorchDispatchMode):
    """Tracks the inputs, and every storage that operations create inside until its last tensor is freed."""

    def __init__(self, weights: set[int], inputs: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ignored = weights
        self.live = self.peak = 0
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}
        for tensor in inputs:
            self._track(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = _call(func, args, kwargs or {})
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, Tensor):
                self._track(output.untyped_storage())
        return outputs

    def _track(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or key in self.ignored:
            return
        size = storage.nbytes()
        self._known[key] = size, weakref.ref(storage, lambda _: self._untrack(key))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _untrack(self, key: int) -> None:
        self.live -= self._known.pop(key)[0]


class MetaDeviceEmulation(TorchFunctionMode):
    """Makes networks on `meta` save what they would save on a device, with autocast to `lower` if given."""

    def __init__(self, device: str, lower: torch.dtype | None) -> None:
        super().__init__()
        self.device, self.lower = device, lower
        self._cast: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.lower is not None:
            dtype = self.lower if func in AUTOCAST_LOWER else None
            dtype = torch.float32 if func in AUTOCAST_FP32[self.device] else dtype
            if dtype is not None:
                args = tuple(self._autocast(dtype, value) for value in args)
                kwargs = {name: self._autocast(dtype, value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return emulate_fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _autocast(self, dtype: torch.dtype, value: Any) -> Any:
        """Cast a tensor as autocast does; leaves that require gradients are cast once and cached."""
        if (
            not isinstance(value, Tensor)
            or value.dtype is dtype
            or value.dtype not in (torch.float32, *HALF_DTYPES)
        ):
            return value
        if not (value.is_leaf and value.requires_grad and dtype in HALF_DTYPES):
            return value.to(dtype)
        if id(value) not in self._cast:
            self._cast[id(value)] = value.to(dtype)
        return self._cast[id(value)]


def emulate_fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """The shape of fused attention's output [B, heads, tokens, D], saving for backward what the kernel saves.

    Instead of a boolean mask it saves the numbers that are added.
    """
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return cast(Tensor, _FusedAttention.apply(query, key, value, attn_mask))  # type: ignore[no-untyped-call]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)
        sums = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, *([] if mask is None else [mask]))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


# Helpers ----------------------------------------------------------------------------------------------------


@contextmanager
def _count_saved(weights: set[int]) -> Iterator[dict[int, int]]:
    """The bytes of each storage that a forward pass inside saves for the backward pass, by its address."""
    sizes: dict[int, int] = {}
    saved: list[Any] = []

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            saved.append(storage)  # so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield sizes
    saved.clear()  # the backward pass frees them one by one


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operation; on `meta`, after an equal call, only allocate its outputs.

    Most operations on `meta` are decomposed in Python, which takes much longer than making an empty tensor.
    """
    inputs: list[Tensor] = []
    try:
        key = (func, _describe(args, inputs), _describe(kwargs, inputs))
        layouts = _OUTPUTS.get(key)
    except TypeError:  # an argument that is not hashable
        return func(*args, **kwargs)
    if not inputs or not all(tensor.is_meta for tensor in inputs):
        return func(*args, **kwargs)
    if layouts:
        outputs = [
            torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in layouts
        ]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]
    outputs = func(*args, **kwargs)
    if layouts is None:
        _OUTPUTS[key] = _find_layouts(inputs, outputs)
    return outputs


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    """A hashable description of an argument for the outputs' layout; appends its tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_describe(item, tensors) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _describe(item, tensors)) for name, item in value.items()])
    return type(value), value


def _find_layouts(inputs: Sequence[Tensor], outputs: Any) -> tuple[Layout, ...]:
    """The outputs' layouts; () unless each is a tensor on `meta` that fills a new storage of its own."""
    tensors = outputs if type(outputs) is tuple else (outputs,)
    if not all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
        return ()

    # An output that shares an input's storage, or fills a part of a storage, is no new memory
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    layouts: list[Layout] = []
    for tensor in tensors:
        storage, size, stride = tensor.untyped_storage(), tensor.shape, tensor.stride()
        filled = torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta").untyped_storage()
        if storage._cdata in storages or filled.nbytes() != storage.nbytes():
            return ()
        storages.add(storage._cdata)
        layouts.append((size, stride, tensor.dtype))
    return tuple(layouts)


def _emulate(network: nn.Module, device: str, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """The device's autocast where there is storage, else its emulation."""
    if next(network.parameters()).device.type == "meta":
        return MetaDeviceEmulation(device, autocast)
    return nullcontext() if autocast is None else torch.autocast(device, autocast)


@contextmanager
def _enable_checkpointing(
    network: nn.Module, device: str, autocast: torch.dtype | None, checkpointing: bool
) -> Iterator[None]:
    """Enable gradient checkpointing inside, if requested; recomputation is counted like the first pass."""
    if not checkpointing:
        yield
        return
    on_meta = next(network.parameters()).device.type == "meta"

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), MetaDeviceEmulation(device, autocast) if on_meta else nullcontext()

    def recompute(module: Any, *inputs: Any) -> Any:
        return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)

    cast(Any, network).enable_gradient_checkpointing(recompute)
    try:
        yield
    finally:
        cast(Any, network).disable_gradient_checkpointing()
