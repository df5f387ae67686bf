"""`moji`'s parts one after the other on a GPU that is there for minutes, and weights in pieces to carry away.

    python -m recipes.moji.on_gpu --minutes 9 --out build/moji-gpu         on a GPU
    python -m recipes.moji.on_gpu --tiny --device cpu --out build/try      a few steps of everything: does it run?

In order: pictures if there are none (by all cores; this needs the emoji font), the decoder polished, latents
encoded on the device, the denoiser with its text encoder, the flow. Each part goes on from its checkpoint in the work
directory, or from `--begin` (a pipeline of the same world) if there is none, and gets its share of the minutes: a
first stretch measures the pace, so that the learning rate falls to its end just when the time is over. What is left in
`--out` is small: both pipelines in fp16, in files of at most 15 MiB that diffusers and transformers load as they are,
and `log.txt` with all that was printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, cast

import numpy as np
import torch

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.flags import OUTPUT
from backbone.cli.options import Option
from backbone.io.console import UserError, run_app
from backbone.io.files import read_json, read_metadata, read_tensors, write_json, write_tensors
from backbone.models.locate import EMBEDDED
from backbone.world.rendering.textures import draw_texture
from recipes.moji import autoencoder, denoiser, flow
from recipes.moji.autoencoder import AutoencoderSettings
from recipes.moji.data.pictures import shard_path, write_missing
from recipes.moji.denoiser import DenoiserSettings
from recipes.moji.flow import FlowSettings
from recipes.moji.training.run import RecipeSettings

VAE = EMBEDDED / "vae"
LARGEST = 15 * 2**20  # bytes of a file that is carried away
FURTHER = {"askew": 6_000, "others": 8_000}  # scenes of further kinds
ASKEW_SHARE, OTHER_SHARE = 0.08, 0.1  # of the denoiser's batches
SHARES = {"decoder": 0.15, "denoiser": 0.5, "flow": 0.25}  # of the minutes; the rest is encoding and writing
PACE = 0.1  # of a part's time, in which its pace is measured
ENDLESS = 10**7  # steps of a run that only the clock ends
app = script_app()
PartSettings = TypeVar("PartSettings", bound=RecipeSettings)


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """Settings of a training of all parts within some minutes."""

    out: Annotated[Path, Option("Weights in pieces, and the log.", OUTPUT)]
    minutes: Annotated[float, Option("Time limit of all stages together, in minutes.", "Training", min=0)] = (
        9.0
    )
    begin: Annotated[
        Path, Option("Pipeline folder whose denoiser and text encoder to start from.", "Training")
    ] = EMBEDDED
    vae: Annotated[Path, Option("The autoencoder whose decoder is fine-tuned.", "Training")] = VAE
    workdir: Annotated[Path, Option("Pictures, latents, checkpoints.", OUTPUT)] = Path("build/moji")
    scenes: Annotated[int, Option("Scenes to render where none are there.", "Training", min=1)] = 24_000
    batch: Annotated[int, Option("Latents in a batch.", "Training", min=1)] = 256
    device: Annotated[str, Option("cuda or cpu.", "Training")] = "cuda"
    tiny: Annotated[bool, Option("A few steps on blank pictures.", "Training")] = False


@settled_command(app, GpuSettings)
def main(settings: GpuSettings) -> None:
    """Trains every part for its share of the minutes and writes what came out."""
    settings.out.mkdir(parents=True, exist_ok=True)
    with logging_to(settings.out / "log.txt"):
        began = time.monotonic()
        if settings.tiny:
            write_blank_pictures(settings.workdir)
            settings = replace(settings, minutes=0.0, batch=2)
        train_parts(settings, began)
        denoiser.export(out=settings.out / "moji", averaged=True, workdir=settings.workdir)
        flow.export(out=settings.out / "moji-flow", averaged=True, workdir=settings.workdir)
        for path in sorted(settings.out.rglob("*.safetensors")):
            split_weights(path, LARGEST)
        say(step="all", seconds=time.monotonic() - began)


def train_parts(settings: GpuSettings, began: float) -> None:
    """Decoder, latents, denoiser and flow, one after the other; `began` is when the minutes did."""
    minutes, batch, workdir, tiny = settings.minutes, settings.batch, settings.workdir, settings.tiny
    counts = {} if tiny else {"scenes": settings.scenes, **FURTHER, "textures": 1}
    say(step="pictures", seconds=prepare(workdir, settings.begin, settings.vae, counts))
    common: dict[str, Any] = {"device": settings.device, "workdir": workdir}
    decoder_settings = AutoencoderSettings(decoder_only=True, begin_from=None, whole_steps=0, **common)
    if tiny:
        decoder_settings = replace(decoder_settings, batch=2)
    train_part(
        autoencoder.main, decoder_settings, workdir / "decoder.safetensors", minutes * SHARES["decoder"]
    )
    denoiser.encode(batch=2 if tiny else 250, shards=10**6, device=settings.device, workdir=workdir)
    say(step="latents", seconds=time.monotonic() - began)
    begin = None if tiny else settings.begin
    denoiser_settings = DenoiserSettings(batch=batch, text_rows=batch // 4, begin_from=begin, **common)
    if not tiny:
        denoiser_settings = replace(denoiser_settings, askew_share=ASKEW_SHARE, other_share=OTHER_SHARE)
    train_part(
        denoiser.train, denoiser_settings, workdir / "denoiser.safetensors", minutes * SHARES["denoiser"]
    )
    flow_settings = FlowSettings(batch=batch, text_rows=batch // 4, **common)
    remaining = minutes * 0.95 - (time.monotonic() - began) / 60
    train_part(
        flow.train,
        flow_settings,
        workdir / "flow.safetensors",
        max(0.0, min(remaining, minutes * SHARES["flow"])),
    )


def train_part(
    train: Callable[[PartSettings], None], settings: PartSettings, checkpoint: Path, minutes: float
) -> None:
    """Trains a part for its minutes, from its checkpoint if there is one: a stretch for the pace, then to the end."""
    stable = checkpoint.with_name(f"{checkpoint.stem}-stable.safetensors")
    if stable.exists():  # of an earlier run, from before its learning rate fell
        shutil.copyfile(stable, checkpoint)
    first_step, began = read_steps(checkpoint), time.monotonic()
    train(replace(settings, steps=ENDLESS, minutes=PACE * minutes))
    last_step, took = read_steps(checkpoint), time.monotonic() - began
    remaining = max(0.0, 60 * minutes - took)
    total = last_step + max(1, int(remaining * (last_step - first_step) / took))
    decay: dict[str, Any] = {"decay": min(getattr(settings, "decay", 0), max(1, (total - last_step) // 3))}
    if isinstance(settings, AutoencoderSettings):
        decay = {"decay": (total - last_step) / total}
    train(replace(cast(Any, settings), steps=total, minutes=1e9, **decay))
    say(step=checkpoint.stem, of=total, began_at=first_step, seconds=time.monotonic() - began)


def read_steps(checkpoint: Path) -> int:
    """The number of steps of a checkpoint; 0 without one."""
    return int(read_metadata(checkpoint)["step"]) if checkpoint.exists() else 0


# Preparation ------------------------------------------------------------------------------------------------


def prepare(workdir: Path, begin: Path, vae: Path, counts: Mapping[str, int]) -> float:
    """Puts the tokenizer, autoencoder and this many pictures of each kind in the work directory, if missing."""
    began = time.monotonic()
    config, expected = read_json(vae / "config.json"), autoencoder.build().config
    for key in ("norm_num_groups", "mid_block_add_attention", "block_out_channels"):
        if json.dumps(config.get(key)) != json.dumps(expected[key]):
            raise UserError(f"{vae} is no autoencoder of this recipe ({key} differs). Name another --vae.")
    workdir.mkdir(parents=True, exist_ok=True)
    for source, name in ((begin / "tokenizer", "tokenizer"), (vae, "vae")):
        if not (workdir / name).exists():
            shutil.copytree(source, workdir / name)
    list(write_missing(workdir, counts, os.cpu_count()))
    return time.monotonic() - began


def write_blank_pictures(workdir: Path, count: int = 4) -> None:
    """Three small shards in place of rendered ones: textures, which need no font, under one caption."""
    (workdir / "pictures").mkdir(parents=True, exist_ok=True)
    pictures = np.stack([draw_texture(seed) for seed in range(count)])
    for kind, first in (("scenes", 0), ("scenes", count), ("textures", 0)):
        path = shard_path(workdir, kind, first)
        np.save(path, pictures)
        if kind == "scenes":
            path.with_suffix(".json").write_text(json.dumps([["a dog", "one dog"]] * count))


# Weights in pieces ------------------------------------------------------------------------------------------


def split_weights(path: Path, largest: int) -> list[Path]:
    """A file of weights in pieces of at most `largest` bytes; a smaller file stays.

    diffusers and transformers read the pieces by the index that is written beside them. A larger single tensor has a
    piece of its own.
    """
    if path.stat().st_size <= largest:
        return [path]
    tensors, _ = read_tensors(path)
    pieces: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        tensor_size = tensor.numel() * tensor.element_size() + 256  # its line in the header
        if pieces[-1] and size + tensor_size > largest - 2**16:
            pieces.append({})
            size = 0
        pieces[-1][name] = tensor
        size += tensor_size
    parts: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, piece in enumerate(pieces, 1):
        part = path.with_name(f"{path.stem}-{number:05d}-of-{len(pieces):05d}.safetensors")
        write_tensors(part, {name: value.clone() for name, value in piece.items()}, {"format": "pt"})
        weight_map |= dict.fromkeys(piece, part.name)
        parts.append(part)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    del tensors, pieces
    write_json(
        path.with_name(f"{path.name}.index.json"),
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    path.unlink()
    return parts


# The log ----------------------------------------------------------------------------------------------------


class Tee(io.TextIOBase):
    """Writes to two streams at once."""

    def __init__(self, first: TextIO, second: TextIO) -> None:
        self.first, self.second = first, second

    def write(self, text: str) -> int:
        self.first.write(text)
        return self.second.write(text)

    def flush(self) -> None:
        self.first.flush()
        self.second.flush()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Inside the `with`, what is printed is also written to a file."""
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(Tee(sys.stdout, file)):
        yield


def say(**facts: Any) -> None:
    """A line of the log."""
    print(
        json.dumps({key: round(v, 1) if isinstance(v, float) else v for key, v in facts.items()}), flush=True
    )


if __name__ == "__main__":
    run_app(app)
