"""Between an autoencoder's latents and the network's: their scale, patches of them, the one frame of a picture.

Elsewhere a latent is [B, C, H, W] of about unit variance. The autoencoder's config says how to get there, so no family
repeats it: a scalar scale and shift (Stable Diffusion, FLUX.1), a mean and deviation of each channel (Qwen-Image), or
those of a batch norm over patches of 2 × 2 (FLUX.2). Autoencoders of video take a picture as one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from backbone.io.console import UserError


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """How an autoencoder's latents z [B, c, h, w] become the network's: (z − shift) · scale, in patches.

    scale, shift  numbers, or [C, 1, 1] of each channel
    patch         latents a side that make one of the network's, with their channels concatenated
    frames        whether pictures and latents have a dimension of frames, [B, C, 1, H, W]
    opacity       whether pictures have a fourth channel, their opacity, and are laid on white
    over_time     whether the decoder mixes frames, so that all that it decodes together must be one clip
    """

    scale: float | Tensor
    shift: float | Tensor
    patch: int = 1
    frames: bool = False
    opacity: bool = False
    over_time: bool = False

    def encode(self, autoencoder: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] to the mean and standard deviation of their latents [B, C, h, w]."""
        network = cast(Any, autoencoder)
        if self.opacity:
            pictures = F.pad(pictures, (0, 0, 0, 0, 0, 1), value=1.0)
        distribution = network.encode(pictures.unsqueeze(2) if self.frames else pictures).latent_dist
        mean, std = (self._cut_patches(value.float()) for value in (distribution.mean, distribution.std))
        return (mean - self.shift) * self.scale, std * self.scale

    def decode(self, autoencoder: nn.Module, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W]."""
        z = (latents.float() / self.scale + self.shift).to(dtype)
        if self.patch > 1:
            z = F.pixel_shuffle(z, self.patch)
        if self.frames:
            pictures = cast(Tensor, cast(Any, autoencoder).decode(z.unsqueeze(2)).sample[:, :, 0])
            return lay_on_white(pictures) if self.opacity else pictures
        if self.over_time:
            return cast(Tensor, cast(Any, autoencoder).decode(z, num_frames=len(z)).sample)
        z = z.contiguous(memory_format=torch.channels_last)
        return cast(Tensor, cast(Any, autoencoder).decode(z).sample)

    def _cut_patches(self, z: Tensor) -> Tensor:
        z = z[:, :, 0] if self.frames else z
        return F.pixel_unshuffle(z, self.patch) if self.patch > 1 else z


def latent_space(autoencoder: nn.Module) -> LatentSpace:
    """The latent space of a loaded autoencoder, with the defaults of what old configs leave out.

    Raises `UserError` for a damaged config.
    """
    network = cast(Any, autoencoder)
    config, device = network.config, next(autoencoder.parameters()).device
    if is_batch_normed(config):
        variance = network.bn.running_var + config["batch_norm_eps"]
        shift = network.bn.running_mean.float()[:, None, None]
        return LatentSpace(
            variance.float().rsqrt()[:, None, None], shift, patch=patch_size(config), frames=False
        )

    # (z − shift)·scale, one number each, or one for every channel
    if config.get("scaling_factor") == 0:
        raise UserError(
            "The autoencoder's config is damaged: scaling_factor is 0. Restore vae/config.json, or download the model "
            "again."
        )
    scale = float(config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        shift = float(config.get("shift_factor") or 0.0)
        over_time = isinstance(autoencoder, AutoencoderKLTemporalDecoder)
        return LatentSpace(scale, shift, frames=has_frames(config), over_time=over_time)
    mean, std = (
        torch.tensor(config[key], dtype=torch.float32, device=device)[:, None, None]
        for key in ("latents_mean", "latents_std")
    )
    if not len(mean) == len(std) == latent_channels(config) or any(
        not value for value in config["latents_std"]
    ):
        raise UserError(
            f"The autoencoder's config is damaged: latents_mean and latents_std are no {latent_channels(config)} "
            "numbers. Restore vae/config.json, or download the model again."
        )
    return LatentSpace(
        scale / std, mean, frames=has_frames(config), opacity=config.get("in_channels", 3) == 4
    )


def lay_on_white(pictures: Tensor) -> Tensor:
    """Pictures [B, 4, H, W] in −1…1, whose last channel is their opacity, on white [B, 3, H, W]."""
    opacity = (pictures[:, 3:].clamp(-1, 1) + 1) / 2
    return pictures[:, :3] * opacity + (1 - opacity)


def is_batch_normed(config: Mapping[str, Any]) -> bool:
    """Whether an autoencoder's latents are normalised by the statistics of a batch norm, as FLUX.2's are."""
    return "batch_norm_eps" in config or config.get("_class_name") == "AutoencoderKLFlux2"


def has_frames(config: Mapping[str, Any]) -> bool:
    """Whether an autoencoder is a video's."""
    return "temperal_downsample" in config


def patch_size(config: Mapping[str, Any]) -> int:
    """How many of the autoencoder's latents a side make one of the network's."""
    return int(config.get("patch_size", (2, 2))[0]) if is_batch_normed(config) else 1


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels C of the network's latents."""
    channels = config["z_dim"] if "z_dim" in config else config.get("latent_channels", 4)
    return int(channels) * patch_size(config) ** 2


def first_width(config: Mapping[str, Any]) -> int:
    """Channels of an encoder's first layer, the largest of its activations."""
    return int(config["base_dim"] if has_frames(config) else config["block_out_channels"][0])


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Pixels a side for one of the network's latents."""
    if has_frames(config):
        return int(2 ** len(config["temperal_downsample"]))
    return int(2 ** (len(config["block_out_channels"]) - 1)) * patch_size(config)
