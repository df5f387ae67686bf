"""Z-Image: a transformer over one sequence of image and text tokens, Qwen3, a rectified flow.

The network gets 1 − σ and predicts the velocity from noise to image, so its output is negated. Prompts are ragged:
each row has as many tokens as its prompt, filled up to a multiple of 32 by a learned token, as its image is. The base
takes classifier-free guidance; Turbo is distilled to eight steps without.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Model

from backbone.cli.few_step import is_called_turbo
from backbone.conditions.conditions import Conditions
from backbone.families.base import (
    AttentionLayout,
    JointAttentionInputs,
    ModelSpec,
    Network,
    NoisePath,
    diffusers_spec,
    transformers_spec,
    working_dtype,
)
from backbone.families.components import joint_attention, language_models, loading, noise_paths
from backbone.families.components.language_models import LanguageModelEncoder, Reading
from backbone.families.location import Location
from backbone.families.single_file import split_files
from backbone.families.single_file.checkpoint import say_name_leaves_distillation_open
from backbone.families.single_file.split_files import SplitFileFamily, SplitFiles
from backbone.io.files import Header

READING = Reading(layers=(-2,), tokens=512)
PATCH, MULTIPLE = 2, 32  # latents a side of a token; tokens are filled up to a multiple
TURBO_SHIFT = 3.0  # of Turbo's scheduler; the base's is larger


def published_configs(header: Header) -> tuple[str, ...]:
    """Folders of published configs for a transformer's file: by its name it is Turbo or the base."""
    say_name_leaves_distillation_open(header, r"turbo|base|^z[-_ ]?image[-_ ]?([bf]\w+)?$", "turbo")
    return ("z-image-turbo", "z-image") if is_called_turbo(header.path.stem) else ("z-image",)


def convert_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors by diffusers' names; ComfyUI's files hold q, k and v together."""
    if "all_x_embedder.2-1.weight" in tensors:
        return tensors
    return cast(dict[str, Tensor], convert_z_image_transformer_checkpoint_to_diffusers(dict(tensors)))


FILES = SplitFiles(
    "Z-Image",
    marks=(
        ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight", "x_embedder.weight"),
        ("cap_embedder.1.weight", "noise_refiner.0.attention.to_q.weight", "all_x_embedder.2-1.weight"),
    ),
    encoder="text encoder (Qwen3-4B)",
    published=published_configs,
    convert=convert_to_diffusers,
)


class ZImage(SplitFileFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "Z-Image"
    hub_ids: ClassVar[dict[str, str]] = {
        "z-image": "Tongyi-MAI/Z-Image",
        "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo",
    }
    pipeline_classes: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    files: ClassVar[SplitFiles] = FILES
    transformer_kind: ClassVar[Any] = ZImageTransformer2DModel
    vae_kind: ClassVar[Any] = AutoencoderKL
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
            # That of the final layer begins with a SiLU
            *(f"layers.{n}.adaLN_modulation.0" for n in range(30)),
            *(f"noise_refiner.{n}.adaLN_modulation.0" for n in range(2)),
        ),
    }

    def text_encoder(self, location: Location, dtype: torch.dtype) -> LanguageModelEncoder:
        source = language_models if location.file is None else split_files
        slot = source.load_language_model(Qwen3Model, Qwen2Tokenizer, location, dtype)
        write = language_models.chat_writer(
            slot.tokenizer, location, language_models.QWEN, enable_thinking=True
        )
        width = int(location.config("transformer")["cap_feat_dim"])
        return LanguageModelEncoder(slot, READING, write=write, name=location.name, width=width)

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        width = int(location.config("transformer")["cap_feat_dim"])
        return ModelSpec(
            diffusers_spec(ZImageTransformer2DModel, location, "transformer", dtype),
            diffusers_spec(AutoencoderKL, location, "vae", loading.autoencoder_dtype(location, dtype)),
            {"text_encoder": transformers_spec(Qwen3Model, location, "text_encoder", dtype)},
            {"hidden": (READING.tokens, width), "mask": (READING.tokens,)},
        )

    def longest_side(self, location: Location) -> int:
        return PATCH * min(map(int, location.config("transformer")["axes_lens"][1:]))

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        turbo = float(location.config("scheduler").get("shift", TURBO_SHIFT)) <= TURBO_SHIFT
        return {"steps": 8, "guidance": 1.0} if turbo else {"steps": 50, "guidance": 5.0}

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        return noise_paths.flow_path(location, size=(height, width), lowest=lambda steps: 1 / steps)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = working_dtype(denoiser)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            pictures = noisy.to(dtype).unsqueeze(2)  # with one frame
            # Its time is 1 at the clean end, and its velocity x0 − ε
            output = denoiser(
                list(pictures.unbind()),
                (1000 - time.expand(len(noisy))) / 1000,
                language_models.unpad_rows(conditions.text, dtype),
            )
            return -torch.stack(output.sample).squeeze(2)

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        network = cast(Any, denoiser)
        text_alone = {id(block.attention) for block in network.context_refiner}
        read = partial(joint_attention_inputs, text_alone=text_alone, angles=int(network.axes_dims[0]) // 2)
        late = joint_attention.later_half_prefixes(network.layers, "layers")
        return AttentionLayout({ZSingleStreamAttnProcessor: read}, max_map_queries=None, detail_layers=late)


def joint_attention_inputs(
    attn: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Tensor | None = None,
    *,
    text_alone: Collection[int],
    angles: int,
) -> JointAttentionInputs:
    """One call of an attention layer: image tokens and their padding, then text tokens.

    Image tokens share the first of their three coordinates, whose rotary embedding is the first `angles` numbers; the
    layers `text_alone`, by their ids, have no image tokens, and the noise refiner no text.
    """
    assert freqs_cis is not None
    query, key, value = joint_attention.project_qkv(attn, hidden)
    query, key = (rotate(x, freqs_cis) for x in (query, key))
    tokens, image_tokens = hidden.shape[1], 0
    if id(attn) not in text_alone:
        # The image's tokens are those at the beginning that share the first coordinate
        first = freqs_cis[0, :, :angles]
        image_tokens = int((first == first[:1]).all(-1).long().cumprod(0).sum())
    filled = -(-image_tokens // MULTIPLE) * MULTIPLE

    def project_output(attended: Tensor) -> Any:
        x = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return attn.to_out[1](x) if len(attn.to_out) > 1 else x

    return JointAttentionInputs(
        query,
        key,
        value,
        text=slice(filled, tokens),
        project_output=project_output,
        bias=None if attention_mask is None else attention_mask[:, None, None, :],
        padding=filled - image_tokens,
    )


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Heads [B, heads, tokens, D] turned by angles given as complex numbers [B, tokens, D/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary[:, None]).flatten(3).to(x.dtype)
