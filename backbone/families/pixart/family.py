"""PixArt-Σ: a variance-preserving transformer that reads T5's tokens by cross-attention.

Chen et al. 2024. The network also learned the variance of its answer, which the samplers here do not ask for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from backbone.conditions.conditions import Conditions, Text
from backbone.families import loading as parts
from backbone.families.base import Attention, Network, NoisePath, Outline, Stretch, encoder, network
from backbone.families.location import Location
from backbone.io.files import Header

T5_TOKENS = 300


class PixArt:
    """The family's file: see `Family`."""

    name: ClassVar[str] = "PixArt-Σ"
    names: ClassVar[dict[str, str]] = {"pixart": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"}
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline",)
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    }

    def single_file(self, header: Header) -> tuple[Path, ...] | None:
        return None

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        return parts.load_network(PixArtTransformer2DModel, location, "transformer", dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        return parts.load_autoencoder(AutoencoderKL, location, dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> T5Text:
        return T5Text([parts.load_t5(location, "", dtype)])

    def outline(self, location: Location, dtype: torch.dtype) -> Outline:
        width = int(location.config("transformer")["caption_channels"])
        return Outline(
            network(PixArtTransformer2DModel, location, "transformer", dtype),
            network(AutoencoderKL, location, "vae", parts.autoencoder_dtype(location, dtype)),
            {"text_encoder": encoder(T5EncoderModel, location, "text_encoder", dtype)},
            {"hidden": (T5_TOKENS, width), "mask": (T5_TOKENS,)},
        )

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        side = int(location.config("transformer")["sample_size"])
        return int(location.config("vae")["latent_channels"]), side, side

    def longest_side(self, location: Location) -> None:
        return None

    def defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 20, "guidance": 4.5}

    def path(self, location: Location) -> NoisePath:
        return parts.vp_path(location)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = cast(torch.dtype, denoiser.dtype)
        unsaid = {"resolution": None, "aspect_ratio": None}

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            said = denoiser(
                noisy.to(dtype),
                encoder_hidden_states=conditions.text["hidden"].to(dtype),
                encoder_attention_mask=conditions.text["mask"],
                timestep=time.expand(len(noisy)),
                added_cond_kwargs=unsaid,
            ).sample
            return cast(Tensor, said[:, : noisy.shape[1]])  # the variance is behind it

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> Attention:
        late = parts.later_half(cast(Any, denoiser).transformer_blocks, "transformer_blocks")
        return Attention(coarse=None, late=late)

    def distilled(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> None:
        return None


class T5Text(parts.Encoders):
    """T5's last hidden states of 300 positions, and which of them hold a token. Prompts are read in small letters."""

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        return (Stretch(self.tokenizer, T5_TOKENS, self.heard),)

    def heard(self, prompt: str) -> str:
        """A prompt as T5 is given it."""
        return small(prompt, self.tokenizer.get_added_vocab()).strip()

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 300, D], mask [B, 300]. A prompt that is too long is cut, and said so."""
        (side,) = self.sides
        said = [self.heard(prompt) for prompt in prompts]
        parts.say_what_is_cut(side, said, T5_TOKENS)
        tokens = parts.token_ids(side, said, T5_TOKENS)
        return {"hidden": side.model(**tokens).last_hidden_state.float(), "mask": tokens["attention_mask"]}


def small(prompt: str, kept: Collection[str]) -> str:
    """A prompt in small letters, but for the words in `kept`: those that the tokenizer was taught."""
    pieces = re.split(f"({'|'.join(map(re.escape, kept))})", prompt) if kept else [prompt]
    return "".join(piece if piece in kept else piece.lower() for piece in pieces)
