"""Control networks of the UNet families: ControlNet (Zhang et al. 2023) and T2I-Adapter (Mou et al. 2024).

A ControlNet is a copy of the UNet's encoder with zero convolutions; it reads text and time, and its output is added to
the skip connections. Its first layers embed the map alone, so they run once for an image and not at every step. A
T2I-Adapter reads nothing but the map, so all of it runs once, and its features are added inside the encoder; a LoRA may
belong to it (`backbone.families.unet.row_lora`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers import ControlNetUnionModel, T2IAdapter
from torch import Tensor, nn

from backbone.conditions.control import Control, ControlNetwork, Residuals
from backbone.families.base import working_dtype
from backbone.families.control import made_for_another_model, sum_residuals
from backbone.families.unet.row_lora import apply_row_loras
from backbone.io.console import UserError

SKIPS, MIDDLE, INNER = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
UNION_TYPES = {  # of the published SDXL nets
    "pose": 0,
    "depth": 1,
    "sketch": 2,
    "edges": 3,
    "lines": 3,
    "normal": 4,
    "labels": 5,
    "tile": 6,
}
EMBEDDING = "controlnet_cond_embedding"  # a ControlNet's layers that read the map alone
GREY = (0.299, 0.587, 0.114)  # Rec. 601 luma, as Pillow's mode L


class UNetControlNet:
    """A ControlNet. Implements `ControlNetwork`."""

    takes_guess = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.prompted_only = bool(cast(Any, module).config.global_pool_conditions)

    def for_kind(self, kind: str) -> UNetControlNet:
        return self

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        network = cast(Any, self.module)
        if is_bgr(network):
            maps = maps.flip(1)
        return (network.controlnet_cond_embedding(maps.to(network.dtype)),)

    def network_arguments(self, hints: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of the network that the denoiser does not have, from hints in this dtype."""
        # Flipped here, since such a network flips its input
        return {"controlnet_cond": hints[0].flip(1) if is_bgr(self.module) else hints[0]}

    def without_embedding(self) -> AbstractContextManager[None]:
        """Inside the `with`, the network takes the output of `read`, which is embedded already."""
        return replace_module(self.module, EMBEDDING, nn.Identity())

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        network = cast(Any, self.module)
        arguments = cast_inputs(inputs, network.dtype)
        # The latents alone, without the channels of an image to edit
        arguments["sample"] = arguments["sample"][:, : network.config.in_channels]
        with self.without_embedding():
            skips, middle = network(
                **arguments, **self.network_arguments(hints, network.dtype), return_dict=False
            )
        if guess and not self.prompted_only:
            # Guess mode: weights from 0.1 at the finest level to 1 in the middle block, as in Zhang et al.'s code
            *ramp, last = torch.logspace(-1, 0, len(skips) + 1).tolist()
            skips = [skip * share for skip, share in zip(skips, ramp, strict=True)]
            middle = middle * last
        return {SKIPS: list(skips), MIDDLE: [middle]}


class UNetUnion(UNetControlNet):
    """A union ControlNet for one kind of map, or for several in one call.

    types   the numbers of the kinds
    scales  of each kind, where there are several: their hints are fused inside the network
    """

    def __init__(
        self,
        module: nn.Module,
        types: tuple[int, ...] = (),
        scales: tuple[float, ...] = (1.0,),
        cache: dict[Any, UNetUnion] | None = None,
    ) -> None:
        super().__init__(module)
        self.types, self.scales = types, scales
        self.cache = {} if cache is None else cache  # rows of equal kinds share one object

    def select(self, types: tuple[int, ...], scales: tuple[float, ...]) -> UNetUnion:
        """The same module for these kinds."""
        key = (types, scales)
        if key not in self.cache:
            self.cache[key] = UNetUnion(self.module, types, scales, self.cache)
        return self.cache[key]

    def for_kind(self, kind: str) -> UNetUnion:
        """The same module for a kind; `UserError` for a kind that it does not read."""
        count = cast(Any, self.module).config.num_control_type
        if UNION_TYPES.get(kind, count) >= count:
            raise UserError(
                f"A union ControlNet of {count} kinds reads no {kind}. It reads "
                f"{', '.join(name for name, number in UNION_TYPES.items() if number < count)}; say which, as in "
                "--condition edges=map.png."
            )
        return self.select((UNION_TYPES[kind],), (1.0,))

    def join_controls(self, controls: Sequence[Control]) -> Control:
        """Join controls of several kinds, one row each, of the same module, into one whose call reads all of them."""
        types = tuple(number for control in controls for number in cast(UNetUnion, control.network).types)
        scales = tuple(float(control.scale[0]) for control in controls)
        hints = tuple(hint for control in controls for hint in control.hints)
        network = self.select(types, scales)
        return replace(controls[0], network=network, hints=hints, scale=torch.ones_like(controls[0].scale))

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        return (maps,)  # its embedding depends on the other kinds of the same call

    def without_embedding(self) -> AbstractContextManager[None]:
        return nullcontext()

    def network_arguments(self, hints: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
        network = cast(Any, self.module)
        types = torch.zeros(len(hints[0]), network.config.num_control_type, device=hints[0].device)
        types[:, list(self.types)] = 1
        return {
            "controlnet_cond": [hint.to(dtype) for hint in hints],
            "control_type": types,
            "control_type_idx": list(self.types),
            "conditioning_scale": list(self.scales),
        }


class UNetAdapter:
    """A T2I-Adapter; its hints are its features. Implements `ControlNetwork`."""

    prompted_only = takes_guess = False

    def __init__(self, module: T2IAdapter) -> None:
        self.module: nn.Module = module

    def for_kind(self, kind: str) -> UNetAdapter:
        return self

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        network = cast(Any, self.module)
        if network.config.in_channels == 1:
            maps = (maps * maps.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
        # In the layout of the UNet's own tensors, so that adding them is no copy
        return tuple(
            feature.contiguous(memory_format=torch.channels_last)
            for feature in network(maps.to(network.dtype))
        )

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        return {INNER: list(hints)}


def is_bgr(module: nn.Module) -> bool:
    """Whether a ControlNet reads a map's colours in the order blue, green, red."""
    return bool(cast(Any, module).config.controlnet_conditioning_channel_order == "bgr")


@contextmanager
def replace_module(module: nn.Module, name: str, replacement: nn.Module) -> Iterator[None]:
    """Inside the `with`, `replacement` takes the place of a module's submodule `name`."""
    original = module._modules[name]
    module._modules[name] = replacement
    try:
        yield
    finally:
        module._modules[name] = original


def cast_inputs(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Cast a denoiser's arguments to another dtype, except times and integers."""

    def cast_to(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cast_to(key, item) for key, item in value.items()}
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and name != "timestep" else value

    return {name: cast_to(name, value) for name, value in inputs.items()}


def call_unet(denoiser: nn.Module, inputs: Mapping[str, Any], controls: Sequence[Control]) -> Tensor:
    """A UNet's prediction with the controls' residuals; lists are new at every call, since the UNet empties them."""
    # No control network takes `timestep_cond`
    shared = {name: value for name, value in inputs.items() if name != "timestep_cond"}
    residuals = sum_residuals(controls, shared, working_dtype(denoiser))
    middle = residuals.pop(MIDDLE, None)
    arguments = {**inputs, **residuals, **({MIDDLE: middle[0]} if middle is not None else {})}
    with apply_row_loras(controls, denoiser):
        return cast(Tensor, denoiser(**arguments).sample)


def unet_control_network(module: nn.Module, denoiser: nn.Module) -> ControlNetwork:
    """Wrap a loaded ControlNet or T2I-Adapter of this UNet; `UserError` for another's."""
    unet, config = cast(Any, denoiser).config, cast(Any, module).config
    if isinstance(module, T2IAdapter):
        widths, needed = list(config.channels), list(unet.block_out_channels)
        if widths[: len(needed)] != needed:  # SDXL's has more, for the middle
            raise made_for_another_model("width of the blocks", widths, needed)
        # Features after the first halving, where a UNet's first block takes none inside
        kind = "full_adapter_xl" if unet.down_block_types[0] == "DownBlock2D" else "full_adapter"
        if (config.adapter_type == "full_adapter_xl") != (kind == "full_adapter_xl"):
            raise made_for_another_model("adapter_type", config.adapter_type, kind)
        return UNetAdapter(module)
    for name, words in MUST_AGREE.items():
        if config.get(name) != unet.get(name):
            raise made_for_another_model(words, config.get(name), unet.get(name))
    if config.in_channels != unet.out_channels:  # the UNet's input may also hold an image to edit
        raise made_for_another_model("number of latent channels", config.in_channels, unet.out_channels)
    return UNetUnion(module) if isinstance(module, ControlNetUnionModel) else UNetControlNet(module)


MUST_AGREE = {  # of a ControlNet's config and its UNet's
    "cross_attention_dim": "width of the text",
    "block_out_channels": "width of the blocks",
    "layers_per_block": "number of layers in a block",
    "addition_embed_type": "condition on the image size",
}
