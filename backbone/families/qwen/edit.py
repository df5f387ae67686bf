"""Qwen-Image-Edit: Qwen-Image's transformer, which reads images as tokens, and Qwen2.5-VL, which sees them too.

The first edition edits one image, which the text encoder sees at the autoencoder's size. From 2509 on (`…EditPlus`)
there are up to three, which it sees at about 384 × 384 pixels, each called “Picture 1:” and so on in the prompt.
Positions in an image have two coordinates there, as in training; diffusers 0.42 with transformers 5 numbers them like
words (its issue 14194).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from PIL.Image import Image, Resampling
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from backbone.conditions.conditions import Text
from backbone.families.base import ImageInput, ModelSpec, TextEncoderSlot, transformers_spec
from backbone.families.components import language_models, loading, tokenization
from backbone.families.components.language_models import LanguageModelEncoder, Reading
from backbone.families.location import Location
from backbone.families.qwen import seeing
from backbone.families.qwen.family import QwenImage, is_editor, reads_clean
from backbone.families.single_file import split_files
from backbone.io.files import Header

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
WORDS, DROPPED = 512, 64
SIDE = 32  # multiple of the sides at which images are seen
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 3584 * 3584}  # of the published processor


@dataclass(frozen=True)
class ImageReading:
    """How an edition's text encoder reads images.

    max_images  at most this many images
    area        pixels to which each is resized; 0: as it is
    tokens      at most this many of one image
    numbered    whether each is announced as “Picture 1: ”
    """

    max_images: int
    area: int
    tokens: int
    numbered: bool


ONE = ImageReading(1, 0, 1440, numbered=False)  # 1024² pixels are 1369 tokens of 28 × 28
PLUS = ImageReading(3, 384 * 384, 240, numbered=True)
LATER = ("2509", "2511", "plus")  # in a file's name, which says what its transformer was trained for


def find_edition(header: Header) -> ImageReading | None:
    """Find how the edition of a transformer's file reads images; None for Qwen-Image itself."""
    if not is_editor(header):
        return None
    is_later = reads_clean(header) or any(mark in header.path.stem.lower() for mark in LATER)
    return PLUS if is_later else ONE


class SeeingEncoder(LanguageModelEncoder):
    """Implements `SeeingTextEncoder`: the last hidden states of a vision-language model."""

    def __init__(
        self,
        slot: TextEncoderSlot,
        model: Any,
        processor: Any,
        image_reading: ImageReading,
        *,
        name: str,
        width: int,
    ) -> None:
        """`slot` is the language model within the whole `model`; `processor` makes patches of images."""
        reading = Reading(
            layers=(-1,), tokens=WORDS + image_reading.max_images * image_reading.tokens, dropped=DROPPED
        )
        super().__init__(slot, reading, write=lambda prompt: prompt.join(TEMPLATE), name=name, width=width)
        self.model, self.processor, self.image_reading = (
            model.eval().requires_grad_(False),
            processor,
            image_reading,
        )
        seeing.refuse_other_image_token(slot, model, name)

    def to(self, device: torch.device) -> Any:
        self.model.to(device)
        return self

    def __call__(self, prompts: Sequence[str], images: Sequence[Image] = ()) -> Text:
        """hidden [B, T, D] and mask [B, T] of prompts, each with the same images; warns of truncated prompts."""
        if not images:
            return super().__call__(prompts)
        (slot,) = self.slots
        patches, counts = seeing.cut_patches(self.processor, [self.resize(image) for image in images])
        prefix = "".join(
            (f"Picture {number}: " if self.image_reading.numbered else "")
            + f"<|vision_start|>{seeing.IMAGE_TOKEN * count}<|vision_end|>"
            for number, count in enumerate(counts, 1)
        )
        self.warn_truncation(prompts, WORDS)
        texts = [self.write(prefix + prompt) for prompt in prompts]
        tokens = tokenization.tokenize(
            slot, texts, self.reading.tokens + DROPPED, padding="longest", special=False
        )
        rows = zip(seeing.encode(self.model, tokens, patches), tokens["attention_mask"].bool(), strict=True)
        return language_models.pad_rows([row[mask][DROPPED:] for row, mask in rows], self.reading.tokens)

    def resize(self, image: Image) -> Image:
        """Resize an image to what the text encoder sees."""
        if not self.image_reading.area:
            return image
        ratio = image.width / image.height
        width = math.sqrt(self.image_reading.area * ratio)
        sides = (max(SIDE, round(side / SIDE) * SIDE) for side in (width, width / ratio))
        return image.resize(cast(tuple[int, int], tuple(sides)), Resampling.LANCZOS)


class QwenImageEdit(QwenImage):
    """Implements `Family`."""

    name: ClassVar[str] = "Qwen-Image-Edit"
    hub_ids: ClassVar[dict[str, str]] = {"qwen-image-edit": "Qwen/Qwen-Image-Edit"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImageEditPipeline",)
    image_reading: ClassVar[ImageReading] = ONE
    reads_images: ClassVar[Mapping[str, ImageInput]] = {
        "QwenImageEditPipeline": ImageInput(ONE.max_images, text_sees=True)
    }

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return self.files.match(header) if find_edition(header) is self.image_reading else None

    def text_encoder(self, location: Location, dtype: torch.dtype) -> SeeingEncoder:
        if location.file is not None:
            model = split_files.load_text_model(Qwen2_5_VLModel, location, dtype, part_name=seeing.name_part)
            tokenizer = split_files.load_tokenizer(Qwen2Tokenizer, location)
            processor = Qwen2VLImageProcessorPil(size=PIXELS)
        else:
            kind = Qwen2_5_VLForConditionalGeneration
            model = loading.load_pretrained(kind, location, "text_encoder", dtype=dtype).model
            tokenizer = loading.load_pretrained(Qwen2Tokenizer, location, "tokenizer")
            processor = loading.load_pretrained(Qwen2VLImageProcessorPil, location, "processor")
        slot = TextEncoderSlot("text_encoder", tokenizer, model.language_model)
        width = int(location.config("transformer")["joint_attention_dim"])
        return SeeingEncoder(slot, model, processor, self.image_reading, name=location.name, width=width)

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        base = super().spec(location, dtype)
        tokens = WORDS + self.image_reading.max_images * self.image_reading.tokens
        width = base.text_shapes["hidden"][-1]
        return ModelSpec(
            base.denoiser,
            base.autoencoder,
            {"text_encoder": transformers_spec(Qwen2_5_VLModel, location, "text_encoder", dtype)},
            {"hidden": (tokens, width), "mask": (tokens,)},
        )


class QwenImageEditPlus(QwenImageEdit):
    """Implements `Family`: the editions of 2509 and later."""

    name: ClassVar[str] = "Qwen-Image-Edit-Plus"
    hub_ids: ClassVar[dict[str, str]] = {
        "qwen-image-edit-2509": "Qwen/Qwen-Image-Edit-2509",
        "qwen-image-edit-2511": "Qwen/Qwen-Image-Edit-2511",
    }
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImageEditPlusPipeline",)
    image_reading: ClassVar[ImageReading] = PLUS
    reads_images: ClassVar[Mapping[str, ImageInput]] = {
        "QwenImageEditPlusPipeline": ImageInput(PLUS.max_images, text_sees=True)
    }
