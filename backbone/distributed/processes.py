"""A run in several processes, as `accelerate launch` or torchrun starts them: who writes, who does what.

Every process takes the same steps on the same weights, computes its own part of each step, and the gradients are
averaged, so a run comes out as one process would have made it at the same settings: the batch is a step's, not a
process's. One process, the writer, writes and speaks. Alone, everything here does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from backbone.io.console import UserError

Item = TypeVar("Item")
COLLECTIVE_TIMEOUT = timedelta(hours=12)  # how long processes wait for the writer's pictures and evaluations
BUCKET_ELEMENTS = 1 << 24  # numbers in a message
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


# Being one of several ----------------------------------------------------------------------------------------


def init_process(device: str) -> None:
    """Takes this process's place among those that were launched together; alone it does nothing.

    `device` is what the user asked for. Each process gets a GPU of its own, or they share the CPU.

    Raises `UserError` for a launch that cannot work.
    """
    if dist.is_initialized():
        return
    launched = max(int(os.environ.get(name, "1")) for name in WORLD_SIZE_VARIABLES)
    if launched == 1:
        if _launcher_started_one_of_several():
            _relaunch_with_torchrun(device)
        return
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _launcher_uses(name):
            raise UserError(
                f"The launcher was configured for {name.replace('_', '-')}, which brings a training loop of its own. "
                "To cut up the base over the processes, launch it with recipes/accelerate/fsdp.yaml."
            )
    if ":" in device:
        raise UserError(f"Each process takes a device of its own. Leave out --device {device}.")
    from accelerate import PartialState

    from backbone.distributed.device import best_device

    on_cpu = (best_device() if device == "auto" else device) == "cpu"
    state = PartialState(cpu=on_cpu, timeout=COLLECTIVE_TIMEOUT)
    if state.num_processes != launched:
        raise UserError(f"{launched} processes cannot share this machine's device. Add --device cpu.")


def end_process() -> None:
    """Waits for the others at a run's good end, and lets go of them."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


# A sharded model (`backbone.distributed.fsdp`) --------------------------------------------------------------------


def is_sharded() -> bool:
    """Whether the launcher asked for FSDP: every process holds a part of the denoiser, and all ask it together."""
    return world_size() > 1 and _launcher_uses("FSDP")


def is_participant() -> bool:
    """Whether this process helps to compute what the writer alone needs: the writer, or all with a model cut up."""
    return is_main_process() or is_sharded()


def require_whole_model(what: str) -> None:
    """`UserError` for what cannot be done to a model that is cut up; `what` begins the sentence."""
    if is_sharded():
        raise UserError(
            f"{what} needs the whole model in every process, and the launcher asked for FSDP. Launch it with "
            "recipes/accelerate/gpus.yaml."
        )


# Parts of the work -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What one process does of a step: some of its micro-batches whole, or some rows of each.

    The mean over processes of `scale` × the sum over own rows is then the sum over all rows.
    """

    micros: slice
    rows: slice
    scale: int


def share_of_step(micros: int, rows: int) -> Share:
    """This process's share of a step of `micros` micro-batches of at least `rows` rows each.

    Whole micro-batches where they can be dealt out evenly; a batch that stays whole gives the same bits as in one
    process, one that is cut up the same numbers up to rounding.

    Raises `UserError` where there is not a row for every process.
    """
    own, count = rank(), world_size()
    if micros % count == 0:
        each = micros // count
        return Share(slice(own * each, (own + 1) * each), slice(None), 1)
    if rows < count:
        raise UserError(
            f"A step of {micros} × {rows} cannot be shared by {count} processes. Raise --train_batch_size (it counts "
            f"what all processes do together) to {count} or a multiple of it, or start fewer processes."
        )
    return Share(slice(None), slice(own, None, count), count)


def split_batches(items: Sequence[Item], *, batch: int) -> list[Item]:
    """This process's part of what is done `batch` at a time, in the very batches of one process."""
    starts = list(range(0, len(items), batch))
    if is_sharded() and starts:  # all ask equally often; what is done twice comes out alike
        starts += [starts[-1]] * (-len(starts) % world_size())
    starts = starts[rank() :: world_size()]
    return [item for start in starts for item in items[start : start + batch]]


def split_items(items: Sequence[Item], *, batch: int) -> list[Item]:
    """The same where there are batches enough for everybody; otherwise in smaller ones."""
    return split_batches(items, batch=min(batch, max(1, -(-len(items) // world_size()))))


def warm_cache(work: Callable[[Item], object], items: Sequence[Item]) -> None:
    """Does work whose results are remembered on disk, each process its part; nothing is done here alone.

    Afterwards every process finds all of them there.
    """
    if world_size() == 1:
        return
    for item in split_items(items, batch=1):
        work(item)
    barrier()


@contextmanager
def main_process_first() -> Iterator[None]:
    """The writer goes through the `with` before the others do, who find on disk what it left there.

    With a model that is cut up they go together: what one of them lacks, all do.
    """
    if not is_participant():
        barrier()
    yield
    if is_participant():
        barrier()


# Agreeing ----------------------------------------------------------------------------------------------------


def barrier() -> None:
    """Waits until every process is here."""
    any_process(False)


def average_in_place(tensors: Sequence[Tensor]) -> None:
    """Replaces every tensor by its mean over the processes, bit for bit the same in each; alone it changes nothing.

    They are of one type and on one device; the messages have about AT_ONCE numbers.
    """
    if not dist.is_initialized():
        return
    count, part, size = world_size(), [], 0
    for tensor in tensors:
        part.append(tensor)
        size += tensor.numel()
        if size >= BUCKET_ELEMENTS:
            _average_bucket(part, count)
            part, size = [], 0
    if part:
        _average_bucket(part, count)


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Fills every tensor with what each process wrote into a part of its own, zeros before."""
    if dist.is_initialized():
        for tensor in tensors:
            found = tensor.to(_communication_device())
            _all_reduce(found)
            tensor.copy_(found)


def gradient_averaging() -> Callable[[Sequence[Tensor]], None] | None:
    """`average` for the training loop, or None alone."""
    return average_in_place if world_size() > 1 else None


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all of them do the same."""
    return reduce_sum([float(flag)])[0] > 0


def reduce_sum(numbers: Sequence[float]) -> list[float]:
    """The sums over the processes."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=_communication_device())
    _all_reduce(sums)
    return [float(value) for value in sums]


def reduce_mean(values: Tensor) -> Tensor:
    """The mean [] over the values of all processes, without gradient."""
    values = values.detach()
    if not dist.is_initialized():
        return values.mean()
    whole, count = reduce_sum([float(values.sum(dtype=torch.float64)), values.numel()])
    return torch.tensor(whole / count, dtype=values.dtype, device=values.device)


def reduce_max(tensor: Tensor) -> Tensor:
    """The element-wise maximum over the processes, where `tensor` was."""
    if not dist.is_initialized():
        return tensor
    found = tensor.to(_communication_device(), copy=True)
    _all_reduce(found, dist.ReduceOp.MAX)
    return found.to(tensor.device)


def _average_bucket(tensors: Sequence[Tensor], count: int) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    _all_reduce(flat)
    flat /= count
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _all_reduce(tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:
        raise UserError(
            f"Process {rank()} cannot reach another process of this run, which has ended or was stopped; what it "
            f"said last tells why ({str(error).splitlines()[0]}). What was saved can be resumed."
        ) from error


def _communication_device() -> torch.device:
    """Where a message's numbers must lie."""
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")


# Launchers ---------------------------------------------------------------------------------------------------


def _launcher_uses(name: str) -> bool:
    """Whether accelerate's configuration asks for it, as its launcher tells in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"


def _launcher_started_one_of_several() -> bool:
    """`accelerate launch --num_processes 2` on a CPU, without MPI, starts a single process and tells it an address."""
    named = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"}
    return named <= set(os.environ) and not {*WORLD_SIZE_VARIABLES, "LOCAL_RANK"} & set(os.environ)


def _relaunch_with_torchrun(device: str) -> None:
    """Becomes torchrun for as many processes as `accelerate launch` was asked for, with this process's command."""
    from backbone.distributed.device import best_device

    count = _read_num_processes()
    if count == 1:
        return  # the address is somebody else's
    on_cpu = (best_device() if device == "auto" else device) == "cpu"
    if count == 0 or not on_cpu:
        raise UserError(
            "accelerate launch was asked for several processes and started one. Add --multi_gpu to it (on a CPU "
            "too), or launch with torchrun --nproc-per-node N."
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*torchrun, "--no-python", sys.executable, *sys.orig_argv[1:]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    os.execve(sys.executable, command, environment)


def _read_num_processes() -> int:
    """`--num_processes` of the `accelerate launch` that started this process, or of its configuration; 0 if unknown."""
    import psutil
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 0
    if "launch" not in words:
        return 0
    asked, _ = launch_command_parser().parse_known_args(words[words.index("launch") + 1 :])
    if (asked.num_machines or 1) > 1:
        return 0
    if asked.num_processes is not None:
        return int(asked.num_processes)
    try:
        return int(load_config_from_file(asked.config_file).num_processes)
    except (OSError, ValueError, TypeError):
        return 0
