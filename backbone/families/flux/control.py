"""FLUX.1's ControlNets: blocks of both kinds, whose outputs are spread over the transformer's; union nets, modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import FluxControlNetModel
from torch import Tensor, nn

from backbone.conditions.control import Residuals
from backbone.families.control import made_for_another_model
from backbone.io.console import UserError

DOUBLE, SINGLE = "controlnet_block_samples", "controlnet_single_block_samples"
MODES = {"edges": 0, "lines": 0, "sketch": 0, "tile": 1, "depth": 2, "pose": 4}  # of the published union nets
MUST_AGREE = {
    "joint_attention_dim": "width of the text",
    "in_channels": "number of channels of a token",
    "num_attention_heads": "number of attention heads",
    "attention_head_dim": "width of an attention head",
}


class FluxControlNet:
    """Implements `ControlNetwork`. Its hints are the map's packed latents; for XLabs' nets the map itself, −1…1.

    mode   of a union net: the kind of map that it reads
    """

    prompted_only = takes_guess = False

    def __init__(
        self, module: nn.Module, denoiser: nn.Module, encode: Callable[..., Tensor], mode: int | None = None
    ) -> None:
        self.module, self.denoiser, self.encode, self.mode = module, denoiser, encode, mode
        self.kinds: dict[int, FluxControlNet] = {}

    def for_kind(self, kind: str) -> FluxControlNet:
        """This network in the mode of a kind of map; `UserError` where a union net has no such mode."""
        if not cast(Any, self.module).union:
            return self
        if kind not in MODES:
            raise UserError(
                f"A union ControlNet of FLUX.1 has no mode for {kind}. It reads {', '.join(MODES)}; say which, as in "
                "--condition edges=map.png."
            )
        mode = MODES[kind]
        return self.kinds.setdefault(mode, FluxControlNet(self.module, self.denoiser, self.encode, mode))

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        if cast(Any, self.module).input_hint_block is not None:
            return (2 * maps - 1,)
        return (self.encode(2 * maps - 1, shifted=True),)

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        network, dtype = cast(Any, self.module), cast(torch.dtype, self.module.dtype)
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
        cast_inputs = {name: inputs[name].to(dtype) for name in names}
        mode = None
        if self.mode is not None:
            mode = torch.full((len(hints[0]), 1), self.mode, dtype=torch.long, device=hints[0].device)
        double, single = network(
            **cast_inputs,
            **{name: inputs[name] for name in ("timestep", "img_ids", "txt_ids")},
            guidance=inputs["guidance"] if network.config.guidance_embeds else None,
            controlnet_cond=hints[0].to(dtype),
            controlnet_mode=mode,
            return_dict=False,
        )
        repeats = network.input_hint_block is not None
        counts = (
            len(cast(Any, self.denoiser).transformer_blocks),
            len(cast(Any, self.denoiser).single_transformer_blocks),
        )
        residuals = {DOUBLE: _spread(double, counts[0], repeats), SINGLE: _spread(single, counts[1], False)}
        return {name: parts for name, parts in residuals.items() if parts}


def _spread(outputs: Sequence[Tensor] | None, blocks: int, repeats: bool) -> list[Tensor]:
    """One output for each block: each repeated for ⌈blocks / outputs⌉ blocks, or with `repeats` all in turn."""
    if not outputs:
        return []
    per_output = math.ceil(blocks / len(outputs))
    return [outputs[block % len(outputs) if repeats else block // per_output] for block in range(blocks)]


def control_network(module: nn.Module, denoiser: nn.Module, encode: Callable[..., Tensor]) -> FluxControlNet:
    """Wrap a loaded ControlNet of this transformer; `UserError` for another's. `encode` gives packed latents."""
    config, transformer = cast(Any, module).config, cast(Any, denoiser).config
    for name, words in MUST_AGREE.items():
        if config[name] != transformer[name]:
            raise made_for_another_model(words, config[name], transformer[name])
    assert isinstance(module, FluxControlNetModel)
    return FluxControlNet(module, denoiser, encode)
