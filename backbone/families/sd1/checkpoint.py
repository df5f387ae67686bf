"""Single-file Stable Diffusion 1.x and 2.x checkpoints: recognition, configs, text encoder.

A checkpoint holds weights and nothing else. Its configs are looked up in the folder of its own name (`NAME/` beside
`NAME.safetensors`), then beside it, then among the published ones in `configs/`, all in the diffusers layout:
`unet/config.json`, `vae/config.json`, `text_encoder/config.json`, `scheduler/scheduler_config.json`, `tokenizer/`. So
a file of another architecture works with its configs beside it.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from backbone.diffusion.noise import PredictionType
from backbone.families.base import TextEncoderSlot
from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.single_file.checkpoint import (
    AUTOENCODER,
    SCHEDULER,
    UNET,
    folders_beside,
    has_settings_beside,
    noise_settings,
    read_prediction,
    refuse_quantized,
    say_name_promises_velocity,
    unet_and_latent_channels,
    unscale,
)
from backbone.families.single_file.clip import UNUSED_KEYS, build_clip, convert_openclip, read_config
from backbone.io.console import notify
from backbone.io.files import Header, read_tensors

TEXT_PREFIX = "cond_stage_model."
PREFIXES = {"unet": UNET, "vae": AUTOENCODER}
OPENCLIP_PREFIX = TEXT_PREFIX + "model."  # version 2; version 1 has transformers' names


def match_checkpoint(header: Header) -> tuple[Path, ...] | None:
    """The config folders of a Stable Diffusion 1.x or 2.x checkpoint, or None for any other file."""
    in_channels, latent_channels = unet_and_latent_channels(header)
    has_text = any(name.startswith(TEXT_PREFIX) for name in header.shapes)
    if (
        not has_text
        or in_channels is None
        or in_channels != latent_channels
        or UNET + "label_emb.0.0.weight" in header.shapes
    ):
        return None
    refuse_quantized(header)
    is_version_2 = any(name.startswith(OPENCLIP_PREFIX) for name in header.shapes)
    kind, resolution = read_prediction_type(header)
    if kind is None:
        kind, resolution = guess_prediction_type(header.path) if is_version_2 else ("epsilon", 512)
        if not is_version_2:
            say_name_promises_velocity(header)
        elif not has_settings_beside(header, SCHEDULER):
            notify(
                f"{header.path} does not say what it predicts; by its name it should be {kind} at {resolution} pixels. "
                f"If it draws noise, put its {SCHEDULER} and unet/config.json beside it."
            )
    published = noise_settings(header, kind) + ["768"] * (is_version_2 and resolution == 768)
    published += ["stable-diffusion-2"] * is_version_2 + ["stable-diffusion-1"]
    return (*folders_beside(header), *(PUBLISHED_CONFIGS / name for name in published))


def read_prediction_type(header: Header) -> tuple[PredictionType | None, int]:
    """The prediction type and the resolution in pixels that the file declares; None and 512 if it declares none.

    Read from ModelSpec metadata (kohya, ComfyUI), or from a tensor named `v_pred`.
    """
    architecture = header.metadata.get("modelspec.architecture", "")  # as stable-diffusion-v2-768-v
    kind = read_prediction(header)
    size = header.metadata.get("modelspec.resolution", "") or architecture
    if kind == "v_prediction" or architecture.endswith("-v"):
        return "v_prediction", 512 if "512" in size else 768
    if kind == "epsilon" or architecture.endswith("v2-512"):
        return "epsilon", 768 if "768" in size else 512
    return None, 512


def guess_prediction_type(path: Path) -> tuple[PredictionType, int]:
    """Guess both from a Stable Diffusion 2 file's name: v-prediction at 768, unless it says base or 512."""
    return ("epsilon", 512) if re.search("512|base", path.stem.lower()) else ("v_prediction", 768)


def load_text_encoder(location: Location) -> TextEncoderSlot:
    """Load the CLIP text encoder in fp32 with its tokenizer; `UserError` where one is missing or they do not fit."""
    from transformers import CLIPTextModel

    tensors = unscale(read_tensors(location.source, prefix=TEXT_PREFIX)[0])
    config = read_config(location, "text_encoder")
    converted = convert_to_transformers(tensors, layers=config.num_hidden_layers)
    pads_with = "!" if any(map(is_openclip, tensors)) else "<|endoftext|>"
    return build_clip(CLIPTextModel, location, "", converted, pads_with=pads_with)


def convert_to_transformers(tensors: dict[str, Tensor], *, layers: int) -> dict[str, Tensor]:
    """Rename the text encoder's tensors to transformers' keys, without the level `text_model`.

    OpenCLIP's last layer is dropped: Stable Diffusion 2 reads the last but one.
    """
    converted = {
        name.removeprefix(TEXT_PREFIX + "transformer.").removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not is_openclip(name)
    }
    openclip = {name: tensor for name, tensor in tensors.items() if is_openclip(name)}
    for name, tensor in convert_openclip(openclip, OPENCLIP_PREFIX).items():
        if not name.startswith(f"encoder.layers.{layers}."):
            converted[name] = tensor
    return {name: tensor for name, tensor in converted.items() if not re.search(UNUSED_KEYS, name)}


def is_openclip(name: str) -> bool:
    """Whether a key is OpenCLIP's (version 2) rather than transformers' (version 1)."""
    return name.startswith(OPENCLIP_PREFIX)
