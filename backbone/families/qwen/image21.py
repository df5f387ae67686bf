"""Qwen-Image 2.1: one sequence of text and image tokens, read causally, Qwen3-VL, latents of 64 channels.

The text tokens stand first and see only what is before them; modulated as at time 0, they do not depend on
the noise level. A token of the image is one latent of 16 × 16 pixels. The prompt is read in a template of its own, and
the network is given the language model's last layer before its norm. Images beside a prompt stand within the template:
the language model sees them there, and the network has their latents at those positions. Pictures have a fourth
channel, their opacity. The published weights are sampled without guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_qwen_image21_transformer_checkpoint_to_diffusers,
)
from diffusers.models.transformers import transformer_qwenimage21
from PIL.Image import Image
from torch import Tensor, nn
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from backbone.conditions.conditions import Conditions, Text
from backbone.families.base import (
    AttentionLayout,
    ImageInput,
    ModelSpec,
    Network,
    NoisePath,
    TextEncoderSlot,
    diffusers_spec,
    transformers_spec,
    working_dtype,
)
from backbone.families.components import (
    joint_attention,
    language_models,
    loading,
    noise_paths,
    prompt_lengths,
    tokenization,
)
from backbone.families.components.language_models import LanguageModelEncoder, Reading
from backbone.families.location import Location
from backbone.families.qwen import seeing
from backbone.families.qwen.causal import CausalAttention
from backbone.families.single_file import split_files
from backbone.families.single_file.split_files import SplitFileFamily, SplitFiles
from backbone.io.console import UserError, notify_once
from backbone.io.files import read_header

TOKENS = 1024
MOST_IMAGES = 4  # diffusers' pipeline takes any number
SLOT = 4  # latents at one position of the language model's sequence
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
FRAME = (f"{SYSTEM}<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
IMAGE_PREFIX = "<image{}><|vision_start|>{}<|vision_end|>"
MEAN = STD = [0.5, 0.5, 0.5]  # of the pixels, as the published processor has them
MARKS = ("txt_in.text_norm.weight", "modulation.1.weight", "img_in.weight")


def convert_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors by diffusers' names: ComfyUI joins each gate and what it multiplies."""
    return dict(convert_qwen_image21_transformer_checkpoint_to_diffusers(dict(tensors)))


FILES = SplitFiles(
    "Qwen-Image 2.1",
    marks=(MARKS,),
    encoder="text encoder (Qwen3-VL-8B)",
    published=lambda header: ("qwen-image-2.1",),
    convert=convert_to_diffusers,
)

choose_rows = transformer_qwenimage21._select_modulation_rows


def choose_rows_anywhere(params: Tensor, image: Tensor | None) -> Tensor:
    """`choose_rows` with a mask that may lie on another device, as while memory is counted on `meta`."""
    return cast(Tensor, choose_rows(params, None if image is None else image.to(params.device)))


transformer_qwenimage21._select_modulation_rows = choose_rows_anywhere


class QwenImage21(SplitFileFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "Qwen-Image 2.1"
    hub_ids: ClassVar[dict[str, str]] = {"qwen-image-2.1": "Qwen/Qwen-Image-2.1"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImage21Pipeline",)
    files: ClassVar[SplitFiles] = FILES
    transformer_kind: ClassVar[Any] = QwenImage21Transformer2DModel
    vae_kind: ClassVar[Any] = AutoencoderKLQwenImage21
    reads_images: ClassVar[Mapping[str, ImageInput]] = {
        "QwenImage21Pipeline": ImageInput(MOST_IMAGES, text_sees=True)
    }
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
        ),
    }

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.index.get("sample_sigmas"):
            notify_once(
                f"{location.name} names sample_sigmas of its own, which are not used: the levels are those of --steps."
            )
        return read_causally(super().denoiser(location, dtype))

    def licence(self, location: Location) -> str:
        return "Qwen-Image 2.1's published weights are under a licence for research, not for commercial use."

    def text_encoder(self, location: Location, dtype: torch.dtype) -> PreNormEncoder:
        from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel  # slow to import

        if location.file is None:
            kind = Qwen3VLForConditionalGeneration
            tokenizer = loading.load_pretrained(Qwen2Tokenizer, location, "processor")
            model = loading.load_pretrained(kind, location, "text_encoder", dtype=dtype).model
            processor = loading.load_pretrained(Qwen2VLImageProcessorPil, location, "processor")
        else:
            tokenizer = split_files.load_tokenizer(Qwen2Tokenizer, location)
            model = load_from_file(Qwen3VLModel, location, dtype)
            vision = location.config("text_encoder").get("vision_config", {})
            processor = Qwen2VLImageProcessorPil(
                image_mean=MEAN, image_std=STD, patch_size=vision.get("patch_size", 16)
            )
        slot = TextEncoderSlot("text_encoder", tokenizer, getattr(model, "language_model", model))
        width = int(location.config("transformer")["context_in_dim"])
        return PreNormEncoder(slot, model, processor, name=location.name, width=width)

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        from transformers import Qwen3VLModel

        width = int(location.config("transformer")["context_in_dim"])
        vae_dtype = loading.autoencoder_dtype(location, dtype)
        network = diffusers_spec(QwenImage21Transformer2DModel, location, "transformer", dtype)
        return ModelSpec(
            replace(network, build=lambda: read_causally(network.build())),
            diffusers_spec(AutoencoderKLQwenImage21, location, "vae", vae_dtype),
            {"text_encoder": transformers_spec(Qwen3VLModel, location, "text_encoder", dtype)},
            {"hidden": (TOKENS, width), "mask": (TOKENS,), "images": (MOST_IMAGES,)},
        )

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 40, "guidance": 1.0}

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        return noise_paths.flow_path(location, size=(height, width), patch=1, lowest=lambda steps: 1 / steps)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        network = cast(Any, denoiser)
        dtype = working_dtype(network)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            count, _, height, width = noisy.shape
            hidden, mask, slots = insert_references(conditions, height * width)
            images = (*conditions.references, noisy)
            output = network(
                hidden_states=torch.cat([image.flatten(2).transpose(1, 2) for image in images], 1).to(dtype),
                timestep=time.expand(count) / 1000,
                encoder_hidden_states=hidden.to(dtype),
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, *map(int, image.shape[-2:])) for image in images]] * count,
                img_mask=slots if noisy.is_meta else slots.to(noisy.device),
            )
            prediction = output.sample[:, -height * width :]
            return cast(Tensor, prediction.transpose(1, 2).unflatten(2, (height, width)))

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        blocks = cast(Any, denoiser).transformer_blocks
        late = joint_attention.later_half_prefixes(blocks, "transformer_blocks")
        read = CausalAttention(first_frequencies(denoiser)).read
        return AttentionLayout({CausalAttention: read}, max_map_queries=None, detail_layers=late)


def read_causally(denoiser: nn.Module) -> nn.Module:
    """Give a network `CausalAttention`, which keeps no masks; returns the network."""
    cast(Any, denoiser).set_attn_processor(CausalAttention(first_frequencies(denoiser)))
    return denoiser


def first_frequencies(denoiser: nn.Module) -> Tensor:
    """The rotary angle of one step in a position's first coordinate, for each pair of features."""
    embedding = cast(Any, denoiser).pos_embed
    rotations: Tensor = embedding.rope_params(torch.ones(1), embedding.axes_dim[0], embedding.theta)
    return rotations[0].angle()


def insert_references(conditions: Conditions, image_tokens: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """The text with empty tokens for the references within it, and which positions of the sequence are images'.

    hidden [B, T, D], mask [B, T] or None as of `cut_padding`, and slots [B, T + image_tokens / SLOT], in CPU memory.
    """
    hidden, mask = prompt_lengths.cut_padding(conditions.text)
    count, width = len(hidden), hidden.shape[2]
    positions = find_image_positions(conditions)

    # Text up to an image, as many empty tokens as the image has, and so on; at last the noisy image
    parts, masks, slots, start = [], [], [], 0
    for image, position in zip(conditions.references, positions, strict=False):
        tokens = image[0, 0].numel() // SLOT
        parts += [hidden[:, start:position], hidden.new_zeros(count, tokens, width)]
        masks += [] if mask is None else [mask[:, start:position], mask.new_ones(count, tokens)]
        slots += [torch.zeros(position - start, dtype=torch.bool), torch.ones(tokens, dtype=torch.bool)]
        start = position
    parts.append(hidden[:, start:])
    slots += [
        torch.zeros(hidden.shape[1] - start, dtype=torch.bool),
        torch.ones(image_tokens // SLOT, dtype=torch.bool),
    ]
    joined = None if mask is None else torch.cat([*masks, mask[:, start:]], 1)
    return torch.cat(parts, 1), joined, torch.cat(slots).expand(count, -1)


def find_image_positions(conditions: Conditions) -> list[int]:
    """How many words of the text stand before each reference, the same in every row; on `meta` 0."""
    if not conditions.references:
        return []
    positions = conditions.text["images"][0]
    return [0] * len(positions) if positions.is_meta else [int(position) for position in positions.tolist()]


def load_from_file(kind: Any, location: Location, dtype: torch.dtype) -> Any:
    """Load Qwen3-VL from a file, or its language model alone where the file has no vision tower."""
    from transformers import Qwen3VLTextModel

    names = read_header(location.find_file("text_encoder")).shapes
    if any("visual." in name for name in names):
        return split_files.load_text_model(kind, location, dtype, part_name=seeing.name_part)
    return split_files.load_text_model(Qwen3VLTextModel, location, dtype)


class PreNormEncoder(LanguageModelEncoder):
    """Implements `SeeingTextEncoder`: the last layer of Qwen3-VL before its norm; an empty prompt is a space."""

    def __init__(self, slot: TextEncoderSlot, model: Any, processor: Any, *, name: str, width: int) -> None:
        """`slot` is the language model within the whole `model`; `processor` makes patches of images."""
        dropped = len(slot.tokenizer(SYSTEM, add_special_tokens=False)["input_ids"])
        reading = Reading(layers=(-1,), tokens=TOKENS, dropped=dropped)
        super().__init__(
            slot, reading, write=lambda prompt: (prompt or " ").join(FRAME), name=name, width=width
        )
        self.model, self.processor, self.name = model.eval().requires_grad_(False), processor, name

    def to(self, device: torch.device) -> Any:
        self.model.to(device)
        return self

    def __call__(self, prompts: Sequence[str], images: Sequence[Image] = ()) -> Text:
        """hidden [B, 1024, D], mask [B, 1024], and how many words stand before each image [B, 4].

        Warns of truncated prompts.
        """
        norm: Any = self.slots[0].model.norm
        handle = norm.register_forward_hook(lambda module, inputs, output: inputs[0])
        try:
            text = self.encode_with_images(prompts, images) if images else super().__call__(prompts)
        finally:
            handle.remove()
        positions = text.pop("images", text["mask"].new_zeros(len(prompts), 0))
        return {**text, "images": F.pad(positions, (0, MOST_IMAGES - positions.shape[1]))}

    def encode_with_images(self, prompts: Sequence[str], images: Sequence[Image]) -> Text:
        """hidden and mask of prompts with images, without the images' own tokens, and the words before each image."""
        if self.model is self.slots[0].model:
            raise UserError(
                f"The text encoder of {self.name} is a language model without its vision tower. Leave the references "
                "out, or name the file of all of Qwen3-VL-8B."
            )
        (slot,), dropped = self.slots, self.reading.dropped
        seeing.refuse_other_image_token(slot, self.model, self.name)

        # Each image as its name and as many marks as it has patches, then the prompt
        patches, counts = seeing.cut_patches(self.processor, images, do_resize=False)
        prefix = " ".join(
            IMAGE_PREFIX.format(number, seeing.IMAGE_TOKEN * count) for number, count in enumerate(counts, 1)
        )
        self.warn_truncation(prompts, TOKENS + dropped)
        texts = [self.write(prefix + (prompt or " ")) for prompt in prompts]
        tokens = tokenization.tokenize(
            slot, texts, TOKENS + dropped + sum(counts), padding="longest", special=False
        )

        # Hidden states of the words alone, and how many words stood before each image
        states = seeing.encode(self.model, tokens, patches)
        rows, positions = [], []
        for row, ids, mask in zip(states, tokens["input_ids"], tokens["attention_mask"].bool(), strict=True):
            is_word = (ids[mask] != self.model.config.image_token_id)[dropped:]
            rows.append(row[mask][dropped:][is_word])
            positions.append(is_word.cumsum(0)[~is_word].unique_consecutive())
        return {**language_models.pad_rows(rows, TOKENS), "images": torch.stack(positions)}
