"""Regional compilation of a denoiser in training: its repeated blocks, adapters included, by `torch.compile`.

A transformer is the same block many times over, so one graph a shape serves all of them, and compiling takes seconds
where a whole network takes minutes. Blocks are compiled for the shapes that they meet, never for shapes in general:
prompts are padded to one length and images come in few sizes, so that nothing is compiled again after the first steps.
Outside of a step (a preview, an evaluation) the same blocks run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from backbone.distributed import processes
from backbone.models.model import Backbone

BLOCKS = (  # diffusers' classes that a denoiser repeats
    *("BasicTransformerBlock", "JointTransformerBlock"),
    *("FluxTransformerBlock", "FluxSingleTransformerBlock"),
)
GRAPHS = (
    64  # of a block: its widths, sizes of images, with and without its adapter, with and without gradients
)
Backend = str | Callable[..., Any]


class CompiledBlocks:
    """The blocks of networks, compiled where they are called inside `active`."""

    def __init__(self, networks: Sequence[nn.Module], *, backend: Backend = "inductor") -> None:
        # (diffusers' `_repeated_blocks` names those of some networks only)
        every = {id(module): module for network in networks for module in network.modules()}
        self.blocks = [module for module in every.values() if type(module).__name__ in BLOCKS]
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, GRAPHS)
        how: dict[str, Any] = {"backend": backend, "dynamic": False}
        if backend == "inductor":  # rounds where the blocks as they are round, so that both say the same
            how["options"] = {"emulate_precision_casts": True}
        self.calls = [torch.compile(block._call_impl, **how) for block in self.blocks]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the `with`, the blocks run compiled; afterwards as they are."""
        blocks: list[Any] = list(self.blocks)
        for block, call in zip(blocks, self.calls, strict=True):
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


def compiles_usually(model: Backbone) -> bool:
    """Whether a training of this model is compiled where nobody says: on a GPU, where the base lies there as it is."""
    held = model.placement.quantize or model.placement.offload or processes.is_sharded()
    return model.device.type == "cuda" and not held
