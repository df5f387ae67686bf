"""Fully sharded frozen weights (FSDP2; Zhao et al. 2023): each process holds a shard of the denoiser.

Before a block computes, its weights are all-gathered, and freed afterwards. Trained parameters (an adapter, token
embeddings) are added later and stay replicated, so losses, gradient averages, checkpoints and files are those of an
unsharded run.

A forward pass of a sharded network is a collective: all processes must call it, equally often.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from backbone.distributed import processes
from backbone.io.console import UserError


def shard(denoiser: nn.Module, device: torch.device) -> nn.Module:
    """Shard the frozen denoiser over all processes: each repeated block, then the remaining weights.

    Adapters added later are replicated. Raises `UserError` below torch 2.6.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise UserError("Sharding (FSDP) needs torch 2.6 or later. Run: pip install -U torch") from error
    for value in denoiser.parameters():
        value.data = value.data.contiguous()  # channels_last cannot be sharded
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    for block in repeated_blocks(denoiser):
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
    return denoiser


def repeated_blocks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of every ModuleList of blocks, inner lists before those that contain them."""
    lists = [
        layers
        for name, layers in denoiser.named_modules()
        if isinstance(layers, nn.ModuleList) and (name == "layers" or name.endswith(("blocks", "refiner")))
    ]
    for layers in reversed(lists):
        yield from layers
