"""FLUX.1: a joint text-image transformer on packed latents, CLIP and T5, a rectified flow.

The published weights are guidance-distilled and need no second call without a prompt: dev takes the guidance scale as
an input (Meng et al. 2023), schnell has a fixed one. Latents are [B, 16, H, W] everywhere else; the network packs
2 × 2 of them into a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from backbone.conditions.conditions import Conditions, Text
from backbone.conditions.control import ControlNetwork
from backbone.diffusion.transfer import send
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
from backbone.families.flux import checkpoint, control
from backbone.families.location import Location
from backbone.families.single_file import text_encoders
from backbone.io.console import notify_once
from backbone.io.files import Header

T5_TOKENS, T5_TOKENS_SCHNELL = 512, 256
TRAINING_GUIDANCE = 1.0  # the input of a guidance embedding where no guidance is given


class Flux:
    """Implements `Family`."""

    name: ClassVar[str] = "FLUX.1"
    hub_ids: ClassVar[dict[str, str]] = {
        "flux": "black-forest-labs/FLUX.1-dev",
        "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    }
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxKontextPipeline")
    reads_images: ClassVar[Mapping[str, ImageInput]] = {"FluxKontextPipeline": ImageInput(1)}
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": joint_attention.PROJECTIONS,
        "all": (
            *joint_attention.PROJECTIONS,
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            "proj_mlp",
            *(f"single_transformer_blocks.{n}.proj_out" for n in range(38)),  # but not the final `proj_out`
        ),
    }

    control_classes: ClassVar[tuple[Any, ...]] = (FluxControlNetModel,)

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return checkpoint.match_checkpoint(header)

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        return refuse_beside(header, other_files)

    def licence(self, location: Location) -> str:
        free = not has_guidance_embedding(location)  # schnell
        return "" if free else "FLUX.1-dev's published weights are under a licence for non-commercial use."

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            return checkpoint.load_transformer(location, dtype)
        return loading.load_network(FluxTransformer2DModel, location, "transformer", dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            return text_encoders.load_autoencoder(location, dtype)
        return loading.load_autoencoder(AutoencoderKL, location, dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> ClipAndT5:
        if location.file is not None:
            clip, t5 = checkpoint.load_clip_l(location), text_encoders.load_t5(location, "_2", dtype)
        else:
            clip, t5 = loading.load_clip(CLIPTextModel, location), loading.load_t5(location, "_2", dtype)
        return ClipAndT5(
            clip, t5, tokens=T5_TOKENS if has_guidance_embedding(location) else T5_TOKENS_SCHNELL
        )

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        config = location.config("transformer")
        tokens = T5_TOKENS if has_guidance_embedding(location) else T5_TOKENS_SCHNELL
        return ModelSpec(
            diffusers_spec(FluxTransformer2DModel, location, "transformer", dtype),
            diffusers_spec(AutoencoderKL, location, "vae", loading.autoencoder_dtype(location, dtype)),
            {
                "text_encoder": transformers_spec(CLIPTextModel, location, "text_encoder"),
                "text_encoder_2": transformers_spec(T5EncoderModel, location, "text_encoder_2", dtype),
            },
            {
                "hidden": (tokens, int(config["joint_attention_dim"])),
                "pooled": (int(config["pooled_projection_dim"]),),
            },
        )

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        config = location.config("vae")
        side = int(config.get("sample_size", 1024)) // 2 ** (len(config["block_out_channels"]) - 1)
        return int(config["latent_channels"]), side, side

    def longest_side(self, location: Location) -> None:
        return None

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        dev, schnell = {"steps": 28, "guidance": 3.5}, {"steps": 4, "guidance": 1.0}
        return dev if has_guidance_embedding(location) else schnell

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        return noise_paths.flow_path(location, size=(height, width), lowest=lambda steps: 1 / steps)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        network = cast(Any, denoiser)
        dtype = working_dtype(denoiser)
        takes_guidance = network.config.guidance_embeds

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            count, _, height, width = noisy.shape
            guidance = conditions.guidance
            if guidance is None:
                guidance = noisy.new_full((count,), TRAINING_GUIDANCE)

            # [B, C, H, W] → [B, H/2·W/2, 4·C]: the noisy image's tokens, then the reference images', told apart by ids
            images = (noisy, *conditions.references)
            tokens = [pack_latents(image) for image in images]
            ids = [
                latent_image_ids(image.shape[-2] // 2, image.shape[-1] // 2, number)
                for number, image in enumerate(images)
            ]
            words = conditions.text["hidden"].shape[1]
            inputs: dict[str, Any] = {
                "hidden_states": torch.cat(tokens, 1).to(dtype),
                "timestep": time.expand(count) / 1000,
                "guidance": guidance.to(noisy.device),
                "encoder_hidden_states": conditions.text["hidden"].to(dtype),
                "pooled_projections": conditions.text["pooled"].to(dtype),
                "txt_ids": torch.zeros(words, 3, dtype=dtype, device=noisy.device),
                "img_ids": send(torch.cat(ids).to(dtype), noisy.device),
            }
            added = sum_residuals(conditions.controls, inputs, dtype)
            if not takes_guidance:
                inputs["guidance"] = None

            # The prediction is of the noisy image's tokens alone
            output = network(**inputs, **added).sample[:, : tokens[0].shape[1]]
            return unpack_latents(output, height, width)

        return predict

    def control_network(
        self, module: nn.Module, denoiser: nn.Module, encode: Callable[..., Tensor]
    ) -> ControlNetwork:
        return control.control_network(
            module, denoiser, lambda pictures, **options: pack_latents(encode(pictures, **options))
        )

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        read = partial(joint_attention_inputs, text_tokens=conditions.text["hidden"].shape[1])
        return AttentionLayout(
            {FluxAttnProcessor: read}, max_map_queries=None, detail_layers=("single_transformer_blocks.",)
        )

    def embed_guidance(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> Conditions:
        if not cast(Any, denoiser).config.guidance_embeds:
            if guidance != 1:
                notify_once(f"This FLUX.1 reads no guidance, as schnell: {guidance:g} has no effect.")
            return conditions
        scale = conditions.text["pooled"].new_full((len(conditions),), guidance)
        return replace(conditions, guidance=scale)


class ClipAndT5(tokenization.MultiTextEncoder):
    """T5's hidden states and CLIP's pooled output.

    Only CLIP learns tokens or carries an adapter, as diffusers loads them.
    """

    def __init__(self, clip: TextEncoderSlot, t5: TextEncoderSlot, *, tokens: int) -> None:
        super().__init__([clip], [t5])
        self.t5, self.tokens = t5, tokens

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        """T5's alone: CLIP enters through its pooled output."""
        return (TextSegment(self.t5.tokenizer, self.tokens),)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, T, D], pooled [B, P]; warns of what T5 truncates."""
        tokenization.warn_truncation(self.t5, prompts, self.tokens)
        (clip,) = self.slots
        ids = tokenization.tokenize(self.t5, prompts, self.tokens)["input_ids"]
        return {
            "hidden": self.t5.model(ids).last_hidden_state.float(),
            "pooled": clip.model(tokenization.tokenize(clip, prompts)["input_ids"]).pooler_output.float(),
        }


def has_guidance_embedding(location: Location) -> bool:
    """Whether the network takes a guidance scale, as dev does and schnell does not."""
    return bool(location.config("transformer").get("guidance_embeds"))


def joint_attention_inputs(
    attn: Any,
    hidden: Tensor,
    text_hidden: Tensor | None = None,
    mask: None = None,
    rotary: Any = None,
    *,
    text_tokens: int,
) -> JointAttentionInputs:
    """One call of an attention layer: text tokens, then image tokens, with rotary embeddings applied.

    In a double block `hidden` holds the image tokens and `text_hidden` the text's, each with its own projections. In a
    single block `hidden` is the concatenated sequence, its first `text_tokens` the text's.
    """
    assert mask is None
    qkv = joint_attention.project_qkv(attn, hidden)
    if text_hidden is not None:
        text_qkv = joint_attention.project_text_qkv(attn, text_hidden)
        qkv = [torch.cat(pair, dim=2) for pair in zip(text_qkv, qkv, strict=True)]
    query, key, value = qkv
    query, key = (apply_rotary_emb(x, rotary) for x in (query, key))

    def project_output(attended: Tensor) -> Any:
        x = attended.transpose(1, 2).flatten(2)
        if text_hidden is None:  # a single block projects after its attention
            return x
        text, image = x[:, :text_tokens].contiguous(), x[:, text_tokens:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)

    return JointAttentionInputs(query, key, value, text=slice(0, text_tokens), project_output=project_output)


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, H, W] → tokens [B, H/2 · W/2, 4C]; H and W are even."""
    count, channels, height, width = latents.shape
    blocks = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, H/2 · W/2, 4C] → latents [B, C, H, W], as `pack_latents` had them."""
    blocks = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def latent_image_ids(rows: int, columns: int, number: int = 0) -> Tensor:
    """The rotary position of each token [rows · columns, 3]: its image's number, its row, its column.

    The noisy image is number 0; references count from 1 (FLUX.1 Kontext, Labs et al. 2025, section 3).
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(row, number), row, column], dim=-1).reshape(-1, 3)
