"""Stable Diffusion 1.x and 2.x, and the embedded `moji`: a variance-preserving UNet with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from backbone.conditions.conditions import Conditions, Text
from backbone.families import checkpoint as single_file
from backbone.families import loading
from backbone.families.base import (
    AttentionLayout,
    ModelSpec,
    Network,
    NoisePath,
    TextEncoderSlot,
    TextSegment,
    diffusers_spec,
    transformers_spec,
)
from backbone.families.location import Location
from backbone.families.sd1 import checkpoint
from backbone.io.files import Header


class StableDiffusion:
    """Implements `Family`."""

    name: ClassVar[str] = "Stable Diffusion"
    hub_ids: ClassVar[dict[str, str]] = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": (
            *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
            *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        ),
    }

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return checkpoint.match_checkpoint(header)

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        return _load_network(UNet2DConditionModel, location, "unet", dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        return _load_network(AutoencoderKL, location, "vae", loading.autoencoder_dtype(location, dtype))

    def text_encoder(self, location: Location, dtype: torch.dtype) -> ClipTextEncoder:
        if location.file is not None:
            return ClipTextEncoder(*checkpoint.load_text_encoder(location, torch.float32))
        slot = loading.load_clip(CLIPTextModel, location)
        return ClipTextEncoder(slot.tokenizer, slot.model)

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        return ModelSpec(
            diffusers_spec(UNet2DConditionModel, location, "unet", dtype),
            diffusers_spec(AutoencoderKL, location, "vae", loading.autoencoder_dtype(location, dtype)),
            {"text_encoder": transformers_spec(CLIPTextModel, location, "text_encoder")},
            {"hidden": (77, int(location.config("unet")["cross_attention_dim"]))},
        )

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        side = int(location.config("unet")["sample_size"])
        return int(location.config("vae")["latent_channels"]), side, side

    def longest_side(self, location: Location) -> None:
        return None

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {}

    def path(self, location: Location) -> NoisePath:
        return loading.vp_path(location)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = cast(torch.dtype, denoiser.dtype)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            noisy = noisy.to(dtype).contiguous(memory_format=torch.channels_last)
            return cast(Tensor, denoiser(noisy, time, conditions.text["hidden"].to(dtype)).sample)

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        return AttentionLayout()

    def embed_guidance(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> None:
        return None


class ClipTextEncoder:
    """CLIP's last hidden states at 77 positions."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)

    @property
    def slots(self) -> tuple[TextEncoderSlot, ...]:
        return (TextEncoderSlot("text_encoder", self.tokenizer, self.model),)

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        return (TextSegment(self.tokenizer, self.tokenizer.model_max_length),)

    def to(self, device: torch.device) -> ClipTextEncoder:
        self.model.to(device)
        return self

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 77, D]; warns of truncated prompts."""
        (slot,) = self.slots
        loading.warn_truncation(slot, prompts)
        ids = loading.tokenize(slot, prompts)["input_ids"]
        return {"hidden": self.model(ids).last_hidden_state.float()}


def _load_network(kind: Any, location: Location, part: str, dtype: torch.dtype) -> nn.Module:
    """Load the UNet or the VAE from a folder, the hub or a single file."""
    if location.file is None:
        return loading.load_network(kind, location, part, dtype, torch.channels_last)
    prefix = checkpoint.PREFIXES[part]
    model = single_file.load_single_file_part(kind, location, part, prefix=prefix, dtype=dtype)
    return cast(nn.Module, model.to(memory_format=torch.channels_last))
