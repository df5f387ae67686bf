"""Qwen's vision-language models, which read images within a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from PIL.Image import Image
from torch import Tensor

from backbone.families.base import TextEncoderSlot
from backbone.families.single_file import split_files
from backbone.io.console import UserError

IMAGE_TOKEN = "<|image_pad|>"


def refuse_other_image_token(slot: TextEncoderSlot, model: Any, name: str) -> None:
    """`UserError` where the tokenizer's token for an image is another than the model's."""
    if slot.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != model.config.image_token_id:
        raise UserError(
            f"The tokenizer of {name} has another token for an image than its text encoder. Download the model again."
        )


def cut_patches(
    processor: Any, images: Sequence[Image], **options: Any
) -> tuple[Mapping[str, Tensor], list[int]]:
    """Cut images into the patches that the model takes, and count the tokens of the prompt that stand for each."""
    patches = processor(images=list(images), return_tensors="pt", **options)
    counts = patches["image_grid_thw"].prod(-1) // processor.merge_size**2
    return patches, counts.tolist()


def encode(model: Any, tokens: Mapping[str, Tensor], patches: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states [B, T, D] of prompts, each read with the same images.

    Positions within an image have two coordinates, as in training.
    """
    rows, device = len(tokens["input_ids"]), model.device
    states = model(
        **tokens,
        mm_token_type_ids=(tokens["input_ids"] == model.config.image_token_id).int(),
        pixel_values=patches["pixel_values"].repeat(rows, 1).to(device),
        image_grid_thw=patches["image_grid_thw"].repeat(rows, 1).to(device),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[-1]
    return cast(Tensor, states.float())


def name_part(name: str) -> str:
    """A tensor's name in the whole model: files have the vision tower beside the language model, or within it."""
    inner = split_files.name_inner(name)
    return inner if inner.startswith(("visual.", "lm_head.")) else f"language_model.{inner}"
