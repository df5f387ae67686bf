"""`moji-sparse`: a SparseCtrl for `moji` and its motion adapter, by which a picture begins to move as words say.

    python -m recipes.moji.adapters.motion clips               the same clips as the motion adapter's
    OMP_NUM_THREADS=1 python -m recipes.moji.adapters.sparse train --motion build/moji/moji-motion --processes 2
    python -m recipes.moji.adapters.sparse export --out build/moji/moji-sparse
    customize clip "a cat in a park, moving right" --image cat.png --motion build/moji/moji-motion \\
        --sparsectrl build/moji/moji-sparse

Guo et al. 2023 (SparseCtrl): the network begins as the UNet's encoder, its layers over time as the adapter's, and what
it adds as zero; everything else is frozen. It reads latents. In nine of ten clips the first frame is given, in others
the first and the last, or any three. Runs on any folder of `moji`, two hours, and continues from its last
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor, nn

from backbone.adapters.motion import Moves, set_in_motion
from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control
from backbone.diffusion.losses import denoising_score_matching
from backbone.diffusion.noise import add_noise, generator
from backbone.distributed.spawn import run_workers
from backbone.families.unet.control_files import plain_weights
from backbone.io.console import UserError, run_app
from backbone.io.files import write_text
from backbone.models.clips.motion import find_motion
from backbone.models.clips.sparse import NO_FRAME, SparseControl, build_sparsectrl
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from recipes.moji.adapters.motion import FRAMES, ClipLatents, compute_level_densities
from recipes.moji.autoencoder import precision
from recipes.moji.denoiser import LatentSettings, LatentTraining
from recipes.moji.training.run import TRAINING, fill, make_readable, read_trained

GIVEN = 3  # frames of a clip, at most
# Shares of the clips whose first frame is given, and up to here the last one too
ONLY_FIRST, AND_LAST = 0.9, 0.95
CARD = """# moji-sparse

A SparseCtrl for `moji` with a motion adapter (diffusers' `SparseControlNetModel`, fp16), from optimiser step {step}:

    controlnet = SparseControlNetModel.from_pretrained("moji-sparse")
    pipeline = AnimateDiffSparseControlNetPipeline.from_pretrained("moji", motion_adapter=…, controlnet=controlnet)

Trained on clips of `backbone/world/clip.py`, as latents. diffusers' own pipeline takes latents of 4 channels, and
`moji`'s have more, so it is drawn with `customize clip --sparsectrl`.
Apache-2.0; the glyphs are Noto Color Emoji by Google, SIL Open Font License 1.1.
"""
app = script_app()


@dataclass(frozen=True, kw_only=True)
class SparseSettings(LatentSettings):
    """Settings of the training of the SparseCtrl."""

    model: Annotated[str, Option("The picture model: moji, or a folder of its kind.", TRAINING)] = "moji"
    motion: Annotated[str, Option("The motion adapter that it works beside.", TRAINING)] = (
        "build/moji/moji-motion"
    )
    steps: int = 4_000
    batch: int = 4
    learning_rate: float = 5e-4
    warmup: int = 100
    noisy: Annotated[
        float, Option("Share of the steps' samples from the noisier levels at first.", TRAINING, min=0, max=1)
    ] = 2 / 3


@settled_command(app, SparseSettings)
def train(settings: SparseSettings) -> None:
    """Trains, or goes on training."""
    run_workers(train_sparse, (settings,), processes=settings.processes)


def train_sparse(rank: int, settings: SparseSettings) -> None:
    """One process of the training; the first one saves and reports."""
    torch.manual_seed(settings.seed)
    data = ClipLatents(settings.workdir)
    network, parameters = begin(settings)
    model = network.model
    matrices = [value for value in parameters.values() if value.ndim == 2]
    training = LatentTraining(settings, "sparse", parameters, matrices)
    uniform, noisier = compute_level_densities(len(model.path.levels.a))

    def losses(step: int) -> Iterator[Tensor]:
        random, progress = generator(settings.seed, step, rank), step / settings.steps
        frames = FRAMES if progress > 2 / 3 else FRAMES // 2
        clean, captions = data.batch(settings.batch, min(frames, data.mean.shape[2]), random)
        noisy_share = settings.noisy * min(1.0, 3 * (1 - progress))
        index = torch.multinomial(
            noisy_share * noisier + (1 - noisy_share) * uniform, len(clean), True, generator=random
        )
        noise = torch.randn(clean.shape, generator=random)
        level = model.path.levels[index]
        with precision(clean.device):
            with torch.no_grad():
                text = Conditions(model.text_encoder(captions))
            conditions = replace(text, controls=(give_frames(network, clean, random),))
            predicted = model.predict(add_noise(clean, noise, level), index, conditions)
        yield denoising_score_matching(
            predicted, clean, noise=noise, level=level, prediction_type=model.path.prediction_type
        ).mean()

    side = data.mean.shape[-1]
    with fast_attention_backward(model.denoiser), fast_attention_backward(network.module, side=side):
        training.follow(losses, rank)


def begin(settings: SparseSettings) -> tuple[SparseControl, dict[str, nn.Parameter]]:
    """The picture model in motion with a new SparseCtrl, and what is trained, by name."""
    model = Backbone.open(settings.model, device=settings.device, precision="fp32")
    set_in_motion(model, Moves(settings.motion))
    motion = find_motion(model.denoiser)
    if motion is None:
        raise UserError("SparseCtrl works beside a motion adapter. Name one with --motion.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = copy_encoder(model.denoiser, cast(Any, motion.adapter).config)
    network.requires_grad_(True).train()
    parameters = {f"sparse.{key}": value for key, value in network.named_parameters()}
    return SparseControl(network, model), parameters


def copy_encoder(denoiser: nn.Module, adapter: Any) -> nn.Module:
    """A SparseCtrl of latents with the weights of a UNet's encoder and motion layers, for layers that both have.

    The layers that read its pictures, and those that add to the UNet, begin at zero.
    """
    network = build_sparsectrl(
        denoiser,
        motion_num_attention_heads=adapter["motion_num_attention_heads"],
        motion_max_seq_length=adapter["motion_max_seq_length"],
    )
    state, weights = network.state_dict(), plain_weights(denoiser)
    network.load_state_dict(
        {
            name: weights[name]
            for name, value in state.items()
            if name in weights and weights[name].shape == value.shape
        },
        strict=False,
    )
    return network


def give_frames(network: SparseControl, clean: Tensor, random: torch.Generator) -> Control:
    """The control of clips [B, C, F, h, w] by some of their own frames."""
    places = torch.stack([draw_places(clean.shape[2], random) for _ in clean])
    rows = torch.arange(len(clean))[:, None]
    pictures = clean.transpose(1, 2)[rows, places.clamp(min=0)]
    return Control(network, (pictures, places.to(clean.device)), torch.ones(len(clean)))


def draw_places(frames: int, random: torch.Generator) -> Tensor:
    """The frames that are given [3], −1 for none: the first, the first and the last, or any three."""
    share = float(torch.rand((), generator=random))
    any_three = torch.randperm(frames, generator=random)[:GIVEN]
    if share >= AND_LAST:
        return any_three
    return torch.tensor([0, NO_FRAME if share < ONLY_FIRST else frames - 1, NO_FRAME])


@app.command()
def export(
    model: Annotated[str, typer.Option(help="The picture model that it was trained with.")] = "moji",
    motion: Annotated[str, typer.Option(help="The motion adapter.")] = "build/moji/moji-motion",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/moji/moji-sparse"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Writes the network, in fp16."""
    trained, header = read_trained(workdir / "sparse.safetensors", averaged=averaged)
    network, parameters = begin(SparseSettings(model=model, motion=motion, workdir=workdir))
    fill(parameters, trained)
    cast(Any, nn.Module.to(network.module, torch.float16)).save_pretrained(out)
    write_text(out / "README.md", CARD.format(step=header["step"]))
    make_readable(out)
    size = sum(path.stat().st_size for path in out.rglob("*")) / 1e6
    print(f"{out}: step {header['step']}, {size:.1f} MB")


if __name__ == "__main__":
    run_app(app)
