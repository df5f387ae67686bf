"""FLUX.2: a joint text-image transformer on latents of 128 channels, a language model, a rectified flow.

klein reads Qwen3, dev reads Mistral; three hidden layers lie side by side, padding included. Latents are patches of
2 × 2, normalised by the autoencoder's batch norm, so a token is one latent of 16 × 16 pixels. How far the schedule is
shifted depends on the tokens and on the steps. klein's base takes classifier-free guidance, its distilled models none
in four steps, and dev is conditioned on the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor, nn
from transformers import MistralModel, PreTrainedTokenizerFast, Qwen2Tokenizer, Qwen3Model

from backbone.conditions.conditions import Conditions
from backbone.families.base import (
    AttentionLayout,
    ImageInput,
    JointAttentionInputs,
    ModelSpec,
    Network,
    NoisePath,
    diffusers_spec,
    working_dtype,
)
from backbone.families.components import joint_attention, language_models, loading, noise_paths
from backbone.families.components.language_models import LanguageModelEncoder, Reading
from backbone.families.location import Location
from backbone.families.single_file import split_files
from backbone.families.single_file.checkpoint import say_name_leaves_distillation_open
from backbone.families.single_file.split_files import SplitFileFamily, SplitFiles
from backbone.io.console import notify_once
from backbone.io.files import Header

KLEIN = Reading(layers=(9, 18, 27), tokens=512, padded=True)
DEV = Reading(layers=(10, 20, 30), tokens=512, padded=True)
MISTRAL = (f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]", "[/INST]")
QWEN = (language_models.QWEN[0], language_models.QWEN[1] + language_models.NO_THOUGHTS)
SINGLE = ("to_qkv_mlp_proj", *(f"single_transformer_blocks.{n}.attn.to_out" for n in range(48)))
KLEIN_9B, DEV_WIDTH = 4096, 6144  # widths of the transformers under a non-commercial licence
REFERENCE = 10  # how far references lie apart in time
MANY_STEPS = 200  # of a schedule as fine as training's


EMBEDDERS = ("img_in.weight", "x_embedder.weight")


def published_configs(header: Header) -> tuple[str, ...]:
    """Folders of published configs for a transformer's file, by its width."""
    width = next((shape[0] for name, shape in header.shapes.items() if name.endswith(EMBEDDERS)), 0)
    if width != DEV_WIDTH:
        say_name_leaves_distillation_open(header, "klein|base", "klein")
    larger = {KLEIN_9B: ("flux2-klein-9b",), DEV_WIDTH: ("flux2-dev",)}
    return (*larger.get(width, ()), "flux2-klein")


def convert_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors by diffusers' names, from the original ones."""
    if "x_embedder.weight" in tensors:
        return tensors
    return cast(dict[str, Tensor], convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors)))


FILES = SplitFiles(
    "FLUX.2",
    marks=(
        ("double_stream_modulation_img.lin.weight", "img_in.weight"),
        ("double_stream_modulation_img.linear.weight", "x_embedder.weight"),
    ),
    encoder="text encoder (Qwen3, for dev Mistral)",
    published=published_configs,
    convert=convert_to_diffusers,
)


class Flux2(SplitFileFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "FLUX.2"
    hub_ids: ClassVar[dict[str, str]] = {
        "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
        "flux2-klein-distilled": "black-forest-labs/FLUX.2-klein-4B",
        "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
        "flux2-dev": "black-forest-labs/FLUX.2-dev",
    }
    pipeline_classes: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline", "Flux2Pipeline")
    reads_images: ClassVar[Mapping[str, ImageInput]] = {
        "Flux2KleinPipeline": ImageInput(4),
        "Flux2Pipeline": ImageInput(6),
    }  # as published
    files: ClassVar[SplitFiles] = FILES
    transformer_kind: ClassVar[Any] = Flux2Transformer2DModel
    vae_kind: ClassVar[Any] = AutoencoderKLFlux2
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": (*joint_attention.PROJECTIONS, *SINGLE),
        "all": (
            *(*joint_attention.PROJECTIONS, *SINGLE),
            *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        ),
    }

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        network = super().denoiser(location, dtype)
        cast(Any, network).is_distilled = is_distilled(location)
        return network

    def licence(self, location: Location) -> str:
        config = location.config("transformer")
        heads, width = (int(config.get(name, 0)) for name in ("num_attention_heads", "attention_head_dim"))
        size = {KLEIN_9B: "klein 9B", DEV_WIDTH: "dev"}.get(heads * width)
        return (
            f"FLUX.2 {size}'s published weights are under a licence for non-commercial use." if size else ""
        )

    def text_encoder(self, location: Location, dtype: torch.dtype) -> LanguageModelEncoder:
        source = language_models if location.file is None else split_files
        width = int(location.config("transformer")["joint_attention_dim"])
        if has_guidance_embedding(location):
            kind: Any = MistralModel
            if location.file is None:
                from transformers import Mistral3ForConditionalGeneration  # slow to import

                kind = Mistral3ForConditionalGeneration
            slot = source.load_language_model(kind, PreTrainedTokenizerFast, location, dtype)
            chat = language_models.chat_writer(slot.tokenizer, location, MISTRAL, system=SYSTEM_MESSAGE)
            return LanguageModelEncoder(
                slot,
                DEV,
                write=lambda prompt: chat(prompt.replace("[IMG]", "")),
                name=location.name,
                width=width,
            )
        slot = source.load_language_model(Qwen3Model, Qwen2Tokenizer, location, dtype)
        write = language_models.chat_writer(slot.tokenizer, location, QWEN, enable_thinking=False)
        return LanguageModelEncoder(slot, KLEIN, write=write, name=location.name, width=width)

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        width = int(location.config("transformer")["joint_attention_dim"])
        text_kind = MistralModel if has_guidance_embedding(location) else Qwen3Model
        return ModelSpec(
            diffusers_spec(Flux2Transformer2DModel, location, "transformer", dtype),
            diffusers_spec(AutoencoderKLFlux2, location, "vae", loading.autoencoder_dtype(location, dtype)),
            {"text_encoder": language_models.text_spec(text_kind, location, dtype)},
            {"hidden": (KLEIN.tokens, width)},
        )

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 4, "guidance": 1.0} if is_distilled(location) else {"steps": 50, "guidance": 4.0}

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        return noise_paths.flow_path(
            location, size=(height, width), patch=1, lowest=lambda steps: 1 / steps, shift=empirical_shift
        )

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        network = cast(Any, denoiser)
        dtype = working_dtype(denoiser)
        takes_guidance = network.config.guidance_embeds

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            count, _, height, width = noisy.shape
            hidden = conditions.text["hidden"].to(dtype)
            guidance = conditions.guidance
            if guidance is None:
                guidance = noisy.new_ones(count)
            images = (noisy, *conditions.references)
            ids = [
                image_ids(image.shape[-2], image.shape[-1], REFERENCE * number)
                for number, image in enumerate(images)
            ]
            output = network(
                hidden_states=torch.cat([image.flatten(2).transpose(1, 2) for image in images], 1).to(dtype),
                timestep=time.expand(count) / 1000,
                guidance=guidance.to(noisy.device) if takes_guidance else None,
                encoder_hidden_states=hidden,
                txt_ids=text_ids(hidden.shape[1]).to(noisy.device),
                img_ids=torch.cat(ids).to(noisy.device),
            )
            prediction = output.sample[:, : height * width]
            return cast(Tensor, prediction.transpose(1, 2).unflatten(2, (height, width)))

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        tokens = conditions.text["hidden"].shape[1]
        readers = {
            Flux2AttnProcessor: partial(joint_attention_inputs, text_tokens=tokens),
            Flux2ParallelSelfAttnProcessor: partial(parallel_attention_inputs, text_tokens=tokens),
        }
        return AttentionLayout(readers, max_map_queries=None, detail_layers=("single_transformer_blocks.",))

    def embed_guidance(
        self, denoiser: nn.Module, conditions: Conditions, guidance: float
    ) -> Conditions | None:
        if not cast(Any, denoiser).config.guidance_embeds:
            if not getattr(denoiser, "is_distilled", False):
                return None
            if guidance != 1:
                notify_once(
                    f"This FLUX.2 is distilled to few steps without guidance: {guidance:g} has no effect."
                )
            return conditions
        scale = conditions.text["hidden"].new_full((len(conditions),), guidance)
        return replace(conditions, guidance=scale)


def has_guidance_embedding(location: Location) -> bool:
    """Whether the network is conditioned on the guidance scale, as dev is and klein is not."""
    return bool(location.config("transformer").get("guidance_embeds", True))


def is_distilled(location: Location) -> bool:
    """Whether the model was distilled to a few steps without guidance: a file says so by its name alone."""
    if location.file is not None and "is_distilled" not in location.index:
        name = location.file.stem.lower()
        return "klein" in name and "base" not in name
    return bool(location.index.get("is_distilled"))


def empirical_shift(tokens: int, steps: int = MANY_STEPS) -> float:
    """log of the shift for this many image tokens and steps, as Black Forest Labs fitted it.

    Linear in the tokens for 10 and for 200 steps, and in the steps between them; beyond 4300 tokens as for 200.
    """
    for_10, for_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return for_200
    slope = (for_200 - for_10) / 190.0
    return slope * steps + (for_200 - 200.0 * slope)


def joint_attention_inputs(
    attn: Any,
    hidden: Tensor,
    text_hidden: Tensor,
    mask: None = None,
    rotary: Any = None,
    *,
    text_tokens: int,
) -> JointAttentionInputs:
    """One call of a double block's attention: text tokens, then image tokens, each with its own projections."""
    assert mask is None
    text_qkv, qkv = (
        joint_attention.project_text_qkv(attn, text_hidden),
        joint_attention.project_qkv(attn, hidden),
    )
    query, key, value = (torch.cat(pair, dim=2) for pair in zip(text_qkv, qkv, strict=True))
    query, key = (apply_rotary_emb(x, rotary) for x in (query, key))

    def project_output(attended: Tensor) -> Any:
        x = attended.transpose(1, 2).flatten(2)
        text, image = x[:, :text_tokens].contiguous(), x[:, text_tokens:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)

    return JointAttentionInputs(query, key, value, text=slice(0, text_tokens), project_output=project_output)


def parallel_attention_inputs(
    attn: Any, hidden: Tensor, mask: None = None, rotary: Any = None, *, text_tokens: int
) -> JointAttentionInputs:
    """One call of a single block's layer, which computes attention and the feed-forward part side by side."""
    assert mask is None
    inner = 3 * attn.inner_dim
    qkv, mlp = attn.to_qkv_mlp_proj(hidden).tensor_split([inner], dim=-1)
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    query, key = (apply_rotary_emb(norm(x), rotary) for norm, x in ((attn.norm_q, query), (attn.norm_k, key)))

    def project_output(attended: Tensor) -> Any:
        x = attended.transpose(1, 2).flatten(2)
        return attn.to_out(torch.cat([x, attn.mlp_act_fn(mlp)], dim=-1))

    return JointAttentionInputs(query, key, value, text=slice(0, text_tokens), project_output=project_output)


def image_ids(rows: int, columns: int, time: int = 0) -> Tensor:
    """The rotary position of each latent [rows · columns, 4]: its image's time, its row, its column, 0.

    The noisy image is at time 0, the first reference at REFERENCE, the next at twice that …
    """
    return torch.cartesian_prod(
        torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.arange(1)
    )


def text_ids(tokens: int) -> Tensor:
    """The rotary position of each text token [tokens, 4]: 0, 0, 0, its number."""
    return F.pad(torch.arange(tokens)[:, None], (3, 0))
