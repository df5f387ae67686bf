"""LoRAs of a model that reads a picture and no words: `customize clip --image PICTURE --model svd --lora FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from backbone.adapters.config import read_adapter_configs
from backbone.adapters.lora import activate_adapters, load_factors
from backbone.io.console import UserError
from backbone.models.model import Backbone
from customize.formats.adapter import BASE_NAMES, AdapterFile, BaseFamily
from customize.formats.convert import fit_to_model
from customize.formats.layers.names import split_component
from customize.formats.model_weights import refuse_mismatch
from customize.formats.read import read_adapter
from customize.formats.write import to_state_dict

# Of names and widths that are Stable Video Diffusion's too, which began as Stable Diffusion 2.1
POSSIBLE: tuple[BaseFamily, ...] = ("svd", "sd2", "other")


def read_loras(model: Backbone, files: Sequence[Path]) -> Mapping[Path, AdapterFile]:
    """The LoRAs of files, under any tool's names, in the form that the model's layers take.

    Raises `UserError`, before weights of the model load, for one that cannot be read, one of another family, and one
    of layers or widths that the model does not have.
    """
    if not files:
        return {}
    network = model.family.spec(model.location, model.dtype).denoiser.instantiate()
    shapes = {f"unet.{name}": tuple(value.shape) for name, value in network.named_parameters()}
    adapters: dict[Path, AdapterFile] = {}
    for path in files:
        if path in adapters:
            raise UserError(f"{path} is named twice. Name it once, with another --scale.")
        adapter = read_adapter(path)
        refuse_other_family(adapter, path, model.location.name)
        layers = {name: layer.shape for name, layer in adapter.layers.items()}
        refuse_mismatch(layers, shapes, str(path), model.location.name)
        adapters[path] = fit_to_model(adapter, shapes, path)
    return adapters


def refuse_other_family(adapter: AdapterFile, path: Path, model: str) -> None:
    """`UserError` for an adapter that is for words or for another network, as its layers or its header say."""
    others = {split_component(name)[0] for name in adapter.layers} - {"unet"}
    if adapter.base in POSSIBLE and not others:
        return
    base = adapter.base_name if adapter.base not in POSSIBLE else "a model that reads words"
    raise UserError(
        f"{path} is a LoRA of {base}, and {model} is {BASE_NAMES['svd']}. Give one that was made for it, or leave "
        "--lora out."
    )


def load_loras(denoiser: nn.Module, loras: Mapping[Path, AdapterFile], *, scale: float = 1.0) -> list[str]:
    """Load the LoRAs of `read_loras` into the network, side by side; returns their names there."""
    names = []
    for number, (path, adapter) in enumerate(loras.items()):
        tensors, header = to_state_dict(adapter, "peft")
        names.append(f"lora_{number}")
        load_factors(path, denoiser, names[-1], tensors, read_adapter_configs(path, header), scale=scale)
    if names:
        activate_adapters(denoiser, names)
    return names


def count_bytes(loras: Mapping[Path, AdapterFile]) -> int:
    """Bytes of their factors in a network, which are fp32."""
    layers = [layer for lora in loras.values() for layer in lora.layers.values()]
    count = sum(value.numel() for layer in layers for value in layer.factors.values())
    return count * torch.float32.itemsize
