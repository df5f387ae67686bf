"""`moji-camera`: camera paths for `moji` with its motion adapter, from clips whose camera is known exactly.

    python -m recipes.moji.adapters.camera clips --model build/moji/pipeline      a quarter of an hour of one core
    python -m recipes.moji.adapters.camera train --model build/moji/pipeline      an hour and a half
    python -m recipes.moji.adapters.camera export --model build/moji/pipeline     beside the motion adapter

Only the encoder of rays and the layers in the motion modules learn; picture model, words and motion adapter stay as
they are. Half of the clips follow one of the camera's words, and half of those say it, so that a path works with words
and without; the other clips follow paths that no word describes. Every clip also counts backwards. Cameras are relative
to the first frame of a batch's piece, whatever was cut before it. Runs on any folder of `moji`, and continues from its
last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, cast

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
from backbone.io.console import UserError, run_app
from backbone.io.files import read_header, read_tensors, write_tensors
from backbone.media.control.camera import Reach, embed_rays, flat_path, measure_reach, relative_values
from backbone.models.clips.camera import CAMERA_WEIGHTS, Camera, CameraAdapter, make_camera, save_camera
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from backbone.world.clip import Clip, render_clip, sample_clip, sample_journey
from backbone.world.motions import CAMERAS
from backbone.world.rendering.render import SIZE, find_font
from recipes.moji.adapters.motion import (
    FRAMES,
    HELD_OUT,
    compute_level_densities,
    encode_frames,
    write_shards,
)
from recipes.moji.autoencoder import precision
from recipes.moji.denoiser import EMPTY_SHARE, LatentSettings, LatentTraining
from recipes.moji.training.run import TRAINING, fill, read_trained

NAMED, MOVING = 0.5, 0.3  # shares of the clips whose camera has a word, and in which a thing moves too
app = script_app()


@dataclass(frozen=True, kw_only=True)
class CameraSettings(LatentSettings):
    """Settings of the training of the camera."""

    model: Annotated[str, Option("The picture model: moji, or a folder of its kind.", TRAINING)] = "moji"
    motion: Annotated[str, Option("The motion adapter of the picture model.", TRAINING)] = (
        "build/moji/moji-motion"
    )
    blocks: Annotated[int, Option("Blocks of the encoder at each resolution.", TRAINING, min=1)] = 1
    steps: int = 3_000
    batch: int = 4
    learning_rate: float = 1e-3
    warmup: int = 100
    noisy: Annotated[
        float,
        Option(
            "Share of the samples from the noisier levels, where places are decided.", TRAINING, min=0, max=1
        ),
    ] = 2 / 3


# Data --------------------------------------------------------------------------------------------------------


@app.command()
def clips(
    count: Annotated[int, typer.Option(help="How many clips, from seed 0.")] = 3_000,
    model: Annotated[str, typer.Option(help="The model whose autoencoder encodes them.")] = "moji",
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Renders clips and encodes them; finished files are kept."""
    find_font()
    write_shards(Backbone.open(model, device="cpu"), workdir / "travels", count, sample_travel, write_shard)


def sample_travel(seed: int, frames: int = FRAMES) -> Clip:
    """A clip whose camera moves as one of its words says, or on a path without a word."""
    clip, random = sample_clip(seed, frames=frames), Random(f"{seed}/travel")
    move = clip.move if random.random() < MOVING else ""
    if random.random() < NAMED:
        return replace(clip, move=move, camera=random.choice(tuple(CAMERAS)))
    return replace(clip, move=move, camera="", journey=sample_journey(random))


def write_shard(model: Backbone, path: Path, values: Sequence[Clip]) -> Path:
    """Writes latents of clips [N, C, F, h, w] in fp16, cameras [N, F, 4], and four captions of each clip.

    The captions are with the camera's words and without, of the clip forwards and then backwards.
    """
    latents, cameras, captions = [], [], []
    for clip in values:
        rendering = render_clip(clip)
        latents.append(encode_frames(model, rendering.frames))
        cameras.append(torch.from_numpy(rendering.camera))
        ways = (clip, clip.backwards())
        captions.append([variant.caption() for way in ways for variant in (way, replace(way, camera=""))])
    tensors = {"mean": torch.stack(latents).contiguous(), "camera": torch.stack(cameras)}
    write_tensors(path, tensors, {"captions": json.dumps(captions)})
    return path


class CameraClips:
    """Encoded clips with their cameras and captions; the last ones are held out."""

    def __init__(self, workdir: Path, held_out: int = HELD_OUT) -> None:
        paths = sorted((workdir / "travels").glob("*.safetensors"))
        if not paths:
            raise UserError(
                f"{workdir / 'travels'} holds no clips. Run: python -m recipes.moji.adapters.camera clips"
            )
        parts = [read_tensors(path)[0] for path in paths]
        self.mean = torch.cat([part["mean"] for part in parts])
        self.camera = torch.cat([part["camera"] for part in parts])
        self.captions = [
            words for path in paths for words in json.loads(read_header(path).metadata["captions"])
        ]
        self.count = max(1, len(self.mean) - held_out)

    def batch(self, count: int, frames: int, random: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Latents [B, C, F, h, w], their cameras [B, F, 4] as the first frame sees them, and captions."""
        clean, cameras, words = [], [], []
        for _ in range(count):
            pick, bits, start = torch.randint(1 << 30, (3,), generator=random).tolist()
            number, backwards = pick % self.count, bits % 2
            first = start % (self.mean.shape[2] - frames + 1)
            latents = self.mean[number, :, first : first + frames].float()
            path = self.camera[number, first : first + frames]
            clean.append(latents.flip(1) if backwards else latents)
            path = path.flip(0) if backwards else path
            cameras.append(torch.from_numpy(relative_values(path.numpy())))
            empty = bits // 4 % 1000 < 1000 * EMPTY_SHARE
            words.append("" if empty else self.captions[number][2 * backwards + bits // 2 % 2])
        return torch.stack(clean), torch.stack(cameras), words


def embed_cameras(cameras: Tensor, side: int) -> Tensor:
    """Rays [B, F, 6, H, W] of cameras [B, F, 4] of the world's pictures, for pictures of this side."""
    return torch.stack([embed_rays(flat_path(camera.numpy(), SIZE), (side, side)) for camera in cameras])


def find_reach(cameras: Tensor) -> Reach:
    """How far cameras [N, F, 4] go at most, forwards and backwards."""
    reaches = [
        measure_reach(flat_path(relative_values(path.numpy()), SIZE))
        for camera in cameras
        for path in (camera, camera.flip(0))
    ]
    return Reach(*(max(getattr(reach, name) for reach in reaches) for name in ("pan", "zoom", "turn")))


# Training ----------------------------------------------------------------------------------------------------


@settled_command(app, CameraSettings)
def train(settings: CameraSettings) -> None:
    """Trains, or goes on training."""
    run_workers(train_camera, (settings,), processes=settings.processes)


def train_camera(rank: int, settings: CameraSettings) -> None:
    """One process of the training; the first one saves and reports."""
    torch.manual_seed(settings.seed)
    data = CameraClips(settings.workdir)
    model, camera = begin(settings)
    parameters = dict(camera.module.named_parameters())
    training = LatentTraining(settings, "camera", parameters, [])
    uniform, noisier = compute_level_densities(len(model.path.levels.a))
    density = settings.noisy * noisier + (1 - settings.noisy) * uniform

    def losses(step: int) -> Iterator[Tensor]:
        random = generator(settings.seed, step, rank)
        frames = min(FRAMES, data.mean.shape[2], camera.settings.longest)
        clean, cameras, captions = data.batch(settings.batch, frames, random)
        index = torch.multinomial(density, settings.batch, True, generator=random)
        noise = torch.randn(clean.shape, generator=random)
        level = model.path.levels[index]
        noisy = add_noise(clean, noise, level)
        with torch.no_grad(), precision(noisy.device):
            text = Conditions(model.text_encoder(captions))
        with precision(noisy.device):
            features = camera.encode(embed_cameras(cameras, clean.shape[-1] * model.factor))
            control = Control(camera, features, torch.ones(len(clean)), frames=frames)
            predicted = model.predict(noisy, index, replace(text, controls=(control,)))
        yield denoising_score_matching(
            predicted, clean, noise=noise, level=level, prediction_type=model.path.prediction_type
        ).mean()

    with fast_attention_backward(model.denoiser):
        training.follow(losses, rank)


def begin(settings: CameraSettings) -> tuple[Backbone, Camera]:
    """The picture model with its motion adapter, both frozen, and a new camera, which learns."""
    model = Backbone.open(settings.model, device=settings.device, precision="fp32")
    set_in_motion(model, Moves(settings.motion))
    model.denoiser.requires_grad_(False)
    camera = make_camera(model, blocks=settings.blocks, seed=settings.seed)
    camera.module.requires_grad_(True)
    return model, camera


# Export ------------------------------------------------------------------------------------------------------


@app.command()
def export(
    model: Annotated[str, typer.Option(help="The picture model that it was trained with.")] = "moji",
    motion: Annotated[
        str, typer.Option(help="The motion adapter of the picture model.")
    ] = "build/moji/moji-motion",
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write.", show_default="camera.safetensors beside the adapter"),
    ] = None,
    blocks: Annotated[int, typer.Option(help="Blocks of the encoder at each resolution.")] = 1,
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Writes the camera in fp16, with how far the paths went that it was trained on."""
    trained, header = read_trained(workdir / "camera.safetensors", averaged=averaged)
    _, camera = begin(CameraSettings(model=model, motion=motion, blocks=blocks, workdir=workdir))
    module = cast(CameraAdapter, camera.module)
    fill(dict(cast(nn.Module, module).named_parameters()), trained)
    reach = find_reach(CameraClips(workdir).camera)
    path = out or Path(motion) / CAMERA_WEIGHTS
    save_camera(path, module, replace(camera.settings, reach=reach, motion=Path(motion).name), torch.float16)
    path.chmod(0o644)
    print(f"{path}: step {header['step']}, {path.stat().st_size / 1e6:.1f} MB, {reach}")


if __name__ == "__main__":
    run_app(app)
