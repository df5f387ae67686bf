"""Single-file Stable Diffusion XL checkpoints: recognition, configs, both text encoders.

Configs are looked up as for Stable Diffusion 1 (`sd1/checkpoint.py`); the published ones are in
`configs/stable-diffusion-xl`, and the first text encoder is Stable Diffusion 1's.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import CLIPTextModel, CLIPTextModelWithProjection

from backbone.families.base import TextEncoderSlot
from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.single_file.checkpoint import (
    folders_beside,
    noise_settings,
    read_prediction,
    refuse_quantized,
    say_name_promises_velocity,
    unet_and_latent_channels,
    unscale,
)
from backbone.families.single_file.clip import build_clip, convert_openclip
from backbone.io.files import Header, read_tensors

FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


def match_checkpoint(header: Header) -> tuple[Path, ...] | None:
    """The config folders of a Stable Diffusion XL checkpoint, or None for any other file."""
    in_channels, latent_channels = unet_and_latent_channels(header)
    has_encoders = all(any(name.startswith(prefix) for name in header.shapes) for prefix in (FIRST, SECOND))
    if not has_encoders or in_channels is None or in_channels != latent_channels:
        return None
    refuse_quantized(header)
    prediction = read_prediction(header)
    if prediction is None:
        say_name_promises_velocity(header)
    published = noise_settings(header, prediction or "epsilon")
    return (
        *folders_beside(header),
        *(PUBLISHED_CONFIGS / name for name in (*published, "stable-diffusion-xl", "stable-diffusion-1")),
    )


def load_text_encoders(location: Location) -> tuple[TextEncoderSlot, TextEncoderSlot]:
    """Load both text encoders in fp32 with their tokenizers; `UserError` where one is missing or does not fit."""
    first, second = (unscale(read_tensors(location.source, prefix=prefix)[0]) for prefix in (FIRST, SECOND))
    renamed = {
        re.sub(r"^(text_model\.)?", "", name.removeprefix(FIRST)): tensor for name, tensor in first.items()
    }
    ending, exclamation = "<|endoftext|>", "!"
    return (
        build_clip(CLIPTextModel, location, "", renamed, pads_with=ending),
        build_clip(
            CLIPTextModelWithProjection,
            location,
            "_2",
            convert_openclip(second, SECOND),
            pads_with=exclamation,
        ),
    )
