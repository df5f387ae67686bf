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


def make_optimizer(name: str, every: Sequence[Any], *, weight_decay: float) -> Optimizer:
    """The optimiser by its name, a group of parameters with its own learning rate for every piece."""
    groups = [
        {"params": list(piece.parameters.values()), "lr": piece.learning_rate}
        for piece in every
        if piece.parameters
    ]
    match name:
        case "adamw":
            return torch.optim.AdamW(groups, weight_decay=weight_decay)
        case "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise UserError("adamw8bit needs bitsandbytes. Run: pip install bitsandbytes") from error
            return cast(Optimizer, AdamW8bit(groups, weight_decay=weight_decay))
        case "prodigy":  # Mishchenko & Defazio 2024: finds the step size; rates are factors of it
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
