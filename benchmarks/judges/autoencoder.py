"""How well an autoencoder reconstructs the world of `moji`, and how predictable its latents are for a denoiser.

    python -m benchmarks.judges.autoencoder --vae backbone/moji/vae --vae build/moji/vae      two minutes each

On the 300 scenes of `benchmarks.moji`, rendered (so it needs the emoji font), on as many textures as there, and on
photographs of your own with `--photographs`. PSNR is the mean of the pictures' decibels, decoded from the posterior's
mean. *Gradient kept* is the sum of absolute differences of neighbouring pixels, decoded over original: below 1 is
smear, above it grain. *With noise* is the PSNR of the first 60 when so many of a channel's deviations lie on it.
*Foreseen* is the share of a latent's variance that a linear map of its eight neighbours explains, on scenes that the
map was not fitted to: a denoiser has to learn the rest. Writes `table.md`, `table.json`, and a sheet of each:
originals above, decoded below, three times enlarged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from backbone.cli.commands import run_main
from backbone.evaluation.image_metrics import psnr_8_bit
from backbone.io.files import write_json, write_text
from backbone.io.progress import progress
from backbone.media.sheet import save_png
from backbone.media.sources.pictures import list_images
from backbone.media.transforms import crop_square
from backbone.world.rendering.render import render
from backbone.world.rendering.textures import draw_texture
from backbone.world.scene import BENCHMARK_SEEDS, Scene
from benchmarks.judges.classifier import prepare_images
from benchmarks.moji import TEXTURES, measure_gradient, select_scenes

NOISES = (0.0, 0.1, 0.2, 0.4)
NOISY, FITTED = (
    60,
    200,
)  # the first scenes, under noise and without; scenes that the linear map is fitted to, of all
STYLES = ("plain", "neon", "pencil", "pixel", "watercolor")
SHOWN, ENLARGED = 12, 3
BATCH = 20


def main(
    vae: Annotated[list[str], typer.Option(help="A diffusers folder of an AutoencoderKL; repeatable.")],
    scenes: Annotated[int, typer.Option(help="How many held-out scenes.")] = 300,
    photographs: Annotated[
        Path | None, typer.Option(help="A folder; squares of 128 pixels are taken.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/autoencoder"),
) -> None:
    """Measures each and writes the table."""
    selected = select_scenes(scenes)
    truth = prepare_images([render(scene).image for scene in selected])
    seeds = range(BENCHMARK_SEEDS[0], BENCHMARK_SEEDS[0] + TEXTURES)
    other_pictures = {"textures": prepare_images([Image.fromarray(draw_texture(seed)) for seed in seeds])}
    if photographs is not None:
        other_pictures["photographs"] = prepare_images(
            [crop_square(photo.open(), 128) for photo in list_images(photographs)]
        )
    columns = {}
    for name in vae:
        model = AutoencoderKL.from_pretrained(name, local_files_only=True).float().eval()
        model.to(memory_format=torch.channels_last)
        columns[name] = measure(model, selected, truth, other_pictures)
        save_reconstructions(model, selected, truth, out / f"{Path(name).parent.name}-reconstructions.png")
    table = format_markdown(columns, len(selected))
    write_json(out / "table.json", columns)
    write_text(out / "table.md", table)
    print(table)


@torch.no_grad()
def measure(
    model: AutoencoderKL, scenes: Sequence[Scene], truth: Tensor, other_pictures: Mapping[str, Tensor]
) -> dict[str, float]:
    """A column of the table."""
    latents = encode_pictures(model, truth)
    pictures = decode_latents(model, latents)
    psnrs = psnr_8_bit(pictures, truth)
    figures = {"channels": float(latents.shape[1]), "all": float(psnrs.mean())}
    for style in STYLES:
        selected = [name_style(scene) == style for scene in scenes]
        if any(selected):
            figures[style] = float(psnrs[torch.tensor(selected)].mean())
    for name, clean in other_pictures.items():
        figures[name] = float(psnr_8_bit(decode_latents(model, encode_pictures(model, clean)), clean).mean())
    figures["gradient kept"] = float(measure_gradient(pictures) / measure_gradient(truth))
    noise = torch.randn(latents[:NOISY].shape, generator=torch.Generator().manual_seed(0))
    deviation = latents.std((0, 2, 3), keepdim=True)
    for level in NOISES:
        noisy = decode_latents(model, latents[:NOISY] + level * deviation * noise)
        figures[f"with noise {level:g}"] = float(psnr_8_bit(noisy, truth[:NOISY]).mean())
    figures["foreseen"] = measure_predictability(latents)
    figures["MB in fp16"] = sum(value.numel() for value in model.parameters()) * 2 / 1e6
    figures["seconds to decode one"] = time_decoding(model, latents[:1])
    return {name: round(value, 3) for name, value in figures.items()}


def encode_pictures(model: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The posteriors' means."""
    return torch.cat([model.encode(batch).latent_dist.mean for batch in pictures.split(BATCH)])


def decode_latents(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures in −1…1, a batch at a time."""
    parts = []
    with progress(len(latents), "decoding") as bar:
        for batch in latents.split(BATCH):
            parts.append(model.decode(batch).sample.clamp(-1, 1))
            bar.advance(len(batch), images=len(batch))
    return torch.cat(parts)


def name_style(scene: Scene) -> str:
    """`plain`, or the style's own word: "a neon drawing of" is neon."""
    return next((style for style in STYLES[1:] if style in (scene.style or "")), STYLES[0])


def measure_predictability(latents: Tensor) -> float:
    """The share of the latents' variance that their neighbours explain linearly, mean of the channels."""
    count, channels = latents.shape[:2]
    scaled = (latents - latents.mean((0, 2, 3), keepdim=True)) / latents.std((0, 2, 3), keepdim=True)
    around = F.unfold(F.pad(scaled, (1, 1, 1, 1), mode="replicate"), 3).unflatten(1, (channels, 9))
    around = torch.cat([around[:, :, :4], around[:, :, 5:]], 2).flatten(1, 2).transpose(1, 2)
    neighbours = torch.cat([around, torch.ones_like(around[..., :1])], 2)
    goals = scaled.flatten(2).transpose(1, 2)
    fitted = min(FITTED, count * 2 // 3)
    rows, targets = neighbours[:fitted].flatten(0, 1).double(), goals[:fitted].flatten(0, 1).double()
    ridge = 0.01 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ targets).float()
    residual = goals[fitted:] - neighbours[fitted:] @ solved
    return float((1 - residual.square().mean((0, 1)) / goals[fitted:].var((0, 1))).mean())


def time_decoding(model: AutoencoderKL, latent: Tensor) -> float:
    """Median process time of decoding one latent on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(7):
        began = time.process_time()
        model.decode(latent)
        times.append(time.process_time() - began)
    torch.set_num_threads(threads)
    return float(np.median(times[2:]))


@torch.no_grad()
def save_reconstructions(model: AutoencoderKL, scenes: Sequence[Scene], truth: Tensor, path: Path) -> None:
    """Writes a sheet: scenes of every style above their reconstructions."""
    indices: list[int] = []
    for style in STYLES:
        of_style = [k for k, scene in enumerate(scenes) if name_style(scene) == style]
        indices += of_style[: count_shown(style)]
    pair = torch.stack([truth[indices], decode_latents(model, encode_pictures(model, truth[indices]))])
    rows = torch.cat([pair[:, : SHOWN // 2], pair[:, SHOWN // 2 :]]).permute(0, 3, 1, 4, 2)
    grid = ((rows.reshape(rows.shape[0] * 128, -1, 3) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(grid)
    size = (picture.width * ENLARGED, picture.height * ENLARGED)
    save_png(path, picture.resize(size, Image.Resampling.NEAREST))


def count_shown(style: str) -> int:
    """How many of the pictures shown are of a style."""
    return 4 if style == STYLES[0] else (SHOWN - 4) // (len(STYLES) - 1)


def format_markdown(columns: Mapping[str, Mapping[str, float]], scenes: int) -> str:
    """A row for every autoencoder."""
    names = list(next(iter(columns.values())))
    lines = [f"| {scenes} scenes | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for vae, figures in columns.items():
        lines.append(f"| {vae} | {' | '.join(format_cell(name, figures[name]) for name in names)} |")
    return "\n".join([*lines, ""])


def format_cell(name: str, value: float) -> str:
    if name in ("gradient kept", "foreseen"):
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if name == "channels" else f"{value:.3f}" if "seconds" in name else f"{value:.2f}"


if __name__ == "__main__":
    run_main(main)
