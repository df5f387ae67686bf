"""Shared by the speed benchmarks: models of a shape with random weights, random images, timing, peak memory.

Random weights cost the same time as trained ones. Peak memory is of a process of its own.
"""

from __future__ import annotations

import io
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor, nn

from backbone.cli.commands import run_main
from backbone.conditions.conditions import Conditions
from backbone.families.location import PUBLISHED_CONFIGS
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json, write_text
from backbone.io.run_folder import peak_memory
from backbone.media.transforms import crop_square, to_tensor
from backbone.models.model import Backbone

CONFIGS = PUBLISHED_CONFIGS / "stable-diffusion-1"
Encode = Callable[[Sequence[str]], Conditions]
CLOCKS = {"wall": "seconds on the clock", "cpu": "processor seconds, on a machine that did other work"}
CLOCKS_OF = {"wall": time.perf_counter, "cpu": time.process_time}
Clock = Literal["wall", "cpu"]
ClockFlag = Annotated[
    Clock, typer.Option(help="wall, or cpu: processor seconds, on a machine that does other work.")
]
ResultsFlag = Annotated[
    Path | None, typer.Option(help="A page in which this shape's section is put.", show_default="none")
]


@dataclass(frozen=True)
class Parts:
    """A model with all that the script needs besides: its autoencoder, and prompts → `Conditions`."""

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


def find_shape(name: str) -> Shape:
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


@contextmanager
def write_model_folder(shape: str) -> Iterator[str]:
    """Inside the `with`, a model of a shape to open: `moji` itself, or a folder with random weights in fp32.

    Another process makes the folder, so that it does not count in this one's peak memory.
    """
    if shape == "moji":
        yield shape
        return
    find_shape(shape)
    with tempfile.TemporaryDirectory(prefix="limner-shape-") as folder:
        subprocess.run([sys.executable, "-m", "benchmarks.speed.shapes", shape, folder], check=True)
        yield folder


def save_random(
    shape: Annotated[str, typer.Argument(help="sd15 or sdxl.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write a model folder of a shape with random weights, with the embedded model's tokenizer."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs, numbers = find_shape(shape), ("", "_2")
    index: dict[str, Any] = {"_class_name": configs.pipeline, "scheduler": ["diffusers", "DDIMScheduler"]}
    parts: list[tuple[str, Any]] = [
        ("unet", UNet2DConditionModel.from_config(configs.unet)),
        ("vae", AutoencoderKL.from_config(configs.autoencoder)),
    ]
    tokenizer = Backbone.open("moji", device="cpu").text_encoder.tokenizer
    for number, config in zip(numbers, configs.text, strict=False):
        kind = CLIPTextModelWithProjection if number else CLIPTextModel
        parts.append((f"text_encoder{number}", kind(CLIPTextConfig(**config))))
        tokenizer.save_pretrained(folder / f"tokenizer{number}")
        index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
    for name, part in parts:
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    write_json(folder / "model_index.json", index)
    settings = read_json(CONFIGS / "scheduler" / "scheduler_config.json")
    write_json(folder / "scheduler" / "scheduler_config.json", settings)


def open_parts(model: str, device: str, precision: str) -> Parts:
    """A model with the further parts of diffusers' scripts, all in the working precision."""
    backbone = Backbone.open(model, device=device, precision=precision)
    return Parts(backbone, backbone.autoencoder, make_encoder(backbone, backbone.dtype))


def load_like_script(model: str, device: str, precision: str) -> Parts:
    """The same, loaded in fp32, cast afterwards and left in its own order of memory, as diffusers' scripts do it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    backbone = Backbone.open(model, device=device, precision=precision)
    encode = make_encoder(backbone, backbone.dtype)
    autoencoder, denoiser = (
        kind.from_pretrained(backbone.location.source, subfolder=part).requires_grad_(False)
        for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
    )
    for network in (autoencoder, denoiser):
        network.to(backbone.device, dtype=backbone.dtype)

    def make_contiguous(
        _: Any, positional: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        sample = {"sample": keywords["sample"].contiguous()} if "sample" in keywords else {}
        return tuple(value.contiguous() for value in positional[:1]) + positional[1:], {**keywords, **sample}

    denoiser.register_forward_pre_hook(make_contiguous, with_kwargs=True)
    backbone.__dict__["denoiser"] = denoiser
    return Parts(backbone, autoencoder, encode)


def make_encoder(backbone: Backbone, dtype: torch.dtype) -> Encode:
    """Prompts → `Conditions`, by the model's encoders cast to a precision, as scripts cast them."""
    encoders = backbone.family.text_encoder(backbone.location, dtype).to(backbone.device)
    for side in encoders.slots:
        side.model.to(dtype)

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Conditions:
        return Conditions(encoders(prompts)).to(backbone.device)

    return encode


# Pictures ---------------------------------------------------------------------------------------------------


def make_random_images(side: int, count: int) -> list[bytes]:
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
    weight = next(vae.parameters())
    opened = [Image.open(io.BytesIO(content)).convert("RGB") for content in pictures]
    posterior = vae.encode(
        torch.stack([to_tensor(crop_square(image, side)) for image in opened]).to(weight)
    ).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=random).to(posterior.mean)
    latents: Tensor = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    return latents.float()


# Time and memory --------------------------------------------------------------------------------------------


def time_call(
    act: Callable[[], object], device: str, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def time_in_turns(
    acts: Mapping[str, Callable[[], object]],
    turns: int,
    device: str,
    *,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[int, str, float], object] = lambda turn, name, seconds: None,
) -> dict[str, list[float]]:
    """Seconds of every act in this many turns, after one that is not counted; `say` is called for that one too."""
    seconds_by_name: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(turns + 1):
        for name, act in acts.items():
            seconds = time_call(act, device, clock=clock)
            say(turn, name, seconds)
            if turn:
                seconds_by_name[name].append(seconds)
    return seconds_by_name


def read_peak_memory(device: str) -> float:
    """Peak memory of this process in GiB: resident, or the GPU's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (peak_memory() or 0) / 2**30


def run_module(module: str, *arguments: str) -> Any:
    """The value that a command of a benchmark prints last as JSON, run in a process of its own.

    Raises `UserError` with the last line of its errors when it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"{' '.join(command[1:])} failed: {last}")
    return json.loads(finished.stdout.splitlines()[-1])


def describe_machine(device: str) -> str:
    """The machine and the versions that the figures were measured with."""
    import diffusers
    import peft
    import transformers

    processor = torch.cuda.get_device_name() if device == "cuda" else read_processor_name()
    libraries = (("torch", torch), ("diffusers", diffusers), ("transformers", transformers), ("peft", peft))
    versions = ", ".join(f"{name} {library.__version__}" for name, library in libraries)
    return f"{device}, {processor}, {torch.get_num_threads()} threads, {versions}"


def read_processor_name() -> str:
    """The processor as the system calls it, and whether it multiplies in bf16."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return name + (" with avx512_bf16" if any("avx512_bf16" in line for line in lines) else "")


def write_section(page: Path, title: str, text: str) -> None:
    """Put a section of Markdown into a page, replacing the one of the same title."""
    old_page = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, *sections = re.split(r"(?m)^## ", old_page)
    bodies = dict(section.partition("\n")[::2] for section in sections) | {title: text}
    blocks = [head.strip(), *(f"## {name}\n\n{body.strip()}" for name, body in bodies.items())]
    write_text(page, "\n\n".join(blocks).lstrip() + "\n")


if __name__ == "__main__":
    run_main(save_random)
