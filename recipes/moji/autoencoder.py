"""The autoencoder of `moji`: 128 × 128 pictures to 16 × 16 × 8 latents and back.

    python -m recipes.moji.pictures                                  the training pictures, once
    python -m recipes.moji.autoencoder --steps 6000                  about 40 minutes on two cores
    python -m recipes.moji.autoencoder --steps 9000 --decoder-only   polish what sees the latents, keep the latents

A variational autoencoder (Kingma & Welling 2014) with L1 + gradient loss, on 64 × 64 crops of scenes and textures.
Continues from its last checkpoint; writes the EMA weights as a diffusers folder, scaled so that every latent channel
has mean 0 and standard deviation 1 at `scaling_factor` 0.18215.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor

from backbone.diffusion.noise import generator
from backbone.evaluation.image_metrics import psnr_8_bit
from backbone.training.loop import Average, load_checkpoint, save_checkpoint, train, warm_cosine
from backbone.world.textures import Pixels
from recipes.moji.logbook import Logbook
from recipes.moji.muon import Muon
from recipes.moji.pictures import load

SCALING_FACTOR = 0.18215


def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 6000,
    batch: Annotated[int, typer.Option(help="Crops a step.")] = 16,
    crop: Annotated[int, typer.Option(help="Side of a crop in pixels; 128 trains on whole pictures.")] = 64,
    learning_rate: Annotated[float, typer.Option()] = 8e-4,
    matrix_rate: Annotated[float, typer.Option(help="Muon's, for inner weights.")] = 2e-3,
    kl_weight: Annotated[float, typer.Option(help="Weight of the KL term per latent number.")] = 2e-4,
    texture_share: Annotated[float, typer.Option(help="Share of textures among the pictures.")] = 0.4,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Keep the encoder (and all latents).")
    ] = False,
    minutes: Annotated[float, typer.Option(help="Stop (and save) after so many minutes.")] = 1e9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
    workdir: Annotated[Path, typer.Option()] = Path("build/moji"),
) -> None:
    """Trains, or goes on training, and writes `vae/` in the work directory."""
    name = "decoder" if decoder_only else "autoencoder"
    torch.manual_seed(seed)
    model = build().to(device, memory_format=torch.channels_last)
    if decoder_only:
        model.load_state_dict(AutoencoderKL.from_pretrained(workdir / "vae").state_dict())
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    inner = [key for key, value in parameters.items() if value.ndim >= 2 and not is_outer(key)]
    groups: list[dict[str, Any]] = [
        {"params": [value for key, value in parameters.items() if key not in inner]},
        {"params": [parameters[key] for key in inner], "momentum": 0.95, "lr": matrix_rate},
    ]
    optimizer = Muon(groups, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    average = Average(parameters, decay=0.998)
    checkpoint = workdir / f"{name}.safetensors"
    done = 0
    if checkpoint.exists():
        done, _ = load_checkpoint(checkpoint, parameters=parameters, optimizer=optimizer, average=average)
    scenes, textures = load(workdir, "scenes")[:-1], load(workdir, "textures")
    held_out = to_tensor(load(workdir, "scenes")[-1][:128]).to(device)

    def losses(step: int) -> Iterator[Tensor]:
        random = np.random.default_rng([seed, step])
        clean = crops(random, scenes, textures, batch=batch, crop=crop, texture_share=texture_share).to(
            device
        )
        clean = clean.contiguous(memory_format=torch.channels_last)
        with torch.autocast(clean.device.type, torch.bfloat16):
            posterior = model.encode(clean).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator(seed, step)).to(device)
            decoded = model.decode(posterior.mean.float() + posterior.std.float() * noise).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        yield reconstruction_loss(decoded, clean) + kl_weight * kl

    if done >= steps:
        export(model, average, workdir, held_out, rescale=not decoder_only)
    logbook = Logbook(batch=batch)
    lr_schedule = warm_cosine(steps, warmup=min(200, steps // 10), floor=0.02)
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
        if report.step % 500 == 0 or last:
            save_checkpoint(
                checkpoint, step=report.step, parameters=parameters, optimizer=optimizer, average=average
            )
            export(model, average, workdir, held_out, rescale=not decoder_only)
        if last:
            break


def build() -> AutoencoderKL:
    """The architecture: narrow where pictures are large, wide where they are small."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 48, 96, 192),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=SCALING_FACTOR,
    )


def is_outer(name: str) -> bool:
    """Whether a weight meets pictures or latents, and so is stepped by AdamW."""
    return name.endswith(("quant_conv.weight", "coder.conv_in.weight", "coder.conv_out.weight"))


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
        picture = shards[random.integers(len(shards))][random.integers(2000)]
        y, x = random.integers(0, 128 - crop + 1, size=2)
        piece = picture[y : y + crop, x : x + crop]
        chosen.append(piece[:, ::-1] if random.random() < 0.5 else piece)
    return to_tensor(np.stack(chosen))


def to_tensor(pictures: Pixels) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in −1…1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def export(model: AutoencoderKL, average: Average, workdir: Path, held_out: Tensor, *, rescale: bool) -> None:
    """Writes the averaged weights as a (re)scaled diffusers folder and prints its PSNR on held-out scenes."""
    averaged = build().to(held_out.device)
    averaged.load_state_dict({**model.state_dict(), **average.values})
    averaged.eval().to(memory_format=torch.channels_last)
    with torch.autocast(held_out.device.type, torch.bfloat16):
        posterior = averaged.encode(held_out).latent_dist
        mean, posterior_std = posterior.mean.float(), posterior.std.float()
        decoded = averaged.decode(mean).sample.float()
    deviations = mean.std((0, 2, 3)).tolist()
    if rescale:
        scaled(averaged, mean.mean((0, 2, 3)), mean.std((0, 2, 3)))
    averaged.cpu().save_pretrained(workdir / "vae")
    facts = {
        "held_out_psnr_db": round(float(psnr_8_bit(decoded, held_out).mean()), 2),
        "latent_std": [round(value, 2) for value in deviations],
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
