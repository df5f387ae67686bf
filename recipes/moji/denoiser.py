"""The denoiser and the text encoder of `moji`, trained together on the autoencoder's latents.

    python -m recipes.moji.pictures --scenes 48000
    python -m recipes.moji.denoiser encode                 latents of all scenes, once: 5 minutes on two cores
    python -m recipes.moji.denoiser train --steps 12000    40 pictures/s on two cores: about 2.7 hours
    python -m recipes.moji.denoiser export                 the whole pipeline folder, fp16

ε-prediction (Ho et al. 2020) with min-SNR-5 weights (Hang et al. 2023). Continues from its last checkpoint.
Half of the training begins with plain pictures of one thing, which teach the nouns; the share falls to none.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from backbone.files import read_tensors, write_json, write_tensors
from backbone.loop import Average, generator, load_checkpoint, save_checkpoint, train, warm_cosine
from backbone.world.scene import sample_scene
from recipes.moji.autoencoder import SCALING_FACTOR, to_tensor
from recipes.moji.pictures import SHARD, load, load_captions

HELD_OUT = 2000  # the last shard of scenes is never trained on
EMPTY_SHARE = 0.1  # captions replaced by the empty one, for classifier-free guidance
DEFAULTS = {  # what works with this model; Backbone.defaults reads it
    "steps": 25,
    "guidance": 4.0,
    "train_steps": 400,
    "learning_rate": 1e-3,
    "rank": 16,
    "batch": 6,
    "prior_batch": 2,
    "flip": True,
    "lora_layers": "all",
    "sheet_prompts": [
        "a {} in the snow",
        "a {} in a park",
        "a {} at night",
        "a {} under the sea",
        "a {} wearing a crown in a park",
        "a red {} in a forest",
        "a pencil sketch of a {} in the snow",
        "two {}s in space",
    ],
}
app = typer.Typer(add_completion=False)
WORKDIR = typer.Option(help="Where intermediate files go.")


@app.command("train")
def train_command(
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 12_000,
    batch: Annotated[int, typer.Option(help="Latents a step.")] = 32,
    learning_rate: Annotated[float, typer.Option()] = 6e-4,
    text_rows: Annotated[int, typer.Option(help="Captions of a step that also train the text encoder.")] = 8,
    text_steps: Annotated[int, typer.Option(help="Freeze the text encoder after this step.")] = 6_000,
    simple_steps: Annotated[
        int, typer.Option(help="The share of plain single things falls to none here.")
    ] = 8_000,
    minutes: Annotated[float, typer.Option(help="Stop (and save) after so many minutes.")] = 1e9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option()] = 0,
    workdir: Annotated[Path, WORKDIR] = Path("build/moji"),
) -> None:
    """Trains, or goes on training."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(workdir / "tokenizer")
    unet = build_unet().to(device, memory_format=torch.channels_last)
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # flash attention's backward is slow on CPU
    text_encoder = build_text_encoder(tokenizer)
    nn.Module.to(text_encoder, device)
    parameters = {f"unet.{key}": value for key, value in unet.named_parameters()}
    parameters |= {f"text_encoder.{key}": value for key, value in text_encoder.named_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": list(unet.parameters())},
        {"params": list(text_encoder.parameters()), "lr": learning_rate / 2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = Average(parameters, decay=0.9985)
    checkpoint = workdir / "denoiser.safetensors"
    done = 0
    if checkpoint.exists():
        done, _ = load_checkpoint(checkpoint, parameters=parameters, optimizer=optimizer, average=average)
    data = Latents(workdir, tokenizer, device)
    alpha_bar = build_scheduler().alphas_cumprod.to(device)
    density = timestep_density(alpha_bar)

    def losses(step: int) -> Iterator[Tensor]:
        random = generator(seed, step)
        simple_share = max(0.0, 0.8 * (1 - step / simple_steps))
        clean, tokens = data.batch(batch, simple_share, random)
        time_index = torch.multinomial(density, batch, replacement=True, generator=random).to(device)
        noise = torch.randn(clean.shape, generator=random).to(device)
        a = alpha_bar[time_index].sqrt()[:, None, None, None]
        b = (1 - alpha_bar[time_index]).sqrt()[:, None, None, None]
        noisy = (a * clean + b * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(noisy.device.type, torch.bfloat16):
            rows = text_rows if step <= text_steps else 0
            with torch.no_grad():
                text = text_encoder(tokens[rows:]).last_hidden_state
            if rows:
                text = torch.cat([text_encoder(tokens[:rows]).last_hidden_state, text])
            predicted = unet(noisy, time_index, text).sample.float()
        snr = alpha_bar[time_index] / (1 - alpha_bar[time_index])
        weight = snr.clamp(max=5) / snr
        yield (weight * (predicted - noise).square().mean((1, 2, 3))).mean()

    began = time.time()
    running = 0.0
    schedule = warm_cosine(steps, warmup=300, floor=0.03)
    for report in train(
        losses, parameters, optimizer=optimizer, schedule=schedule, steps=steps, done=done, average=average
    ):
        running = report.loss if not running else 0.98 * running + 0.02 * report.loss
        last = report.step == steps or time.time() - began > 60 * minutes
        if report.step % 50 == 0:
            facts = {
                "step": report.step,
                "loss": round(running, 4),
                "norm": round(report.gradient_norm, 3),
                "rate": round(report.learning_rate, 6),
                "pictures_per_second": round(batch / report.seconds, 1),
                "minutes": round((time.time() - began) / 60, 1),
            }
            print(json.dumps(facts), flush=True)
        if report.step % 500 == 0 or last:
            save_checkpoint(
                checkpoint, step=report.step, parameters=parameters, optimizer=optimizer, average=average
            )
        if last:
            break


@app.command()
def encode(
    batch: Annotated[int, typer.Option()] = 50,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workdir: Annotated[Path, WORKDIR] = Path("build/moji"),
) -> None:
    """Encodes all rendered scenes; finished shards are kept."""
    vae = AutoencoderKL.from_pretrained(workdir / "vae").to(device, memory_format=torch.channels_last).eval()
    (workdir / "latents").mkdir(exist_ok=True)
    for number, shard in enumerate(load(workdir, "scenes")):
        path = workdir / "latents" / f"{number:03d}.safetensors"
        if path.exists():
            continue
        means, deviations = [], []
        for first in range(0, SHARD, batch):
            pictures = to_tensor(np.array(shard[first : first + batch])).to(device)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), torch.autocast(pictures.device.type, torch.bfloat16):
                posterior = vae.encode(pictures).latent_dist
            means.append(posterior.mean.float().cpu() * SCALING_FACTOR)
            deviations.append(posterior.std.float().cpu() * SCALING_FACTOR)
        tensors = {"mean": torch.cat(means).half(), "std": torch.cat(deviations).half()}
        write_tensors(path, {key: value.contiguous() for key, value in tensors.items()}, {})
        print(
            path,
            f"mean {tensors['mean'].float().mean():.3f} std {tensors['mean'].float().std():.3f}",
            flush=True,
        )


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The pipeline folder to write.")] = Path("build/moji/pipeline"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
    workdir: Annotated[Path, WORKDIR] = Path("build/moji"),
) -> None:
    """Writes an ordinary diffusers folder in fp16."""
    tensors, header = read_tensors(workdir / "denoiser.safetensors")
    kind = "average/" if averaged else "parameter/"
    tokenizer = CLIPTokenizer.from_pretrained(workdir / "tokenizer")
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    for name, model in (("unet", unet), ("text_encoder", text_encoder)):
        start = f"{kind}{name}."
        model.load_state_dict(
            {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(workdir / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    for name in ("vocab.json", "merges.txt"):
        (out / "tokenizer" / name).write_bytes((workdir / "tokenizer" / name).read_bytes())
    write_json(out / "atelier.json", DEFAULTS)
    if (workdir / "scorer").is_dir():
        shutil.copytree(workdir / "scorer", out / "scorer", dirs_exist_ok=True)
    print(f"{out}: step {header['step']}")


class Latents:
    """Encoded scenes with their captions; `batch` draws some, half of them with the canonical caption."""

    def __init__(self, workdir: Path, tokenizer: CLIPTokenizer, device: str) -> None:
        shards = [read_tensors(path)[0] for path in sorted((workdir / "latents").glob("*.safetensors"))]
        self.mean = torch.cat([shard["mean"] for shard in shards])[:-HELD_OUT]
        self.std = torch.cat([shard["std"] for shard in shards])[:-HELD_OUT]
        captions = [caption for pair in load_captions(workdir)[: len(self.mean)] for caption in pair] + [""]
        encoded = tokenizer(
            captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        self.tokens = encoded["input_ids"].to(torch.int16)
        scenes = [sample_scene(seed) for seed in range(len(self.mean))]
        simple = [
            len(s.things) == 1 and not s.pair and not s.style and not s.things[0].accessory for s in scenes
        ]
        self.simple = torch.tensor(simple).nonzero()[:, 0]
        self.device = device

    def batch(self, count: int, simple_share: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, 8, 16, 16] of unit deviation, drawn from their posteriors, and token ids [B, 77]."""
        chosen = torch.randint(len(self.mean), (count,), generator=random)
        simple = self.simple[torch.randint(len(self.simple), (count,), generator=random)]
        chosen = torch.where(torch.rand(count, generator=random) < simple_share, simple, chosen)
        caption = 2 * chosen + torch.randint(2, (count,), generator=random)
        caption[torch.rand(count, generator=random) < EMPTY_SHARE] = len(self.tokens) - 1
        mean, std = self.mean[chosen].float(), self.std[chosen].float()
        clean = mean + std * torch.randn(mean.shape, generator=random)
        return clean.to(self.device), self.tokens[caption].long().to(self.device)


def timestep_density(alpha_bar: Tensor) -> Tensor:
    """How often each timestep is drawn: 70 % log-normal in σ = b/a around 1 (Karras et al. 2022), 30 % uniform."""
    log_sigma = 0.5 * ((1 - alpha_bar) / alpha_bar).log().cpu()
    width = torch.gradient(log_sigma)[0]
    normal = torch.exp(-0.5 * (log_sigma / 1.1) ** 2) * width
    return 0.7 * normal / normal.sum() + 0.3 / len(normal)


def build_unet() -> UNet2DConditionModel:
    """26 M parameters, cross-attention at 16², 8² and 4²."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 160, 320),
        layers_per_block=1,
        cross_attention_dim=256,
        attention_head_dim=(1, 2, 4),  # the number of heads, in this class's historical naming
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """4 layers of width 256; the special ids are the tokenizer's, not CLIP's."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, every setting written out."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


if __name__ == "__main__":
    app()
