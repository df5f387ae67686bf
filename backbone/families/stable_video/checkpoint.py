"""Single-file Stable Video Diffusion checkpoints (`svd.safetensors`, `svd_xt.safetensors`): recognition and loading.

Configs are looked up as for Stable Diffusion 1 (`sd1/checkpoint.py`). The number of frames of training is not in the
file, only in its name. The picture is encoded by the autoencoder of the conditioner, and frames are decoded by the
first stage's, which is another one; a file that was written by another tool may hold only the first stage's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from backbone.families.components import loading
from backbone.families.components.empty import without_weights
from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.single_file.checkpoint import (
    AUTOENCODER,
    UNET,
    config_mismatch,
    folders_beside,
    has_settings_beside,
)
from backbone.families.single_file.clip import convert_openclip
from backbone.families.unet.original import ORIGINAL_RESNET, rename_prefix, to_original
from backbone.io.console import UserError, notify
from backbone.io.files import Header, read_header, read_tensors
from backbone.io.weights import refuse_damaged

MARK = f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight"
TOWER = "conditioner.embedders.0.open_clip.model.visual."
PICTURE = "conditioner.embedders.3.encoder."  # the autoencoder by which the picture is encoded
IDS = f"{UNET}label_emb.0.0.weight"
PUBLISHED_WIDTH, PUBLISHED_IDS = 320, 768  # of the first layer, and of the ids
Rules = tuple[tuple[str, str], ...]

ATTENTION: Rules = (
    (r"\.temporal_transformer_blocks\.", ".time_stack."),
    (r"\.time_pos_embed\.linear_1\.", ".time_pos_embed.0."),
    (r"\.time_pos_embed\.linear_2\.", ".time_pos_embed.2."),
)
CODER: Rules = (  # of an encoder or decoder, outside its blocks over time
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"conv_norm_out", "norm_out"),
    (r"time_conv_out", "conv_out.time_mix_conv"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"spatial_res_block\.", ""),
    (r"time_mixer\.", ""),
)
TOWER_NAMES: Rules = (
    (r"^class_embedding", "embeddings.class_embedding"),
    (r"^conv1", "embeddings.patch_embedding"),
    (r"^ln_pre", "pre_layrnorm"),
    (r"^ln_post", "post_layernorm"),
)


def match_checkpoint(header: Header) -> tuple[Path, ...] | None:
    """The config folders of a Stable Video Diffusion checkpoint, or None for any other file.

    Raises `UserError` for one that lacks a component, and for a model that was fine-tuned to other conditions.
    """
    if MARK not in header.shapes:
        return None
    marks = {
        "picture's encoder (CLIP's tower)": f"{TOWER}conv1.weight",
        "autoencoder": f"{AUTOENCODER}decoder.conv_out.time_mix_conv.weight",
    }
    missing = [label for label, mark in marks.items() if mark not in header.shapes]
    if missing:
        raise UserError(
            f"{header.path} holds the UNet of Stable Video Diffusion without its {' and '.join(missing)}. Take the "
            "whole file, or name the model's diffusers folder or hub id (--model svd, svd-xt)."
        )
    refuse_other_ids(header)
    published = ["stable-video-diffusion"]
    if not has_settings_beside(header, "unet/config.json"):
        is_xt = "xt" in header.path.stem.lower()
        published = ["stable-video-diffusion-xt"] * is_xt + published
        notify(
            f"{header.path} does not say how many frames it was trained on: by its name {25 if is_xt else 14}. "
            "--frames asks for others."
        )
    return (*folders_beside(header), *(PUBLISHED_CONFIGS / name for name in published))


def refuse_other_ids(header: Header) -> None:
    """`UserError` for a network of the published size with other conditions than speed, motion and noise."""
    width, ids = (header.shapes.get(name, ()) for name in (f"{UNET}input_blocks.0.0.weight", IDS))
    if width[:1] == (PUBLISHED_WIDTH,) and ids[1:] != (PUBLISHED_IDS,):
        raise UserError(
            f"{header.path} is made of Stable Video Diffusion for other conditions (as SV3D's camera): its ids are "
            f"{' × '.join(map(str, ids[1:])) or 'missing'} and not {PUBLISHED_IDS} numbers. Name another model."
        )


# Loading -----------------------------------------------------------------------------------------------------


def load_denoiser(location: Location, dtype: torch.dtype) -> nn.Module:
    """Load the UNet of a file; `UserError` where it is not built as its config says."""
    network = build_outline(UNetSpatioTemporalConditionModel, location, "unet")
    return fill(network, location, "unet", name_unet_layers(network), dtype)


def load_autoencoder(location: Location, dtype: torch.dtype) -> nn.Module:
    """Load the encoder of the conditioner's autoencoder, if the file holds it, and the first stage's decoder."""
    network = build_outline(AutoencoderKLTemporalDecoder, location, "vae")
    shapes = read_header(location.source).shapes
    prefix = PICTURE if f"{PICTURE}encoder.conv_in.weight" in shapes else AUTOENCODER
    stored = name_coder_layers(network, prefix)
    if f"{prefix}quant_conv.weight" in shapes:
        return fill(network, location, "vae", stored, dtype)
    channels = 2 * int(cast(Any, network).config.latent_channels)
    cast(Any, network).quant_conv = quant = cast(Any, nn.Conv2d)(channels, channels, 1, dtype=dtype)
    nn.init.dirac_(quant.weight)  # the identity: it is merged into the encoder's last layer
    nn.init.zeros_(quant.bias)
    return fill(network, location, "vae", {k: v for k, v in stored.items() if "quant_conv" not in k}, dtype)


def load_tower(location: Location, dtype: torch.dtype) -> nn.Module:
    """Load CLIP's tower with its projection, from OpenCLIP's tensors."""
    with refuse_damaged(location.name, "image_encoder"), without_weights():
        config = CLIPVisionConfig.from_dict(location.config("image_encoder"))
        model: nn.Module = CLIPVisionModelWithProjection(config)
    tensors, _ = read_tensors(location.source, prefix=TOWER)
    projection = tensors.pop(f"{TOWER}proj", torch.empty(0, 0))
    renamed = {rename(name, TOWER_NAMES): value for name, value in convert_openclip(tensors, TOWER).items()}
    level = "vision_model." if hasattr(model, "vision_model") else ""
    state = {f"{level}{name}": value.to(dtype) for name, value in renamed.items()}
    state["visual_projection.weight"] = projection.T.to(dtype, memory_format=torch.contiguous_format)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise config_mismatch(location, "image_encoder") from error
    return model.eval()


def build_outline(kind: Any, location: Location, part: str) -> nn.Module:
    """Build a network on `meta` from its config."""
    config = location.config(part)
    config.refuse_other_kinds(kind)
    with refuse_damaged(location.name, part), without_weights():
        return cast(nn.Module, kind.from_config(config))


def fill(
    network: nn.Module, location: Location, part: str, stored: Mapping[str, str], dtype: torch.dtype
) -> nn.Module:
    """Load the tensors `stored` (the network's name → the file's); `UserError` where one does not fit."""
    shapes = read_header(location.source).shapes
    expected = {name: value.shape for name, value in network.state_dict().items() if name in stored}
    if any(
        stored[name] not in shapes or prod(shapes[stored[name]]) != shape.numel()
        for name, shape in expected.items()
    ):
        raise config_mismatch(location, part)
    loading.fill_casting(network, Path(location.source), stored, dtype)
    return network.eval()


# Names -------------------------------------------------------------------------------------------------------


def name_unet_layers(network: nn.Module) -> dict[str, str]:
    """Map diffusers' names of the UNet's tensors to those in a file."""
    names = list(network.state_dict())
    layers = int(cast(Any, network).config.layers_per_block)
    blocks = {int(match[1]) for name in names if (match := re.match(r"up_blocks\.(\d+)", name))}
    plain = {
        block for block in blocks if not any(name.startswith(f"up_blocks.{block}.att") for name in names)
    }
    return {name: UNET + name_unet_layer(name, layers, plain) for name in names}


def name_unet_layer(name: str, layers: int, plain: Collection[int]) -> str:
    """The original name of a tensor; `layers` per block, `plain` are the up blocks without attention."""
    original = to_original(name.replace("spatial_res_block.", ""), layers, plain)
    return rename(name_over_time(original), ATTENTION)


def name_over_time(name: str) -> str:
    """The original name of a tensor in a residual block over time; another one unchanged."""
    head, over_time, rest = name.partition(".temporal_res_block.")
    return f"{head}.time_stack.{rename_prefix(rest, ORIGINAL_RESNET)}" if over_time else name


def name_coder_layers(network: nn.Module, encoder: str) -> dict[str, str]:
    """Map diffusers' names of the autoencoder's tensors to those in a file, whose encoder's begin with `encoder`."""
    levels = len(cast(Any, network).config.block_out_channels)
    return {
        name: (AUTOENCODER if name.startswith("decoder.") else encoder) + name_coder_layer(name, levels)
        for name in network.state_dict()
    }


def name_coder_layer(name: str, levels: int) -> str:
    """The original name of a tensor; the original counts the decoder's levels from the picture."""
    name = rename(name_over_time(name), CODER)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = name.replace("down_blocks.", "down.").replace(".resnets.", ".block.")
    return re.sub(r"(down|up)samplers\.0", r"\1sample", name)


def rename(name: str, rules: Rules) -> str:
    """Apply all rules (pattern, replacement) to a name."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
