"""Shared by Stable Diffusion and SDXL: diffusers' conditional UNet on a variance-preserving path."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import ControlNetwork
from backbone.diffusion.transfer import send
from backbone.families.base import AttentionLayout, ImageInput, NoisePath
from backbone.families.components import loading, noise_paths
from backbone.families.location import Location
from backbone.families.single_file import checkpoint as single_file
from backbone.families.unet.control import unet_control_network
from backbone.families.unet.control_files import load_control_file
from backbone.families.unet.norms import use_planar_norms
from backbone.io.console import UserError
from backbone.io.files import Header


class UNetFamily:
    """Part of `Family`: the UNet's layers, the shape of its latents, its noise path."""

    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": (
            *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
            *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        ),
    }

    control_classes: ClassVar[tuple[Any, ...]] = (ControlNetModel, ControlNetUnionModel, T2IAdapter)
    reads_images: ClassVar[Mapping[str, ImageInput]] = {
        "StableDiffusionInstructPix2PixPipeline": ImageInput(1),
        "StableDiffusionXLInstructPix2PixPipeline": ImageInput(1),
    }

    def licence(self, location: Location) -> str:
        return ""

    def control_network(
        self, module: nn.Module, denoiser: nn.Module, encode: Callable[..., Tensor]
    ) -> ControlNetwork:
        return unet_control_network(module, denoiser)

    def load_control_file(self, header: Header, denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
        return load_control_file(header, denoiser, dtype)

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        config = location.config("unet")
        size = config["sample_size"]
        sides = {*size} if isinstance(size, list) else {size}
        if len(sides) != 1 or None in sides:
            raise config.damaged("sample_size")
        (side,) = sides
        return int(location.config("vae")["latent_channels"]), int(side), int(side)

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {}

    def longest_side(self, location: Location) -> None:
        return None

    def path(self, location: Location) -> NoisePath:
        return noise_paths.vp_path(location)

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        return AttentionLayout()

    def embed_guidance(
        self, denoiser: nn.Module, conditions: Conditions, guidance: float
    ) -> Conditions | None:
        """For a UNet that is conditioned on the scale beside the time (`time_cond_proj_dim`), as consistency models."""
        if not cast(Any, denoiser).config.get("time_cond_proj_dim"):
            return None
        hidden = conditions.text["hidden"]
        return replace(conditions, guidance=hidden.new_full((len(conditions),), guidance))


def make_timestep_cond(denoiser: nn.Module, conditions: Conditions, dtype: torch.dtype) -> dict[str, Tensor]:
    """The UNet's argument `timestep_cond` [B, D] for the guidance scales among the conditions; {} without any.

    w = scale − 1 in sines and cosines, as a time of 1000·w is (Meng et al. 2023, section 3; diffusers' pipelines).
    Training gives none.
    """
    if conditions.guidance is None:
        return {}
    width = int(cast(Any, denoiser).config.time_cond_proj_dim)
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = 1000 * (conditions.guidance.float()[:, None] - 1) * send(rates, conditions.guidance.device)
    embedding = F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
    return {"timestep_cond": embedding.to(dtype)}


def refuse_other_inputs(location: Location, encoders: Sequence[str]) -> None:
    """`UserError` for a UNet that reads other inputs than these encoders' texts, or texts of another width."""
    if location.file is not None:
        return  # its config is a published one
    unet, name = location.config("unet"), location.name
    other_inputs = [key for key in ("class_embed_type", "num_class_embeds") if unet.get(key) is not None]
    other_inputs += ["encoder_hid_dim_type"] * (unet.get("encoder_hid_dim_type") not in (None, "text_proj"))
    expected = "text_time" if len(encoders) > 1 else None
    other_inputs += ["addition_embed_type"] * (unet.get("addition_embed_type") not in (None, expected))
    if other_inputs:
        raise UserError(
            f"The unet of {name} reads more than the prompt ({other_inputs[0]} {unet[other_inputs[0]]!r}): it is a "
            "model for another task. Name the text-to-image model that it was made from."
        )
    if (predicts := unet.get("out_channels", 4)) != (
        latents := location.config("vae").get("latent_channels", 4)
    ):
        raise UserError(
            f"The unet of {name} predicts {predicts} channels and its latents have {latents}: it is a model for "
            "another task. Name the text-to-image model that it was made from."
        )

    # Cross-attention reads the encoders side by side; SDXL's added embedding reads the pooled text and 6 sizes
    configs = [location.config(part) for part in encoders]
    width = sum(int(config.get("hidden_size", 512)) for config in configs)
    reads = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    problem = f"texts of the width {reads}, and its encoders' are {width} wide"
    fits = {width} == ({*reads} if isinstance(reads, list) else {reads})
    if fits and unet.get("addition_embed_type") == "text_time":
        pooled, sizes = configs[-1].get("projection_dim", 512), 6 * unet["addition_time_embed_dim"]
        reads, width = unet["projection_class_embeddings_input_dim"], pooled + sizes
        problem, fits = f"a pooled text and sizes of the width {reads}, and is given {width}", reads == width
    if not fits:
        raise UserError(
            f"The unet of {name} reads {problem}: its parts are not of one model. Download it again, or name a whole "
            "one."
        )


def beside_reference(noisy: Tensor, conditions: Conditions) -> Tensor:
    """The UNet's input: noisy latents [B, C, H, W], followed by a reference's latents if there is one.

    Brooks, Holynski & Efros 2023, section 3.2.
    """
    return torch.cat([noisy, *(latents.to(noisy) for latents in conditions.references)], 1)


def widen_input(denoiser: nn.Module, channels: int) -> nn.Module:
    """Give the UNet this many more input channels with zero weights, which leave its predictions unchanged.

    InstructPix2Pix begins like this (Brooks, Holynski & Efros 2023, section 3.2).
    """
    network = cast(Any, denoiser)
    old = network.conv_in
    zeros = old.weight.new_zeros(len(old.weight), channels, *old.weight.shape[2:])
    old.weight = nn.Parameter(
        torch.cat([old.weight.detach(), zeros], 1).contiguous(memory_format=torch.channels_last)
    )
    old.in_channels += channels
    network.register_to_config(in_channels=old.in_channels)
    return denoiser.requires_grad_(False)


def load_part(kind: Any, location: Location, part: str, prefix: str, dtype: torch.dtype) -> nn.Module:
    """Load the UNet or the VAE from a folder, the hub, or the tensors of a single file that begin with `prefix`."""
    if location.file is None:
        return use_planar_norms(loading.load_network(kind, location, part, dtype, torch.channels_last))
    model = single_file.load_single_file_part(kind, location, part, prefix=prefix, dtype=dtype)
    return use_planar_norms(model.to(memory_format=torch.channels_last))
