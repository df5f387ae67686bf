"""Several processes that train one model: each takes its own part of a step, and their gradients are averaged.

On a CPU one process for each core is faster than one process with as many threads, since small operations spend their
time waiting at barriers; torch's `gloo` carries the gradients.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

Reduce = Callable[[Sequence[Tensor]], None]


def run_workers(function: Callable[..., None], arguments: tuple[Any, ...], *, processes: int) -> None:
    """Calls `function(rank, *arguments)` in every process; with one process, here.

    Each of several CPU processes gets one thread. An error in one of them ends all.
    """
    if processes == 1:
        function(0, *arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_worker, (function, arguments, processes, port), nprocs=processes)


def average(tensors: Sequence[Tensor]) -> None:
    """Replaces every tensor by its mean over the processes, in one message; alone it changes nothing."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all of them stop at the same step."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor(float(flag))
    dist.all_reduce(raised)
    return bool(raised > 0)


def _worker(
    rank: int, function: Callable[..., None], arguments: tuple[Any, ...], processes: int, port: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
