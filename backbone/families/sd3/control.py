"""Stable Diffusion 3's ControlNets: some of the transformer's blocks, whose outputs are spread over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import SD3ControlNetModel
from torch import Tensor, nn

from backbone.conditions.control import Residuals
from backbone.families.control import made_for_another_model

BLOCKS = "block_controlnet_hidden_states"
MUST_AGREE = {  # of a ControlNet's config and its transformer's
    "joint_attention_dim": "width of the text",
    "in_channels": "number of latent channels",
    "num_attention_heads": "number of attention heads",
    "attention_head_dim": "width of an attention head",
}


class StableDiffusion3ControlNet:
    """Implements `ControlNetwork`. Its hints are the map's latents."""

    prompted_only = takes_guess = False

    def __init__(self, module: nn.Module, denoiser: nn.Module, encode: Callable[..., Tensor]) -> None:
        self.module = module
        self.blocks = len(cast(Any, denoiser).transformer_blocks)
        self.encode = encode

    def for_kind(self, kind: str) -> StableDiffusion3ControlNet:
        return self

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        """InstantX' nets, recognised by their zero pooled text, were trained on latents without the VAE's shift."""
        return (self.encode(2 * maps - 1, shifted=not self._without_pooled),)

    @property
    def _without_pooled(self) -> bool:
        return bool(cast(Any, self.module).config.force_zeros_for_pooled_projection)

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        network, dtype = cast(Any, self.module), cast(torch.dtype, self.module.dtype)
        pooled = inputs["pooled_projections"].to(dtype)
        (outputs,) = network(
            hidden_states=inputs["hidden_states"].to(dtype),
            timestep=inputs["timestep"],
            encoder_hidden_states=(
                None if network.context_embedder is None else inputs["encoder_hidden_states"].to(dtype)
            ),
            pooled_projections=torch.zeros_like(pooled) if self._without_pooled else pooled,
            controlnet_cond=hints[0].to(dtype),
            return_dict=False,
        )
        per_output = self.blocks / len(outputs)
        return {BLOCKS: [outputs[int(block / per_output)] for block in range(self.blocks)]}


def control_network(
    module: nn.Module, denoiser: nn.Module, encode: Callable[..., Tensor]
) -> StableDiffusion3ControlNet:
    """Wrap a loaded ControlNet of this transformer; `UserError` for another's."""
    config, transformer = cast(Any, module).config, cast(Any, denoiser).config
    for name, words in MUST_AGREE.items():
        if config[name] is not None and config[name] != transformer[name]:
            raise made_for_another_model(words, config[name], transformer[name])
    if config["extra_conditioning_channels"]:
        raise made_for_another_model(
            "number of channels beside the map", config["extra_conditioning_channels"], 0
        )
    assert isinstance(module, SD3ControlNetModel)
    if not config["use_pos_embed"]:  # Stability's 3.5 nets share the transformer's
        cast(Any, module).pos_embed = (
            cast(Any, module)
            ._get_pos_embed_from_transformer(denoiser)
            .to(device=module.device, dtype=module.dtype)
        )
    return StableDiffusion3ControlNet(module, denoiser, encode)
