"""The memory that `align train` needs, and its settings for a device of a given size (`--vram`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from align.settings import Settings
from backbone.adapters.lora import add_lora
from backbone.memory.planner import MemorySettings, Workload, fit_to_memory, precision_name
from backbone.models.model import Backbone
from backbone.models.placement import get_placement


def describe_workload(model: Backbone, settings: Settings) -> Workload:
    """The run's `Workload`; `UserError` for layers that the family does not know."""
    layers = model.find_lora_layers(settings.lora_layers)

    def trains(denoiser: nn.Module) -> Iterable[Tensor]:
        if settings.full:
            return [value.requires_grad_(True) for value in denoiser.parameters()]
        return add_lora(
            denoiser, "planned", rank=settings.rank, alpha=settings.lora_alpha, targets=layers
        ).values()

    micro_batch = settings.micro_batch or settings.batch
    return Workload(
        trains,
        batch_size=micro_batch * (2 if settings.by_pairs else 1),
        full_finetuning=settings.full,
        supports_compressed_base=not settings.concepts,
        queries_base=False,  # the reference is evaluated on a step's own rows, without activations
        extra_denoisers=int(settings.reference == "copy"),
    )


def get_memory_settings(model: Backbone, settings: Settings) -> MemorySettings:
    """The placement and batch of the settings, as a choice of the planner."""
    placement = get_placement(settings)
    return MemorySettings(
        precision_name(model), settings.gradient_checkpointing, placement=placement, fixed_optimizer=True
    )


def fit_to_vram(model: Backbone, settings: Settings, size: float) -> tuple[Backbone, Settings]:
    """The model and the settings that the planner chose for a device of `size` GiB; they are printed.

    Raises `UserError` where nothing fits.
    """
    work = describe_workload(model, settings)
    smaller, choice = fit_to_memory(model, work, size, get_memory_settings(model, settings))
    return smaller, replace(settings, **choice.settings(), compile=settings.compile and choice.compilable)
