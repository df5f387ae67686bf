"""Chroma: FLUX.1's transformer with T5 alone, whose modulation one small network computes for all blocks.

T5 is told which tokens are padding, and the network attends to the prompt's tokens and one token of padding after
them. Latents are FLUX.1's, and so is the schedule; guidance takes a second call. diffusers' pipeline adds its mask to
the attention's logits as the numbers 0 and 1, which leaves nothing out; here padding is left out, as in the code that
the weights were published with.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn
from transformers import T5EncoderModel

from backbone.conditions.conditions import Conditions, Text
from backbone.diffusion.transfer import send
from backbone.families.base import (
    AttentionLayout,
    JointAttentionInputs,
    ModelSpec,
    Network,
    NoisePath,
    TextSegment,
    diffusers_spec,
    transformers_spec,
    working_dtype,
)
from backbone.families.components import loading, prompt_lengths, tokenization
from backbone.families.components.prompt_lengths import PromptLengths
from backbone.families.flux import family as flux
from backbone.families.flux.checkpoint import convert_to_diffusers as convert_flux
from backbone.families.flux.original import CHROMA
from backbone.families.location import Location
from backbone.families.single_file import split_files
from backbone.families.single_file.split_files import SplitFileFamily, SplitFiles

TOKENS = 512
MARK = "distilled_guidance_layer.in_proj.weight"  # in the original names and in diffusers'
# diffusers warns of its own import whenever it builds this transformer
warnings.filterwarnings("ignore", message=".*FluxPosEmbed.*", category=FutureWarning)


def convert_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors by diffusers' names, from the original ones, which are FLUX.1's."""
    if "x_embedder.weight" in tensors:
        return tensors
    converted = convert_flux(tensors, CHROMA)
    return {re.sub(r"(norms\.\d+)\.scale$", r"\1.weight", name): value for name, value in converted.items()}


FILES = SplitFiles(
    "Chroma",
    marks=((MARK, "img_in.weight"), (MARK, "x_embedder.weight")),
    encoder="text encoder (T5-XXL)",
    published=lambda header: ("chroma", "flux"),
    convert=convert_to_diffusers,
)


class Chroma(SplitFileFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "Chroma"
    hub_ids: ClassVar[dict[str, str]] = {"chroma": "lodestones/Chroma1-HD"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("ChromaPipeline",)
    files: ClassVar[SplitFiles] = FILES
    transformer_kind: ClassVar[Any] = ChromaTransformer2DModel
    vae_kind: ClassVar[Any] = AutoencoderKL
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = flux.Flux.lora_targets

    def text_encoder(self, location: Location, dtype: torch.dtype) -> MaskedT5:
        load = loading.load_t5 if location.file is None else split_files.load_t5
        return MaskedT5([load(location, "", dtype)])

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        width = int(location.config("transformer")["joint_attention_dim"])
        return ModelSpec(
            diffusers_spec(ChromaTransformer2DModel, location, "transformer", dtype),
            diffusers_spec(AutoencoderKL, location, "vae", loading.autoencoder_dtype(location, dtype)),
            {"text_encoder": transformers_spec(T5EncoderModel, location, "text_encoder", dtype)},
            {"hidden": (TOKENS, width), "mask": (TOKENS,)},
        )

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 35, "guidance": 5.0}

    def path(self, location: Location) -> NoisePath:
        return flux.Flux().path(location)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        network = cast(Any, denoiser)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            hidden, mask = prompt_lengths.cut_padding(conditions.text)
            time = time.expand(len(noisy))
            checkpointing = network.gradient_checkpointing and torch.is_grad_enabled()
            if mask is None or not checkpointing:
                return call(network, noisy, time, hidden, mask)
            # diffusers calls checkpointed single blocks without the mask, so each prompt is cut to its own tokens
            rows = [hidden[row : row + 1, : int(mask[row].sum())] for row in range(len(noisy))]
            parts = [
                call(network, noisy[n : n + 1], time[n : n + 1], row, None) for n, row in enumerate(rows)
            ]
            return torch.cat(parts)

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        read = partial(joint_attention_inputs, lengths=PromptLengths.of(conditions.text["mask"]))
        return AttentionLayout(
            {FluxAttnProcessor: read}, max_map_queries=None, detail_layers=("single_transformer_blocks.",)
        )


class MaskedT5(tokenization.MultiTextEncoder):
    """T5's last hidden states at 512 positions; the mask includes one token of padding after the prompt."""

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        return (TextSegment(self.tokenizer, TOKENS),)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 512, D], mask [B, 512]; warns of truncated prompts."""
        (slot,) = self.slots
        tokenization.warn_truncation(slot, prompts, TOKENS)
        tokens = tokenization.tokenize(slot, prompts, TOKENS)
        hidden = slot.model(**tokens).last_hidden_state.float()
        positions = torch.arange(TOKENS, device=hidden.device)
        return {"hidden": hidden, "mask": (positions <= tokens["attention_mask"].sum(1, keepdim=True)).long()}


def call(network: Any, noisy: Tensor, time: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The network's velocity [B, C, H, W] at times [B] with text [B, T, D] and its mask [B, T]."""
    _, _, height, width = noisy.shape
    dtype = working_dtype(network)
    latents = flux.pack_latents(noisy)
    joint_mask = None if mask is None else torch.cat([mask, mask.new_ones(latents.shape[:2])], dim=1)
    output = network(
        hidden_states=latents.to(dtype),
        timestep=time / 1000,
        encoder_hidden_states=hidden.to(dtype),
        txt_ids=torch.zeros(hidden.shape[1], 3, dtype=dtype, device=noisy.device),
        img_ids=send(flux.latent_image_ids(height // 2, width // 2).to(dtype), noisy.device),
        attention_mask=joint_mask,
    )
    return flux.unpack_latents(output.sample, height, width)


def joint_attention_inputs(
    attn: Any,
    hidden: Tensor,
    text_hidden: Tensor | None = None,
    mask: Tensor | None = None,
    rotary: Any = None,
    *,
    lengths: PromptLengths,
) -> JointAttentionInputs:
    """One call of an attention layer, as FLUX.1's; padding is not a key (`mask` [B, 1, tokens, tokens])."""
    tokens, _ = lengths.count_tokens()
    inputs = flux.joint_attention_inputs(attn, hidden, text_hidden, None, rotary, text_tokens=tokens)
    return inputs if mask is None else replace(inputs, bias=mask[:, :, -1:])  # the keys of an image token
