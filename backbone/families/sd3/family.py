"""Stable Diffusion 3 and 3.5: a transformer over text and picture jointly, three text encoders, a rectified flow.

Esser et al. 2024: section 4 the network, eq. 19 and 23 the levels that it was trained at. T5, the largest of the text
encoders, may be missing: its 256 tokens are zeros then, as in training with that encoder left out. As the text has no
positions in this network, tokens that begin alike stay alike, and where the picture's are few one of them stands for
all (`RepeatedZeroTokenProcessor`): the same function, in a third of the time on a small model.
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

from backbone.families import loading as parts
from backbone.families import text_encoders as text_encoders_file
from backbone.families.base import (
    AttentionLayout,
    JointAttentionInputs,
    ModelSpec,
    Network,
    NoisePath,
    Text,
    TextEncoderSlot,
    TextSegment,
    diffusers_spec,
    transformers_spec,
)
from backbone.families.location import Location
from backbone.families.sd3 import checkpoint as stable_diffusion_3_file
from backbone.io.files import Header

T5_TOKENS = 256
MAX_TOKENS_WITH_BIAS = 1024  # image tokens; beyond, attention without a bias saves more than 255 fewer tokens
JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class StableDiffusion3:
    """The family's file: see `Family`."""

    name: ClassVar[str] = "Stable Diffusion 3"
    hub_ids: ClassVar[dict[str, str]] = {"sd3": "stabilityai/stable-diffusion-3.5-medium"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": JOINT,
        "all": (*JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    }

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return stable_diffusion_3_file.match_checkpoint(header)

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            network = stable_diffusion_3_file.load_transformer(location, dtype)
        else:
            network = parts.load_network(SD3Transformer2DModel, location, "transformer", dtype)
        if count_t5_tokens(location) < T5_TOKENS:
            use_repeated_zero_token(cast(SD3Transformer2DModel, network))
        return network

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            return text_encoders_file.load_autoencoder(location, dtype)
        return parts.load_autoencoder(AutoencoderKL, location, dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> ThreeEncoders:
        clips: Sequence[TextEncoderSlot]
        if location.file is not None:
            clips, load_t5 = stable_diffusion_3_file.load_clips(location), text_encoders_file.load_t5
        else:
            clips = [parts.load_clip(CLIPTextModelWithProjection, location, number) for number in ("", "_2")]
            load_t5 = parts.load_t5
        t5 = load_t5(location, "_3", dtype) if has_t5(location) else None
        width = int(location.config("transformer")["joint_attention_dim"])
        return ThreeEncoders(clips, t5, width=width, t5_tokens=count_t5_tokens(location))

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        config = location.config("transformer")
        encoders = {
            name: transformers_spec(CLIPTextModelWithProjection, location, name)
            for name in ("text_encoder", "text_encoder_2")
        }
        if has_t5(location):
            encoders["text_encoder_3"] = transformers_spec(T5EncoderModel, location, "text_encoder_3", dtype)
        return ModelSpec(
            diffusers_spec(SD3Transformer2DModel, location, "transformer", dtype),
            diffusers_spec(AutoencoderKL, location, "vae", parts.autoencoder_dtype(location, dtype)),
            encoders,
            {
                "hidden": (77 + count_t5_tokens(location), int(config["joint_attention_dim"])),
                "pooled": (int(config["pooled_projection_dim"]),),
            },
        )

    def latent_shape(self, location: Location) -> tuple[int, int, int]:
        side = int(location.config("transformer")["sample_size"])
        return int(location.config("vae")["latent_channels"]), side, side

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
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

    def attention(self, denoiser: nn.Module, text: Text) -> AttentionLayout:
        late = parts.later_half_prefixes(cast(Any, denoiser).transformer_blocks, "transformer_blocks")
        joint = {
            JointAttnProcessor2_0: joint_attention_inputs,
            RepeatedZeroTokenProcessor: joint_attention_inputs_with_repeated_zero,
        }
        return AttentionLayout(joint, max_map_queries=None, detail_layers=late)

    def embed_guidance(self, denoiser: nn.Module, text: Text, guidance: float) -> None:
        return None


class ThreeEncoders(parts.MultiTextEncoder):
    """The tokens of both CLIPs side by side, filled up to T5's width with zeros, and T5's behind them."""

    def __init__(
        self, clips: Sequence[TextEncoderSlot], t5: TextEncoderSlot | None, *, width: int, t5_tokens: int
    ) -> None:
        super().__init__(clips, [t5] if t5 else [])
        self.t5, self.width, self.t5_tokens = t5, width, t5_tokens

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        """Both CLIPs', which cut alike, then T5's."""
        clip, t5 = self.slots[0].tokenizer, self.t5.tokenizer if self.t5 else None
        return TextSegment(clip, clip.model_max_length), TextSegment(t5, self.t5_tokens)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 77 + 256, D] (77 + 1 where zeros stand once), pooled [B, P₁ + P₂]. What is not read is said."""
        said = [
            side.model(parts.tokenize(side, prompts)["input_ids"], output_hidden_states=True)
            for side in self.slots
        ]
        words = torch.cat([one.hidden_states[-2] for one in said], dim=-1).float()
        words = F.pad(words, (0, self.width - words.shape[-1]))
        pooled = torch.cat([one.text_embeds for one in said], dim=-1).float()
        if self.t5 is None:
            parts.warn_truncation(self.slots[0], prompts)
            more = words.new_zeros(len(prompts), self.t5_tokens, self.width)
        else:
            parts.warn_truncation(self.t5, prompts, T5_TOKENS)
            ids = parts.tokenize(self.t5, prompts, T5_TOKENS)["input_ids"]
            more = self.t5.model(ids).last_hidden_state.float()
        return {"hidden": torch.cat([words, more], dim=1), "pooled": pooled}


def has_t5(location: Location) -> bool:
    """Whether the third text encoder is there."""
    if location.file is not None:
        return stable_diffusion_3_file.has_t5(location)
    return parts.has_part(location, "text_encoder_3")


def count_t5_tokens(location: Location) -> int:
    """How many tokens stand where T5's do: 1 for its zeros where the picture's own are few, else 256."""
    if has_t5(location):
        return T5_TOKENS
    config = location.config("transformer")
    side = int(config["sample_size"]) // int(config["patch_size"])
    return 1 if side * side <= MAX_TOKENS_WITH_BIAS else T5_TOKENS


def use_repeated_zero_token(network: SD3Transformer2DModel) -> None:
    """Makes every attention of the network count the last token of the text 256 times."""
    network.set_attn_processor(RepeatedZeroTokenProcessor())


class RepeatedZeroTokenProcessor:
    """Attention in which the last token of the text stands for 256 equal ones: exp(s + ln 256) = 256·exp(s)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Any:
        found = joint_attention_inputs_with_repeated_zero(
            attn, hidden_states, encoder_hidden_states, attention_mask
        )
        return found.project_output(found.attend(found.query, found.key, found.value))


def joint_attention_inputs_with_repeated_zero(
    attn: Any, hidden: Tensor, said: Tensor | None = None, mask: None = None
) -> JointAttentionInputs:
    """`streams` with the bias of `RepeatedZeroTokenProcessor`; a layer over the picture alone has no text, and none."""
    found = joint_attention_inputs(attn, hidden, said, mask)
    if said is None:
        return found
    bias = found.key.new_zeros(1, found.key.shape[2])
    bias[:, -1] = math.log(T5_TOKENS)
    return replace(found, bias=bias)


def joint_attention_inputs(
    attn: Any, hidden: Tensor, said: Tensor | None = None, mask: None = None
) -> JointAttentionInputs:
    """A call of a layer: the picture's tokens, then, but for the second layer of a block that has two, the text's."""
    assert mask is None
    own = parts.project_qkv(attn, hidden)
    pictures = hidden.shape[1]
    text = slice(pictures, pictures)
    if said is not None:
        text = slice(pictures, pictures + said.shape[1])
        own = [torch.cat(pair, dim=2) for pair in zip(own, parts.project_text_qkv(attn, said), strict=True)]

    def finish(attended: Tensor) -> Any:
        x = attended.transpose(1, 2).flatten(2)
        picture, words = attn.to_out[1](attn.to_out[0](x[:, :pictures])), x[:, text]
        if said is None:
            return picture
        return picture, words if attn.context_pre_only else attn.to_add_out(words)

    query, key, value = own
    return JointAttentionInputs(query, key, value, text=text, project_output=finish)
