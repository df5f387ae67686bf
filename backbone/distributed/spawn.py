"""Spawn worker processes on this machine, connected by torch's `gloo` backend.

On a CPU one process per core is faster than one process with as many threads, since small operations spend their time
waiting at barriers.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

# Imported once, before the fork. The libraries' own modules, not their lazy packages.
PRELOADED = [
    "peft",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.transformers",
]


def run_workers(function: Callable[..., None], arguments: tuple[Any, ...], *, processes: int) -> None:
    """Call `function(rank, *arguments)` in every process; a single process is the calling one.

    Each spawned process has one thread. An error in one of them ends all, as does the end of the calling process.
    """
    if processes == 1:
        function(0, *arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    multiprocessing.set_forkserver_preload(PRELOADED)
    call = (function, arguments, processes, port, dict(os.environ))
    start_processes(_run_worker, call, nprocs=processes, start_method=method)


def _run_worker(
    rank: int,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    processes: int,
    port: int,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)  # the fork server has the environment of its start
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """End this process with its parent, which may be killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
