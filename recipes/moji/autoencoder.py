"""The autoencoder of `moji`: 128 × 128 pictures to 16 × 16 latents of a few channels, and back.

    python -m recipes.moji.data.pictures                      the training pictures, once
    python -m recipes.moji.autoencoder                   about an hour on one core
    python -m recipes.moji.autoencoder --decoder-only    polish what sees the latents, keep the latents

A variational autoencoder (Kingma & Welling 2014) with L1 + gradient loss on crops of scenes and textures, begun as a
linear transform codec (`recipes.moji.training.linear_start`). Two terms are for the denoiser that will draw its
latents: part of the batch is decoded from latents with noise on them, as a denoiser leaves them, and latents of half
the resolution have to decode to the picture at half the resolution (Kouzelis et al. 2025, "EQ-VAE"), which makes
neighbours alike. The last steps see whole pictures, since the norms' statistics of a crop are others.

Continues from its last checkpoint, or, for a longer run, from the last one before the learning rate fell
(`autoencoder-stable.safetensors`); writes the EMA weights as a diffusers folder, scaled so that every latent channel
has mean 0 and standard deviation 1 at `scaling_factor` 0.18215.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.diffusion.noise import generator
from backbone.io.console import run_app
from backbone.io.files import read_json, write_json
from backbone.training.loop import Average
from backbone.training.optimizer import warm_stable_decay
from backbone.world.rendering.textures import Pixels
from recipes.moji.data.pictures import load
from recipes.moji.training.linear_start import begin_linear
from recipes.moji.training.muon import Muon, choose_half
from recipes.moji.training.run import OUTPUT, TRAINING, RecipeSettings, Training, make_readable

SCALING_FACTOR = 0.18215
CHANNELS = 16
FITTED = 1200  # pictures that the linear start is fitted to
WHOLE = 128


app = script_app()


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(RecipeSettings):
    """Settings of the training of the autoencoder."""

    steps: int = 3_000
    batch: Annotated[int, Option("Crops in a batch.", TRAINING, min=1)] = 16
    learning_rate: float = 5e-4
    matrix_rate: float = 1e-3
    channels: Annotated[int, Option("Channels of the latents.", TRAINING, min=1)] = CHANNELS
    crop: Annotated[
        int, Option("Side of a crop in pixels; 128 trains on whole pictures.", TRAINING, min=8, max=WHOLE)
    ] = 64
    whole_steps: Annotated[
        int,
        Option("Last steps, which train on whole pictures with as many pixels in a batch.", TRAINING, min=0),
    ] = 400
    decay: Annotated[
        float,
        Option(
            "Share of the steps, at the end, over which the learning rates decay to zero.",
            TRAINING,
            min=0,
            max=1,
        ),
    ] = 0.25
    kl_weight: Annotated[float, Option("Weight of the KL term per latent number.", TRAINING)] = 2e-4
    texture_share: Annotated[
        float, Option("Share of textures among the pictures.", TRAINING, min=0, max=1)
    ] = 0.25
    latent_noise: Annotated[
        float, Option("Most noise on noisy latents, of each channel's deviation.", TRAINING, min=0)
    ] = 0.2
    noisy_share: Annotated[float, Option("Share of the batch with that noise.", TRAINING, min=0, max=1)] = 0.5
    scale_weight: Annotated[
        float, Option("Weight of decoding latents of half the resolution.", TRAINING, min=0)
    ] = 0.25
    linear: Annotated[bool, Option("Begin as a linear transform, or from random weights.", TRAINING)] = True
    begin_from: Annotated[Path | None, Option("A folder of weights to begin with instead.", TRAINING)] = None
    decoder_only: Annotated[bool, Option("Keep the encoder, and so all latents.", TRAINING)] = False
    out: Annotated[
        Path | None,
        Option("Where `vae/` and the checkpoint go.", OUTPUT, default_text="the work directory"),
    ] = None
    land: Annotated[
        Path | None, Option("Folder that the last weights are also written to, in fp16.", OUTPUT)
    ] = None

    @property
    def folder(self) -> Path:
        """Where the checkpoint and `vae/` go."""
        return self.out or self.workdir


@settled_command(app, AutoencoderSettings)
def main(settings: AutoencoderSettings) -> None:
    """Trains, or goes on training, and writes `vae/`."""
    torch.manual_seed(settings.seed)
    scenes, textures = load(settings.workdir, "scenes")[:-1], load(settings.workdir, "textures")
    held_out = to_tensor(load(settings.workdir, "scenes")[-1][:128]).to(settings.device)
    training, model = begin_training(settings, scenes)

    def losses(step: int) -> Iterator[Tensor]:
        random, draw = np.random.default_rng([settings.seed, step]), generator(settings.seed, step)
        side, count = settings.crop, settings.batch
        if step > settings.steps - settings.whole_steps:
            side, count = WHOLE, settings.batch * settings.crop**2 // WHOLE**2
        clean = sample_crops(
            random, scenes, textures, batch=count, crop=side, texture_share=settings.texture_share
        ).to(settings.device)
        yield autoencoder_loss(model, clean.contiguous(memory_format=torch.channels_last), settings, draw)

    def write(step: int) -> None:
        if step % 300 == 0 or step == settings.steps:
            export(model, training.average, settings, held_out)

    if training.done >= settings.steps:
        write(settings.steps)
    lr_schedule = warm_stable_decay(
        settings.steps, warmup=min(80, settings.steps // 5), decay=round(settings.decay * settings.steps)
    )
    training.run(losses, lr_schedule, every=100, on_save=write)
    if settings.land is not None:
        write_half(settings.folder / "vae", settings.land)


def begin_training(settings: AutoencoderSettings, scenes: list[Pixels]) -> tuple[Training, AutoencoderKL]:
    """The model as the settings begin it, or as its last checkpoint left it, with its optimiser."""
    fresh = not settings.decoder_only and settings.begin_from is None
    if settings.decoder_only:
        model = AutoencoderKL.from_pretrained(settings.folder / "vae").float()
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    elif settings.begin_from is not None:
        model = AutoencoderKL.from_pretrained(settings.begin_from, local_files_only=True).float()
    else:
        model = build(settings.channels)
    model = model.to(settings.device, memory_format=torch.channels_last)
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    inner = [key for key, value in parameters.items() if value.ndim >= 2 and not is_outer(key)]
    groups: list[dict[str, Any]] = [
        {"params": [value for key, value in parameters.items() if key not in inner]},
        {"params": [parameters[key] for key in inner], "momentum": 0.95, "lr": settings.matrix_rate},
    ]
    optimizer = Muon(groups, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    name = "decoder" if settings.decoder_only else "autoencoder"
    checkpoint = settings.folder / f"{name}.safetensors"
    if fresh and settings.linear and not checkpoint.exists():
        begin_linear(
            model, to_tensor(np.concatenate([shard[: -(-FITTED // len(scenes))] for shard in scenes]))
        )
    decay_steps = round(settings.decay * settings.steps)
    return Training(settings, checkpoint, parameters, optimizer, decay=0.995, decay_steps=decay_steps), model


def autoencoder_loss(
    model: AutoencoderKL, clean: Tensor, settings: AutoencoderSettings, draw: torch.Generator
) -> Tensor:
    """Reconstruction from (noisy) latents and from halved ones, and KL divergence, of pictures [B, 3, H, W]."""
    with precision(clean.device):
        posterior = model.encode(clean).latent_dist
        mean, variance = posterior.mean.float(), posterior.var.float()
        sampled = mean + variance.sqrt() * torch.randn(mean.shape, generator=draw).to(clean.device)
        noisy = sampled + sample_noise(sampled, settings.latent_noise, settings.noisy_share, draw)
        loss = reconstruction_loss(model.decode(noisy).sample.float(), clean)
        if settings.scale_weight:
            halved = model.decode(F.avg_pool2d(sampled, 2)).sample.float()
            loss = loss + settings.scale_weight * reconstruction_loss(halved, F.avg_pool2d(clean, 2))
    kl: Tensor = 0.5 * (mean**2 + variance - 1 - variance.log()).mean()
    return loss + settings.kl_weight * kl


def write_half(source: Path, land: Path) -> None:
    """Writes a folder of weights in fp16, without the path they were loaded from."""
    AutoencoderKL.from_pretrained(source, local_files_only=True).half().save_pretrained(land)
    settings = read_json(land / "config.json")
    write_json(land / "config.json", {key: settings[key] for key in settings if key != "_name_or_path"})
    make_readable(land)


def build(channels: int = CHANNELS) -> AutoencoderKL:
    """The architecture: narrow where pictures are large, wide where they are small."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 48, 96, 192),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=WHOLE,
        scaling_factor=SCALING_FACTOR,
    )


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where it is quick."""
    half = choose_half(device)
    return nullcontext() if half is torch.float32 else torch.autocast(device.type, half)


def is_outer(name: str) -> bool:
    """Whether a weight meets pictures or latents, and so is stepped by AdamW."""
    return name.endswith(("quant_conv.weight", "coder.conv_in.weight", "coder.conv_out.weight"))


def sample_noise(latents: Tensor, largest: float, share: float, random: torch.Generator) -> Tensor:
    """Gaussian noise for a share of latents [B, C, h, w]: up to `largest` of each channel's deviation, uniform.

    The deviation is a constant to the gradient, so that the encoder cannot buy silence by turning its latents down.
    """
    level = largest * torch.rand(len(latents), generator=random)
    level = torch.where(torch.rand(len(latents), generator=random) < share, level, torch.zeros(()))
    noise = torch.randn(latents.shape, generator=random).to(latents.device)
    return (
        level.to(latents.device)[:, None, None, None] * latents.detach().std((0, 2, 3), keepdim=True) * noise
    )


def reconstruction_loss(decoded: Tensor, clean: Tensor) -> Tensor:
    """L1 of pixels plus half the L1 of their horizontal and vertical differences."""
    error = decoded - clean
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return error.abs().mean() + 0.5 * (across.abs().mean() + down.abs().mean())


def sample_crops(
    random: np.random.Generator,
    scenes: list[Pixels],
    textures: list[Pixels],
    *,
    batch: int,
    crop: int,
    texture_share: float,
) -> Tensor:
    """Random crops as float32 [B, 3, crop, crop] in −1…1, mirrored half of the time."""
    pieces = []
    for _ in range(batch):
        shards = textures if random.random() < texture_share else scenes
        shard = shards[random.integers(len(shards))]
        picture = shard[random.integers(len(shard))]
        y, x = random.integers(0, WHOLE - crop + 1, size=2)
        piece = picture[y : y + crop, x : x + crop]
        pieces.append(piece[:, ::-1] if random.random() < 0.5 else piece)
    return to_tensor(np.stack(pieces))


def to_tensor(pictures: Pixels) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in −1…1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr_8_bit(decoded: Tensor, clean: Tensor) -> Tensor:
    """Peak signal to noise ratio of each picture in dB [B], of values in −1…1 rounded as a picture file rounds."""
    rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return 10 * torch.log10(4 / F.mse_loss(rounded, clean, reduction="none").mean((1, 2, 3)))


@torch.no_grad()
def export(model: AutoencoderKL, average: Average, settings: AutoencoderSettings, held_out: Tensor) -> None:
    """Writes the averaged weights as a (re)scaled diffusers folder and prints its PSNR on held-out scenes."""
    averaged = build(model.config.latent_channels).to(held_out.device)
    averaged.load_state_dict({**model.state_dict(), **average.values})
    averaged.eval().to(memory_format=torch.channels_last)
    means, deviations, decibels = [], [], []
    for clean in held_out.contiguous(memory_format=torch.channels_last).split(16):
        with precision(clean.device):
            posterior = averaged.encode(clean).latent_dist
            decoded = averaged.decode(posterior.mean).sample.float()
        means.append(posterior.mean.float())
        deviations.append(posterior.std.float())
        decibels.append(psnr_8_bit(decoded, clean))
    mean, posterior_std = torch.cat(means), torch.cat(deviations)
    std = mean.std((0, 2, 3))
    if not settings.decoder_only:
        fold_scaling(averaged, mean.mean((0, 2, 3)), std)
    averaged.cpu().save_pretrained(settings.folder / "vae")
    facts = {
        "held_out_psnr_db": round(float(torch.cat(decibels).mean()), 2),
        "latent_std": [round(value, 2) for value in std.tolist()],
        "posterior_std": [round(value, 3) for value in posterior_std.mean((0, 2, 3)).tolist()],
    }
    print(json.dumps(facts), flush=True)


def fold_scaling(model: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """Folds mean [C] and standard deviation [C] of the latents into the convolutions beside them.

    Afterwards 0.18215 · latent has mean 0 and standard deviation 1 in every channel: the encoder's means are shifted
    and scaled, its log-variances moved to match, and the decoder's first convolution undoes both, so that
    decode(encode(x)) stays what it was.
    """
    factor = 1 / (SCALING_FACTOR * std)
    channels = len(std)
    encoder, decoder = model.quant_conv, model.post_quant_conv
    encoder.weight[:channels] *= factor[:, None, None, None]
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) * factor
    encoder.bias[channels:] += 2 * factor.log()
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight /= factor[None, :, None, None]
    return model


if __name__ == "__main__":
    run_app(app)
