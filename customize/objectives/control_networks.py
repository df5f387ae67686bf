"""Control networks to train: a new one of each kind, or an existing one to continue; and how each is saved.

A control-LoRA is a ControlNet whose copied encoder is the denoiser's own with a low-rank adapter. Its file holds only
the adapter, the layers that read the map and the zero convolutions (Stability AI's format, original layer names).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backbone.adapters.lora import add_lora
from backbone.conditions.control import ControlNetwork
from backbone.families.components.loading import WEIGHTS
from backbone.families.unet.original import to_original
from backbone.families.unet.row_lora import RowLora, make_row_lora
from backbone.io.console import UserError
from backbone.io.files import write_tensors, write_text
from backbone.models.control import PARTS, make_control_network, open_control
from backbone.models.model import Backbone
from customize.control_settings import (
    ADAPTER,
    ADAPTER_LORA,
    ADAPTERS,
    CONTROL_LORA,
    CONTROLNET,
    ControlSettings,
)

HINT_WIDTHS = (16, 32, 64, 96, 256)  # of a ControlNet's layers before the copy
LORA = "control"  # peft's name of the adapter
LORA_FILE = "control-lora.safetensors"
OWN_LAYERS = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")


def make_network(model: Backbone, settings: ControlSettings) -> ControlNetwork:
    """The network of a run, in fp32, its trainable parameters requiring gradients.

    Raises `UserError` for a model whose control networks cannot be trained here, and for a `begin_from` of another
    kind.
    """
    return begin_network(model, settings) if settings.begin_from else create_network(model, settings)


def create_network(
    model: Backbone, settings: ControlSettings, denoiser: nn.Module | None = None
) -> ControlNetwork:
    """A new network for the model's denoiser, or for `denoiser`, another of the same class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.kind in ADAPTERS:
            size: dict[str, Any] = (
                {"adapter_type": "light_adapter"} if settings.adapter_size == "light" else {}
            )
            rank = settings.rank if settings.kind == ADAPTER_LORA else 0
            return make_control_network(model, ADAPTER, denoiser=denoiser, lora_rank=rank, **size)
        widths = hint_widths(model)
        network = make_control_network(
            model, CONTROLNET, denoiser=denoiser, conditioning_embedding_out_channels=widths
        )

    # A control-LoRA: a low-rank adapter on the UNet's encoder; all weights of the network's own layers are trained
    if settings.kind == CONTROL_LORA:
        module = network.module.requires_grad_(False)
        layers = model.family.lora_targets["all"]
        alpha, rank = settings.lora_alpha, settings.rank
        add_lora(module, LORA, rank=rank, alpha=alpha, targets=layers, seed=settings.seed)
        for name, value in module.named_parameters():
            if name.startswith(OWN_LAYERS):
                value.requires_grad_(True)
    return network


def begin_network(model: Backbone, settings: ControlSettings) -> ControlNetwork:
    """The network of `--begin-from`, to be trained further.

    Raises `UserError` for one of another kind, or one that reads other maps.
    """
    if settings.kind == CONTROL_LORA:
        raise UserError(
            "A control-LoRA changes the model's own encoder, so it has nothing to begin from. Leave --begin-from out."
        )
    network, record, *_ = open_control(model, settings.begin_from, dtype=torch.float32)
    expected = "T2IAdapter" if settings.kind in ADAPTERS else "ControlNetModel"
    kind = type(network.module).__name__
    if kind != expected:
        raise UserError(
            f"{settings.begin_from} is a {kind}, and --kind {settings.kind} trains a {expected}. Name another one, or "
            "another --kind."
        )
    if record.kinds and settings.condition not in record.kinds:
        raise UserError(
            f"{settings.begin_from} reads {', '.join(record.kinds)} and not {settings.condition}. Begin a new one."
        )
    module = network.module
    lora = getattr(module, "lora", None)
    if settings.kind == ADAPTER and lora is not None:
        raise UserError(
            f"{settings.begin_from} has a LoRA of the denoiser beside it. Train it on by --kind {ADAPTER_LORA}."
        )
    if settings.kind == ADAPTER_LORA and lora is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            module.add_module("lora", make_row_lora(model.denoiser, settings.rank))
    module.float().requires_grad_(True).train()
    if settings.lora_alone:
        module.requires_grad_(False)
        cast(nn.Module, module.lora).requires_grad_(True)
    return network


def hint_widths(model: Backbone) -> tuple[int, ...]:
    """Widths of the layers that reduce a map to the latents' size: each but the first halves it."""
    return HINT_WIDTHS[: model.factor.bit_length()]


def save_network(module: nn.Module, kind: str, run: Path) -> None:
    """Write a network as diffusers saves it; for a control-LoRA the merged ControlNet and the small LoRA file.

    The LoRA of a T2I-Adapter is written into the adapter's folder. Files are replaced when the new one is complete;
    diffusers' own writer overwrites the old one.
    """
    part = run / PARTS[0 if kind in ADAPTERS else 1]
    weights = merge_weights(module) if kind == CONTROL_LORA else module.state_dict()
    if kind == ADAPTER_LORA:
        weights = {name: value for name, value in weights.items() if not name.startswith("lora.")}
        cast(RowLora, module.lora).write(part)
    write_text(part / "config.json", cast(Any, module).to_json_string())
    write_tensors(part / WEIGHTS, weights, {"format": "pt"})
    if kind == CONTROL_LORA:
        write_tensors(run / LORA_FILE, lora_weights(module), {})


def merge_weights(module: nn.Module) -> dict[str, Tensor]:
    """A ControlNet's weights with its adapter merged in."""
    weights = {
        name.replace(".base_layer.", "."): value.detach().cpu()
        for name, value in module.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in find_adapted_layers(module).items():
        change = layer.get_delta_weight(LORA).detach().cpu()
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + change.reshape(
            weights[f"{name}.weight"].shape
        )
    return weights


def lora_weights(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a control-LoRA's file, in original names: full weights, or `up` and `down` of adapted layers."""
    layers = int(cast(Any, module).config.layers_per_block)
    weights = {
        to_original(name, layers): value.detach().cpu().contiguous()
        for name, value in module.state_dict().items()
        if name.startswith(OWN_LAYERS)
    }
    for name, layer in find_adapted_layers(module).items():
        original = to_original(f"{name}.weight", layers).removesuffix(".weight")
        # α/r goes into `up`, since the file has no place for it
        factors: Mapping[str, Any] = {"up": layer.lora_B[LORA].weight, "down": layer.lora_A[LORA].weight}
        scale = float(layer.scaling[LORA])
        for part, value in factors.items():
            weights[f"{original}.{part}"] = (
                (value.detach() * (scale if part == "up" else 1)).cpu().contiguous()
            )
    return {**weights, "lora_controlnet": torch.zeros(1)}


def find_adapted_layers(module: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
