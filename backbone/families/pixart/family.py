"""PixArt-Σ: a variance-preserving transformer with cross-attention to T5's hidden states (Chen et al. 2024).

The network also predicts its variance, which the samplers here do not use.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from backbone.conditions.conditions import Conditions, Text
from backbone.families.base import (
    AttentionLayout,
    ImageInput,
    ModelSpec,
    Network,
    NoisePath,
    TextSegment,
    diffusers_spec,
    refuse_beside,
    transformers_spec,
    working_dtype,
)
from backbone.families.components import joint_attention, loading, noise_paths, tokenization
from backbone.families.location import Location
from backbone.io.files import Header

T5_TOKENS = 300


class PixArt:
    """Implements `Family`."""

    name: ClassVar[str] = "PixArt-Σ"
    hub_ids: ClassVar[dict[str, str]] = {"pixart": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline",)
    reads_images: ClassVar[Mapping[str, ImageInput]] = {}
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    }

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return None

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        return refuse_beside(header, other_files)

    def licence(self, location: Location) -> str:
        return ""

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        return loading.load_network(PixArtTransformer2DModel, location, "transformer", dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        return loading.load_autoencoder(AutoencoderKL, location, dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> T5TextEncoder:
        return T5TextEncoder([loading.load_t5(location, "", dtype)])

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        width = int(location.config("transformer")["caption_channels"])
        return ModelSpec(
            diffusers_spec(PixArtTransformer2DModel, location, "transformer", dtype),
            diffusers_spec(AutoencoderKL, location, "vae", loading.autoencoder_dtype(location, dtype)),
            {"text_encoder": transformers_spec(T5EncoderModel, location, "text_encoder", dtype)},
            {"hidden": (T5_TOKENS, width), "mask": (T5_TOKENS,)},
        )

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        side = int(location.config("transformer")["sample_size"])
        return int(location.config("vae")["latent_channels"]), side, side

    def longest_side(self, location: Location) -> None:
        return None

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 20, "guidance": 4.5}

    def path(self, location: Location) -> NoisePath:
        return noise_paths.vp_path(location)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = working_dtype(denoiser)
        no_size_condition = {"resolution": None, "aspect_ratio": None}

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            output = denoiser(
                noisy.to(dtype),
                encoder_hidden_states=conditions.text["hidden"].to(dtype),
                encoder_attention_mask=conditions.text["mask"],
                timestep=time.expand(len(noisy)),
                added_cond_kwargs=no_size_condition,
            ).sample
            return cast(Tensor, output[:, : noisy.shape[1]])  # the variance fills the other channels

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        late = joint_attention.later_half_prefixes(
            cast(Any, denoiser).transformer_blocks, "transformer_blocks"
        )
        return AttentionLayout(max_map_queries=None, detail_layers=late)

    def embed_guidance(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> None:
        return None


class T5TextEncoder(tokenization.MultiTextEncoder):
    """T5's last hidden states at 300 positions and the token mask. Prompts are lowercased."""

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        return (TextSegment(self.tokenizer, T5_TOKENS, self.preprocess),)

    def preprocess(self, prompt: str) -> str:
        """Lowercase a prompt, except for added tokens."""
        return lowercase_except(prompt, self.tokenizer.get_added_vocab()).strip()

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 300, D], mask [B, 300]; warns of truncated prompts."""
        (slot,) = self.slots
        prompts = [self.preprocess(prompt) for prompt in prompts]
        tokenization.warn_truncation(slot, prompts, T5_TOKENS)
        tokens = tokenization.tokenize(slot, prompts, T5_TOKENS)
        return {"hidden": slot.model(**tokens).last_hidden_state.float(), "mask": tokens["attention_mask"]}


def lowercase_except(prompt: str, words: Collection[str]) -> str:
    """Lowercase a prompt except for `words`."""
    pieces = re.split(f"({'|'.join(map(re.escape, words))})", prompt) if words else [prompt]
    return "".join(piece if piece in words else piece.lower() for piece in pieces)
