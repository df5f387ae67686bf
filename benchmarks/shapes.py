"""What the speed benchmarks share: models of a shape with random weights, pictures, times, peaks of memory.

Random weights cost the same time as trained ones. Peak memory is of a process of its own.
"""

from __future__ import annotations

import io
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from backbone.console import UserError
from backbone.families import Text, single_file
from backbone.files import read_json, write_json, write_text
from backbone.images import square, to_tensor
from backbone.loop import generator
from backbone.model import Backbone

CONFIGS = Path(single_file.__file__).with_name("configs") / "stable-diffusion-1"
Encode = Callable[[Sequence[str]], Text]


@dataclass(frozen=True)
class Parts:
    """A model with all that the script needs besides: its autoencoder, and prompts → `Text`."""

    model: Backbone
    autoencoder: nn.Module
    encode: Encode


@dataclass(frozen=True)
class Shape:
    """A model's configurations: of its pipeline, its networks and its text encoders."""

    pipeline: str
    unet: dict[str, Any]
    autoencoder: dict[str, Any]
    text: tuple[dict[str, Any], ...]


def shape_called(name: str) -> Shape:
    """SD 1.5's shape, or SDXL's; `UserError` for another name."""
    unet, vae, text = (read_json(CONFIGS / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    if name == "sd15":
        return Shape("StableDiffusionPipeline", unet, vae, (text,))
    if name != "sdxl":
        raise UserError(f"There is no shape {name}. Choose sd15, sdxl or moji.")
    crossed = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
    larger = {
        "sample_size": 128, "down_block_types": ["DownBlock2D", crossed["down"], crossed["down"]],
        "up_block_types": [crossed["up"], crossed["up"], "UpBlock2D"], "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    second = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
    }
    return Shape(
        "StableDiffusionXLPipeline",
        {**unet, **larger},
        {**vae, "sample_size": 1024, "scaling_factor": 0.13025},
        (text, {**text, **second, "projection_dim": 1280}),
    )


def side_of(shape: str) -> int:
    """Pixels a side of a shape's pictures."""
    if shape == "moji":
        return Backbone.open("moji").resolution
    return int(shape_called(shape).unet["sample_size"]) * 8


def opened(shape: str, device: str, precision: str, *, encoders: bool = True, denoiser: bool = True) -> Parts:
    """The parts that are wanted of a shape: `moji` itself, or another with random weights."""
    if shape == "moji":
        model = Backbone.open("moji", device=device, precision=precision)
        return moji_parts(model) if encoders else Parts(model, nn.Identity(), no_text)
    configs = shape_called(shape)
    folder = Path(tempfile.mkdtemp(prefix="atelier-shape-"))
    write_json(folder / "model_index.json", {"_class_name": configs.pipeline})
    write_json(folder / "unet" / "config.json", configs.unet)
    write_json(folder / "vae" / "config.json", configs.autoencoder)
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        read_json(CONFIGS / "scheduler" / "scheduler_config.json"),
    )
    model = Backbone.open(str(folder), device=device, precision=precision)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)  # never in float32, not even while they are made
    try:
        return random_parts(model, configs, encoders=encoders, denoiser=denoiser)
    finally:
        torch.set_default_dtype(usual)


def random_parts(model: Backbone, configs: Shape, *, encoders: bool, denoiser: bool) -> Parts:
    """A shape's networks with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def ready(network: Any) -> Any:
        network = network.eval().requires_grad_(False)
        return network.to(model.device, model.dtype, memory_format=torch.channels_last)

    if denoiser:
        model.__dict__["denoiser"] = ready(UNet2DConditionModel.from_config(configs.unet))
    if not encoders:
        return Parts(model, nn.Identity(), no_text)
    autoencoder = ready(AutoencoderKL.from_config(configs.autoencoder))
    readers: list[Any] = [CLIPTextModel(CLIPTextConfig(**config)).eval() for config in configs.text]
    readers = [reader.requires_grad_(False).to(model.device, model.dtype) for reader in readers]

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Text:
        ids = torch.randint(1, 1000, (len(prompts), 77), generator=generator(0, "ids")).to(model.device)
        said = [reader(ids) for reader in readers]
        text = {"hidden": torch.cat([one.last_hidden_state.float() for one in said], -1)}
        return text if len(said) == 1 else {**text, "pooled": said[-1].pooler_output.float()}

    return Parts(model, autoencoder, encode)


def no_text(prompts: Sequence[str]) -> Text:
    """In the place of a text encoder that is not loaded."""
    return {}


def moji_parts(model: Backbone) -> Parts:
    """The embedded model's own parts."""
    return Parts(model, model.autoencoder, model.encode_prompts)


# Pictures ---------------------------------------------------------------------------------------------------


def random_pictures(side: int, count: int) -> list[bytes]:
    """JPEG files of smooth noise."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    return files


@torch.no_grad()
def encode_pictures(parts: Parts, pictures: Sequence[bytes], random: torch.Generator) -> Tensor:
    """Latents [B, C, H, W] of encoded files, drawn from their posteriors."""
    side, vae = parts.model.resolution, cast(Any, parts.autoencoder)
    own = next(vae.parameters())
    opened = [Image.open(io.BytesIO(content)).convert("RGB") for content in pictures]
    found = vae.encode(torch.stack([to_tensor(square(image, side)) for image in opened]).to(own)).latent_dist
    noise = torch.randn(found.mean.shape, generator=random).to(found.mean)
    drawn: Tensor = (found.mean + found.std * noise) * vae.config.scaling_factor
    return drawn.float()


# Time and memory --------------------------------------------------------------------------------------------


def timed(act: Callable[[], object], device: str, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def peak_gib(device: str) -> float:
    """Peak memory of this process in GiB: resident, or the GPU's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_of(module: str, *arguments: str) -> float:
    """What a command of a benchmark prints last, run in a process of its own: its peak memory in GiB."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def machine(device: str) -> str:
    """What the figures were measured on, and with which versions."""
    import diffusers
    import peft
    import transformers

    processor = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    libraries = (("torch", torch), ("diffusers", diffusers), ("transformers", transformers), ("peft", peft))
    versions = ", ".join(f"{name} {library.__version__}" for name, library in libraries)
    return f"{device}, {processor}, {torch.get_num_threads()} threads, {versions}"


def processor_name() -> str:
    """The processor as the system calls it, and whether it multiplies in bf16."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = found[0] if found else platform.processor() or platform.machine()
    return name + (" with avx512_bf16" if any("avx512_bf16" in line for line in lines) else "")


def put_section(page: Path, title: str, text: str) -> None:
    """Puts a section of Markdown into a page, in the place of the one that has its title."""
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, *sections = re.split(r"(?m)^## ", before)
    kept = dict(section.partition("\n")[::2] for section in sections) | {title: text}
    written = [head.strip(), *(f"## {name}\n\n{body.strip()}" for name, body in kept.items())]
    write_text(page, "\n\n".join(written).lstrip() + "\n")
