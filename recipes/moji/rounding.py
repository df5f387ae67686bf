"""`moji`'s denoiser and text encoder put on the grid of exported weights, taught by themselves as they were before.

    OMP_NUM_THREADS=2 python -m recipes.moji.rounding train     from the latents of `recipes.moji.denoiser encode`
    python -m recipes.moji.rounding export                      a copy of the folder with the rounded weights
    python -m recipes.moji.denoiser compare backbone/moji build/moji/rounded

Rounding trained weights moves what they predict. What is learned here is which way to round each: the target is what
the exact network predicts at the same noisy latents (as in distillation, Hinton et al. 2015), which has none of the
noise that a scene's own target has, so that a few minutes are enough; gradients go straight through the rounding
(`recipes.moji.training.run.on_grid`). Continues from its last checkpoint, `rounded.safetensors` in the work directory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from backbone.cli.commands import script_app
from backbone.cli.options import Option, settled_command
from backbone.diffusion.losses import squared_error
from backbone.diffusion.noise import add_noise, generator, vp
from backbone.io.console import UserError, run_app
from backbone.io.files import read_tensors, write_tensors
from backbone.models.locate import EMBEDDED
from backbone.training.loop import warm_stable_decay
from recipes.moji.autoencoder import precision
from recipes.moji.denoiser import WORKDIR, Latents, build_scheduler
from recipes.moji.training.run import (
    TRAINING,
    LoopSettings,
    Training,
    losses_on_grid,
    make_readable,
    read_trained,
    round_to_grid,
)

SHARES = {"hard": 0.35, "small": 0.1, "askew": 0.1, "others": 0.1}  # of a batch; usual scenes are the rest
FILES = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


@dataclass(frozen=True, kw_only=True)
class RoundingSettings(LoopSettings):
    """What the rounding is asked for."""

    steps: int = 300
    batch: int = 16
    learning_rate: float = 1e-5
    model: Annotated[Path, Option("The pipeline folder whose weights are rounded.", TRAINING)] = EMBEDDED


class Networks(nn.Module):
    """A folder's denoiser behind its text encoder, in fp32."""

    def __init__(self, folder: Path, device: str) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        self.unet.to(memory_format=torch.channels_last)
        self.to(device, torch.float32).eval()

    def forward(self, noisy: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
        """The prediction [B, C, h, w] at noisy latents and timesteps [B], for token ids [B, 77]."""
        with precision(noisy.device):
            predicted: Tensor = self.unet(noisy, index, self.text_encoder(tokens).last_hidden_state).sample
        return predicted.float()


app = script_app()


@settled_command(app, RoundingSettings)
def train(settings: RoundingSettings) -> None:
    """Trains, or goes on training."""
    data = Latents(
        settings.workdir, CLIPTokenizer.from_pretrained(settings.model / "tokenizer"), settings.device
    )
    learn_rounding(settings, data)


def learn_rounding(settings: RoundingSettings, data: Latents) -> Training:
    """The training to its last step, or until the minutes are over."""
    exact = Networks(settings.model, settings.device).requires_grad_(False)
    networks = Networks(settings.model, settings.device)
    matrices = {name: value for name, value in networks.named_parameters() if value.ndim > 1}
    optimizer = torch.optim.Adam(matrices.values(), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    checkpoint = settings.workdir / "rounded.safetensors"
    training = Training(settings, checkpoint, matrices, optimizer, decay=0.98)
    training.facts = {"model": str(settings.model.resolve())}
    alpha_bar = build_scheduler().alphas_cumprod

    def losses(step: int) -> Iterator[Tensor]:
        random = generator(settings.seed, step)
        clean, tokens = data.batch(settings.batch, random, SHARES)
        index = torch.randint(len(alpha_bar), (settings.batch,), generator=random)
        noise = torch.randn(clean.shape, generator=random).to(clean.device)
        noisy = add_noise(clean, noise, vp(alpha_bar[index].to(clean.device)))
        given = noisy.contiguous(memory_format=torch.channels_last), index.to(clean.device), tokens
        with torch.no_grad():
            wanted = exact(*given)
        yield squared_error(networks(*given), wanted).mean()

    lr_schedule = warm_stable_decay(settings.steps, warmup=10, decay=settings.steps)
    training.run(losses_on_grid(losses, matrices), lr_schedule, every=100)
    return training


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/moji/rounded"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = False,
    workdir: Annotated[Path, WORKDIR] = Path("build/moji"),
) -> None:
    """Writes a copy of the folder that was rounded, with the rounded weights."""
    trained, header = read_trained(workdir / "rounded.safetensors", averaged=averaged)
    source = Path(json.loads(header["facts"])["model"])
    if out.resolve() == source:
        raise UserError(f"{out} is the folder that was rounded. Name another by --out.")
    shutil.copytree(source, out, dirs_exist_ok=True)
    rounded = {_plain(name): value for name, value in round_to_grid(trained).items()}
    for part, name in FILES.items():
        tensors, said = read_tensors(source / part / name)
        for key, value in tensors.items():
            if value.ndim > 1:
                tensors[key] = rounded[_plain(f"{part}.{key}")].to(value.dtype)
        write_tensors(out / part / name, tensors, said)
    make_readable(out)
    print(f"{out}: step {header['step']}")


def _plain(name: str) -> str:
    """A weight's name, whichever version of transformers named it."""
    return name.replace("text_encoder.text_model.", "text_encoder.")


if __name__ == "__main__":
    run_app(app)
