"""Fréchet distance between a model's pictures and true renderings, in the classifier's features.

    python -m benchmarks.judges.frechet --count 3000                          0.6 s a picture on one core
    python -m benchmarks.judges.frechet --model build/moji/pipeline --count 3000

The distance of two normal distributions fitted to the features (Heusel et al. 2017, "FID", with the features of
`benchmarks.judges.classifier` in place of Inception's). One set is drawn from the captions of the benchmark's scenes,
the other is the same scenes rendered. A floor stands beside it: as many other renderings against these. The distance
falls with the number of pictures, so figures are compared at the same count only. Writes `frechet.json` and
`frechet.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from PIL import Image
from torch import Tensor

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.io.console import run_app
from backbone.io.files import write_json, write_text
from backbone.io.progress import progress
from backbone.models.model import Backbone
from backbone.world.rendering.render import find_font, render
from benchmarks.judges.classifier import Classifier, load_classifier
from benchmarks.moji import WHAT, DrawingSettings, select_scenes

app = script_app()


@dataclass(frozen=True, kw_only=True)
class FrechetSettings(DrawingSettings):
    """Settings of the benchmark."""

    count: Annotated[int, Option("Pictures of each set.", WHAT, min=2)] = 3000


@settled_command(app, FrechetSettings)
def main(settings: FrechetSettings) -> None:
    """Draws, renders, and writes the distance and its floor."""
    find_font()
    classifier, count, out = load_classifier(device=settings.device), settings.count, settings.out
    scenes = select_scenes(2 * count)
    backbone = Backbone.open(settings.model, device=settings.device)
    images = settings.draw(backbone, scenes[:count])
    with progress(len(scenes), "rendering") as bar:
        rendered: list[Image.Image] = []
        for scene in scenes:
            rendered.append(render(scene).image)
            bar.advance(1)
    true, others = rendered[:count], rendered[count:]
    distance = measure_distance(classifier, images, true)
    floor = measure_distance(classifier, others, true)
    write_json(
        out / "frechet.json",
        {
            "model": settings.model,
            "count": count,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "sampler": settings.setting.resolve_sampler(backbone),
            "guided": settings.setting.resolve_guided(backbone),
            "distance": distance,
            "floor": floor,
        },
    )
    text = (
        "| pictures | drawn to rendered | other renderings to these |\n|---|---|---|\n"
        f"| {count} | {distance:.2f} | {floor:.2f} |\n"
    )
    write_text(out / "frechet.md", text)
    print(text)


def measure_distance(classifier: Classifier, first: list[Image.Image], second: list[Image.Image]) -> float:
    """Fréchet distance between two sets of pictures."""
    return frechet_distance(classifier.features(first), classifier.features(second))


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between normal distributions fitted to features [N, D] and [M, D]: |μ − ν|² + tr(A + B − 2·(AB)^½)."""
    first, second = first.double(), second.double()
    a, b = torch.cov(first.T), torch.cov(second.T)
    root = square_root(a)
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()  # those of AB, made symmetric
    return float((first.mean(0) - second.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross)


def square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix [D, D] without negative eigenvalues, up to rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    return root


if __name__ == "__main__":
    run_app(app)
