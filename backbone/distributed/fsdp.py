"""The denoiser's frozen weights cut up over the processes of a run: each holds a part and borrows the rest (FSDP).

Zhao et al. 2023 (PyTorch FSDP), in torch's second edition: before a block computes, the processes put its weights
together, and let go of the others' parts afterwards. What is trained, an adapter or words, stays whole in every
process, so losses, averages of gradients, checkpoints and files are those of a run whose base is not cut up.

A network that is cut up answers all processes at once or none: whoever asks it, all ask it, equally often.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from backbone.distributed import processes
from backbone.io.console import UserError


def shard(denoiser: nn.Module, device: torch.device) -> nn.Module:
    """The loaded, frozen denoiser on its device, cut up over all processes, block by block; what remains at last.

    Adapters that are put on it later stay whole. Raises `UserError` where torch has no FSDP.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise UserError("Weights are cut up by torch 2.6 or later. Run: pip install -U torch") from error
    for value in denoiser.parameters():
        value.data = value.data.contiguous()  # the only layout that can be cut
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    for block in repeated_blocks(denoiser):
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
    return denoiser


def repeated_blocks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """The layers that repeat, inner ones before those that they are a part of."""
    lists = [
        layers
        for name, layers in denoiser.named_modules()
        if isinstance(layers, nn.ModuleList) and name.endswith("blocks")
    ]
    for layers in reversed(lists):
        yield from layers
