"""Pictures of chosen scenes on disk, and what the autoencoder makes of them: for the scorer and the classifier.

Rendered once, kept as uint8 arrays beside the shards of `recipes.moji.data.pictures`, and read memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from backbone.diffusion.noise import generator
from backbone.io.files import atomic_write, content_hash
from backbone.world.rendering.render import find_font, render, to_array
from backbone.world.rendering.textures import Pixels
from backbone.world.scene import Scene
from recipes.moji.autoencoder import SCALING_FACTOR, to_tensor

AUTOENCODER = Path("vae/diffusion_pytorch_model.safetensors")  # in the work directory


def render_once(workdir: Path, name: str, scenes: Sequence[Scene], *, workers: int = 2) -> Pixels:
    """The pictures of scenes, uint8 [N, 128, 128, 3]; `name` must stand for just these scenes.

    Raises `UserError` when they are not on disk yet and the font is missing.
    """
    path = workdir / "pictures" / f"{name}-{len(scenes)}.npy"
    if not path.exists():
        find_font()
        with ProcessPoolExecutor(workers) as pool:
            _save(path, np.stack(list(pool.map(render_picture, scenes, chunksize=50))))
    return _open(path)


def render_picture(scene: Scene) -> Pixels:
    """A scene as uint8 [128, 128, 3]."""
    return to_array(render(scene).image)


def decode_round_trips(
    workdir: Path,
    name: str,
    pictures: Pixels,
    *,
    latent_noise: float,
    seed: int = 0,
    device: str = "cpu",
    batch: int = 25,
) -> Pixels:
    """Pictures encoded by the autoencoder, with a little noise, and decoded again; same shape.

    Half of the latents are left alone, the others get noise of a deviation up to `latent_noise` (their own is
    1), which looks like what a denoiser leaves behind. Kept under a name that changes with the autoencoder's
    weights.
    """
    weights = content_hash(workdir / AUTOENCODER)[:10]
    path = workdir / "pictures" / f"decoded-{name}-{len(pictures)}-{weights}.npy"
    if path.exists():
        return _open(path)
    vae = AutoencoderKL.from_pretrained(workdir / "vae", local_files_only=True)
    vae = vae.to(device, memory_format=torch.channels_last).eval()
    decoded = np.empty_like(pictures)
    for first in range(0, len(pictures), batch):
        random = generator(seed, name, first)
        clean = to_tensor(np.array(pictures[first : first + batch])).to(device)
        with torch.no_grad(), torch.autocast(clean.device.type, torch.bfloat16):
            latent = vae.encode(clean.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
            share = (torch.rand(len(latent), 1, 1, 1, generator=random) * 2 - 1).clamp(min=0)
            noise = torch.randn(latent.shape, generator=random)
            out = vae.decode(
                latent + (share * latent_noise * noise).to(device) / SCALING_FACTOR
            ).sample.float()
        bytes_ = ((out.clamp(-1, 1) + 1) * 127.5).round().byte()
        decoded[first : first + batch] = bytes_.permute(0, 2, 3, 1).cpu().numpy()
    _save(path, decoded)
    return _open(path)


def has_autoencoder(workdir: Path) -> bool:
    """Whether an autoencoder lies in the work directory."""
    return (workdir / AUTOENCODER).exists()


def shift(picture: Pixels, *, right: int, down: int, mirrored: bool) -> Pixels:
    """A picture [H, W, 3], mirrored or not, then shifted by whole pixels; its edges are repeated."""
    height, width = picture.shape[:2]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    source = (picture[:, ::-1] if mirrored else picture)[rows]
    first, end = max(right, 0), width + min(right, 0)
    result = np.empty_like(source)
    result[:, first:end] = source[:, first - right : end - right]
    result[:, :first] = source[:, :1]
    result[:, end:] = source[:, -1:]
    return result


def roughen(pictures: Tensor, random: Random) -> Tensor:
    """Pictures [B, 3, H, W] in −1…1 as a decoder might leave them.

    A random third is somewhat blurred, a random half has faint noise, and all are a little brighter or darker.
    """
    source = torch.Generator().manual_seed(random.getrandbits(62))

    def shares(count: int) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=source)

    count, (height, width) = len(pictures), pictures.shape[2:]
    order = torch.randperm(count, generator=source)
    rough = pictures + 0.16 * (shares(count) - 0.5)
    blurred, noisy = order[: count // 3], order[::2]
    sharp = rough[blurred]
    soft = F.avg_pool2d(sharp.contiguous(), 3, stride=1, padding=1, count_include_pad=False)
    rough[blurred] = torch.lerp(sharp, soft, shares(len(blurred)))
    field = torch.randn(3, height + 32, width + 32, generator=source)
    corners = torch.randint(0, 33, (len(noisy), 2), generator=source).tolist()
    noise = torch.stack([field[:, y : y + height, x : x + width] for y, x in corners])
    rough[noisy] = rough[noisy] + 0.06 * shares(len(noisy)) * noise
    return rough.clamp(-1, 1)


def _save(path: Path, array: NDArray[np.uint8]) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _open(path: Path) -> Pixels:
    array: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
