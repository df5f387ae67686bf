"""A trained denoiser's predictions as the target of another: what data alone would show over many draws.

The error that trains a diffusion model is mostly noise of its target: ε − x0 of one scene, while the network can only
predict its mean over all scenes that a noisy one may come from. A trained denoiser predicts just that mean (as the
teacher of progressive distillation does, Salimans & Ho 2022, without its halving of steps). It was not confirmed that
this noise slows a training down: `moji-flow` learned no faster by it (benchmarks/results/moji.md).
The two may be of different architectures and different noise paths: both halves of an estimate are the same at one
signal-to-noise ratio.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from backbone.diffusion.noise import Estimate, Level, predictor, scale_to_unit_variance, vp
from backbone.io.console import UserError
from backbone.io.files import read_json


class Teacher:
    """The denoiser of a Stable Diffusion folder, evaluated at any level of any noise path."""

    def __init__(self, folder: Path, device: str, *, channels: int = 24) -> None:
        """Raises `UserError` for a folder of another kind, and one whose latents have other `channels`."""
        config = folder / "unet" / "config.json"
        in_channels = read_json(config).get("in_channels") if config.is_file() else None
        if in_channels != channels:
            problem = (
                "has no unet/"
                if in_channels is None
                else f"predicts latents of {in_channels} channels, not {channels}"
            )
            raise UserError(f"{folder} {problem}. Name a teacher of moji's kind, of the same autoencoder.")
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        for network in (self.unet, self.text_encoder):
            nn.Module.to(network.eval().requires_grad_(False), device, torch.float32)
        self.unet.to(memory_format=torch.channels_last)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.prediction_type = scheduler.config.prediction_type
        self.log_snr = vp(scheduler.alphas_cumprod.double()).log_snr.to(device)  # falls with the timestep

    @torch.no_grad()
    def predict(self, noisy: Tensor, level: Level, tokens: Tensor) -> Estimate:
        """Both halves of its estimate [B, C, h, w] of noisy latents, without guidance, for token ids [B, 77]."""
        text = self.text_encoder(tokens).last_hidden_state

        def network(noisy: Tensor, time: Tensor) -> Tensor:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            prediction: Tensor = self.unet(noisy, time, text).sample
            return prediction.float()

        predict = scale_to_unit_variance(predictor(network, self.prediction_type))
        return predict(noisy, level.with_time(self.time_at(level.log_snr)))

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The timesteps [B], with fractions, at which its schedule has these log signal-to-noise ratios [B].

        They are clamped to its first and last timestep.
        """
        falling = -self.log_snr
        queries = -log_snr.to(falling)
        above = torch.searchsorted(falling, queries).clamp(1, len(falling) - 1)
        below = above - 1
        part = (queries - falling[below]) / (falling[above] - falling[below])
        time: Tensor = below + part.clamp(0, 1)
        return time.float()
