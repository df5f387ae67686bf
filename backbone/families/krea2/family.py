"""Krea 2: a transformer over one sequence of text and image tokens, twelve layers of Qwen3-VL, a rectified flow.

The prompt is padded inside its template, so the template's end always stands at the same position; the layers are a
dimension of their own, which the network fuses. Latents are Qwen-Image's, packed 2 × 2 into a token. Raw takes
classifier-free guidance; Turbo is distilled to eight steps without, at a shift that does not depend on the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from backbone.cli.few_step import is_called_turbo
from backbone.conditions.conditions import Conditions, Text
from backbone.families.base import (
    AttentionLayout,
    JointAttentionInputs,
    ModelSpec,
    Network,
    NoisePath,
    TextSegment,
    diffusers_spec,
    working_dtype,
)
from backbone.families.components import joint_attention, language_models, loading, noise_paths, tokenization
from backbone.families.components.language_models import LanguageModelEncoder, Reading
from backbone.families.flux.family import latent_image_ids, pack_latents, unpack_latents
from backbone.families.location import Location
from backbone.families.qwen.family import TEMPLATE
from backbone.families.single_file import split_files
from backbone.families.single_file.checkpoint import say_name_leaves_distillation_open
from backbone.families.single_file.split_files import Convert, SplitFileFamily, SplitFiles
from backbone.io.console import UserError
from backbone.io.files import Header

TOKENS, DROPPED, ENDING = 512, 34, 5  # what the network is given, the template's beginning and end
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
TURBO_SHIFT = 1.15  # log of Turbo's shift


def convert_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors by diffusers' names, from the original ones."""
    if "text_fusion.projector.weight" in tensors:
        return tensors
    return cast(dict[str, Tensor], convert_krea2_transformer_checkpoint_to_diffusers(dict(tensors)))


def published_configs(header: Header) -> tuple[str, ...]:
    """Folders of published configs for a transformer's file; says where its name does not tell whether it is Turbo.

    The autoencoder is Qwen-Image's.
    """
    say_name_leaves_distillation_open(header, "turbo|raw|base", "turbo")
    return ("krea2", "qwen-image")


FILES = SplitFiles(
    "Krea 2",
    marks=(
        ("txtfusion.projector.weight", "first.weight"),
        ("text_fusion.projector.weight", "img_in.weight"),
    ),
    encoder="text encoder (Qwen3-VL-4B)",
    published=published_configs,
    convert=convert_to_diffusers,
)


class Krea2(SplitFileFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "Krea 2"
    hub_ids: ClassVar[dict[str, str]] = {"krea2": "krea/Krea-2-Raw", "krea2-turbo": "krea/Krea-2-Turbo"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("Krea2Pipeline",)
    files: ClassVar[SplitFiles] = FILES
    transformer_kind: ClassVar[Any] = Krea2Transformer2DModel
    vae_kind: ClassVar[Any] = AutoencoderKLQwenImage
    convert_vae: ClassVar[Convert | None] = split_files.convert_video_autoencoder
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_gate", "to_out.0", "ff.gate", "ff.up", "ff.down"),
    }

    def licence(self, location: Location) -> str:
        return "Krea 2's published weights are under a licence that large companies have to buy."

    def text_encoder(self, location: Location, dtype: torch.dtype) -> PaddedPromptEncoder:
        from transformers import Qwen3VLModel, Qwen3VLTextModel  # slow to import

        if location.file is not None:
            slot = split_files.load_language_model(Qwen3VLTextModel, Qwen2Tokenizer, location, dtype)
        else:
            slot = language_models.load_language_model(Qwen3VLModel, Qwen2Tokenizer, location, dtype)
        width = int(location.config("transformer")["text_hidden_dim"])
        return PaddedPromptEncoder(slot, layers=read_layer_choice(location), name=location.name, width=width)

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        from transformers import Qwen3VLTextModel

        config = location.config("transformer")
        shape = TOKENS, int(config["num_text_layers"]), int(config["text_hidden_dim"])
        return ModelSpec(
            diffusers_spec(Krea2Transformer2DModel, location, "transformer", dtype),
            diffusers_spec(
                AutoencoderKLQwenImage, location, "vae", loading.autoencoder_dtype(location, dtype)
            ),
            {"text_encoder": language_models.text_spec(Qwen3VLTextModel, location, dtype)},
            {"hidden": shape, "mask": (TOKENS,)},
        )

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 8, "guidance": 1.0} if is_turbo(location) else {"steps": 28, "guidance": 5.5}

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        shift = (lambda tokens, *steps: TURBO_SHIFT) if is_turbo(location) else None
        return noise_paths.flow_path(
            location, size=(height, width), lowest=lambda steps: 1 / steps, shift=shift
        )

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = working_dtype(denoiser)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            _, _, height, width = noisy.shape
            text = conditions.text
            positions = latent_image_ids(height // 2, width // 2).to(noisy.device, torch.float32)
            output = denoiser(
                hidden_states=pack_latents(noisy).to(dtype),
                encoder_hidden_states=text["hidden"].to(dtype),
                timestep=time.expand(len(noisy)) / 1000,
                position_ids=torch.cat([positions.new_zeros(text["hidden"].shape[1], 3), positions]),
                encoder_attention_mask=text["mask"].bool(),
            )
            return unpack_latents(output.sample, height, width)

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        late = joint_attention.later_half_prefixes(
            cast(Any, denoiser).transformer_blocks, "transformer_blocks"
        )
        tokens = conditions.text["hidden"].shape[1]

        def read(
            attn: Any, hidden: Tensor, mask: Tensor | None, rotary: Any, *arguments: Any
        ) -> JointAttentionInputs:
            return joint_attention_inputs(attn, hidden, mask, rotary, text_tokens=tokens)

        return AttentionLayout({Krea2AttnProcessor: read}, max_map_queries=None, detail_layers=late)


class PaddedPromptEncoder(LanguageModelEncoder):
    """Layers of Qwen3-VL; the prompt is padded before the end of its template, and padding takes no position."""

    def __init__(self, slot: Any, *, layers: tuple[int, ...], name: str, width: int) -> None:
        reading = Reading(layers=layers, tokens=TOKENS - ENDING, dropped=DROPPED, stacked=True)
        super().__init__(slot, reading, write=lambda prompt: TEMPLATE[0] + prompt, name=name, width=width)

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        """The prompt's, padded, and the end of the template."""
        return *super().segments, TextSegment(None, ENDING)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, T, layers, D], mask [B, T]; warns of truncated prompts."""
        (slot,), reading = self.slots, self.reading
        length = reading.tokens + reading.dropped
        self.warn_truncation(prompts, length)
        beginning = tokenization.tokenize(slot, [self.write(prompt) for prompt in prompts], length)
        ending = tokenization.tokenize(slot, [TEMPLATE[1]] * len(prompts), padding="longest")
        tokens = {name: torch.cat([beginning[name], ending[name]], dim=1) for name in beginning}
        positions = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        hidden = language_models.read_layers(
            slot.model, reading, tokens, position_ids=positions.expand(3, -1, -1)
        )
        kept = slice(reading.dropped, None)
        return {"hidden": hidden[:, kept], "mask": tokens["attention_mask"][:, kept]}


def read_layer_choice(location: Location) -> tuple[int, ...]:
    """Read which hidden states of the text encoder the network is given."""
    layers = location.index.get("text_encoder_select_layers") or LAYERS
    count = int(location.config("transformer")["num_text_layers"])
    if not isinstance(layers, (list, tuple)) or [type(layer) for layer in layers] != [int] * count:
        raise UserError(
            f"model_index.json of {location.name} is damaged: text_encoder_select_layers are no {count} numbers of "
            "layers. Restore it, or download the model again."
        )
    return tuple(layers)


def is_turbo(location: Location) -> bool:
    """Whether the model was distilled to a few steps; for a file only its name says so."""
    if location.file is not None and "is_distilled" not in location.index:
        return is_called_turbo(location.file.stem)
    return bool(location.index.get("is_distilled"))


def joint_attention_inputs(
    attn: Any, hidden: Tensor, mask: Tensor | None = None, rotary: Any = None, *, text_tokens: int
) -> JointAttentionInputs:
    """One call of an attention layer: text tokens, then image tokens; text alone where nothing is rotated.

    Several queries share a key and a value, and the output is gated.
    """
    query, key, value = (
        layer(hidden).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    query, key = attn.norm_q(query), attn.norm_k(key)
    if rotary is not None:
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
    shared = attn.num_heads // attn.num_kv_heads
    key, value = (x.repeat_interleave(shared, dim=2) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    gate = attn.to_gate(hidden).sigmoid()

    def project_output(attended: Tensor) -> Any:
        return attn.to_out[0](attended.transpose(1, 2).flatten(2) * gate)

    text = slice(0, hidden.shape[1] if rotary is None else text_tokens)
    return JointAttentionInputs(query, key, value, text=text, project_output=project_output, bias=mask)
