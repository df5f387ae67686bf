"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.optim import Optimizer

from backbone.io.console import UserError

LRSchedule = Callable[[int], float]
"""Optimiser step, from 1 → factor of the learning rate."""


def make_schedule(name: str, *, steps: int, warmup: int) -> LRSchedule:
    """The learning-rate schedule of this name (`--lr-scheduler`); `UserError` for an unknown one."""
    match name:
        case "cosine":
            return warm_cosine(steps, warmup=warmup, floor=0.05)
        case "constant":
            return warm_constant(warmup=warmup)
    raise UserError(f"There is no schedule {name}. Choose cosine or constant.")


def warm_cosine(steps: int, *, warmup: int = 0, floor: float = 0.0) -> LRSchedule:
    """Linear warm-up, then half a cosine down to `floor` at `steps` (Loshchilov & Hutter 2017, eq. 5)."""

    def factor(step: int) -> float:
        if step <= warmup:
            return step / max(warmup, 1)
        share = min(1.0, (step - warmup) / max(steps - warmup, 1))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

    return factor


def warm_stable_decay(steps: int, *, warmup: int = 0, decay: int = 0) -> LRSchedule:
    """Linear warm-up, constant, then linearly down to zero over the last `decay` steps (Hu et al. 2024, "MiniCPM", §4).

    Training can continue from the weights before the decay, so the number of steps need not be known in advance.
    """

    def factor(step: int) -> float:
        return min(1.0, step / max(warmup, 1), (steps + 1 - step) / (decay + 1))

    return factor


def warm_constant(*, warmup: int = 0) -> LRSchedule:
    """Linear warm-up, then constant."""
    return lambda step: min(1.0, step / max(warmup, 1))


def make_adamw(groups: list[dict[str, Any]], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused where all parameters are on one kind of device; on a GPU a flag there can then skip an update."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups, weight_decay=weight_decay, fused=True if devices in ({"cuda"}, {"cpu"}) else None
    )


def make_optimizer(name: str, trained: Sequence[Any], *, weight_decay: float) -> Optimizer:
    """The optimiser of this name (`--optimizer`); each part of `trained` is a parameter group with its learning rate.

    Raises `UserError` for an unknown name, and for one whose package is not installed.
    """
    groups = [
        {"params": list(part.parameters.values()), "lr": part.learning_rate}
        for part in trained
        if part.parameters
    ]
    match name:
        case "adamw":
            return make_adamw(groups, weight_decay=weight_decay)
        case "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise UserError("adamw8bit needs bitsandbytes. Run: pip install bitsandbytes") from error
            return cast(Optimizer, AdamW8bit(groups, weight_decay=weight_decay))
        case "prodigy":  # Mishchenko & Defazio 2024: finds the step size; learning rates are factors of it
            try:
                from prodigyopt import Prodigy
            except ImportError as error:
                raise UserError("prodigy needs prodigyopt. Run: pip install prodigyopt") from error
            prodigy = Prodigy(
                groups,
                weight_decay=weight_decay,
                use_bias_correction=True,
                safeguard_warmup=True,
                decouple=True,
            )
            return cast(Optimizer, prodigy)
    raise UserError(f"There is no optimiser {name}. Choose one of adamw, adamw8bit, prodigy.")
