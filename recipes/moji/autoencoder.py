"""The autoencoder of `moji`: 128 × 128 pictures to 16 × 16 latents of a few channels, and back.

    python -m recipes.moji.pictures                      the training pictures, once
    python -m recipes.moji.autoencoder                   about an hour on one core
    python -m recipes.moji.autoencoder --decoder-only    polish what sees the latents, keep the latents

A variational autoencoder (Kingma & Welling 2014) with L1 + gradient loss on crops of scenes and textures, begun as a
linear transform codec (`recipes.moji.linear_start`). Two terms are for the denoiser that will draw its latents: part of
the batch is decoded from latents with noise on them, as a denoiser leaves them, and latents of half the resolution have
to decode to the picture at half the resolution (Kouzelis et al. 2025, "EQ-VAE"), which makes neighbours alike. The last
steps see whole pictures, since the norms' statistics of a crop are others.

Continues from its last checkpoint, or, for a longer run, from the last one before the learning rate fell
(`autoencoder-stable.safetensors`); writes the EMA weights as a diffusers folder, scaled so that every latent channel
has mean 0 and standard deviation 1 at `scaling_factor` 0.18215.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from torch import Tensor

from backbone.diffusion.noise import generator
from backbone.io.files import read_json, write_bytes, write_json
from backbone.training.loop import Average, load_checkpoint, save_checkpoint, train, warm_stable_decay
from backbone.world.textures import Pixels
from recipes.moji.linear_start import begin
from recipes.moji.logbook import Logbook
from recipes.moji.muon import Muon, quick_half
from recipes.moji.pictures import SHARD, load

SCALING_FACTOR = 0.18215
CHANNELS = 16
FITTED = 1200  # pictures that the linear start is fitted to
WHOLE = 128


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 3000,
    channels: Annotated[int, typer.Option(help="Of the latents.")] = CHANNELS,
    batch: Annotated[int, typer.Option(help="Crops a step.")] = 16,
    crop: Annotated[int, typer.Option(help="Side of a crop in pixels; 128 trains on whole pictures.")] = 64,
    whole_steps: Annotated[
        int, typer.Option(help="So many last steps see whole pictures, as many pixels.")
    ] = 400,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.")] = 5e-4,
    matrix_rate: Annotated[float, typer.Option(help="Muon's, for inner weights.")] = 1e-3,
    decay: Annotated[float, typer.Option(help="Over this last share the rates fall to zero.")] = 0.25,
    kl_weight: Annotated[float, typer.Option(help="Weight of the KL term per latent number.")] = 2e-4,
    texture_share: Annotated[float, typer.Option(help="Share of textures among the pictures.")] = 0.25,
    latent_noise: Annotated[
        float, typer.Option(help="Most noise on noisy latents, of each channel's deviation.")
    ] = 0.2,
    noisy_share: Annotated[float, typer.Option(help="Share of the batch that gets it.")] = 0.5,
    scale_weight: Annotated[
        float, typer.Option(help="Weight of decoding latents of half the resolution.")
    ] = 0.25,
    linear: Annotated[bool, typer.Option(help="Begin as a linear transform, or from random weights.")] = True,
    begin_from: Annotated[
        Path | None, typer.Option(help="A folder of weights to begin with instead.")
    ] = None,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Keep the encoder (and all latents).")
    ] = False,
    minutes: Annotated[float, typer.Option(help="Stop (and save) after so many minutes.")] = 1e9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
    workdir: Annotated[Path, typer.Option(help="Where the pictures are.")] = Path("build/moji"),
    land: Annotated[Path | None, typer.Option(help="Where the last weights also go, in fp16.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where `vae/` and the checkpoint go: the work directory.")
    ] = None,
) -> None:
    """Trains, or goes on training, and writes `vae/`."""
    out = out or workdir
    out.mkdir(parents=True, exist_ok=True)
    name = "decoder" if decoder_only else "autoencoder"
    torch.manual_seed(seed)
    scenes, textures = load(workdir, "scenes")[:-1], load(workdir, "textures")
    held_out = to_tensor(load(workdir, "scenes")[-1][:128]).to(device)
    if decoder_only:
        model = AutoencoderKL.from_pretrained(out / "vae").float()
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    elif begin_from is not None:
        model = AutoencoderKL.from_pretrained(begin_from, local_files_only=True).float()
    else:
        model = build(channels)
    model = model.to(device, memory_format=torch.channels_last)
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    inner = [key for key, value in parameters.items() if value.ndim >= 2 and not is_outer(key)]
    groups: list[dict[str, Any]] = [
        {"params": [value for key, value in parameters.items() if key not in inner]},
        {"params": [parameters[key] for key in inner], "momentum": 0.95, "lr": matrix_rate},
    ]
    optimizer = Muon(groups, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    checkpoint = out / f"{name}.safetensors"
    if linear and begin_from is None and not decoder_only and not checkpoint.exists():
        begin(model, to_tensor(np.concatenate([shard[: -(-FITTED // len(scenes))] for shard in scenes])))
    average = Average(parameters, decay=0.995)
    done = 0
    if checkpoint.exists():
        done, _ = load_checkpoint(checkpoint, parameters=parameters, optimizer=optimizer, average=average)

    def losses(step: int) -> Iterator[Tensor]:
        random, draw = np.random.default_rng([seed, step]), generator(seed, step)
        side, count = (crop, batch) if step <= steps - whole_steps else (WHOLE, batch * crop**2 // WHOLE**2)
        clean = crops(random, scenes, textures, batch=count, crop=side, texture_share=texture_share)
        clean = clean.to(device).contiguous(memory_format=torch.channels_last)
        with precision(clean.device):
            posterior = model.encode(clean).latent_dist
            mean, variance = posterior.mean.float(), posterior.var.float()
            sampled = mean + variance.sqrt() * torch.randn(mean.shape, generator=draw).to(device)
            noisy = sampled + noise_on(sampled, latent_noise, noisy_share, draw)
            loss = reconstruction_loss(model.decode(noisy).sample.float(), clean)
            if scale_weight:
                halved = model.decode(F.avg_pool2d(sampled, 2)).sample.float()
                loss = loss + scale_weight * reconstruction_loss(halved, F.avg_pool2d(clean, 2))
        kl = 0.5 * (mean**2 + variance - 1 - variance.log()).mean()
        yield loss + kl_weight * kl

    if done >= steps:
        export(model, average, out, held_out, rescale=not decoder_only)
    logbook = Logbook(batch=batch)
    falling = round(decay * steps)
    lr_schedule = warm_stable_decay(steps, warmup=min(80, steps // 5), decay=falling)
    for report in train(
        losses,
        parameters,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        steps=steps,
        done=done,
        average=average,
    ):
        logbook.note(report)
        last = report.step == steps or logbook.minutes > minutes
        if report.step % 100 == 0 or last:
            save_checkpoint(
                checkpoint, step=report.step, parameters=parameters, optimizer=optimizer, average=average
            )
            if report.step <= steps - falling:
                write_bytes(out / f"{name}-stable.safetensors", checkpoint.read_bytes())
        if report.step % 300 == 0 or last:
            export(model, average, out, held_out, rescale=not decoder_only)
        if last:
            break
    if land is not None:
        write_half(out / "vae", land)


def write_half(source: Path, land: Path) -> None:
    """Writes a folder of weights in fp16; where they were loaded from is nobody's business."""
    AutoencoderKL.from_pretrained(source, local_files_only=True).half().save_pretrained(land)
    settings = read_json(land / "config.json")
    write_json(land / "config.json", {key: settings[key] for key in settings if key != "_name_or_path"})
    for path in land.iterdir():
        path.chmod(0o644)  # safetensors are written for their owner alone


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
    half = quick_half(device)
    return nullcontext() if half is torch.float32 else torch.autocast(device.type, half)


def is_outer(name: str) -> bool:
    """Whether a weight meets pictures or latents, and so is stepped by AdamW."""
    return name.endswith(("quant_conv.weight", "coder.conv_in.weight", "coder.conv_out.weight"))


def noise_on(latents: Tensor, most: float, share: float, random: torch.Generator) -> Tensor:
    """Gaussian noise for a share of latents [B, C, h, w]: up to `most` of each channel's deviation, evenly drawn.

    The deviation is a constant to the gradient, so that the encoder cannot buy silence by turning its latents down.
    """
    level = most * torch.rand(len(latents), generator=random)
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


def crops(
    random: np.random.Generator,
    scenes: list[Pixels],
    textures: list[Pixels],
    *,
    batch: int,
    crop: int,
    texture_share: float,
) -> Tensor:
    """Random crops as float32 [B, 3, crop, crop] in −1…1, mirrored half of the time."""
    chosen = []
    for _ in range(batch):
        shards = textures if random.random() < texture_share else scenes
        picture = shards[random.integers(len(shards))][random.integers(SHARD)]
        y, x = random.integers(0, WHOLE - crop + 1, size=2)
        piece = picture[y : y + crop, x : x + crop]
        chosen.append(piece[:, ::-1] if random.random() < 0.5 else piece)
    return to_tensor(np.stack(chosen))


def to_tensor(pictures: Pixels) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in −1…1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr_8_bit(decoded: Tensor, clean: Tensor) -> Tensor:
    """Peak signal to noise ratio of each picture in dB [B], of values in −1…1 rounded as a picture file rounds."""
    rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return 10 * torch.log10(4 / F.mse_loss(rounded, clean, reduction="none").mean((1, 2, 3)))


@torch.no_grad()
def export(model: AutoencoderKL, average: Average, out: Path, held_out: Tensor, *, rescale: bool) -> None:
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
    if rescale:
        scaled(averaged, mean.mean((0, 2, 3)), std)
    averaged.cpu().save_pretrained(out / "vae")
    facts = {
        "held_out_psnr_db": round(float(torch.cat(decibels).mean()), 2),
        "latent_std": [round(value, 2) for value in std.tolist()],
        "posterior_std": [round(value, 3) for value in posterior_std.mean((0, 2, 3)).tolist()],
    }
    print(json.dumps(facts), flush=True)


def scaled(model: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
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
    typer.run(main)
