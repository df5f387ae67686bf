"""Qwen-Image: a joint text-image transformer on packed latents, Qwen2.5-VL, a rectified flow (Wu et al. 2025).

The prompt is read in a template of its own, whose first 34 tokens are dropped. Latents are those of a video's
autoencoder with one frame, normalised by channel; the network packs 2 × 2 of them into a token. Classifier-free
guidance keeps the length that each token's velocity has with the prompt.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level, guide
from backbone.families.base import (
    AttentionLayout,
    JointAttentionInputs,
    ModelSpec,
    Network,
    NoisePath,
    diffusers_spec,
    working_dtype,
)
from backbone.families.components import (
    joint_attention,
    language_models,
    loading,
    noise_paths,
    prompt_lengths,
)
from backbone.families.components.language_models import LanguageModelEncoder, Reading
from backbone.families.flux.family import pack_latents, unpack_latents
from backbone.families.location import Location
from backbone.families.single_file import split_files
from backbone.families.single_file.split_files import Convert, SplitFileFamily, SplitFiles
from backbone.io.console import UserError
from backbone.io.files import Header

READING = Reading(layers=(-1,), tokens=1024, dropped=34)
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
# An empty tensor in ComfyUI's files of the edition of 2511, whose network reads images beside the prompt as clean at
# every step
READS_CLEAN = "__index_timestep_zero__"
OF_LAYERED = "time_text_embed.addition_t_embedding.weight"


def published_configs(header: Header) -> tuple[str, ...]:
    """Folders of published configs for a transformer's file; `UserError` for Qwen-Image-Layered's."""
    if any(name.endswith(OF_LAYERED) for name in header.shapes):
        raise UserError(
            f"{header.path} belongs to Qwen-Image-Layered, which is not supported. Name another model."
        )
    later = reads_clean(header) or (is_editor(header) and "2511" in header.path.stem)
    return ("qwen-image-edit-2511",) * later + ("qwen-image",)


def drop_mark(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors without the one that only marks the edition."""
    return {name: value for name, value in tensors.items() if name != READS_CLEAN}


FILES = SplitFiles(
    "Qwen-Image",
    marks=(("txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"),),
    encoder="text encoder (Qwen2.5-VL-7B)",
    published=published_configs,
    convert=drop_mark,
)


class QwenImage(SplitFileFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "Qwen-Image"
    hub_ids: ClassVar[dict[str, str]] = {"qwen-image": "Qwen/Qwen-Image"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    files: ClassVar[SplitFiles] = FILES
    transformer_kind: ClassVar[Any] = QwenImageTransformer2DModel
    vae_kind: ClassVar[Any] = AutoencoderKLQwenImage
    convert_vae: ClassVar[Convert | None] = split_files.convert_video_autoencoder
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": joint_attention.PROJECTIONS,
        "all": (
            *joint_attention.PROJECTIONS,
            *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
            *("img_mod.1", "txt_mod.1"),
        ),
    }

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return None if is_editor(header) else super().match_checkpoint(header)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> LanguageModelEncoder:
        if location.file is not None:
            slot = split_files.load_language_model(Qwen2_5_VLTextModel, Qwen2Tokenizer, location, dtype)
        else:
            kind = Qwen2_5_VLForConditionalGeneration
            slot = language_models.load_language_model(kind, Qwen2Tokenizer, location, dtype)
        width = int(location.config("transformer")["joint_attention_dim"])
        return LanguageModelEncoder(
            slot, READING, write=lambda prompt: prompt.join(TEMPLATE), name=location.name, width=width
        )

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        width = int(location.config("transformer")["joint_attention_dim"])
        return ModelSpec(
            diffusers_spec(QwenImageTransformer2DModel, location, "transformer", dtype),
            diffusers_spec(
                AutoencoderKLQwenImage, location, "vae", loading.autoencoder_dtype(location, dtype)
            ),
            {"text_encoder": language_models.text_spec(Qwen2_5_VLTextModel, location, dtype)},
            {"hidden": (READING.tokens, width), "mask": (READING.tokens,)},
        )

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 50, "guidance": 4.0}

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        path = noise_paths.flow_path(location, size=(height, width), lowest=lambda steps: 1 / steps)
        return replace(path, guide=guide_keeping_length)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        network = cast(Any, denoiser)
        dtype = working_dtype(denoiser)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            count, _, height, width = noisy.shape
            hidden, mask = prompt_lengths.cut_padding(conditions.text)
            images = (noisy, *conditions.references)
            output = network(
                hidden_states=torch.cat([pack_latents(image) for image in images], 1).to(dtype),
                timestep=time.expand(count) / 1000,
                encoder_hidden_states=hidden.to(dtype),
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, image.shape[-2] // 2, image.shape[-1] // 2) for image in images]] * count,
            )
            prediction = output.sample[:, : height * width // 4]
            return unpack_latents(prediction, height, width)

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        late = joint_attention.later_half_prefixes(
            cast(Any, denoiser).transformer_blocks, "transformer_blocks"
        )
        joint = {QwenDoubleStreamAttnProcessor2_0: joint_attention_inputs}
        return AttentionLayout(joint, max_map_queries=None, detail_layers=late)


def is_editor(header: Header) -> bool:
    """Whether a transformer's file was trained for edits, by its name or by the mark of later editions."""
    by_name = re.search(r"(?<![a-z])edit(?![a-z])", header.path.stem.lower()) is not None
    return by_name or reads_clean(header)


def reads_clean(header: Header) -> bool:
    """Whether a file is marked as reading images beside the prompt as clean ones, as the edition of 2511 does."""
    return any(name.endswith(READS_CLEAN) for name in header.shapes)


def guide_keeping_length(
    conditional: Estimate, unconditional: Estimate, scale: float, level: Level
) -> Estimate:
    """Classifier-free guidance that keeps the length of each token's conditional velocity.

    A token is 2 × 2 latents. With the velocity u = ε − x0 the noisy state is x0 + b·u, which guidance does not change.
    """
    guided = guide(conditional, unconditional, scale)
    unguided, velocity = conditional.noise - conditional.clean, guided.noise - guided.clean

    # ‖u‖ of each token [B, 1, H/2, W/2], before guidance and after
    lengths = [
        F.pixel_unshuffle(u.square().sum(1, keepdim=True), 2).sum(1, keepdim=True).sqrt()
        for u in (unguided, velocity)
    ]

    # u' = ratio·u with x = x0 + b·u unchanged: x0' = x0 − b·(u' − u), ε' = ε + (1 − b)·(u' − u)
    ratio = (lengths[0] / lengths[1]).repeat_interleave(2, -2).repeat_interleave(2, -1)
    change = (ratio - 1) * velocity
    b = level.b.to(change).reshape(-1, *[1] * (change.ndim - 1)) if level.b.ndim else level.b.to(change)
    return Estimate(guided.clean - b * change, guided.noise + (1 - b) * change)


def joint_attention_inputs(
    attn: Any,
    hidden: Tensor,
    *,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> JointAttentionInputs:
    """One call of an attention layer: text tokens, then image tokens, each with its own projections."""
    text_qkv = joint_attention.project_text_qkv(attn, encoder_hidden_states)
    qkv = joint_attention.project_qkv(attn, hidden)
    angles, text_angles = image_rotary_emb
    for parts, freqs in ((text_qkv, text_angles), (qkv, angles)):
        parts[:2] = [
            apply_rotary_emb_qwen(x.transpose(1, 2), freqs, use_real=False).transpose(1, 2) for x in parts[:2]
        ]
    query, key, value = (torch.cat(pair, dim=2) for pair in zip(text_qkv, qkv, strict=True))
    tokens, text_mask = encoder_hidden_states.shape[1], encoder_hidden_states_mask
    bias = None
    if text_mask is not None:
        image = text_mask.new_ones(len(hidden), hidden.shape[1])
        bias = torch.cat([text_mask, image], dim=1)[:, None, None, :]

    def project_output(attended: Tensor) -> Any:
        x = attended.transpose(1, 2).flatten(2)
        text, image = x[:, :tokens].contiguous(), x[:, tokens:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)

    return JointAttentionInputs(
        query, key, value, text=slice(0, tokens), project_output=project_output, bias=bias
    )
