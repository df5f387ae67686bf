"""`moji-motion`: a motion adapter for `moji`, and the LoRA that makes it follow words of motion.

    python -m recipes.moji.adapters.motion clips --model build/moji/pipeline      6,000 clips: half an hour of one core
    OMP_NUM_THREADS=1 python -m recipes.moji.adapters.motion train --model build/moji/pipeline --processes 2
    python -m recipes.moji.adapters.motion export --model build/moji/pipeline --out build/moji/moji-motion

A frozen picture model hardly follows words of motion (`moving left` for `moving right` changes its prediction by less
than a hundredth), and motion layers have no cross-attention: so a LoRA of rank 16 on the cross-attention and the text
encoder is trained with them. The layers' last matrices begin at zero, so that training begins at the picture model.
Noise: nine tenths of its variance are shared by the frames at first (Ge et al. 2023, PYoCo), none from the middle on,
since sampling gives every frame its own noise. Levels: two thirds are noisy ones, where places are
decided, until the last third, in which all count alike and clips have all 16 frames. Every clip also counts backwards,
with the opposite words. Runs on any folder of `moji`, three hours, and continues from its last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from diffusers import MotionAdapter
from PIL.Image import Image
from torch import Tensor, nn

from backbone.adapters.lora import LORA_WEIGHTS, add_lora, save_lora
from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.conditions.conditions import Conditions
from backbone.diffusion.losses import denoising_score_matching
from backbone.diffusion.noise import add_noise, generator
from backbone.distributed.spawn import run_workers
from backbone.io.console import UserError, run_app
from backbone.io.files import read_header, read_tensors, write_tensors, write_text
from backbone.models.clips.motion import attach_motion, detach_motion, make_motion_adapter
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from backbone.world.clip import Clip, render_clip, sample_clip
from backbone.world.rendering.render import find_font
from recipes.moji.autoencoder import precision
from recipes.moji.denoiser import EMPTY_SHARE, LatentSettings, LatentTraining
from recipes.moji.training.run import TRAINING, fill, make_readable, read_trained

FRAMES = 16  # of a clip
SHARD = 100  # clips of a file
HELD_OUT = 100  # the last clips, which are never trained on
RANK, NAME = 16, "words"  # of the LoRA
CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
NOISY = 400  # of 1000 levels: from here on places are decided
CARD = """# moji-motion

A motion adapter for `moji` (diffusers' `MotionAdapter`, fp16), from optimiser step {step}, and beside it a LoRA on the
cross-attention and the text encoder (`{lora}`), by which words of motion are heard:

    pipeline = AnimateDiffPipeline.from_pretrained("moji", motion_adapter=MotionAdapter.from_pretrained("moji-motion"))
    pipeline.load_lora_weights("moji-motion")

Trained on clips of `backbone/world/clip.py`: 14 motions and 8 movements of the camera, three paraphrases each.
Apache-2.0; the glyphs are Noto Color Emoji by Google, SIL Open Font License 1.1.
"""
app = script_app()


@dataclass(frozen=True, kw_only=True)
class MotionSettings(LatentSettings):
    """Settings of the training of the motion adapter."""

    model: Annotated[str, Option("The picture model: moji, or a folder of its kind.", TRAINING)] = "moji"
    steps: int = 6_000
    batch: int = 4
    learning_rate: float = 1.5e-3
    warmup: int = 100
    shared: Annotated[
        float, Option("Share of the noise that frames have in common at first.", TRAINING, min=0, max=1)
    ] = 0.9
    noisy: Annotated[
        float, Option("Share of the steps' samples from the noisier levels at first.", TRAINING, min=0, max=1)
    ] = 2 / 3


# Data --------------------------------------------------------------------------------------------------------


@app.command()
def clips(
    count: Annotated[int, typer.Option(help="How many clips, from seed 0.")] = 6_000,
    model: Annotated[str, typer.Option(help="The model whose autoencoder encodes them.")] = "moji",
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Renders clips and encodes them; finished files are kept."""
    find_font()
    draw = partial(sample_clip, frames=FRAMES)
    write_shards(Backbone.open(model, device="cpu"), workdir / "clips", count, draw, write_shard)


def write_shards(
    model: Backbone,
    folder: Path,
    count: int,
    draw: Callable[[int], Clip],
    write: Callable[[Backbone, Path, Sequence[Clip]], Path],
) -> None:
    """Write clips of seeds from 0 in files of SHARD; finished files are kept."""
    for first in range(0, count, SHARD):
        path = folder / f"{first:06d}.safetensors"
        if not path.exists():
            seeds = range(first, min(first + SHARD, count))
            print(write(model, path, [draw(seed) for seed in seeds]), flush=True)


def encode_frames(model: Backbone, frames: Sequence[Image]) -> Tensor:
    """The latents of a clip [C, F, h, w] in fp16."""
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    return model.encode_clip(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).half()


def write_shard(model: Backbone, path: Path, values: Sequence[Clip]) -> Path:
    """The latents of clips [N, C, F, h, w] in fp16, and four captions of each: two forwards, two backwards."""
    latents, captions = [], []
    for clip in values:
        latents.append(encode_frames(model, render_clip(clip).frames))
        captions.append([words for way in (clip, clip.backwards()) for words in make_captions(way)])
    write_tensors(path, {"mean": torch.stack(latents).contiguous()}, {"captions": json.dumps(captions)})
    return path


def make_captions(clip: Clip) -> tuple[str, str]:
    """The canonical caption and another way to say it."""
    return clip.caption(), clip.caption_for_training()


class ClipLatents:
    """Encoded clips with their captions; the last ones are held out."""

    def __init__(self, workdir: Path, held_out: int = HELD_OUT) -> None:
        paths = sorted((workdir / "clips").glob("*.safetensors"))
        if not paths:
            raise UserError(
                f"{workdir / 'clips'} holds no clips. Run: python -m recipes.moji.adapters.motion clips"
            )
        self.mean = torch.cat([read_tensors(path)[0]["mean"] for path in paths])
        self.captions = [
            pair for path in paths for pair in json.loads(read_header(path).metadata["captions"])
        ]
        self.count = max(1, len(self.mean) - held_out)

    def batch(self, count: int, frames: int, random: torch.Generator) -> tuple[Tensor, list[str]]:
        """Latents [B, C, F, h, w] of this many frames, one or two apart, forwards or backwards, and their captions."""
        clean, words = [], []
        for _ in range(count):
            pick, bits, start = torch.randint(1 << 30, (3,), generator=random).tolist()
            clip, backwards = self.mean[pick % self.count], bits % 2
            stride = 1 + (bits // 2 % 2) * (clip.shape[1] >= 2 * frames)
            first = start % (clip.shape[1] - stride * (frames - 1))
            latents = clip[:, first : first + stride * (frames - 1) + 1 : stride].float()
            clean.append(latents.flip(1) if backwards else latents)
            empty = bits // 8 % 1000 < 1000 * EMPTY_SHARE
            caption = self.captions[pick % self.count][2 * backwards + bits // 4 % 2]
            words.append("" if empty else caption)
        return torch.stack(clean), words


# Training ----------------------------------------------------------------------------------------------------


@settled_command(app, MotionSettings)
def train(settings: MotionSettings) -> None:
    """Trains, or goes on training."""
    run_workers(train_motion, (settings,), processes=settings.processes)


def train_motion(rank: int, settings: MotionSettings) -> None:
    """One process of the training; the first one saves and reports."""
    torch.manual_seed(settings.seed)
    data = ClipLatents(settings.workdir)
    model, _, parameters = begin(settings)
    matrices = [value for key, value in parameters.items() if key.startswith("motion.") and value.ndim == 2]
    training = LatentTraining(settings, "motion", parameters, matrices)
    densities = compute_level_densities(len(model.path.levels.a))

    def losses(step: int) -> Iterator[Tensor]:
        random, progress = generator(settings.seed, step, rank), step / settings.steps
        last_third = progress > 2 / 3
        frames, count = (FRAMES, max(1, settings.batch // 2)) if last_third else (FRAMES // 2, settings.batch)
        clean, captions = data.batch(count, min(frames, data.mean.shape[2]), random)
        uniform, noisier = densities
        noisy_share = settings.noisy * min(1.0, 3 * (1 - progress))
        index = torch.multinomial(
            noisy_share * noisier + (1 - noisy_share) * uniform, count, True, generator=random
        )
        noise = sample_mixed_noise(clean, settings.shared * max(0.0, 1 - 2 * progress), random)
        level = model.path.levels[index]
        noisy = add_noise(clean, noise, level)
        with precision(noisy.device):
            conditions = Conditions(model.text_encoder(captions))
            predicted = model.predict(noisy, index, conditions)
        yield denoising_score_matching(
            predicted, clean, noise=noise, level=level, prediction_type=model.path.prediction_type
        ).mean()

    with fast_attention_backward(model.denoiser):  # flash attention's backward is slow on a CPU
        training.follow(losses, rank)


def begin(settings: MotionSettings) -> tuple[Backbone, MotionAdapter, dict[str, nn.Parameter]]:
    """The picture model with a new adapter and a new LoRA, and what is trained, by name."""
    model = Backbone.open(settings.model, device=settings.device, precision="fp32")
    if len(model.text_encoder.slots) != 1 or not hasattr(model.denoiser, "down_blocks"):
        raise UserError(f"{settings.model} is no model of moji's kind (a UNet with one text encoder).")
    text = model.text_encoder.slots[0].model
    parameters: dict[str, Any] = {}
    for part, module, targets in (
        ("unet", model.denoiser, CROSS),
        ("text_encoder", text, ("q_proj", "k_proj", "v_proj", "out_proj")),
    ):
        layers = [name for name, _ in module.named_modules() if name.endswith(targets)]
        values = add_lora(module, NAME, rank=RANK, alpha=RANK, targets=layers, seed=settings.seed)
        parameters |= {f"{NAME}.{part}.{key}": value for key, value in values.items()}
    adapter = make_motion_adapter(cast(Any, model.denoiser).config, seed=settings.seed)
    attach_motion(model.denoiser, adapter)
    adapter.requires_grad_(True)
    parameters |= {f"motion.{key}": value for key, value in adapter.named_parameters()}
    model.text_learned = True
    return model, adapter, parameters


def compute_level_densities(levels: int) -> tuple[Tensor, Tensor]:
    """Two densities of levels: all levels alike, and only the noisier ones."""
    uniform = torch.full((levels,), 1 / levels)
    noisier = (torch.arange(levels) >= levels * NOISY // 1000).float()
    return uniform, noisier / noisier.sum()


def sample_mixed_noise(clean: Tensor, shared: float, random: torch.Generator) -> Tensor:
    """Noise like clips [B, C, F, h, w], a share of whose variance the frames have in common (PYoCo, mixed noise)."""
    independent = torch.randn(clean.shape, generator=random)
    common = torch.randn(clean[:, :, :1].shape, generator=random)
    mixed: Tensor = shared**0.5 * common + (1 - shared) ** 0.5 * independent
    return mixed


# Export ------------------------------------------------------------------------------------------------------


@app.command()
def export(
    model: Annotated[str, typer.Option(help="The picture model that it was trained with.")] = "moji",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/moji/moji-motion"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Writes the adapter and the LoRA beside it, in fp16."""
    trained, header = read_trained(workdir / "motion.safetensors", averaged=averaged)
    opened, adapter, parameters = begin(MotionSettings(model=model, workdir=workdir))
    fill(parameters, trained)
    detach_motion(opened.denoiser)
    nn.Module.to(adapter, torch.float16)
    adapter.save_pretrained(out)
    for key, value in parameters.items():
        if key.startswith(f"{NAME}."):
            value.data = value.data.half()
    text = {slot.name: slot.model for slot in opened.text_encoder.slots}
    save_lora(out / LORA_WEIGHTS, opened.denoiser, NAME, text_encoders=text)
    write_text(out / "README.md", CARD.format(step=header["step"], lora=LORA_WEIGHTS))
    make_readable(out)
    size = sum(path.stat().st_size for path in out.rglob("*")) / 1e6
    print(f"{out}: step {header['step']}, {size:.1f} MB")


if __name__ == "__main__":
    run_app(app)
