"""Single-file Stable Diffusion 3 and 3.5 checkpoints: recognition, configs, transformer and text encoders.

Configs are looked up as for Stable Diffusion 1 (`sd1/checkpoint.py`); the published ones are in
`configs/stable-diffusion-3`, those of 3.5's transformers in folders beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import nn
from transformers import CLIPTextModelWithProjection

from backbone.families.base import TextEncoderSlot
from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.single_file import text_encoders
from backbone.families.single_file.checkpoint import config_mismatch
from backbone.families.single_file.text_encoders import (
    CLIP_G,
    CLIP_L,
    PROJECTION,
    T5,
    build_network,
    load_clip,
    read_weights,
)
from backbone.io.files import Header, read_header

KERNEL = "x_embedder.proj.weight"  # of the transformer
REMEDY = (
    "Take the version that includes them (often with incl_clips in its name), or name the model's diffusers "
    "folder or hub id."
)


def match_checkpoint(header: Header) -> tuple[Path, ...] | None:
    """The config folders of a Stable Diffusion 3 checkpoint, or None for any other file.

    Raises `UserError` for a file that lacks a component; T5 may be missing.
    """
    prefix = text_encoders.transformer_prefix(header, KERNEL)
    if prefix is None or f"{prefix}joint_blocks.0.x_block.attn.qkv.weight" not in header.shapes:
        return None
    text_encoders.require_complete(
        header,
        "the transformer of a Stable Diffusion 3",
        encoders=(CLIP_L, CLIP_G),
        in_channels=header.shapes[prefix + KERNEL][1],
        patch=1,
        remedy=REMEDY,
    )
    published = []
    if f"{prefix}joint_blocks.0.x_block.attn2.qkv.weight" in header.shapes:
        published = ["stable-diffusion-3.5-medium"]
    elif f"{prefix}joint_blocks.0.x_block.attn.ln_q.weight" in header.shapes:
        published = ["stable-diffusion-3.5-large"]
    # The last two for the CLIPs
    published += ["stable-diffusion-3", "stable-diffusion-xl", "stable-diffusion-1"]
    return (
        header.path.with_suffix(""),
        header.path.parent,
        *(PUBLISHED_CONFIGS / name for name in published),
    )


def load_transformer(location: Location, dtype: torch.dtype) -> nn.Module:
    """Load the transformer through diffusers' converter; `UserError` where it does not fit its config."""
    tensors = text_encoders.read_transformer(location, KERNEL, dtype)
    try:
        converted = convert_sd3_transformer_checkpoint_to_diffusers(tensors)  # pops the tensors that it knows
    except (KeyError, IndexError, ValueError) as error:
        raise config_mismatch(location, "transformer") from error
    return build_network(SD3Transformer2DModel, location, "transformer", converted | tensors)


def has_t5(location: Location) -> bool:
    """Whether the file holds T5, the third text encoder."""
    return text_encoders.has_tensors(read_header(location.source), T5)


def load_clips(location: Location) -> tuple[TextEncoderSlot, TextEncoderSlot]:
    """Load both CLIPs in fp32 with their tokenizers. The first one's pooled output is not projected."""
    first, second = (read_weights(location, prefix, torch.float32) for prefix in (CLIP_L, CLIP_G))
    first[PROJECTION] = torch.eye(int(location.config("text_encoder")["hidden_size"]))
    kind = CLIPTextModelWithProjection
    return (
        load_clip(kind, location, "", first, pads_with="<|endoftext|>"),
        load_clip(kind, location, "_2", second, pads_with="!"),
    )
