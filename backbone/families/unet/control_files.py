"""Control networks of UNets in one file: original names (`control_model.input_blocks.…`), Stability's control-LoRA,
diffusers' own names, and T2I-Adapter's original ones.

A control-LoRA (file key `lora_controlnet`) holds the hint's encoder and the zero convolutions whole, and of the copied
encoder low-rank changes `X.up @ X.down` to the UNet's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from diffusers import ControlNetModel, T2IAdapter
from torch import Tensor, nn

from backbone.families.components.empty import without_weights
from backbone.families.unet.original import from_original
from backbone.io.console import UserError
from backbone.io.files import Header, read_tensors

PREFIX = "control_model."
LORA_KEY = "lora_controlnet"


def load_control_file(header: Header, unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Load a ControlNet or T2I-Adapter from one file, for a UNet; `UserError` for one that was made for another."""
    names = set(header.shapes)
    if any(name.endswith("body.0.block1.weight") for name in names):
        return _load_adapter(header, dtype)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    stored, _ = read_tensors(header.path, prefix=prefix) if prefix else read_tensors(header.path)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    is_lora = LORA_KEY in tensors
    tensors.pop(LORA_KEY, None)

    # Original names are renamed to diffusers'
    if not any(name.startswith("controlnet_cond_embedding.") for name in tensors):
        layers = int(cast(Any, unet).config.layers_per_block)
        tensors = {from_original(name, layers): tensor for name, tensor in tensors.items()}
    if "controlnet_cond_embedding.conv_in.weight" not in tensors:
        raise UserError(
            f"{header.path} is no control network: it holds {', '.join(sorted(names)[:3])} … Name a ControlNet, a "
            "control-LoRA or a T2I-Adapter."
        )

    # A control-LoRA holds low-rank changes of the UNet's own weights: W + up·down
    base = plain_weights(unet) if is_lora else {}
    with without_weights():
        module = ControlNetModel.from_unet(
            cast(Any, unet),
            conditioning_embedding_out_channels=_read_hint_widths(tensors),
            load_weights_from_unet=False,
            conditioning_channels=tensors["controlnet_cond_embedding.conv_in.weight"].shape[1],
        )

    # A 1 × 1 convolution and a linear layer hold the same numbers, so weights are reshaped
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    weights = {name: _complete_weight(name, tensors, base) for name in expected}
    for name, shape in expected.items():
        weight = weights[name]
        if weight is None or weight.numel() != torch.Size(shape).numel():
            holds = "is missing" if weight is None else f"is {tuple(weight.shape)} and not {shape}"
            raise UserError(f"was made for another model: its {name} {holds}")
    ready = {
        name: value.reshape(expected[name]).to(dtype) for name, value in weights.items() if value is not None
    }
    module.load_state_dict(ready, assign=True)
    return cast(nn.Module, module)


def plain_weights(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet's own weights under their own names, without the adapters on it."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in unet.state_dict().items()
        if not any(mark in name for mark in (".lora_", ".hada_", ".lokr_"))
    }


def _complete_weight(name: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor | None:
    """A weight: the file's, or the UNet's with the file's low-rank change; None where neither has it."""
    if name in tensors:
        return tensors[name]
    layer = name.removesuffix(".weight")
    weight = base.get(name)
    if weight is None or f"{layer}.up" not in tensors or not name.endswith(".weight"):
        return weight
    up, down = (tensors[f"{layer}.{part}"].float().flatten(1) for part in ("up", "down"))
    return weight.float() + (up @ down).reshape(weight.shape).to(weight.device)


def _read_hint_widths(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The channels of the hint's encoder at each resolution."""

    def count(layer: str) -> Iterator[int]:
        weight = tensors.get(f"controlnet_cond_embedding.{layer}.weight")
        if weight is not None:
            yield len(weight)

    return tuple(
        width
        for layer in ("conv_in", "blocks.1", "blocks.3", "blocks.5", "blocks.7")
        for width in count(layer)
    )


def _load_adapter(header: Header, dtype: torch.dtype) -> nn.Module:
    """Load a T2I-Adapter with its original names (full adapters)."""
    tensors, _ = read_tensors(header.path)
    tensors = {name.removeprefix("adapter."): tensor for name, tensor in tensors.items()}

    # Levels, widths and the pixel-unshuffle factor are read off the shapes
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("body."))
    per_level = 2  # residual blocks a level
    channels = [len(tensors[f"body.{n}.block1.weight"]) for n in range(0, blocks, per_level)]
    pixels = tensors["conv_in.weight"].shape[1]
    large = pixels % 256 == 0  # SDXL's: 16 × 16 pixels of one or three channels

    # body.N → body.LEVEL.resnets.LAYER
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] == "body":
            level, layer = divmod(int(parts[1]), per_level)
            inner = "" if parts[2] == "in_conv" else f"resnets.{layer}."
            name = f"body.{level}.{inner}{'.'.join(parts[2:])}"
        renamed[f"adapter.{name}"] = tensor.to(dtype)
    factor = 16 if large else 8
    module = T2IAdapter(
        in_channels=pixels // factor**2,
        channels=channels,
        num_res_blocks=per_level,
        downscale_factor=factor,
        adapter_type="full_adapter_xl" if large else "full_adapter",
    )
    mismatch = module.load_state_dict(renamed, strict=False)
    if mismatch.missing_keys or mismatch.unexpected_keys:
        strange = (*mismatch.missing_keys, *mismatch.unexpected_keys)[0]
        raise UserError(f"is no T2I-Adapter of a known kind ({strange} does not fit)")
    return cast(nn.Module, nn.Module.to(module, dtype))
