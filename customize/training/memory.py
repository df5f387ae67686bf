"""The memory of a run of `customize train`, and its settings for a device of a given size (`--vram`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from backbone.adapters.config import AdapterType
from backbone.adapters.lora import AdapterKind, add_lora
from backbone.memory.planner import (
    MemoryEstimator,
    MemorySettings,
    Workload,
    fit_to_memory,
    has_bitsandbytes,
    plan_memory,
    precision_name,
)
from backbone.models.model import Backbone
from backbone.models.placement import get_placement
from customize.data.dataset import preserves, trains_text
from customize.methods.weights import CROSS_ATTENTION, INPUT, select_weights
from customize.settings import Settings


def make_workload(model: Backbone, settings: Settings) -> Workload:
    """The run's `Workload`; `UserError` for a set of layers that the family does not know."""
    layers = model.find_lora_layers(settings.lora_layers)

    def trains(denoiser: nn.Module) -> Iterator[Tensor]:
        if settings.method == "textual-inversion":
            return
        if settings.method in ("full", "custom-diffusion"):
            pattern = "" if settings.method == "full" else CROSS_ATTENTION
            yield from select_parameters(denoiser, pattern)
            return
        if settings.pairs and model.widened:
            yield from select_parameters(denoiser, INPUT)
        yield from add_lora(
            denoiser,
            "planned",
            rank=settings.rank,
            alpha=settings.lora_alpha,
            targets=layers,
            kind=AdapterKind(cast(AdapterType, settings.adapter), rank_pattern=settings.ranks()),
        ).values()

    prior = settings.prior_batch if preserves(settings) else 0
    return Workload(
        trains,
        batch_size=settings.batch + prior,
        full_finetuning=settings.method == "full",
        supports_compressed_base=settings.adapter == "lora"
        and settings.method not in ("full", "custom-diffusion"),
        trains_text_encoders=trains_text(settings),
        queries_base=preserves(settings) and settings.prior == "base",
        has_ema=bool(settings.ema_decay),
        references=int(bool(settings.pairs)),
    )


def select_parameters(denoiser: nn.Module, pattern: str) -> list[Tensor]:
    """The denoiser's weights whose names match, in fp32 and requiring gradients."""
    selected = list(select_weights(denoiser, pattern).values())
    for value in selected:
        value.data = value.data.float()
        value.requires_grad_(True)
    return selected


def make_choice(model: Backbone, settings: Settings) -> MemorySettings:
    """The placement and batch that the settings ask for, as a choice of the planner."""
    placement = get_placement(settings)
    return MemorySettings(
        precision_name(model), settings.gradient_checkpointing, settings.optimizer, placement
    )


def fit_to_vram(model: Backbone, settings: Settings, size: float) -> tuple[Backbone, Settings]:
    """The model and the settings that the planner chose for a device of `size` GiB; they are printed.

    Raises `UserError` if nothing fits.
    """
    work = make_workload(model, settings)
    smaller, plan = fit_to_memory(model, work, size, make_choice(model, settings))
    return smaller, replace(
        settings,
        **plan.settings(),
        optimizer=plan.optimizer,
        compile=settings.compile and plan.compilable,
    )


def describe_plan(model: Backbone, settings: Settings, size: float) -> list[str]:
    """What the planner would choose on a GPU of `size` GiB, here or elsewhere; `UserError` if nothing fits."""
    account = MemoryEstimator(model, make_workload(model, settings), device="cuda")
    start = make_choice(model, settings)
    if settings.precision == "auto":
        start = replace(start, precision="bf16")
    return plan_memory(account, size, start, library=has_bitsandbytes()).lines()
