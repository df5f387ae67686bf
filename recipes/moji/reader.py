"""The reader of `benchmarks.control`: labels and depths out of pictures, for the judgement of drawn ones.

    python -m recipes.moji.adapters.control prepare --model moji     if it was not called yet
    python -m recipes.moji.reader --minutes 60              goes on from its last step

Learns from the scenes that `recipes.moji.adapters.control` has prepared: their latents, some with noise as a denoiser
leaves it, decoded by the model's autoencoder, and the true labels and depths.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.diffusion.noise import generator
from backbone.io.console import UserError, run_app
from backbone.io.files import read_tensors, write_json, write_tensors
from backbone.models.model import Backbone
from backbone.training.optimizer import warm_cosine
from benchmarks.judges.reader import WEIGHTS, Reader
from recipes.moji.adapters.control import held_out_path
from recipes.moji.training.run import TRAINING, RecipeSettings, Training

NOISE = 0.4  # the most that half of the latents get, in units of their deviation
DEPTH = 4.0  # weight of the depth's error beside the labels'
FACTS = "reader.json"
app = script_app()


@dataclass(frozen=True, kw_only=True)
class ReaderSettings(RecipeSettings):
    """Settings of the training of the reader."""

    steps: int = 6_000
    batch: int = 16
    learning_rate: float = 2e-3
    workdir: Path = Path("build/moji/control")
    model: Annotated[str, Option("moji, or a pipeline folder of its world.", TRAINING)] = "moji"


@settled_command(app, ReaderSettings)
def main(settings: ReaderSettings) -> None:
    """Trains, or goes on training."""
    train_reader(settings)


def train_reader(settings: ReaderSettings) -> None:
    """Trains, or goes on training; writes the averaged weights and their accuracies with every checkpoint."""
    torch.manual_seed(settings.seed)
    model = Backbone.open(settings.model, device=settings.device)
    folder = held_out_path(settings.workdir, model).parent
    paths = sorted(path for path in folder.glob("*.safetensors") if path.stem != "held")
    if not paths:
        raise UserError(
            f"{folder} holds no scenes. Run: python -m recipes.moji.adapters.control prepare --model {settings.model}"
        )
    scenes, held_out = PreparedScenes(paths), PreparedScenes([held_out_path(settings.workdir, model)])
    reader = Reader().to(settings.device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    out = settings.workdir / "reader"
    out.mkdir(parents=True, exist_ok=True)
    training = Training(
        settings, out / "checkpoint.safetensors", dict(reader.named_parameters()), optimizer, decay=0.998
    )

    def losses(step: int) -> Iterator[Tensor]:
        random = generator(settings.seed, "reader", step)
        rows = torch.randint(len(scenes), (settings.batch,), generator=random)
        pictures = decode(model, scenes, rows, random)
        logits, depth = reader(pictures)
        labels, true_depth = (tensor.to(logits.device) for tensor in scenes.truth(rows))
        yield F.cross_entropy(logits, labels) + DEPTH * F.mse_loss(depth, true_depth)

    def save(step: int) -> None:
        with training.average.applied():
            tensors = {name: value.detach().half().cpu() for name, value in reader.state_dict().items()}
            write_tensors(out / WEIGHTS, tensors, {"step": str(step)})
            write_json(out / FACTS, {"step": step, **examine(model, reader, held_out)})

    training.run(losses, warm_cosine(settings.steps, warmup=100, floor=0.02), every=250, on_save=save)


class PreparedScenes:
    """Prepared scenes: latents, true labels and depths."""

    def __init__(self, paths: Sequence[Path]) -> None:
        shards = [read_tensors(path)[0]["mean"] for path in paths]
        self.mean = torch.cat(shards)
        self.ends = np.cumsum([len(shard) for shard in shards])
        self.zips = [zipfile.ZipFile(path.with_suffix(".zip")) for path in paths]

    def __len__(self) -> int:
        return len(self.mean)

    def truth(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of labels [B, 128, 128] and depths in 0…1 [B, 128, 128]."""
        labels = torch.stack(
            [torch.from_numpy(np.array(self._open(int(row), "labels"))).long() for row in rows]
        )
        depth = torch.stack(
            [
                torch.from_numpy(np.array(self._open(int(row), "depth").convert("L"))).float() / 255
                for row in rows
            ]
        )
        return labels, depth

    def _open(self, row: int, kind: str) -> Image.Image:
        shard = int(np.searchsorted(self.ends, row, side="right"))
        number = row - (int(self.ends[shard - 1]) if shard else 0)
        return Image.open(io.BytesIO(self.zips[shard].read(f"{number}.{kind}.png")))


def decode(
    model: Backbone, scenes: PreparedScenes, rows: Tensor, random: torch.Generator | None = None
) -> Tensor:
    """Scenes through the autoencoder [B, 3, 128, 128] in −1…1; with `random`, half of them with noise."""
    latents = scenes.mean[rows].float()
    if random is not None:
        strength = (torch.rand(len(rows), 1, 1, 1, generator=random) * 2 - 1).clamp(min=0) * NOISE
        latents = latents + strength * torch.randn(latents.shape, generator=random)
    with model.autocast():
        return model.decode(latents.to(model.device)).float()


@torch.no_grad()
def examine(model: Backbone, reader: Reader, held_out: PreparedScenes) -> dict[str, float]:
    """On held-out scenes: the share of pixels whose label is right, the mean IoU of labels, the depth's mean error."""
    rows = torch.arange(len(held_out))
    right, shared, union, error = 0.0, torch.zeros(reader.labels), torch.zeros(reader.labels), 0.0
    for batch in rows.split(16):
        logits, depth = reader(decode(model, held_out, batch))
        labels, true_depth = held_out.truth(batch)
        predicted = logits.argmax(1).cpu()
        right += float((predicted == labels).float().mean()) * len(batch)
        error += float((depth.cpu() - true_depth).abs().mean()) * len(batch)
        for label in labels.unique().tolist():
            predicted_here, true_here = predicted == label, labels == label
            shared[label] += float((predicted_here & true_here).sum())
            union[label] += float((predicted_here | true_here).sum())
    present = union > 0
    return {
        "accuracy": right / len(held_out),
        "mean_iou": float((shared[present] / union[present]).mean()),
        "depth_error": error / len(held_out),
    }


if __name__ == "__main__":
    run_app(app)
