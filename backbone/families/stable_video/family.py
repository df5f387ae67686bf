"""Stable Video Diffusion (Blattmann et al. 2023): a UNet over frames that reads a picture, and no words.

Its noise levels are EDM's, σ from 0.002 to 700 (Karras et al. 2022), and it predicts v at c_in·x with c_in =
1/√(1 + σ²): that is a variance-preserving path with a = c_in and b = σ·c_in, so latents here are c_in times
diffusers', and Euler's step in σ is the deterministic step of every other family. The network gets ¼·ln σ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Level, Schedule
from backbone.diffusion.schedules import karras_schedule
from backbone.families.base import (
    AttentionLayout,
    ImageInput,
    ModelSpec,
    Network,
    NoisePath,
    TextEncoder,
    diffusers_spec,
    refuse_beside,
    transformers_spec,
    working_dtype,
)
from backbone.families.components import loading
from backbone.families.location import Location
from backbone.families.stable_video import checkpoint
from backbone.families.stable_video.image_encoder import ClipImageEncoder
from backbone.io.console import UserError
from backbone.io.files import Header

TRAINED_LEVELS = 1000  # quantiles of the density of ln σ
LOG_SIGMA = (1.0, 1.6)  # its mean and deviation (Blattmann et al. 2023, appendix D.2)
IDS = 3  # frames a second, motion bucket, noise on the picture


class StableVideo:
    """Implements `Family`. Its conditions are `hidden` [B, 1, D] of the picture and `ids` [B, 3]; one reference."""

    name: ClassVar[str] = "Stable Video Diffusion"
    hub_ids: ClassVar[dict[str, str]] = {
        "svd": "stabilityai/stable-video-diffusion-img2vid",
        "svd-xt": "stabilityai/stable-video-diffusion-img2vid-xt",
    }
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableVideoDiffusionPipeline",)
    reads_images: ClassVar[Mapping[str, ImageInput]] = {}
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    }

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return checkpoint.match_checkpoint(header)

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        return refuse_beside(header, other_files)

    def licence(self, location: Location) -> str:
        return (
            "Stable Video Diffusion's published weights are under a licence that large companies have to buy."
        )

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        check_configs(location)
        if location.file is not None:
            return checkpoint.load_denoiser(location, dtype)
        return loading.load_network(UNetSpatioTemporalConditionModel, location, "unet", dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        dtype = loading.autoencoder_dtype(location, dtype)
        if location.file is not None:
            return checkpoint.load_autoencoder(location, dtype)
        return loading.load_network(AutoencoderKLTemporalDecoder, location, "vae", dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> TextEncoder:
        raise UserError(f"{location.name} reads a picture and no words. Leave the words out.")

    def image_encoder(self, location: Location, dtype: torch.dtype) -> ClipImageEncoder:
        """CLIP's vision tower, whose embedding conditions the network."""
        return ClipImageEncoder.load(location, dtype)

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        return ModelSpec(
            diffusers_spec(UNetSpatioTemporalConditionModel, location, "unet", dtype),
            diffusers_spec(
                AutoencoderKLTemporalDecoder, location, "vae", loading.autoencoder_dtype(location, dtype)
            ),
            {
                "image_encoder": transformers_spec(
                    CLIPVisionModelWithProjection, location, "image_encoder", dtype
                )
            },
            {"hidden": (1, int(location.config("unet")["cross_attention_dim"])), "ids": (IDS,)},
        )

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        unet = location.config("unet")
        size = unet["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        return (
            int(location.config("vae")["latent_channels"]),
            int(unet["num_frames"]),
            int(height),
            int(width),
        )

    def longest_side(self, location: Location) -> None:
        return None

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 25, "guidance": 3.0}

    def path(self, location: Location) -> NoisePath:
        return edm_path(location)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        dtype = working_dtype(denoiser)
        hidden, ids = (conditions.text[name].to(dtype) for name in ("hidden", "ids"))
        (picture,) = conditions.references

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            frames = noisy.to(dtype).transpose(1, 2)  # [B, F, C, h, w]
            condition = picture.to(dtype)[:, None].expand_as(frames)
            inputs = torch.cat([frames, condition], 2)
            output = denoiser(inputs, time, encoder_hidden_states=hidden, added_time_ids=ids).sample
            return cast(Tensor, output.transpose(1, 2))

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        return AttentionLayout()

    def embed_guidance(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> None:
        return None


def check_configs(location: Location) -> None:
    """`UserError` where the components' configs do not fit together: a UNet with other inputs, another tower."""
    unet, tower = location.config("unet"), location.config("image_encoder")
    latents = int(location.config("vae")["latent_channels"])
    sizes = {
        "input channels": (unet["in_channels"], 2 * latents),
        "width of the picture's embedding": (unet["cross_attention_dim"], tower["projection_dim"]),
        "width of its ids": (
            unet["projection_class_embeddings_input_dim"],
            IDS * unet["addition_time_embed_dim"],
        ),
    }
    for label, (actual, expected) in sizes.items():
        if actual != expected:
            raise UserError(
                f"The unet of {location.name} has {label} {actual}, and its other parts make {expected}. Save or "
                "download the model again."
            )


def edm_path(location: Location) -> NoisePath:
    """The noise path of a network that predicts v at levels of EDM, from its EulerDiscreteScheduler's config."""
    scheduler = location.config("scheduler")
    required = {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    }
    strange = next((name for name, value in required.items() if scheduler.get(name) != value), None)
    if strange is not None:
        raise UserError(
            f"The scheduler of {location.name} has {strange} {scheduler.get(strange)}, and {required[strange]} is what "
            "Stable Video Diffusion was published with. Restore scheduler/."
        )
    lowest, highest = (scheduler[f"sigma_{end}"] for end in ("min", "max"))
    if not all(isinstance(end, (int, float)) for end in (lowest, highest)) or not 0 < lowest < highest:
        raise UserError(
            f"The scheduler of {location.name} goes from sigma_max {highest} to sigma_min {lowest}. Restore scheduler/."
        )

    def schedule(steps: int, size: tuple[int, int]) -> Schedule:
        return scale_level(karras_schedule(steps, lowest, highest).sigma)

    share = (torch.arange(TRAINED_LEVELS, dtype=torch.float64) + 0.5) / TRAINED_LEVELS
    mean, deviation = LOG_SIGMA
    levels = scale_level((mean + deviation * torch.special.ndtri(share)).exp())
    return NoisePath("v_prediction", levels, schedule)


def scale_level(sigma: Tensor) -> Level:
    """Levels σ at the scale of the network's input: a = 1/√(1 + σ²), b = σ·a; time ¼·ln σ, at σ = 0 that of e⁻²⁰."""
    scale = (1 + sigma**2).rsqrt()
    time = 0.25 * sigma.clamp(min=math.exp(-20)).log()
    return Level(scale, sigma * scale, time.float())
