"""Checkpoints of the training loop: parameters, optimiser state and their moving average in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from backbone.io.console import UserError
from backbone.io.files import content_hash, read_metadata, read_tensors, write_tensors
from backbone.io.records import parse_json, read_as
from backbone.io.run_folder import damaged_checkpoint, explain_damaged_checkpoint
from backbone.training.loop import Average

# Numbers that Prodigy estimates and keeps in its parameter groups, not in its state
ESTIMATED = ("d", "d_max", "d_numerator", "k")


@torch.no_grad()
def save_checkpoint(
    path: Path,
    *,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    average: Average | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write one safetensors file, atomically: parameters, optimiser state, average, and the step in the header.

    `facts` name the sources of the run for `load_checkpoint` to compare; of a sequence the first is saved.
    """
    # parameter/NAME, optimizer/KEY/NAME, average/NAME
    tensors = {f"parameter/{name}": value.detach() for name, value in parameters.items()}
    names = {id(value): name for name, value in parameters.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer/{key}/{names[id(parameter)]}"] = torch.as_tensor(value)
    if average is not None:
        tensors.update({f"average/{name}": value for name, value in average.values.items()})
    numbers = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    header = {
        "step": str(step),
        "optimizer": type(optimizer).__name__,
        "groups": json.dumps(numbers, default=_plain_number),
        "facts": json.dumps({name: _as_sequence(fact)[0] for name, fact in (facts or {}).items()}),
        "tensors": _hash_kinds(tensors),
        "sums": _hash_sums(tensors),
    }
    write_tensors(path, {name: value.contiguous() for name, value in tensors.items()}, header)


def _plain_number(value: Any) -> Any:
    """A one-element tensor of an optimiser's group as a number, anything else by its name."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else str(value)


def _hash_kinds(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the names, dtypes and shapes of tensors."""
    kinds = sorted((name, str(value.dtype), list(value.shape)) for name, value in tensors.items())
    return content_hash(json.dumps(kinds).encode())


def _hash_sums(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the sums of the tensors' bits, which a flipped bit or a block of zeros changes."""
    sums = [(name, _sum_bits(value)) for name, value in sorted(tensors.items())]
    return content_hash(json.dumps(sums).encode())


def _sum_bits(value: Tensor) -> int:
    bits = value.detach().contiguous().reshape(-1).view(torch.uint8)
    is_aligned = bits.numel() % 4 == 0 and bits.storage_offset() % 4 == 0
    words = bits.view(torch.int32) if is_aligned else bits
    return int(words.sum(dtype=torch.int64))


@torch.no_grad()
def load_checkpoint(
    path: Path,
    *,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    average: Average | None = None,
    facts: Mapping[str, Any] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Restore a checkpoint of `save_checkpoint` into the same parameters and optimiser; returns (step, saved facts).

    Raises `UserError`, before anything is changed, for a file with other parameters or `facts`, one of another
    optimiser, and a damaged one. A fact that is a sequence matches any of its values.
    """
    # All checks first: nothing is changed unless the file fits
    with explain_damaged_checkpoint(path):
        tensors, header = read_tensors(path)
        step = read_as(int, parse_json(header.get("step", "null"), path), path, "step")
        estimated = _read_estimated(path, header)
    saved_facts = _refuse_other_facts(path, header, facts or {})
    _refuse_changed(path, tensors, header, step)
    kind = type(optimizer).__name__
    if header.get("optimizer", kind) != kind:
        raise UserError(
            f"{path} was saved by another kind of run (its optimiser is {header['optimizer']}, and {kind} is wanted). "
            "Start anew or resume that one."
        )
    saved = {name.removeprefix("parameter/") for name in tensors if name.startswith("parameter/")}
    if saved != set(parameters):
        differing = sorted(saved ^ set(parameters))[0]
        raise UserError(
            f"{path} was saved by another kind of run ({differing} differs). Start anew or resume that one."
        )
    _refuse_other_shapes(path, tensors, parameters, average)

    # The optimiser's state by parameter: optimizer/KEY/NAME → {KEY: tensor}
    states: dict[str, dict[str, Tensor]] = {}  # by parameter
    for tensor_name, saved_value in tensors.items():
        if tensor_name.startswith("optimizer/"):
            key, _, name = tensor_name.removeprefix("optimizer/").partition("/")
            states.setdefault(name, {})[key] = saved_value
    for name, value in parameters.items():
        value.copy_(tensors[f"parameter/{name}"])
        if name in states:
            optimizer.state[value] = {
                key: _copy_state(saved_value, value, _choose_state_device(optimizer, key, value))
                for key, saved_value in states[name].items()
            }
    if average is not None:
        for name, value in average.values.items():
            value.copy_(tensors[f"average/{name}"])

    # Numbers that an optimiser estimates itself (Prodigy's d)
    for group, numbers in zip(optimizer.param_groups, estimated, strict=False):
        group.update({name: number for name, number in numbers.items() if name in group})
    return step, saved_facts


def _read_estimated(path: Path, header: Mapping[str, str]) -> list[dict[str, float]]:
    """The ESTIMATED numbers of each of the optimiser's groups."""
    groups = read_as(list[dict[str, Any]], parse_json(header.get("groups", "[]"), path), path, "groups")
    return [
        {
            name: read_as(int if name == "k" else float, group[name], path, name)
            for name in ESTIMATED
            if name in group
        }
        for group in groups
    ]


def _refuse_changed(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], step: int) -> None:
    """`UserError` for a checkpoint whose tensors have changed since it was saved, or are not finite."""
    problem = ""
    if step < 0:
        problem = f"its step is {step}"
    elif header.get("tensors") not in (None, _hash_kinds(tensors)):
        problem = "it holds other tensors than were saved in it"
    else:
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
                problem = f"{name} holds values that are not finite numbers"
        if not problem and header.get("sums") not in (None, _hash_sums(tensors)):
            problem = "its numbers are not those that were saved in it"
    if problem:
        raise damaged_checkpoint(path, problem)


def refuse_other_sources(path: Path, facts: Mapping[str, Any]) -> None:
    """`UserError` where a checkpoint exists and was saved with other `facts`.

    A fact that is a sequence matches any of its values.
    """
    if path.exists():
        with explain_damaged_checkpoint(path):
            header = read_metadata(path)
        _refuse_other_facts(path, header, facts)


def _refuse_other_facts(path: Path, header: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    with explain_damaged_checkpoint(path):
        saved_facts = read_as(dict[str, Any], parse_json(header.get("facts", "null"), path), path, "facts")
    for name, fact in facts.items():
        if name in saved_facts and saved_facts[name] not in _as_sequence(fact):
            raise UserError(
                f"{path} was saved with another {name} than there is now. Put the old one back, or start the run anew."
            )
    return saved_facts


def _as_sequence(fact: Any) -> Sequence[Any]:
    return fact if isinstance(fact, Sequence) and not isinstance(fact, str) else (fact,)


def _copy_state(saved: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of an optimiser's state; of a parameter's shape, in its memory layout, which fused kernels need."""
    if saved.shape != parameter.shape:
        return saved.clone().to(device)
    return torch.empty_like(parameter, dtype=saved.dtype, device=device, requires_grad=False).copy_(saved)


def _choose_state_device(optimizer: Optimizer, key: str, parameter: Tensor) -> torch.device:
    """The device of a tensor of an optimiser's state: its parameter's, or the CPU for a plain AdamW's step count."""
    counted_on_host = key == "step" and not optimizer.defaults.get("fused")
    return torch.device("cpu") if counted_on_host else parameter.device


def _refuse_other_shapes(
    path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], average: Average | None
) -> None:
    """`UserError` where a checkpoint's tensors have other shapes than these parameters."""
    expected = {f"parameter/{name}": value for name, value in parameters.items()}
    if average is not None:
        expected |= {f"average/{name}": value for name, value in average.values.items()}
    for name, value in expected.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != tuple(value.shape):
            raise UserError(
                f"{path} was saved by another kind of run ({name} is {shape}, and {tuple(value.shape)} is wanted). "
                "Start anew or resume that one."
            )
