"""Single-file FLUX.1 checkpoints: recognition, configs, transformer and CLIP.

Configs are looked up as for Stable Diffusion 1 (`sd1/checkpoint.py`); the published ones are in `configs/flux`, and
those that differ between dev and schnell in `configs/flux-dev` and `configs/flux-schnell`. diffusers' converter knows
one width only, so keys are converted here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from backbone.families.base import TextEncoderSlot
from backbone.families.flux.original import LAYERS, Layers, from_original
from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.single_file import text_encoders
from backbone.families.single_file.checkpoint import config_mismatch
from backbone.families.single_file.text_encoders import (
    CLIP_L,
    PROJECTION,
    T5,
    build_network,
    load_clip,
    read_weights,
)
from backbone.io.files import Header

REMEDY = (
    "Take a file that includes them, as ComfyUI's full checkpoints do, or name the model's diffusers folder or "
    "hub id."
)
MARK = "img_in.weight"  # of the transformer
LATENTS_PER_TOKEN = 4  # latents in a token


def match_checkpoint(header: Header) -> tuple[Path, ...] | None:
    """The config folders of a FLUX.1 checkpoint, or None for any other file.

    Raises `UserError` for a file that lacks a component, like those of the transformer alone.
    """
    prefix = text_encoders.transformer_prefix(header, MARK)
    marks = ("vector_in.in_layer.weight", "double_blocks.0.img_mod.lin.weight")
    if prefix is None or any(prefix + mark not in header.shapes for mark in marks):
        return None
    text_encoders.require_complete(
        header,
        "the transformer of a FLUX.1",
        encoders=(CLIP_L, T5),
        in_channels=header.shapes[f"{prefix}img_in.weight"][1],
        patch=LATENTS_PER_TOKEN,
        remedy=REMEDY,
    )
    is_dev = f"{prefix}guidance_in.in_layer.weight" in header.shapes
    published = ["flux-dev" if is_dev else "flux-schnell", "flux", "stable-diffusion-1"]  # the last for CLIP
    return (
        header.path.with_suffix(""),
        header.path.parent,
        *(PUBLISHED_CONFIGS / name for name in published),
    )


def load_transformer(location: Location, dtype: torch.dtype) -> nn.Module:
    """Load the transformer; `UserError` where it does not fit its config."""
    try:
        tensors = convert_to_diffusers(text_encoders.read_transformer(location, MARK, dtype))
    except (KeyError, ValueError) as error:
        raise config_mismatch(location, "transformer") from error
    return build_network(FluxTransformer2DModel, location, "transformer", tensors)


def convert_to_diffusers(tensors: dict[str, Tensor], layers: Layers = LAYERS) -> dict[str, Tensor]:
    """Rename the transformer's tensors to diffusers' keys, splitting fused layers.

    diffusers' last modulation is (scale, shift), the original's (shift, scale).
    """
    width = len(tensors["img_in.weight"])
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first, *fused = from_original(name, layers)
        if fused:
            rows = [width * number for number in range(1, len(fused) + 1)]
            converted |= zip((first, *fused), tensor.tensor_split(rows), strict=True)
        elif name.startswith("final_layer.adaLN_modulation.1."):
            shift, scale = tensor.chunk(2)
            converted[first] = torch.cat([scale, shift])
        else:
            converted[first] = tensor
    return converted


def load_clip_l(location: Location) -> TextEncoderSlot:
    """Load CLIP-L in fp32 with its tokenizer; FLUX.1 has no use for the text projection of some files."""
    tensors = read_weights(location, CLIP_L, torch.float32)
    tensors.pop(PROJECTION, None)
    return load_clip(CLIPTextModel, location, "", tensors, pads_with="<|endoftext|>")
