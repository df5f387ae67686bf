"""The control network that comes with `moji`: one T2I-Adapter that reads sketches, lines, edges, labels, depth, poses.

    python -m recipes.moji.adapters.control prepare --model moji            48,000 scenes: their maps, latents, captions
    python -m recipes.moji.adapters.control train --model moji --minutes 120  goes on from its last step, bit for bit
    python -m recipes.moji.adapters.control export --model build/moji/pipeline         5.6 MB beside the model's parts

The base is frozen. Half of the scenes are those that `moji` was trained on, half have things anywhere, turned, and one
before the other (`sample_posed_scene`), since angles that no training scene has are not obeyed. Sketches are drawn by
hands of all kinds (`backbone.world.maps.HandStyle`). The kinds look unlike, so one network tells them by the picture
alone; `--kinds labels` trains one for a kind. The loss, its noise levels and the run are those of `customize
train-control`. Every so many steps the run measures on held-out scenes how much the maps lower the loss, and how well
the edges of drawn pictures agree with the maps.
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.conditions import ROWS
from backbone.cli.options import Option
from backbone.io.console import UserError, notify, run_app
from backbone.io.files import (
    atomic_write,
    content_hash,
    read_json,
    read_metadata,
    read_tensors,
    write_json,
    write_tensors,
)
from backbone.io.run_folder import CHECKPOINT, CONDITION_FILE, LORA_WEIGHTS
from backbone.media.control.maps import as_hints, compute_map
from backbone.media.transforms import to_tensor
from backbone.models.control import EMBEDDED, PARTS, ControlRecord
from backbone.models.encode import encode_texts
from backbone.models.model import Backbone
from backbone.training.loop import Average
from backbone.training.run import Every, drive
from backbone.world.maps import draw_maps, draw_sketch, look_at, sample_hand
from backbone.world.rendering.record import load_labels
from backbone.world.rendering.render import find_font
from backbone.world.scene import TRAINING_SEEDS, Scene, sample_posed_scene, sample_scene
from customize.control_settings import ADAPTER, ADAPTER_LORA, NETWORKS, ControlSettings, resolve_settings
from customize.evaluation.condition_fidelity import HeldOutMaps
from customize.objectives.control import ControlTraining
from customize.objectives.control_networks import make_network
from customize.training.control.run import PreviewMap, Previews, Validation

KINDS = ("sketch", "lines", "edges", "labels", "depth", "pose")
SHARD = 500  # scenes in a file
# Posed scenes that no part of moji is trained on
HELD_OUT_SEEDS = range(TRAINING_SEEDS.stop - 48, TRAINING_SEEDS.stop)
PREVIEWS_PER_KIND = 2
NAME = "world"  # of the exported network's folder
WEIGHTS = "diffusion_pytorch_model.safetensors"
WHAT, TRAINING, OUTPUT = "What is learned", "Training", "Output"
app = script_app()


@dataclass(frozen=True, kw_only=True)
class WorkSettings:
    """Which model, and where intermediate files go."""

    model: Annotated[str, Option("moji, or a pipeline folder of its world.", WHAT)] = "moji"
    workdir: Annotated[Path, Option("Where intermediate files go.", OUTPUT)] = Path("build/moji/control")
    device: Annotated[str, Option("Where to work.", TRAINING, choices=("cpu", "cuda"))] = "cpu"


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(WorkSettings):
    """Settings of `prepare`."""

    scenes: Annotated[int, Option("How many of each mixture.", WHAT, min=1)] = 24_000
    workers: Annotated[int, Option("Processes that render.", TRAINING, min=1)] = 2


@dataclass(frozen=True, kw_only=True)
class TrainSettings(WorkSettings):
    """Settings of `train`."""

    kinds: Annotated[
        tuple[str, ...],
        Option(
            "Kinds of maps; repeatable, and one named twice is drawn twice as often.", WHAT, choices=KINDS
        ),
    ] = KINDS
    network: Annotated[str, Option("What is trained.", WHAT, choices=NETWORKS)] = ADAPTER
    rank: Annotated[int, Option("Rank of a T2I-Adapter's LoRA of the denoiser.", WHAT, min=1)] = 16
    begin_from: Annotated[
        str, Option("Start from a network's weights.", WHAT, default_text="a new one", metavar="FOLDER")
    ] = ""
    lora_alone: Annotated[bool, Option("Learn the LoRA alone: the adapter stays as it is.", WHAT)] = False
    steps: Annotated[int, Option("Optimiser steps in all.", TRAINING, min=1)] = 12_000
    batch: Annotated[int, Option("Images in a batch.", TRAINING, min=1)] = 24
    learning_rate: Annotated[float, Option("Learning rate of AdamW.", TRAINING)] = 1e-3
    minutes: Annotated[float, Option("Stop, and save, after this many minutes.", TRAINING)] = 1e9
    look: Annotated[int, Option("Evaluate and preview every N steps.", TRAINING, min=1)] = 500
    seed: Annotated[int, Option("Seed of everything random.", TRAINING)] = 0
    name: Annotated[str, Option("The run's folder in the work directory.", OUTPUT)] = "run"


class Example(NamedTuple):
    """A training example: a scene's picture [128, 128, 3], its maps as PNG files by kind, and its caption."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    maps: dict[str, bytes]
    caption: str


# Preparation --------------------------------------------------------------------------------------------------


@settled_command(app, PrepareSettings)
def prepare(settings: PrepareSettings) -> None:
    """Renders scenes, encodes them, and keeps their maps; finished shards are kept."""
    prepare_scenes(settings)


def prepare_scenes(settings: PrepareSettings) -> None:
    """Renders scenes, encodes them, and keeps their maps; finished shards are kept."""
    find_font()
    model = Backbone.open(settings.model, device=settings.device)
    with ProcessPoolExecutor(settings.workers) as pool:
        for posed in (False, True):
            for first in range(0, settings.scenes, SHARD):
                seeds = range(first, min(first + SHARD, settings.scenes))
                write_shard(
                    shard_path(settings.workdir, model, first, posed=posed), seeds, model, pool, posed
                )
        write_shard(held_out_path(settings.workdir, model), HELD_OUT_SEEDS, model, pool, True)


def shard_path(workdir: Path, model: Backbone, first: int, *, posed: bool) -> Path:
    """A shard's latents; its maps lie beside it. The name changes with the model's autoencoder."""
    return workdir / encoder_key(model) / f"{'posed' if posed else 'usual'}-{first:06d}.safetensors"


def held_out_path(workdir: Path, model: Backbone) -> Path:
    """The scenes that are held out."""
    return workdir / encoder_key(model) / "held.safetensors"


def encoder_key(model: Backbone) -> str:
    """The beginning of the hash of the autoencoder's weights."""
    weights = model.location.local("vae") or Path()
    return content_hash(weights / WEIGHTS)[:10]


def write_shard(path: Path, seeds: range, model: Backbone, pool: ProcessPoolExecutor, posed: bool) -> None:
    """Draws the scenes of these seeds in the pool, and writes their latents and their maps."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    examples = list(pool.map(partial(render_example, posed=posed), seeds, chunksize=10))
    means, stds = [], []
    for first in range(0, len(examples), 50):
        pictures = torch.stack(
            [to_tensor(Image.fromarray(example.pixels)) for example in examples[first : first + 50]]
        )
        with model.autocast():
            posterior = model.encode(pictures)
        means.append(posterior.mean.float().cpu())
        stds.append(posterior.std.float().cpu())
    with atomic_write(path.with_suffix(".zip")) as temporary, zipfile.ZipFile(temporary, "w") as maps:
        for number, example in enumerate(examples):
            for kind, png in example.maps.items():
                maps.writestr(f"{number}.{kind}.png", png)
        maps.writestr("captions.json", json.dumps([example.caption for example in examples]))
    tensors = {"mean": torch.cat(means).half().contiguous(), "std": torch.cat(stds).half().contiguous()}
    write_tensors(path, tensors, {"scenes": str(len(examples))})
    print(path, flush=True)


def render_example(seed: int, *, posed: bool) -> Example:
    """The example of a seed; its sketch has its own random hand."""
    scene: Scene = sample_posed_scene(seed) if posed else sample_scene(seed)
    rendering, layers = look_at(scene)
    hand = Random(f"{seed}/hand")
    maps = {
        **draw_maps(layers),
        "sketch": draw_sketch(layers, sample_hand(hand), hand),
        "edges": compute_map("edges", rendering.image),
    }
    return Example(
        np.asarray(rendering.image), {kind: encode_png(maps[kind]) for kind in KINDS}, scene.caption()
    )


def encode_png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# Training -----------------------------------------------------------------------------------------------------


class WorldData:
    """Prepared scenes. A `ControlSource`: the kind of each sample's map is drawn with it."""

    def __init__(self, model: Backbone, paths: Sequence[Path], kinds: Sequence[str]) -> None:
        shards = [read_tensors(path)[0] for path in paths]
        self.kinds = tuple(kinds)
        self.mean = torch.cat([shard["mean"] for shard in shards])
        self.std = torch.cat([shard["std"] for shard in shards])
        self.zips = [zipfile.ZipFile(path.with_suffix(".zip")) for path in paths]
        self.ends = np.cumsum([len(shard["mean"]) for shard in shards])
        self.texts: list[str] = [
            text for file in self.zips for text in json.loads(file.read("captions.json"))
        ]
        self.conditions = encode_texts(model, [*self.texts, ""])

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, rows: Tensor, random: torch.Generator) -> Tensor:
        mean, std = self.mean[rows].float(), self.std[rows].float()
        return mean + std * torch.randn(mean.shape, generator=random)

    def captions(self, rows: Tensor) -> Tensor:
        return rows

    def maps(self, rows: Tensor, random: torch.Generator) -> Tensor:
        kinds = torch.randint(len(self.kinds), (len(rows),), generator=random).tolist()
        return torch.stack(
            [self.map(int(row), self.kinds[kind]) for row, kind in zip(rows, kinds, strict=True)]
        )

    def map(self, row: int, kind: str) -> Tensor:
        """A scene's map [3, H, W] in 0…1."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        number = row - (int(self.ends[shard - 1]) if shard else 0)
        file = io.BytesIO(self.zips[shard].read(f"{number}.{kind}.png"))
        return as_hints(Image.open(file))[0]


class WorldTraining(ControlTraining):
    """The same loss on scenes of the world, whose labels are known."""

    def record(self) -> ControlRecord:
        return ControlRecord(
            kinds=tuple(dict.fromkeys(self.data.kinds)),
            palette=load_labels() if "labels" in self.data.kinds else {},
            base=self.model.fingerprint,
            model="moji",
        )


@settled_command(app, TrainSettings)
def train(settings: TrainSettings) -> None:
    """Trains, or goes on training from the last step that was saved."""
    train_network(settings)


def train_network(settings: TrainSettings) -> None:
    """Trains, or goes on training from the last step that was saved."""
    model = Backbone.open(settings.model, device=settings.device)
    folder = held_out_path(settings.workdir, model).parent
    paths = sorted(path for path in folder.glob("*.safetensors") if path.stem != "held")
    if not paths or not held_out_path(settings.workdir, model).exists():
        raise UserError(
            f"{folder} holds no scenes for this model's autoencoder. Run: python -m recipes.moji.adapters.control "
            f"prepare --model {settings.model}"
        )
    run = settings.workdir / settings.name
    control_settings = resolve_control_settings(settings)
    data = WorldData(model, paths, settings.kinds)
    training = WorldTraining(model, make_network(model, control_settings), data, control_settings)
    training.average = Average(training.parameters, decay=0.998)
    training.sources = {"model": model.fingerprint, "kinds": " ".join(settings.kinds)}
    held_data = WorldData(
        model, [held_out_path(settings.workdir, model)], tuple(dict.fromkeys(settings.kinds))
    )
    previews = Previews(model, training, choose_preview_maps(held_data))
    validation = Validation(run, training, make_held_out(model, held_data))
    model.free("text_encoder", "autoencoder")
    run.mkdir(parents=True, exist_ok=True)
    training.resume(run)
    validation.restore()

    def preview(step: int) -> None:
        agreed = previews.save(run / "previews" / f"step-{step:06d}.png")
        measured = validation.history[-1]
        message = f"step {step}: loss {measured.loss:.4f}, without maps {measured.loss_without_map:.4f}"
        notify(message if agreed is None else f"{message}, edges agree {agreed.f1:.3f}")
        training.write(run, {})

    try:
        drive(
            training,
            run,
            command="python -m recipes.moji.adapters.control train",
            validate=Every(settings.look, limit_minutes(settings.minutes, validation)),
            preview=Every(settings.look, preview),
        )
    except KeyboardInterrupt:
        stopped = f"Stopped and saved at step {training.saved} of {settings.steps}. The same command goes on."
        raise KeyboardInterrupt(stopped) from None
    preview(training.done)


def limit_minutes(minutes: float, validation: Validation) -> Callable[[int], str]:
    """The validation, which also stops the run when its minutes are over."""
    began = time.monotonic()

    def validate(step: int) -> str:
        spent = (time.monotonic() - began) / 60
        return validation(step) or (f"{spent:.0f} minutes are over." if spent > minutes else "")

    return validate


def resolve_control_settings(settings: TrainSettings) -> ControlSettings:
    """The settings of the run, as `customize train-control` has them."""
    return resolve_settings(
        {
            "images": str(settings.workdir),
            "condition": settings.kinds[0],
            "model": settings.model,
            "kind": settings.network,
            **({"begin_from": settings.begin_from} if settings.begin_from else {}),
            **(
                {"rank": settings.rank, "lora_alone": settings.lora_alone}
                if settings.network == ADAPTER_LORA
                else {}
            ),
            "steps": settings.steps,
            "batch": settings.batch,
            "learning_rate": settings.learning_rate,
            "checkpointing_steps": min(settings.look, 250),
            "seed": settings.seed,
            "sample_steps": 15,
            "guidance": 4.0,
        },
        {},
    )


def make_held_out(model: Backbone, data: WorldData) -> HeldOutMaps:
    """Scenes held out, each under a map of one kind, all kinds equally often."""
    rows = torch.arange(len(data))
    maps = torch.stack([data.map(int(row), data.kinds[int(row) % len(data.kinds)]) for row in rows])
    return HeldOutMaps(data.mean.float(), maps, data.conditions[rows].to(model.device))


def choose_preview_maps(data: WorldData) -> list[PreviewMap]:
    """The maps of the previews: some held-out scenes for every kind."""
    return [
        PreviewMap(data.texts[row % len(data)], kind, data.map(row % len(data), kind))
        for number, kind in enumerate(data.kinds)
        for row in range(number * PREVIEWS_PER_KIND, (number + 1) * PREVIEWS_PER_KIND)
    ]


# Export -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExportSettings(WorkSettings):
    """Settings of `export`."""

    name: Annotated[str, Option("The run's folder in the work directory.", OUTPUT)] = "run"
    scale: Annotated[float, Option("The scale that works well.", OUTPUT)] = 1.0
    sketch_scale: Annotated[float, Option("The scale that works well for sketches.", OUTPUT)] = 1.25
    stop: Annotated[float, Option("Share of the steps after which control ends.", OUTPUT)] = 1.0
    rows: Annotated[str, Option("Rows of guidance on which control acts.", OUTPUT, choices=ROWS)] = "prompted"


@settled_command(app, ExportSettings)
def export(settings: ExportSettings) -> None:
    """Writes the network in fp16 beside the model's parts, where `customize sample --condition` finds it."""
    export_network(settings)


def export_network(settings: ExportSettings) -> None:
    """Writes the network in fp16 beside the model's parts, where `customize sample --condition` finds it."""
    run, model = settings.workdir / settings.name, Backbone.open(settings.model)
    if not (run / CONDITION_FILE).exists():
        raise UserError(f"{run} holds no trained network. Run: python -m recipes.moji.adapters.control train")
    folder = (model.location.folder or Path()) / EMBEDDED / NAME
    record = read_json(run / CONDITION_FILE)
    if not model.has_fingerprint(record["base"]):
        notify(f"{run} was trained on other weights than those in {settings.model}.")
    part = next(part for part in PARTS if (run / part).is_dir())
    tensors, _ = read_tensors(run / part / WEIGHTS)
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / "config.json").write_bytes((run / part / "config.json").read_bytes())
    write_half(folder / part / WEIGHTS, tensors)
    if (run / part / LORA_WEIGHTS).exists():
        write_half(folder / part / LORA_WEIGHTS, read_tensors(run / part / LORA_WEIGHTS)[0])
    defaults = {
        "scale": settings.scale, "scales": {"sketch": settings.sketch_scale}, "start": 0.0, "stop": settings.stop,
        "rows": settings.rows,
    }  # fmt: skip
    write_json(folder / CONDITION_FILE, {**record, "base": model.fingerprint, "defaults": defaults})
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    step = read_metadata(run / CHECKPOINT)["step"]
    print(f"{folder}: step {step}, {size / 1e6:.1f} MB")


def write_half(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors in fp16."""
    write_tensors(path, {name: value.half() for name, value in tensors.items()}, {"format": "pt"})


if __name__ == "__main__":
    run_app(app)
