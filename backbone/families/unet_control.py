"""Control networks of the UNet families: ControlNet (Zhang et al. 2023) and T2I-Adapter (Mou et al. 2024).

A ControlNet is a copy of the UNet's encoder with zero convolutions; it hears text and time, and its answer is added to
the skip connections. A T2I-Adapter hears the map alone, so it is asked once for a picture, and its features are added
inside the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import ControlNetModel, T2IAdapter
from torch import Tensor, nn

from backbone.conditions.control import Control, ControlNetwork, Residuals
from backbone.families.control import residuals_of
from backbone.io.console import UserError

SKIPS, MIDDLE, INNER = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
GREY = (0.299, 0.587, 0.114)  # Rec. 601 luma, as Pillow's mode L


class UNetControlNet:
    """A ControlNet. Implements `ControlNetwork`."""

    takes_guess = True

    def __init__(self, module: ControlNetModel) -> None:
        self.module: nn.Module = module
        self.prompted_only = bool(cast(Any, module).config.global_pool_conditions)

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        return (maps,)

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        network = cast(Any, self.module)
        skips, middle = network(
            **as_dtype(inputs, network.dtype), controlnet_cond=hints[0].to(network.dtype), return_dict=False
        )
        if guess and not self.prompted_only:
            *ramp, last = torch.logspace(-1, 0, len(skips) + 1).tolist()
            skips = [skip * share for skip, share in zip(skips, ramp, strict=True)]
            middle = middle * last
        return {SKIPS: list(skips), MIDDLE: [middle]}


class UNetAdapter:
    """A T2I-Adapter; its hints are its features. Implements `ControlNetwork`."""

    prompted_only = takes_guess = False

    def __init__(self, module: T2IAdapter) -> None:
        self.module: nn.Module = module

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        network = cast(Any, self.module)
        if network.config.in_channels == 1:
            maps = (maps * maps.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
        return tuple(network(maps.to(network.dtype)))

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        return {INNER: list(hints)}


def as_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A denoiser's arguments for a network of another precision; times and whole numbers as they are."""

    def cast_to(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: cast_to(inner, one) for inner, one in value.items()}
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and name != "timestep" else value

    return {name: cast_to(name, value) for name, value in inputs.items()}


def controlled(controls: Sequence[Control], inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A UNet's arguments with what the controls add; lists are new at every call, since the UNet empties them."""
    found = residuals_of(controls, inputs, dtype)
    middle = found.pop(MIDDLE, None)
    return {**inputs, **found, **({MIDDLE: middle[0]} if middle is not None else {})}


def unet_control_network(module: nn.Module, denoiser: nn.Module) -> ControlNetwork:
    """A loaded ControlNet or T2I-Adapter for this UNet; `UserError` for one of another UNet."""
    unet, own = cast(Any, denoiser).config, cast(Any, module).config
    if isinstance(module, T2IAdapter):
        widths, needed = list(own.channels), list(unet.block_out_channels)
        if widths[: len(needed)] != needed:  # SDXL's has more, for the middle
            raise wrong_base(f"it adds to layers of {_listed(widths)} channels", f"has {_listed(needed)}")
        return UNetAdapter(module)
    for name, words in MUST_AGREE.items():
        if own.get(name) != unet.get(name):
            raise wrong_base(f"its {words} is {_listed(own.get(name))}", f"has {_listed(unet.get(name))}")
    assert isinstance(module, ControlNetModel)
    return UNetControlNet(module)


MUST_AGREE = {  # of a ControlNet's config and its UNet's
    "cross_attention_dim": "width of the text",
    "in_channels": "number of latent channels",
    "block_out_channels": "width of the blocks",
    "layers_per_block": "number of layers in a block",
    "addition_embed_type": "condition on the image size",
}


def wrong_base(found: str, needed: str) -> UserError:
    """The error for a control network that was made for another denoiser; whoever opens it adds its name."""
    return UserError(f"was made for another model: {found}, and this model's denoiser {needed}")


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
