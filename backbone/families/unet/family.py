"""What Stable Diffusion's and SDXL's families share: diffusers' conditional UNet on a variance-preserving path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import ControlNetwork
from backbone.families.base import AttentionLayout, ImageInput, NoisePath
from backbone.families.components import loading, noise_paths
from backbone.families.location import Location
from backbone.families.single_file import checkpoint as single_file
from backbone.families.unet.control import unet_control_network
from backbone.families.unet.control_files import load_control_file
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
        side = int(location.config("unet")["sample_size"])
        return int(location.config("vae")["latent_channels"]), side, side

    def longest_side(self, location: Location) -> None:
        return None

    def path(self, location: Location) -> NoisePath:
        return noise_paths.vp_path(location)

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        return AttentionLayout()

    def embed_guidance(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> None:
        return None


def beside_reference(noisy: Tensor, conditions: Conditions) -> Tensor:
    """What the UNet reads: noisy latents [B, C, H, W], and where there is a reference its latents behind them.

    Brooks, Holynski & Efros 2023, section 3.2.
    """
    return torch.cat([noisy, *(latents.to(noisy) for latents in conditions.references)], 1)


def widen_input(denoiser: nn.Module, channels: int) -> nn.Module:
    """The UNet with so many more input channels, whose weights are zero: it predicts what it predicted.

    So InstructPix2Pix begins (Brooks, Holynski & Efros 2023, section 3.2).
    """
    network = cast(Any, denoiser)
    old = network.conv_in
    more = old.weight.new_zeros(len(old.weight), channels, *old.weight.shape[2:])
    old.weight = nn.Parameter(
        torch.cat([old.weight.detach(), more], 1).contiguous(memory_format=torch.channels_last)
    )
    old.in_channels += channels
    network.register_to_config(in_channels=old.in_channels)
    return denoiser.requires_grad_(False)


def load_part(kind: Any, location: Location, part: str, prefix: str, dtype: torch.dtype) -> nn.Module:
    """Load the UNet or the VAE from a folder, the hub, or a single file, whose tensors of it begin with `prefix`."""
    if location.file is None:
        return loading.load_network(kind, location, part, dtype, torch.channels_last)
    model = single_file.load_single_file_part(kind, location, part, prefix=prefix, dtype=dtype)
    return cast(nn.Module, model.to(memory_format=torch.channels_last))
