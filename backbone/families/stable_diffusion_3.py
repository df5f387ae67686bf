"""Stable Diffusion 3 and 3.5: a transformer over text and picture jointly, three text encoders, a rectified flow.

Esser et al. 2024: section 4 the network, eq. 19 and 23 the levels that it was trained at. T5, the largest of the text
encoders, may be missing: its tokens are zeros then, as in training with that encoder left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from backbone.families import (
    Attention,
    Location,
    Network,
    NoisePath,
    Side,
    Streams,
    Stretch,
    Text,
    parts,
    stable_diffusion_3_file,
    text_encoders_file,
)
from backbone.families.outline import Outline, encoder, network
from backbone.files import Header

T5_TOKENS = 256
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
            return stable_diffusion_3_file.transformer(location, dtype)
        return parts.load_network(SD3Transformer2DModel, location, "transformer", dtype)

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
        return ThreeEncoders(clips, t5, width=int(location.config("transformer")["joint_attention_dim"]))

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
                "hidden": (77 + T5_TOKENS, int(config["joint_attention_dim"])),
                "pooled": (int(config["pooled_projection_dim"]),),
            },
        )

    def latent_shape(self, location: Location) -> tuple[int, int, int]:
        side = int(location.config("transformer")["sample_size"])
        return int(location.config("vae")["latent_channels"]), side, side

    def defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 28, "guidance": 4.5}

    def path(self, location: Location) -> NoisePath:
        _, *size = self.latent_shape(location)
        patch = int(location.config("transformer")["patch_size"])
        return parts.flow_path(location, size=(size[0], size[1]), patch=patch)

    def network(self, denoiser: nn.Module, text: Text) -> Network:
        dtype = cast(torch.dtype, denoiser.dtype)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            said = denoiser(
                hidden_states=noisy.to(dtype),
                timestep=time.expand(len(noisy)),
                encoder_hidden_states=text["hidden"].to(dtype),
                pooled_projections=text["pooled"].to(dtype),
            )
            return cast(Tensor, said.sample)

        return predict

    def attention(self, denoiser: nn.Module, text: Text) -> Attention:
        late = parts.later_half(cast(Any, denoiser).transformer_blocks, "transformer_blocks")
        return Attention({JointAttnProcessor2_0: streams}, coarse=None, late=late)

    def distilled(self, denoiser: nn.Module, text: Text, guidance: float) -> None:
        return None


class ThreeEncoders(parts.Encoders):
    """The tokens of both CLIPs side by side, filled up to T5's width with zeros, and T5's behind them."""

    def __init__(self, clips: Sequence[Side], t5: Side | None, *, width: int) -> None:
        super().__init__(clips, [t5] if t5 else [])
        self.t5, self.width = t5, width

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """Both CLIPs', which cut alike, then T5's."""
        clip, t5 = self.sides[0].tokenizer, self.t5.tokenizer if self.t5 else None
        return Stretch(clip, clip.model_max_length), Stretch(t5, T5_TOKENS)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 77 + 256, D], pooled [B, P₁ + P₂]. What no encoder reads of a prompt is said."""
        said = [
            side.model(parts.token_ids(side, prompts)["input_ids"], output_hidden_states=True)
            for side in self.sides
        ]
        words = torch.cat([one.hidden_states[-2] for one in said], dim=-1).float()
        words = F.pad(words, (0, self.width - words.shape[-1]))
        pooled = torch.cat([one.text_embeds for one in said], dim=-1).float()
        if self.t5 is None:
            parts.say_what_is_cut(self.sides[0], prompts)
            more = words.new_zeros(len(prompts), T5_TOKENS, self.width)
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
