"""Stable Diffusion XL: a larger variance-preserving UNet, two CLIP text encoders, and the image size as a condition.

Podell et al. 2023: § 2.1 for the network, § 2.2 for the size conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from backbone.conditions.conditions import Conditions, Text
from backbone.diffusion.transfer import send
from backbone.families.base import (
    ModelSpec,
    Network,
    TextEncoderSlot,
    TextSegment,
    diffusers_spec,
    refuse_beside,
    transformers_spec,
    working_dtype,
)
from backbone.families.components import loading, tokenization
from backbone.families.location import Location
from backbone.families.sdxl import checkpoint
from backbone.families.single_file import checkpoint as single_file
from backbone.families.unet.control import call_unet
from backbone.families.unet.family import (
    UNetFamily,
    beside_reference,
    load_part,
    make_timestep_cond,
    refuse_other_inputs,
)
from backbone.io.console import UserError
from backbone.io.files import Header

VAE_SCALE_FACTOR = 8  # pixels per latent and side


class StableDiffusionXL(UNetFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "Stable Diffusion XL"
    hub_ids: ClassVar[dict[str, str]] = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0"}
    pipeline_classes: ClassVar[tuple[str, ...]] = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    )

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return checkpoint.match_checkpoint(header)

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        return refuse_beside(header, other_files)

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.config("unet").get("addition_embed_type") != "text_time":
            raise UserError(
                f"The unet of {location.name} does not take the image size as a condition, so it is not Stable "
                "Diffusion XL's. Name a whole model of one family."
            )
        if location.index.get("requires_aesthetics_score"):
            raise UserError(
                f"{location.name} is a refiner, which finishes another model's images. Name the model that draws them."
            )
        refuse_other_inputs(location, ("text_encoder", "text_encoder_2"))
        return load_part(UNet2DConditionModel, location, "unet", single_file.UNET, dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        """Load the VAE in fp32, except for one that was fixed for half precision (`force_upcast` false)."""
        dtype = fp32_unless_repaired(location, dtype)
        return load_part(AutoencoderKL, location, "vae", single_file.AUTOENCODER, dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> TwoClips:
        if location.file is not None:
            return TwoClips(checkpoint.load_text_encoders(location), zeros=True)
        slots = (
            loading.load_clip(CLIPTextModel, location),
            loading.load_clip(CLIPTextModelWithProjection, location, "_2"),
        )
        return TwoClips(slots, zeros=bool(location.index.get("force_zeros_for_empty_prompt", True)))

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        config = location.config("unet")
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return ModelSpec(
            diffusers_spec(UNet2DConditionModel, location, "unet", dtype),
            diffusers_spec(AutoencoderKL, location, "vae", fp32_unless_repaired(location, dtype)),
            {
                "text_encoder": transformers_spec(CLIPTextModel, location, "text_encoder"),
                "text_encoder_2": transformers_spec(CLIPTextModelWithProjection, location, "text_encoder_2"),
            },
            {"hidden": (77, int(config["cross_attention_dim"])), "pooled": (int(pooled),)},
        )

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"guidance": 5.0}

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = working_dtype(denoiser)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            count, _, height, width = noisy.shape
            size = (height * VAE_SCALE_FACTOR, width * VAE_SCALE_FACTOR)
            # The original size, no crop, the target size
            sizes = send(torch.tensor([[*size, 0, 0, *size]], dtype=dtype), noisy.device)
            added = {"text_embeds": conditions.text["pooled"].to(dtype), "time_ids": sizes.expand(count, -1)}
            noisy = beside_reference(noisy.to(dtype), conditions).contiguous(
                memory_format=torch.channels_last
            )
            inputs = {
                "sample": noisy,
                "timestep": time,
                "encoder_hidden_states": conditions.text["hidden"].to(dtype),
                "added_cond_kwargs": added,
                **make_timestep_cond(denoiser, conditions, dtype),
            }
            return call_unet(denoiser, inputs, conditions.controls)

        return predict


class TwoClips(tokenization.MultiTextEncoder):
    """Both encoders' last-but-one hidden states concatenated, and the second one's pooled output.

    With `zeros` (`force_zeros_for_empty_prompt`) an empty prompt is zeros and not the encoding of "".
    """

    def __init__(self, slots: Sequence[TextEncoderSlot], *, zeros: bool) -> None:
        super().__init__(slots)
        self.zeros = zeros

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        """Both tokenise alike; the second pads with another token."""
        return (TextSegment(self.tokenizer, self.tokenizer.model_max_length),)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 77, D₁ + D₂], pooled [B, P]; warns of truncated prompts."""
        tokenization.warn_truncation(self.slots[0], prompts)
        outputs = [
            slot.model(tokenization.tokenize(slot, prompts)["input_ids"], output_hidden_states=True)
            for slot in self.slots
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).float()
        pooled = outputs[-1].text_embeds.float()
        if self.zeros:
            non_empty = send(torch.tensor([bool(prompt) for prompt in prompts]), hidden.device)
            hidden, pooled = hidden * non_empty[:, None, None], pooled * non_empty[:, None]
        return {"hidden": hidden, "pooled": pooled}


def fp32_unless_repaired(location: Location, dtype: torch.dtype) -> torch.dtype:
    """The autoencoder's dtype: fp32 unless it was fixed for half precision; the cost of bf16 is not measured."""
    return torch.float32 if location.config("vae").get("force_upcast", True) else dtype
