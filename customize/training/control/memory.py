"""The memory that `customize train-control` needs, and its settings for a device of a given size (`--vram`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control
from backbone.io.console import UserError
from backbone.memory.planner import MemorySettings, Workload, fit_to_memory, precision_name
from backbone.models.control import require_controlled_family
from backbone.models.model import Backbone
from backbone.models.placement import get_placement
from customize.control_settings import ADAPTER, ADAPTER_LORA, ADAPTERS, ControlSettings
from customize.objectives.control_networks import create_network

PART = "control"  # of the planned denoiser: the network is counted with it


def make_workload(model: Backbone, settings: ControlSettings) -> Workload:
    """The run's `Workload`: the control network is a part of the planned denoiser, and reads blank maps."""

    def trains(denoiser: nn.Module) -> Iterable[Tensor]:
        network = create_network(model, settings, denoiser)
        denoiser.add_module(PART, network.module)
        return [value for value in network.module.parameters() if value.requires_grad]

    def conditioned(denoiser: nn.Module, conditions: Conditions) -> Conditions:
        module = denoiser.get_submodule(PART)
        network = require_controlled_family(model).control_network(module, denoiser, lambda maps: maps)
        maps = torch.zeros(len(conditions), 3, model.resolution, model.resolution, device="meta")
        return replace(conditions, controls=(Control.of(network, maps),))

    return Workload(
        trains,
        batch_size=settings.batch,
        supports_compressed_base=settings.kind in ADAPTERS,
        queries_base=False,
        conditioned=conditioned,
    )


def fit_to_vram(model: Backbone, settings: ControlSettings, size: float) -> tuple[Backbone, ControlSettings]:
    """The model and the settings that the planner chose for a device of `size` GiB; they are printed.

    Raises `UserError` if nothing fits.
    """
    choice = MemorySettings(
        precision_name(model),
        settings.gradient_checkpointing,
        placement=get_placement(settings),
        fixed_optimizer=True,
    )
    smaller, plan = fit_to_memory(model, make_workload(model, settings), size, choice)
    if plan.checkpointing and settings.kind == ADAPTER_LORA:
        raise UserError(
            f"--kind {ADAPTER_LORA} does not fit into {size:g} GiB without gradient checkpointing, which it does not "
            f"learn with. Give a smaller --batch, or --kind {ADAPTER}."
        )
    return smaller, replace(settings, **plan.settings(), compile=settings.compile and plan.compilable)
