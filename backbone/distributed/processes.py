"""Data-parallel runs, as `accelerate launch` or torchrun start them: splitting work, collectives, the main process.

Every process takes the same steps on the same weights, computes its share of each batch, and gradients are averaged.
The batch size is that of a step, not of a process, so a run gives the same result as a single process with the same
settings. Only the main process writes files and prints. In a single process everything here is the identity.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from backbone.io import run_folder
from backbone.io.console import UserError, shorten
from backbone.io.progress import progress

Item = TypeVar("Item")
COLLECTIVE_TIMEOUT = timedelta(hours=12)  # the others wait while the main process samples and evaluates
BUCKET_ELEMENTS = 1 << 24  # elements of one all-reduce
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


# The process group -------------------------------------------------------------------------------------------


def init_process(device: str) -> None:
    """Join the process group of the launcher, if there is one.

    `device` is the user's `--device`. Each process gets its own GPU, or all share the CPU.

    Raises `UserError` for a launch configuration that cannot work.
    """
    if dist.is_initialized():
        return
    launched = max(map(_read_number, WORLD_SIZE_VARIABLES))
    if launched <= 1:
        if _is_one_of_several():
            _relaunch_with_torchrun(device)
        return
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _launcher_uses(name):
            raise UserError(
                f"The launcher was configured for {name.replace('_', '-')}, which brings a training loop of its own. "
                "To shard the base over the processes, launch it with recipes/accelerate/fsdp.yaml."
            )
    if ":" in device:
        raise UserError(f"Each process takes a device of its own. Leave out --device {device}.")
    from accelerate import PartialState

    from backbone.distributed.device import choose_device

    on_cpu = (choose_device() if device == "auto" else device) == "cpu"
    try:
        with progress(None, f"waiting for {launched} processes", brief=True):
            state = PartialState(cpu=on_cpu, timeout=COLLECTIVE_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        PartialState._reset_state()
        raise UserError(
            f"The environment tells of {launched} processes, which did not meet ({shorten(str(error), 200)}). Start "
            "the command with accelerate launch or torchrun, or unset WORLD_SIZE for a single process."
        ) from error
    if state.num_processes != launched:
        raise UserError(f"{launched} processes cannot share this machine's device. Add --device cpu.")


def _read_number(variable: str) -> int:
    """A launcher's number of processes; 1 if unset."""
    value = os.environ.get(variable) or "1"
    if not value.isdecimal():
        raise UserError(
            f"{variable} of the environment is “{shorten(value, 80)}”, and a number of processes is wanted. Run: unset "
            f"{variable}"
        )
    return int(value)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """`run_folder.hold_folder` by the main process for all processes."""
    with run_folder.hold_folder(folder) if is_main_process() else nullcontext():
        yield


@contextmanager
def hold_new_run(run: Path) -> Iterator[bool]:
    """Hold the folder of a new run by the main process for all; yields whether this process writes.

    Removes the remains of an attempt that never saved a step, and at the end a folder with nothing but the settings, as
    of a refused run. Raises `UserError` where another run took the folder first.
    """
    barrier()  # every process has seen that the folder is free
    new = not run.exists()
    with hold_folder(run):
        if is_main_process():
            run_folder.refuse_taken(run)
            run_folder.clear_failed_try(run)
        try:
            yield is_main_process()
        finally:
            if is_main_process():
                run_folder.remove_bare_record(run, is_new=new)


def end_process() -> None:
    """Wait for the other processes at the end of a successful run, and leave the process group."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def rank() -> int:
    """The index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process, rank 0, writes files and prints."""
    return rank() == 0


# A sharded model (`backbone.distributed.fsdp`) --------------------------------------------------------------------


def is_sharded() -> bool:
    """Whether the launcher asked for FSDP: each process holds a shard of the denoiser, and all call it together."""
    return world_size() > 1 and _launcher_uses("FSDP")


def is_participant() -> bool:
    """Whether this process computes what only the main process needs: all call a sharded model together."""
    return is_main_process() or is_sharded()


def require_whole_model(subject: str) -> None:
    """Raise `UserError` if the denoiser is sharded; `subject` begins the sentence."""
    if is_sharded():
        raise UserError(
            f"{subject} needs the whole model in every process, and the launcher asked for FSDP. Launch it with "
            "recipes/accelerate/gpus.yaml."
        )


# Splitting work ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The part of an optimiser step that one process computes: some of its micro-batches, or some rows of each.

    The mean over processes of `scale` × the sum over a process's rows is the sum over all rows.
    """

    micros: slice
    rows: slice
    scale: int


def find_share_of_step(micros: int, rows: int) -> Share:
    """This process's share of a step of `micros` micro-batches of at least `rows` rows each.

    Whole micro-batches where they divide evenly: each then gives the same bits as in one process. Split rows give the
    same numbers up to rounding.

    Raises `UserError` where there are fewer rows than processes.
    """
    index, count = rank(), world_size()
    if micros % count == 0:
        per_process = micros // count
        return Share(slice(index * per_process, (index + 1) * per_process), slice(None), 1)
    if rows < count:
        raise UserError(
            f"A step of {micros} × {rows} cannot be shared by {count} processes. Raise --batch (it counts "
            f"what all processes do together) to {count} or a multiple of it, or start fewer processes."
        )
    return Share(slice(None), slice(index, None, count), count)


def split_batches(items: Sequence[Item], *, batch: int) -> list[Item]:
    """This process's items, in the same batches of `batch` as a single process would make.

    With a sharded model every process gets equally many batches; the last one is repeated as needed.
    """
    starts = list(range(0, len(items), batch))
    if is_sharded() and starts:
        starts += [starts[-1]] * (-len(starts) % world_size())
    starts = starts[rank() :: world_size()]
    return [item for start in starts for item in items[start : start + batch]]


def split_items(items: Sequence[Item], *, batch: int) -> list[Item]:
    """Like `split_batches`, with smaller batches where there would be fewer of them than processes."""
    return split_batches(items, batch=min(batch, max(1, -(-len(items) // world_size()))))


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the body on the main process first; the others then read its results from the cache.

    With a sharded model all run it together, since each call needs all of them.
    """
    if not is_participant():
        barrier()
    yield
    if is_participant():
        barrier()


# Collectives -------------------------------------------------------------------------------------------------


def barrier() -> None:
    """Wait for all processes."""
    any_process(False)


def average_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the processes, identical bit for bit in each.

    The tensors have one dtype and device; they are reduced in buckets of about BUCKET_ELEMENTS.
    """
    if not dist.is_initialized():
        return
    count, bucket, size = world_size(), [], 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel()
        if size >= BUCKET_ELEMENTS:
            _average_bucket(bucket, count)
            bucket, size = [], 0
    if bucket:
        _average_bucket(bucket, count)


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over the processes: a gather where each process filled its own rows of zeros."""
    if dist.is_initialized():
        for tensor in tensors:
            summed = tensor.to(_communication_device())
            _all_reduce(summed)
            tensor.copy_(summed)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [N, D] of all processes, concatenated; the number of rows may differ between processes."""
    if not dist.is_initialized():
        return rows
    counts = torch.zeros(world_size(), dtype=torch.float64)
    counts[rank()] = len(rows)
    sum_in_place([counts])
    ends = counts.cumsum(0).long()
    gathered = torch.zeros(int(ends[-1]), *rows.shape[1:], dtype=rows.dtype)
    gathered[int(ends[rank()]) - len(rows) : int(ends[rank()])] = rows
    sum_in_place([gathered])
    return gathered


def gradient_averaging() -> Callable[[Sequence[Tensor]], None] | None:
    """`average_in_place` for the training loop, or None in a single process."""
    return average_in_place if world_size() > 1 else None


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all take the same branch."""
    return reduce_sum([float(flag)])[0] > 0


def reduce_sum(numbers: Sequence[float]) -> list[float]:
    """The sum of each number over the processes."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=_communication_device())
    _all_reduce(sums)
    return [float(value) for value in sums]


def reduce_mean(values: Tensor) -> Tensor:
    """The mean [] of the values of all processes, detached."""
    values = values.detach()
    if not dist.is_initialized():
        return values.mean()
    total = values.sum(dtype=torch.float64)
    sums = torch.stack([total, torch.full_like(total, values.numel())]).to(_communication_device())
    _all_reduce(sums)
    return (sums[0] / sums[1]).to(values)


def _average_bucket(tensors: Sequence[Tensor], count: int) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    _all_reduce(flat)
    flat /= count
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _all_reduce(tensor: Tensor) -> None:
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise UserError(
            f"Process {rank()} cannot reach another process of this run, which has ended or was stopped; its last "
            f"message tells why ({str(error).splitlines()[0]}). What was saved can be resumed."
        ) from error


def _communication_device() -> torch.device:
    """The device of the tensors that the backend reduces: cuda for nccl, else cpu."""
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")


# Launchers ---------------------------------------------------------------------------------------------------


def _launcher_uses(name: str) -> bool:
    """Whether accelerate's configuration enables a plugin, which its launcher puts in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"


def _is_one_of_several() -> bool:
    """Whether accelerate started one process of several: on a CPU without MPI it sets an address and no world size."""
    variables = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"}
    return variables <= set(os.environ) and not {*WORLD_SIZE_VARIABLES, "LOCAL_RANK"} & set(os.environ)


def _relaunch_with_torchrun(device: str) -> None:
    """Replace this process by torchrun with its command, for the `--num_processes` of `accelerate launch`."""
    from backbone.distributed.device import choose_device

    count = _read_num_processes()
    if count == 1:
        return  # the address in the environment is not accelerate's
    on_cpu = (choose_device() if device == "auto" else device) == "cpu"
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
    """`--num_processes` of the parent `accelerate launch`, or of its configuration file; 0 if unknown."""
    import psutil
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 0
    if "launch" not in command:
        return 0
    arguments, _ = launch_command_parser().parse_known_args(command[command.index("launch") + 1 :])
    try:
        configured = load_config_from_file(arguments.config_file)
    except (OSError, ValueError, TypeError):
        configured = None
    if (arguments.num_machines or getattr(configured, "num_machines", 1) or 1) > 1:
        return 0
    requested = arguments.num_processes
    return int(getattr(configured, "num_processes", 0) or 0) if requested is None else int(requested)
