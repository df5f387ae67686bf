"""Single-file Stable Diffusion XL checkpoints: recognition, configs, both text encoders.

Configs are looked up as for Stable Diffusion 1 (`sd1/checkpoint.py`); the published ones are in
`configs/stable-diffusion-xl`, and the first text encoder is Stable Diffusion 1's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from backbone.families.base import TextEncoderSlot
from backbone.families.components import loading
from backbone.families.components.empty import without_weights
from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.sd1.checkpoint import OPENCLIP_KEY_PATTERNS, UNUSED_KEYS, load_tokenizer
from backbone.families.single_file.checkpoint import config_mismatch, unet_and_latent_channels
from backbone.io.console import UserError
from backbone.io.files import Header, read_tensors
from backbone.io.weights import refuse_damaged

FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def match_checkpoint(header: Header) -> tuple[Path, ...] | None:
    """The config folders of a Stable Diffusion XL checkpoint, or None for any other file."""
    in_channels, latent_channels = unet_and_latent_channels(header)
    has_encoders = all(any(name.startswith(prefix) for name in header.shapes) for prefix in (FIRST, SECOND))
    if not has_encoders or in_channels is None or in_channels != latent_channels:
        return None
    beside = (header.path.with_suffix(""), header.path.parent)
    prediction_type = header.metadata.get("modelspec.prediction_type", "")
    published = ["velocity"] * (prediction_type.startswith("v") or "v_pred" in header.shapes)
    return (
        *beside,
        *(PUBLISHED_CONFIGS / name for name in (*published, "stable-diffusion-xl", "stable-diffusion-1")),
    )


def load_text_encoders(location: Location) -> tuple[TextEncoderSlot, TextEncoderSlot]:
    """Load both text encoders in fp32 with their tokenizers; `UserError` where one is missing or does not fit."""
    first, second = (read_tensors(location.source, prefix=prefix)[0] for prefix in (FIRST, SECOND))
    named = {
        re.sub(r"^(text_model\.)?", "", name.removeprefix(FIRST)): tensor for name, tensor in first.items()
    }
    ending, exclamation = "<|endoftext|>", "!"
    return (
        build_clip(CLIPTextModel, location, "", named, pads_with=ending),
        build_clip(
            CLIPTextModelWithProjection, location, "_2", convert_openclip(second), pads_with=exclamation
        ),
    )


def convert_openclip(tensors: dict[str, Tensor], prefix: str = SECOND) -> dict[str, Tensor]:
    """Rename OpenCLIP's tensors to transformers' keys, with all layers and the text projection."""
    named = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix)
        if name == "text_projection":
            named["text_projection.weight"] = tensor.T.contiguous()
            continue
        for pattern, replacement in OPENCLIP_KEY_PATTERNS:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:  # query, key and value fused
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                named[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            named[name] = tensor
    return named


def build_clip(
    kind: Any, location: Location, number: str, tensors: dict[str, Tensor], *, pads_with: str
) -> TextEncoderSlot:
    """Build a CLIP text encoder in fp32 with its tokenizer; `tensors` have transformers' keys without `text_model.`."""
    part = f"text_encoder{number}"
    with refuse_damaged(location.name, part), without_weights():
        config = CLIPTextConfig.from_dict(location.config(part))
        model = kind(config)
    level = "text_model." if hasattr(model, "text_model") else ""
    named = {
        (name if name.startswith("text_projection") else level + name): tensor.to(torch.float32)
        for name, tensor in tensors.items()
        if name == "text_projection.weight" or not re.search(UNUSED_KEYS, name)
    }
    try:
        model.load_state_dict(named, assign=True)
    except RuntimeError as error:
        raise config_mismatch(location, part) from error
    tokenizer = load_tokenizer(location, pads_with=pads_with, folder=f"tokenizer{number}")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"The tokenizer{number} has {len(tokenizer)} tokens and {location.source} knows {config.vocab_size}. "
            f"Put the tokenizer{number}/ folder of this model beside the file."
        )
    loading.set_eos_token(model, tokenizer)
    return TextEncoderSlot(part, tokenizer, model)
