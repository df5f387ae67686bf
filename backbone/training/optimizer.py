"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.optim import Optimizer

from backbone.io.console import UserError
from backbone.training.loop import (
    LRSchedule,
    warm_constant,
    warm_cosine,
)


def make_schedule(name: str, *, steps: int, warmup: int) -> LRSchedule:
    """The learning rate's schedule by its name: a factor of the rate for every step."""
    match name:
        case "cosine":
            return warm_cosine(steps, warmup=warmup, floor=0.05)
        case "constant":
            return warm_constant(warmup=warmup)
    raise UserError(f"There is no schedule {name}. Choose cosine or constant.")


def make_adamw(groups: list[dict[str, Any]], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused where one kernel updates all parameters; on a GPU it can skip an update by a flag on the device."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups, weight_decay=weight_decay, fused=True if devices in ({"cuda"}, {"cpu"}) else None
    )


def make_optimizer(name: str, trained: Sequence[Any], *, weight_decay: float) -> Optimizer:
    """The optimiser by its name; every part that is trained is a parameter group with its own learning rate."""
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
