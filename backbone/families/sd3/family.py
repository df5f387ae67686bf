"""Stable Diffusion 3 and 3.5: a transformer over text and picture jointly, three text encoders, a rectified flow.

Esser et al. 2024: section 4 the network, eq. 19 and 23 the levels that it was trained at. T5, the largest of the text
encoders, may be missing: its 256 tokens are zeros then, as in training with that encoder left out. As the text has no
positions in this network, tokens that begin alike stay alike, and where the picture's are few one of them stands for
all (`ZerosOnce`): the same function, in a third of the time on a small model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from backbone.conditions.conditions import Conditions, Text
from backbone.families import loading as parts
from backbone.families import text_encoders as text_encoders_file
from backbone.families.base import (
    Attention,
    Network,
    NoisePath,
    Outline,
    Side,
    Streams,
    Stretch,
    encoder,
    network,
)
from backbone.families.location import Location
from backbone.families.sd3 import checkpoint as stable_diffusion_3_file
from backbone.io.files import Header

T5_TOKENS = 256
FEW = 1024  # tokens of a picture; where it has more, attention without a bias is worth more than 255 tokens less
JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class StableDiffusion3:
    """The family's file: see `Family`."""

    name: ClassVar[str] = "Stable Diffusion 3"
    names: ClassVar[dict[str, str]] = {"sd3": "stabilityai/stable-diffusion-3.5-medium"}
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": JOINT,
        "all": (*JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    }

    def single_file(self, header: Header) -> tuple[Path, ...] | None:
        return stable_diffusion_3_file.settings_of(header)

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            network = stable_diffusion_3_file.transformer(location, dtype)
        else:
            network = parts.load_network(SD3Transformer2DModel, location, "transformer", dtype)
        if t5_tokens(location) < T5_TOKENS:
            zeros_once(cast(SD3Transformer2DModel, network))
        return network

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            return text_encoders_file.autoencoder(location, dtype)
        return parts.load_autoencoder(AutoencoderKL, location, dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> ThreeEncoders:
        clips: Sequence[Side]
        if location.file is not None:
            clips, load_t5 = stable_diffusion_3_file.clips(location), text_encoders_file.t5
        else:
            clips = [parts.load_clip(CLIPTextModelWithProjection, location, number) for number in ("", "_2")]
            load_t5 = parts.load_t5
        t5 = load_t5(location, "_3", dtype) if has_t5(location) else None
        width = int(location.config("transformer")["joint_attention_dim"])
        return ThreeEncoders(clips, t5, width=width, t5_tokens=t5_tokens(location))

    def outline(self, location: Location, dtype: torch.dtype) -> Outline:
        config = location.config("transformer")
        encoders = {
            name: encoder(CLIPTextModelWithProjection, location, name)
            for name in ("text_encoder", "text_encoder_2")
        }
        if has_t5(location):
            encoders["text_encoder_3"] = encoder(T5EncoderModel, location, "text_encoder_3", dtype)
        return Outline(
            network(SD3Transformer2DModel, location, "transformer", dtype),
            network(AutoencoderKL, location, "vae", parts.autoencoder_dtype(location, dtype)),
            encoders,
            {
                "hidden": (77 + t5_tokens(location), int(config["joint_attention_dim"])),
                "pooled": (int(config["pooled_projection_dim"]),),
            },
        )

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        side = int(location.config("transformer")["sample_size"])
        return int(location.config("vae")["latent_channels"]), side, side

    def longest_side(self, location: Location) -> int | None:
        config = location.config("transformer")
        places = config.get("pos_embed_max_size")
        return None if places is None else int(places) * int(config["patch_size"])

    def defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 28, "guidance": 4.5}

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        patch = int(location.config("transformer")["patch_size"])
        return parts.flow_path(location, size=(height, width), patch=patch)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = cast(torch.dtype, denoiser.dtype)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            said = denoiser(
                hidden_states=noisy.to(dtype),
                timestep=time.expand(len(noisy)),
                encoder_hidden_states=conditions.text["hidden"].to(dtype),
                pooled_projections=conditions.text["pooled"].to(dtype),
            )
            return cast(Tensor, said.sample)

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> Attention:
        late = parts.later_half(cast(Any, denoiser).transformer_blocks, "transformer_blocks")
        joint = {JointAttnProcessor2_0: streams, ZerosOnce: streams_with_zeros_once}
        return Attention(joint, coarse=None, late=late)

    def distilled(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> None:
        return None


class ThreeEncoders(parts.Encoders):
    """The tokens of both CLIPs side by side, filled up to T5's width with zeros, and T5's behind them."""

    def __init__(self, clips: Sequence[Side], t5: Side | None, *, width: int, t5_tokens: int) -> None:
        super().__init__(clips, [t5] if t5 else [])
        self.t5, self.width, self.t5_tokens = t5, width, t5_tokens

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """Both CLIPs', which cut alike, then T5's."""
        clip, t5 = self.sides[0].tokenizer, self.t5.tokenizer if self.t5 else None
        return Stretch(clip, clip.model_max_length), Stretch(t5, self.t5_tokens)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 77 + 256, D] (77 + 1 where zeros stand once), pooled [B, P₁ + P₂]. What is not read is said."""
        said = [
            side.model(parts.token_ids(side, prompts)["input_ids"], output_hidden_states=True)
            for side in self.sides
        ]
        words = torch.cat([one.hidden_states[-2] for one in said], dim=-1).float()
        words = F.pad(words, (0, self.width - words.shape[-1]))
        pooled = torch.cat([one.text_embeds for one in said], dim=-1).float()
        if self.t5 is None:
            parts.say_what_is_cut(self.sides[0], prompts)
            more = words.new_zeros(len(prompts), self.t5_tokens, self.width)
        else:
            parts.say_what_is_cut(self.t5, prompts, T5_TOKENS)
            ids = parts.token_ids(self.t5, prompts, T5_TOKENS)["input_ids"]
            more = self.t5.model(ids).last_hidden_state.float()
        return {"hidden": torch.cat([words, more], dim=1), "pooled": pooled}


def has_t5(location: Location) -> bool:
    """Whether the third text encoder is there."""
    if location.file is not None:
        return stable_diffusion_3_file.has_t5(location)
    return parts.has(location, "text_encoder_3")


def t5_tokens(location: Location) -> int:
    """How many tokens stand where T5's do: 1 for its zeros where the picture's own are few, else 256."""
    if has_t5(location):
        return T5_TOKENS
    config = location.config("transformer")
    side = int(config["sample_size"]) // int(config["patch_size"])
    return 1 if side * side <= FEW else T5_TOKENS


def zeros_once(network: SD3Transformer2DModel) -> None:
    """Makes every attention of the network count the last token of the text 256 times."""
    network.set_attn_processor(ZerosOnce())


class ZerosOnce:
    """Attention in which the last token of the text stands for 256 equal ones: exp(s + ln 256) = 256·exp(s)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Any:
        found = streams_with_zeros_once(attn, hidden_states, encoder_hidden_states, attention_mask)
        return found.finish(found.attend(found.query, found.key, found.value))


def streams_with_zeros_once(
    attn: Any, hidden: Tensor, said: Tensor | None = None, mask: None = None
) -> Streams:
    """`streams` with the bias of `ZerosOnce`; a layer over the picture alone has no text, and none."""
    found = streams(attn, hidden, said, mask)
    if said is None:
        return found
    bias = found.key.new_zeros(1, found.key.shape[2])
    bias[:, -1] = math.log(T5_TOKENS)
    return replace(found, bias=bias)


def streams(attn: Any, hidden: Tensor, said: Tensor | None = None, mask: None = None) -> Streams:
    """A call of a layer: the picture's tokens, then, but for the second layer of a block that has two, the text's."""
    assert mask is None
    own = parts.heads(attn, hidden)
    pictures = hidden.shape[1]
    text = slice(pictures, pictures)
    if said is not None:
        text = slice(pictures, pictures + said.shape[1])
        own = [torch.cat(pair, dim=2) for pair in zip(own, parts.text_heads(attn, said), strict=True)]

    def finish(attended: Tensor) -> Any:
        x = attended.transpose(1, 2).flatten(2)
        picture, words = attn.to_out[1](attn.to_out[0](x[:, :pictures])), x[:, text]
        if said is None:
            return picture
        return picture, words if attn.context_pre_only else attn.to_add_out(words)

    query, key, value = own
    return Streams(query, key, value, text=text, finish=finish)
