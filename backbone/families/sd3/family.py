"""Stable Diffusion 3 and 3.5: a joint text-image transformer (MMDiT), two CLIPs and T5, a rectified flow.

Esser et al. 2024: § 4 for the network, eq. 19 and 23 for the training density of noise levels. T5, the largest encoder,
may be missing: its 256 tokens are then zeros, as when training dropped it. Text has no positions in this network, so
tokens that start equal stay equal, and for small images one zero token stands for all (`RepeatedZeroTokenProcessor`):
the same function in a third of the time on a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3ControlNetModel, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from backbone.conditions.conditions import Conditions, Text
from backbone.conditions.control import ControlNetwork
from backbone.families.base import (
    AttentionLayout,
    ImageInput,
    JointAttentionInputs,
    ModelSpec,
    Network,
    NoisePath,
    TextEncoderSlot,
    TextSegment,
    diffusers_spec,
    refuse_beside,
    transformers_spec,
    working_dtype,
)
from backbone.families.components import joint_attention, loading, noise_paths, tokenization
from backbone.families.control import sum_residuals
from backbone.families.location import Location
from backbone.families.sd3 import checkpoint, control
from backbone.families.single_file import text_encoders
from backbone.io.files import Header

T5_TOKENS = 256
# Image tokens; with more, 255 fewer text tokens save less than attention without a bias
MAX_TOKENS_WITH_BIAS = 1024


class StableDiffusion3:
    """Implements `Family`."""

    name: ClassVar[str] = "Stable Diffusion 3"
    hub_ids: ClassVar[dict[str, str]] = {"sd3": "stabilityai/stable-diffusion-3.5-medium"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    reads_images: ClassVar[Mapping[str, ImageInput]] = {}
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": joint_attention.PROJECTIONS,
        "all": (
            *joint_attention.PROJECTIONS,
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        ),
    }

    control_classes: ClassVar[tuple[Any, ...]] = (SD3ControlNetModel,)

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return checkpoint.match_checkpoint(header)

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        return refuse_beside(header, other_files)

    def licence(self, location: Location) -> str:
        return "Stable Diffusion 3's published weights are under a licence that large companies have to buy."

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            network = checkpoint.load_transformer(location, dtype)
        else:
            network = loading.load_network(SD3Transformer2DModel, location, "transformer", dtype)
        if count_t5_tokens(location) < T5_TOKENS:
            use_repeated_zero_token(cast(SD3Transformer2DModel, network))
        return network

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            return text_encoders.load_autoencoder(location, dtype)
        return loading.load_autoencoder(AutoencoderKL, location, dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> ThreeEncoders:
        clips: Sequence[TextEncoderSlot]
        if location.file is not None:
            clips, load_t5 = checkpoint.load_clips(location), text_encoders.load_t5
        else:
            clips = [
                loading.load_clip(CLIPTextModelWithProjection, location, number) for number in ("", "_2")
            ]
            load_t5 = loading.load_t5
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
            diffusers_spec(AutoencoderKL, location, "vae", loading.autoencoder_dtype(location, dtype)),
            encoders,
            {
                "hidden": (77 + count_t5_tokens(location), int(config["joint_attention_dim"])),
                "pooled": (int(config["pooled_projection_dim"]),),
            },
        )

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        side = int(location.config("transformer")["sample_size"])
        return int(location.config("vae")["latent_channels"]), side, side

    def longest_side(self, location: Location) -> int | None:
        config = location.config("transformer")
        positions = config.get("pos_embed_max_size")
        return None if positions is None else int(positions) * int(config["patch_size"])

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 28, "guidance": 4.5}

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        patch = int(location.config("transformer")["patch_size"])
        return noise_paths.flow_path(location, size=(height, width), patch=patch)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = working_dtype(denoiser)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            inputs = {
                "hidden_states": noisy.to(dtype),
                "timestep": time.expand(len(noisy)),
                "encoder_hidden_states": conditions.text["hidden"].to(dtype),
                "pooled_projections": conditions.text["pooled"].to(dtype),
            }
            added = sum_residuals(conditions.controls, inputs, dtype)
            return cast(Tensor, denoiser(**inputs, **added).sample)

        return predict

    def control_network(
        self, module: nn.Module, denoiser: nn.Module, encode: Callable[..., Tensor]
    ) -> ControlNetwork:
        processors = cast(Any, denoiser).attn_processors.values()
        if any(isinstance(processor, RepeatedZeroTokenProcessor) for processor in processors):
            use_repeated_zero_token(cast(Any, module))  # it reads the same text
        return control.control_network(module, denoiser, encode)

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        late = joint_attention.later_half_prefixes(
            cast(Any, denoiser).transformer_blocks, "transformer_blocks"
        )
        joint = {
            JointAttnProcessor2_0: joint_attention_inputs,
            RepeatedZeroTokenProcessor: joint_attention_inputs_with_repeated_zero,
        }
        return AttentionLayout(joint, max_map_queries=None, detail_layers=late)

    def embed_guidance(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> None:
        return None


class ThreeEncoders(tokenization.MultiTextEncoder):
    """Both CLIPs' hidden states concatenated and zero-padded to T5's width, then T5's tokens."""

    def __init__(
        self, clips: Sequence[TextEncoderSlot], t5: TextEncoderSlot | None, *, width: int, t5_tokens: int
    ) -> None:
        super().__init__(clips, [t5] if t5 else [])
        self.t5, self.width, self.t5_tokens = t5, width, t5_tokens

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        """Both CLIPs', which tokenise alike, then T5's."""
        clip, t5 = self.slots[0].tokenizer, self.t5.tokenizer if self.t5 else None
        return TextSegment(clip, clip.model_max_length), TextSegment(t5, self.t5_tokens)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 77 + 256, D] (77 + 1 with one zero token), pooled [B, P₁ + P₂]; warns of truncated prompts."""
        outputs = [
            slot.model(tokenization.tokenize(slot, prompts)["input_ids"], output_hidden_states=True)
            for slot in self.slots
        ]
        clip_hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).float()
        clip_hidden = F.pad(clip_hidden, (0, self.width - clip_hidden.shape[-1]))
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1).float()
        if self.t5 is None:
            tokenization.warn_truncation(self.slots[0], prompts)
            t5_hidden = clip_hidden.new_zeros(len(prompts), self.t5_tokens, self.width)
        else:
            tokenization.warn_truncation(self.t5, prompts, T5_TOKENS)
            ids = tokenization.tokenize(self.t5, prompts, T5_TOKENS)["input_ids"]
            t5_hidden = self.t5.model(ids).last_hidden_state.float()
        return {"hidden": torch.cat([clip_hidden, t5_hidden], dim=1), "pooled": pooled}


def has_t5(location: Location) -> bool:
    """Whether the model has T5, the third text encoder."""
    if location.file is not None:
        return checkpoint.has_t5(location)
    return loading.has_part(location, "text_encoder_3")


def count_t5_tokens(location: Location) -> int:
    """The length of T5's segment: 256, or 1 for a missing T5 where the model's images have few tokens."""
    if has_t5(location):
        return T5_TOKENS
    config = location.config("transformer")
    side = int(config["sample_size"]) // int(config["patch_size"])
    return 1 if side * side <= MAX_TOKENS_WITH_BIAS else T5_TOKENS


def use_repeated_zero_token(network: SD3Transformer2DModel) -> None:
    """Make every attention layer of the network count the last text token 256 times."""
    network.set_attn_processor(RepeatedZeroTokenProcessor())


class RepeatedZeroTokenProcessor:
    """Joint attention in which the last text token stands for 256 equal ones: exp(s + ln 256) = 256·exp(s)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Any:
        inputs = joint_attention_inputs_with_repeated_zero(
            attn, hidden_states, encoder_hidden_states, attention_mask
        )
        return inputs.project_output(inputs.attend(inputs.query, inputs.key, inputs.value))


def joint_attention_inputs_with_repeated_zero(
    attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
) -> JointAttentionInputs:
    """`joint_attention_inputs` with the bias of `RepeatedZeroTokenProcessor` on the last text token."""
    inputs = joint_attention_inputs(attn, hidden, encoder_hidden_states, attention_mask)
    if encoder_hidden_states is None:
        return inputs
    bias = inputs.key.new_zeros(1, inputs.key.shape[2])
    bias[:, -1] = math.log(T5_TOKENS)
    return replace(inputs, bias=bias)


def joint_attention_inputs(
    attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: None = None
) -> JointAttentionInputs:
    """One call of an attention layer: image tokens, then text tokens; image alone in a dual block's second layer."""
    assert attention_mask is None
    qkv = joint_attention.project_qkv(attn, hidden)
    image_tokens = hidden.shape[1]
    text = slice(image_tokens, image_tokens)
    if encoder_hidden_states is not None:
        text = slice(image_tokens, image_tokens + encoder_hidden_states.shape[1])
        text_qkv = joint_attention.project_text_qkv(attn, encoder_hidden_states)
        qkv = [torch.cat(pair, dim=2) for pair in zip(qkv, text_qkv, strict=True)]

    def project_output(attended: Tensor) -> Any:
        x = attended.transpose(1, 2).flatten(2)
        image_output, text_output = attn.to_out[1](attn.to_out[0](x[:, :image_tokens])), x[:, text]
        if encoder_hidden_states is None:
            return image_output
        return image_output, text_output if attn.context_pre_only else attn.to_add_out(text_output)

    query, key, value = qkv
    return JointAttentionInputs(query, key, value, text=text, project_output=project_output)
