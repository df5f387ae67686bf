"""Stable Diffusion 1.x and 2.x, and the embedded `moji`: a variance-preserving UNet with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions, Text
from backbone.families.base import (
    ModelSpec,
    Network,
    NoisePath,
    TextSegment,
    diffusers_spec,
    refuse_beside,
    transformers_spec,
    working_dtype,
)
from backbone.families.components import loading, noise_paths, tokenization
from backbone.families.location import Location
from backbone.families.sd1 import checkpoint
from backbone.families.unet.control import call_unet
from backbone.families.unet.family import (
    UNetFamily,
    beside_reference,
    load_part,
    make_timestep_cond,
    refuse_other_inputs,
)
from backbone.io.files import Header


class StableDiffusion(UNetFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "Stable Diffusion"
    hub_ids: ClassVar[dict[str, str]] = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
    pipeline_classes: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionInstructPix2PixPipeline",
    )

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return checkpoint.match_checkpoint(header)

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        return refuse_beside(header, other_files)

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        refuse_other_inputs(location, ("text_encoder",))
        return load_part(UNet2DConditionModel, location, "unet", checkpoint.PREFIXES["unet"], dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        from diffusers import AutoencoderKL  # slow to import, and not needed by a training from prepared data

        dtype = loading.autoencoder_dtype(location, dtype)
        return load_part(AutoencoderKL, location, "vae", checkpoint.PREFIXES["vae"], dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> ClipTextEncoder:
        from transformers import CLIPTextModel

        if location.file is not None:
            return ClipTextEncoder([checkpoint.load_text_encoder(location)])
        return ClipTextEncoder([loading.load_clip(CLIPTextModel, location)])

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel

        return ModelSpec(
            diffusers_spec(UNet2DConditionModel, location, "unet", dtype),
            diffusers_spec(AutoencoderKL, location, "vae", loading.autoencoder_dtype(location, dtype)),
            {"text_encoder": transformers_spec(CLIPTextModel, location, "text_encoder")},
            {"hidden": (77, int(location.config("unet")["cross_attention_dim"]))},
        )

    def path(self, location: Location) -> NoisePath:
        # diffusers' pipeline has the offset 1 whatever an old config says
        old = location.index.get("_class_name") == "StableDiffusionPipeline"
        return noise_paths.vp_path(location, steps_offset=1 if old else None)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = working_dtype(denoiser)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            noisy = beside_reference(noisy.to(dtype), conditions).contiguous(
                memory_format=torch.channels_last
            )
            inputs = {
                "sample": noisy,
                "timestep": time,
                "encoder_hidden_states": conditions.text["hidden"].to(dtype),
                **make_timestep_cond(denoiser, conditions, dtype),
            }
            return call_unet(denoiser, inputs, conditions.controls)

        return predict


class ClipTextEncoder(tokenization.MultiTextEncoder):
    """CLIP's last hidden states at 77 positions."""

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        return (TextSegment(self.tokenizer, self.tokenizer.model_max_length),)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 77, D]; warns of truncated prompts."""
        (slot,) = self.slots
        tokenization.warn_truncation(slot, prompts)
        ids = tokenization.tokenize(slot, prompts)["input_ids"]
        return {"hidden": slot.model(ids).last_hidden_state.float()}
