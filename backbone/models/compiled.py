"""Regional compilation of a denoiser: its repeated blocks, adapters included, by `torch.compile`.

A transformer is the same block many times over, so one graph a shape serves all of them, and compiling takes seconds
where a whole network takes minutes. Blocks are compiled for the shapes that they meet, never for shapes in general:
prompts are padded to one length or to few (`prompt_lengths`), and images come in few sizes: nothing is compiled again
after the first steps.
In a training a preview or an evaluation runs the same blocks as they are; a model that was opened to draw or to edit
(`Backbone.open(…, compile=True)`) compiles them in every prediction. Where there is nothing to compile with, as on a
machine without a C++ compiler, they run as they are, and a line says so.
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
# Of a block: its widths, sizes of images, with and without its adapter, with and without gradients
GRAPHS = 64
Backend = str | Callable[..., Any]


class CompiledBlocks:
    """The blocks of networks, compiled where they are called inside `active`."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {  # of inductor
        "emulate_precision_casts": True  # rounds where the blocks as they are round, so that both say the same
    }

    def __init__(self, networks: Sequence[nn.Module], *, backend: Backend = "inductor") -> None:
        # (diffusers' `_repeated_blocks` names those of some networks only)
        names = {
            *BLOCKS,
            *(name for one in networks for name in getattr(one, "_repeated_blocks", None) or ()),
        }
        every = {id(module): module for network in networks for module in network.modules()}
        self.blocks = [module for module in every.values() if type(module).__name__ in names]
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, GRAPHS)
        options: dict[str, Any] = {"backend": backend, "dynamic": False}
        if backend == "inductor":
            options["options"] = dict(self.OPTIONS)
        self.fails = False  # compiling did, once: it is not tried again
        self.calls = [
            self._or_plainly(with_plain_inputs(torch.compile(block._call_impl, **options)), block._call_impl)
            for block in self.blocks
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the `with`, the blocks run compiled, and prompts' lengths are few; afterwards as they did before."""
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

    def _or_plainly(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled call of a block, and the plain one from when compiling has failed on."""

        def call(*inputs: Any, **named: Any) -> Any:
            if not self.fails:
                try:
                    return compiled(*inputs, **named)
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
            return plain(*inputs, **named)

        return call


def with_plain_inputs(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a compiled block, given tensors as their shapes are, not as what they were cut from lay in memory.

    A graph is compiled for the strides of its inputs too: Z-Image's angles of a prompt are cut from those of all
    positions, as many as its words want.
    """

    def call_plainly(*inputs: Any, **named: Any) -> Any:
        return call(*map(close_gaps, inputs), **{name: close_gaps(value) for name, value in named.items()})

    return call_plainly


def close_gaps(value: Any) -> Any:
    """A tensor whose rows are a part of longer ones as one of its own strides, anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    reach = 1  # of the dimensions so far, from the innermost: the next one's stride, if nothing lies between
    for stride, length in sorted(zip(value.stride(), value.shape, strict=True)):
        if stride > reach:  # also of a dimension of one, which `contiguous` would leave alone
            return value.reshape(-1).view(value.shape)
        reach = max(reach, stride * length)
    return value
