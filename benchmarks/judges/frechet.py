"""How far a model's pictures lie from true renderings as sets: Fréchet distance in the classifier's features.

    python -m benchmarks.judges.frechet --count 3000                          0.6 s a picture on one core
    python -m benchmarks.judges.frechet --model build/moji/pipeline --count 3000

The distance of two normal distributions fitted to the features (Heusel et al. 2017, "FID", with the features of
`benchmarks.judges.classifier` in place of Inception's). One set is drawn from the captions of the benchmark's scenes,
the other is the same scenes rendered. A floor stands beside it: as many other renderings against these. The distance
falls with the number of pictures, so figures are compared at the same count only. Writes `frechet.json` and
`frechet.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from backbone.cli.commands import run_main
from backbone.io.console import progress
from backbone.io.files import write_json, write_text
from backbone.models.model import Backbone
from backbone.world.rendering.render import find_font, render
from benchmarks.judges.classifier import Classifier, load_classifier
from benchmarks.moji import Gallery, Setting, read_sampler, select_scenes


def main(
    model: Annotated[str, typer.Option(help="moji, or a diffusers folder.")] = "moji",
    count: Annotated[int, typer.Option(min=2, help="Pictures of each set.")] = 3000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is without.")] = 4.0,
    sampler: Annotated[str | None, typer.Option(help="Sampler; by model where none is named.")] = None,
    guidance_stop: Annotated[
        float | None,
        typer.Option(help="Share of the steps after which guidance ends; by model.", min=0, max=1),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/moji"),
) -> None:
    """Draws, renders, and writes the distance and its floor."""
    setting = Setting(steps, guidance, read_sampler(sampler), guidance_stop)
    find_font()
    classifier = load_classifier(device=device)
    scenes = select_scenes(2 * count)
    backbone = Backbone.open(model, device=device)
    drawn = Gallery(out / "pictures", 10).pictures(backbone, scenes[:count], setting)
    with progress(len(scenes), "rendering") as bar:
        rendered: list[Image.Image] = []
        for scene in scenes:
            rendered.append(render(scene).image)
            bar.advance(1)
    true, others = rendered[:count], rendered[count:]
    distance = distance_between(classifier, drawn, true)
    floor = distance_between(classifier, others, true)
    write_json(
        out / "frechet.json",
        {
            "model": model,
            "count": count,
            "steps": steps,
            "guidance": guidance,
            "sampler": setting.sampler_of(backbone),
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


def distance_between(classifier: Classifier, one: list[Image.Image], other: list[Image.Image]) -> float:
    """Fréchet distance between two sets of pictures."""
    return frechet_distance(classifier.features(one), classifier.features(other))


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Between normal distributions fitted to features [N, D] and [M, D]: |μ − ν|² + tr(A + B − 2·(AB)^½)."""
    one, other = one.double(), other.double()
    a, b = torch.cov(one.T), torch.cov(other.T)
    root = square_root(a)
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()  # those of AB, made symmetric
    return float((one.mean(0) - other.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross)


def square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix [D, D] without negative eigenvalues, up to rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    return root


if __name__ == "__main__":
    run_main(main)
