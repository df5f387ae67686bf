"""Stable Diffusion 1.x and 2.x, and the embedded `moji`: a variance-preserving UNet with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from backbone.console import UserError, say
from backbone.families import Location, Network, NoisePath, Side, Text, single_file, stable_diffusion_file
from backbone.files import Header
from backbone.ladders import alphas_cumprod, vp_ladder
from backbone.noise import Kind, vp


class StableDiffusion:
    """The family's file: see `Family`."""

    name: ClassVar[str] = "Stable Diffusion"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": (
            *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
            *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        ),
    }

    def single_file(self, header: Header) -> tuple[Path, ...] | None:
        return stable_diffusion_file.settings_of(header)

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        return _network(UNet2DConditionModel, location, "unet", dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        overflows = dtype is torch.float16 and location.config("vae").get("force_upcast", True)
        return _network(AutoencoderKL, location, "vae", torch.float32 if overflows else dtype)

    def text_encoder(self, location: Location, dtype: torch.dtype) -> ClipText:
        if location.file is not None:
            return ClipText(*stable_diffusion_file.text_side(location, dtype))
        tokenizer = _load(CLIPTokenizer, location, "tokenizer")
        return ClipText(tokenizer, _load(CLIPTextModel, location, "text_encoder", dtype=dtype))

    def path(self, location: Location) -> NoisePath:
        config = _scheduler_config(location)
        train_steps = int(config.get("num_train_timesteps", 1000))
        alpha_bar = alphas_cumprod(
            config.get("beta_schedule", "scaled_linear"),
            config.get("beta_start", 0.00085),
            config.get("beta_end", 0.012),
            train_steps,
        )

        def ladder(steps: int) -> Any:
            return vp_ladder(
                alpha_bar,
                steps,
                spacing=config.get("timestep_spacing", "leading"),
                steps_offset=config.get("steps_offset", 1),
                final="one" if config.get("set_alpha_to_one", False) else "first",
            )

        kind = cast(Kind, config.get("prediction_type", "epsilon"))
        return NoisePath(kind, vp(alpha_bar, torch.arange(train_steps)), ladder)

    def network(self, denoiser: nn.Module, text: Text) -> Network:
        dtype = cast(torch.dtype, denoiser.dtype)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            noisy = noisy.to(dtype).contiguous(memory_format=torch.channels_last)
            return cast(Tensor, denoiser(noisy, time, text["hidden"].to(dtype)).sample)

        return predict


class ClipText:
    """CLIP's text encoder: the last hidden states of 77 positions."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)

    @property
    def sides(self) -> tuple[Side, ...]:
        return (Side("text_encoder", self.tokenizer, self.model),)

    def to(self, device: torch.device) -> ClipText:
        self.model.to(device)
        return self

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 77, D]. A prompt that is too long is cut, and said so."""
        length = self.tokenizer.model_max_length
        for prompt in prompts:
            tokens = self.tokenizer(prompt, verbose=False)["input_ids"]
            if len(tokens) > length:
                lost = self.tokenizer.decode(tokens[length - 1 : -1])
                _say_once(
                    f"The prompt has {len(tokens)} tokens and this model reads {length}: it will not see “{lost}”."
                )
        ids = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        return {"hidden": self.model(ids.to(self.model.device)).last_hidden_state.float()}


@cache
def _say_once(text: str) -> None:
    say(text)


def _network(kind: Any, location: Location, part: str, dtype: torch.dtype) -> nn.Module:
    """The denoiser or the autoencoder, from wherever the model is."""
    if location.file is not None:
        prefix = stable_diffusion_file.PREFIXES[part]
        model = single_file.load_part(kind, location, part, prefix=prefix, dtype=dtype)
    else:
        model = _load(kind, location, part, torch_dtype=dtype)
    return cast(nn.Module, model.to(memory_format=torch.channels_last))


def _load(kind: Any, location: Location, part: str, **options: Any) -> Any:
    """One part of a diffusers folder or hub id, safetensors only."""
    folder = location.folder
    if folder is not None and not (folder / part).is_dir():
        raise UserError(
            f"{folder} has no folder {part}/, so it is not a whole model. Save or download it again."
        )
    if issubclass(kind, nn.Module):
        options |= {"use_safetensors": True}
    transformers_logging.disable_progress_bar()
    try:
        return kind.from_pretrained(
            location.place, subfolder=part, local_files_only=folder is not None, **options
        )
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"The {part} of {location.name} could not be loaded ({first}). Check the model."
        ) from error


def _scheduler_config(location: Location) -> dict[str, Any]:
    from diffusers import DDIMScheduler

    return dict(DDIMScheduler.from_config(location.config("scheduler")).config)
