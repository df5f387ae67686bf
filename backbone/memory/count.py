"""The bytes of a training step, counted without computing: networks on torch's `meta` device have shapes alone.

`saved` is what a forward pass keeps for its backward pass; `peak` the most that is alive at any moment of both, weights
not counted, gradients counted. A step on a device with storage is counted in the same way, so that the two can be
compared. What the `meta` device lacks is put in its place: autocast, by the lists of the device that is meant, and
fused attention, which keeps its operands, its answer and one number a query (Dao et al. 2022, algorithm 1) where the
`meta` device would take the plain product of matrices. Workspaces of single kernels are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from backbone.training.attention import quick_to_train

Forward = Callable[[], Tensor]
AUTOCAST_LOWER = frozenset(
    {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.Tensor.matmul}
    | {torch.Tensor.__matmul__, F.scaled_dot_product_attention}
)
AUTOCAST_FP32 = {  # what autocast computes in fp32, by device
    "cuda": frozenset(
        {F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm, F.rms_norm, F.softmax, torch.softmax}
        | {torch.Tensor.softmax, torch.pow, torch.Tensor.pow, torch.exp, torch.rsqrt, torch.Tensor.rsqrt}
    ),
    "cpu": frozenset[Any](),
}
HALF_DTYPES = (torch.float16, torch.bfloat16)


class StepBytes(NamedTuple):
    """Bytes of one step: kept from forward to backward, and alive at the most."""

    saved: int
    peak: int


def training_step_bytes(
    network: nn.Module,
    forward: Forward,
    *,
    device: str = "cuda",
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
) -> StepBytes:
    """Counts a step of `forward`, which asks `network` and gives a prediction; all gradients are dropped again.

    `device` and `autocast` are those of the run that is counted. A network with storage is counted as it computes.
    """
    own = {value.untyped_storage()._cdata for value in network.parameters()}
    with quick_to_train(network, device=device), _checkpointed(network, device, autocast, checkpointing):
        saved = _count_saved(forward, own, lambda: _emulate(network, device, autocast))
        with LiveStorageTracker(own) as alive:
            with _emulate(network, device, autocast):
                loss = forward().float().square().mean()
            loss.backward()
    network.zero_grad(set_to_none=True)
    return StepBytes(saved, alive.peak)


@torch.no_grad()
def forward_peak_bytes(
    network: nn.Module,
    ask: Callable[[], object],
    *,
    device: str = "cuda",
    autocast: torch.dtype | None = None,
) -> int:
    """The most bytes alive while `network` is asked without gradients, its weights not counted."""
    own = {value.untyped_storage()._cdata for value in network.parameters()}
    with (
        quick_to_train(network, device=device),
        _emulate(network, device, autocast),
        LiveStorageTracker(own) as alive,
    ):
        ask()
    return int(alive.peak)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Together, without storage or with."""
    return sum(value.numel() * value.element_size() for value in tensors)


class LiveStorageTracker(TorchDispatchMode):
    """Inside, follows every storage that an operation makes until the last tensor on it is gone."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ignored = own
        self.live = self.peak = 0
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor):
                self._follow(one.untyped_storage())
        return made

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or key in self.ignored:
            return
        size = storage.nbytes()
        self._known[key] = size, weakref.ref(storage, lambda _: self._forget(key))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[0]


class MetaDeviceEmulation(TorchFunctionMode):
    """Inside, networks on `meta` keep what they would on a device, under autocast to `lower` or without."""

    def __init__(self, device: str, lower: torch.dtype | None) -> None:
        super().__init__()
        self.device, self.lower = device, lower
        self._cast: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.lower is not None:
            wanted = self.lower if func in AUTOCAST_LOWER else None
            wanted = torch.float32 if func in AUTOCAST_FP32[self.device] else wanted
            if wanted is not None:
                args = tuple(self._in(wanted, value) for value in args)
                kwargs = {name: self._in(wanted, value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return emulate_fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _in(self, dtype: torch.dtype, value: Any) -> Any:
        """A tensor as autocast hands it on; what is trained is cast once."""
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
    """The shape of fused attention's answer [B, heads, tokens, D]; it keeps for its backward pass what that keeps."""
    return cast(Tensor, _FusedAttention.apply(query, key, value, attn_mask))  # type: ignore[no-untyped-call]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        answer = query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)
        sums = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, answer, sums, *([] if mask is None else [mask]))
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


# Helpers ----------------------------------------------------------------------------------------------------


def _count_saved(forward: Forward, own: set[int], like: Callable[[], AbstractContextManager[Any]]) -> int:
    """Bytes that a forward pass keeps, each storage once."""
    seen: dict[int, int] = {}
    kept: list[Any] = []

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes()
            kept.append(storage)  # so that its address is not given to another
        return tensor

    with like(), torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        said = forward()
        said.float().square().mean()
    return sum(seen.values())


def _emulate(network: nn.Module, device: str, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """As the device computes: its own autocast where there is storage, else what stands in for it."""
    if next(network.parameters()).device.type == "meta":
        return MetaDeviceEmulation(device, autocast)
    return nullcontext() if autocast is None else torch.autocast(device, autocast)


@contextmanager
def _checkpointed(
    network: nn.Module, device: str, autocast: torch.dtype | None, checkpointing: bool
) -> Iterator[None]:
    """With gradient checkpointing inside, or without; a pass that is taken again is counted as the first one was."""
    if not checkpointing:
        yield
        return
    bare = next(network.parameters()).device.type == "meta"

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), MetaDeviceEmulation(device, autocast) if bare else nullcontext()

    def again(module: Any, *inputs: Any) -> Any:
        return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)

    cast(Any, network).enable_gradient_checkpointing(again)
    try:
        yield
    finally:
        cast(Any, network).disable_gradient_checkpointing()
