"""Regional compilation of a denoiser: its repeated blocks, adapters included, by `torch.compile`.

A transformer is the same block many times over, so one graph a shape serves all of them, and compiling takes seconds
where a whole network takes minutes. Blocks are compiled for each shape, never for dynamic shapes: prompts are
padded to one length or to few (`prompt_lengths`), and images come in few sizes, so nothing is compiled again after the
first steps.
During training, previews and evaluations run the blocks uncompiled; a model that was opened to draw or to edit
(`Backbone.open(…, compile=True)`) compiles them in every prediction. On a machine without a C++ compiler they run
uncompiled, and a line says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from backbone.families.components.prompt_lengths import in_buckets
from backbone.io.console import notify_once, shorten

BLOCKS = (  # diffusers' classes that a denoiser repeats
    *("BasicTransformerBlock", "JointTransformerBlock"),
    *("FluxTransformerBlock", "FluxSingleTransformerBlock"),
)
# Of a block: widths, sizes of images, with and without its adapter, with and without gradients
GRAPHS = 64
Backend = str | Callable[..., Any]


class CompiledBlocks:
    """The blocks of networks, which run compiled inside `active`."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {  # of inductor
        "emulate_precision_casts": True  # rounds where uncompiled blocks round, so that both agree
    }

    def __init__(self, networks: Sequence[nn.Module], *, backend: Backend = "inductor") -> None:
        # (diffusers' `_repeated_blocks` names those of some networks only)
        names = {
            *BLOCKS,
            *(name for network in networks for name in getattr(network, "_repeated_blocks", None) or ()),
        }
        modules = {id(module): module for network in networks for module in network.modules()}
        self.blocks = [module for module in modules.values() if type(module).__name__ in names]
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, GRAPHS)
        options: dict[str, Any] = {"backend": backend, "dynamic": False}
        if backend == "inductor":
            options["options"] = dict(self.OPTIONS)
        self.fails = False  # after a failure compiling is not tried again
        self.calls = [
            self._fall_back(with_plain_inputs(torch.compile(block._call_impl, **options)), block._call_impl)
            for block in self.blocks
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the `with`, the blocks run compiled and prompts are padded to few lengths; not afterwards."""
        blocks: list[Any] = list(self.blocks)
        previous = [block._compiled_call_impl for block in blocks]
        for block, call in zip(blocks, self.calls, strict=True):
            block._compiled_call_impl = call
        try:
            with in_buckets():
                yield
        finally:
            for block, call in zip(blocks, previous, strict=True):
                block._compiled_call_impl = call

    def _fall_back(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled call of a block, or the plain one once compiling has failed."""

        def call(*inputs: Any, **kwargs: Any) -> Any:
            if not self.fails:
                try:
                    return compiled(*inputs, **kwargs)
                except BackendCompilerFailed as error:
                    reason = error.inner_exception
                    if isinstance(reason, (MemoryError, torch.OutOfMemoryError)):
                        raise
                    self.fails = True
                    message = shorten(" ".join(f"{type(reason).__name__}: {reason}".split()), 200)
                    notify_once(
                        f"The blocks are not compiled and run as they are: PyTorch could not compile here ({message}). "
                        "It needs a C++ compiler and Python's headers: apt-get install g++ python3-dev"
                    )
            return plain(*inputs, **kwargs)

        return call


def with_plain_inputs(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a compiled block, with contiguous strides for tensors that were cut from longer ones.

    A graph is compiled for the strides of its inputs too: Z-Image's angles of a prompt are cut from those of all
    positions, as many as it has tokens.
    """

    def call_plainly(*inputs: Any, **kwargs: Any) -> Any:
        return call(*map(close_gaps, inputs), **{name: close_gaps(value) for name, value in kwargs.items()})

    return call_plainly


def close_gaps(value: Any) -> Any:
    """A tensor cut from a longer one as one with contiguous strides; anything else unchanged."""
    if not isinstance(value, Tensor):
        return value
    reach = 1  # length of the dimensions so far, from the innermost: the next stride of a contiguous tensor
    for stride, length in sorted(zip(value.stride(), value.shape, strict=True)):
        if stride > reach:  # also of a dimension of one, which `contiguous` would leave alone
            return value.reshape(-1).view(value.shape)
        reach = max(reach, stride * length)
    return value
