"""`customize evaluate-control`: how closely samples follow their maps, on pairs of images and maps.

Every pair's caption is sampled under its map and, from the same noise, without it (the *floor*); the pair's own image
goes through the autoencoder (the *bound*). `benchmarks.control` measures more on scenes whose layout is known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from backbone.conditions.control import Control
from backbone.evaluation.clip import Scorer
from backbone.evaluation.statistics import bootstrap_mean
from backbone.io.files import write_json, write_text
from backbone.io.progress import progress
from backbone.media.control.maps import COMPUTED, as_hints, compute_map
from backbone.media.crops import read_crop
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.transforms import to_image, to_tensor
from backbone.models.control import OpenedControl
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from customize.data.control_pairs import ControlPair
from customize.evaluation.condition_fidelity import measure_agreement

TABLE = "table.json"
UNDER, FLOOR, BOUND, APART = "under the map", "no condition", "true, round trip", "under the map − without"
COLUMNS = {
    "edges": "edges F1 with the true image's",
    "map": "F1 of its map with the given one",
    "words": "CLIP-T",
}
SHOWN = 12  # pairs on the sheet


@dataclass(frozen=True)
class ControlDrawing:
    """How pairs are sampled: the kind of map, its scale, and the sampler's settings.

    condition_rows  rows of guidance that the map acts on
    sweep           further scales
    """

    kind: str
    scale: float
    steps: int
    guidance: float
    seed: int
    condition_rows: str = "both"
    sweep: tuple[float, ...] = ()


Values = dict[str, list[float | None]]
"""The values of each metric, one for every pair; None if undefined."""


def evaluate_control(
    model: Backbone,
    opened: OpenedControl,
    pairs: Sequence[ControlPair],
    drawing: ControlDrawing,
    *,
    scorer: Scorer | None,
    out: Path,
) -> dict[str, Any]:
    """Draw and measure pairs and write `table.md`, `table.json` and `sheet.png`; the table is under `text` too."""
    size = (model.resolution, model.resolution)
    true = [read_crop(pair.image, size) for pair in pairs]
    maps = torch.stack([pair.read_map(drawing.kind, size) for pair in pairs])
    images = {
        UNDER: draw_pairs(model, pairs, drawing, opened=opened, maps=maps),
        **{
            f"{UNDER}, scale {scale:g}": draw_pairs(
                model, pairs, replace(drawing, scale=scale), opened=opened, maps=maps
            )
            for scale in drawing.sweep
        },
        FLOOR: draw_pairs(model, pairs, drawing),
        BOUND: [round_trip(model, image) for image in true],
    }
    edges = [_detect_lines("edges", image) for image in true]
    values = {
        name: measure_images(samples, edges, maps, pairs, drawing.kind, scorer)
        for name, samples in images.items()
    }
    rows = summarize(values)
    facts = {"network": opened.name, "model": model.location.name, "pairs": len(pairs), **vars(drawing)}
    write_json(out / TABLE, {**facts, "rows": rows})
    text = format_table(facts, rows)
    write_text(out / "table.md", text)
    save_pairs(out / "sheet.png", drawing.kind, maps, true, images)
    return {"text": text, "rows": rows}


@torch.no_grad()
def draw_pairs(
    model: Backbone,
    pairs: Sequence[ControlPair],
    drawing: ControlDrawing,
    *,
    opened: OpenedControl | None = None,
    maps: torch.Tensor | None = None,
) -> list[Image]:
    """Sample each pair's caption, always from the same noise: under its map, or without one."""
    images: list[Image] = []
    with progress(len(pairs), f"drawing ({UNDER if opened else FLOOR})") as bar:
        for number, pair in enumerate(pairs):
            controls = []
            if opened is not None and maps is not None:
                network = opened.network.for_kind(drawing.kind)
                with model.autocast():
                    hints = maps[number : number + 1].to(model.device)
                    prompted = drawing.condition_rows == "prompted"
                    controls = [Control.of(network, hints, scale=drawing.scale, prompted=prompted)]
            images += sample(
                model,
                [Request(pair.caption, (number, 0))],
                steps=drawing.steps,
                guidance=drawing.guidance,
                seed=drawing.seed,
                controls=controls,
                advance=bar.advance_images,
            )
    return images


def round_trip(model: Backbone, image: Image) -> Image:
    """An image encoded and decoded by the autoencoder: the upper bound of agreement."""
    return to_image(model.decode(model.encode(to_tensor(image)[None]).mean)[0].cpu())


def measure_images(
    images: Sequence[Image],
    edges: Sequence[torch.Tensor],
    maps: torch.Tensor,
    pairs: Sequence[ControlPair],
    kind: str,
    scorer: Scorer | None,
) -> Values:
    """Metrics of one image for each pair; `edges` [H, W] are those of the pairs' own images."""
    values: Values = {
        "edges": [
            measure_agreement(real, _detect_lines("edges", image)).f1
            for real, image in zip(edges, images, strict=True)
        ]
    }
    if kind in COMPUTED:
        expected = [hint.amax(0) > 0.5 for hint in maps]
        values["map"] = [
            measure_agreement(hint, _detect_lines(kind, image)).f1
            for hint, image in zip(expected, images, strict=True)
        ]
    if scorer is not None and any(pair.caption for pair in pairs):
        captions = [pair.caption or " " for pair in pairs]
        cosines = (scorer.embed_images(list(images)) * scorer.embed_texts(captions)).sum(1).tolist()
        values["words"] = [
            cosine if pair.caption else None for cosine, pair in zip(cosines, pairs, strict=True)
        ]
    return values


def _detect_lines(kind: str, image: Image) -> torch.Tensor:
    """The lines [H, W] of a kind, detected in an image."""
    return as_hints(compute_map(kind, image))[0].amax(0) > 0.5


def summarize(values: dict[str, Values]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over pairs with bootstrap intervals, row by row; the last row is the paired effect of the map."""
    differences: Values = {
        name: [
            None if mine is None or other is None else mine - other
            for mine, other in zip(under, values[FLOOR][name], strict=True)
        ]
        for name, under in values[UNDER].items()
    }
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for row, columns in {**values, APART: differences}.items():
        rows[row] = {}
        for name, numbers in columns.items():
            defined = [value for value in numbers if value is not None]
            mean = bootstrap_mean(defined)
            rows[row][name] = {"mean": mean.value, "low": mean.low, "high": mean.high, "n": len(defined)}
    return rows


def format_table(facts: dict[str, Any], rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table as Markdown."""
    columns = [name for name in COLUMNS if name in rows[UNDER]]
    lines = [
        f"{facts['network']} on {facts['model']}: {facts['pairs']} pairs by {facts['kind']}, {facts['steps']} steps, "
        f"guidance {facts['guidance']:g}, scale {facts['scale']:g}, rows of guidance: {facts['condition_rows']}",
        "",
        f"| | {' | '.join(COLUMNS[name] for name in columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for row, figures in rows.items():
        cells = [
            f"{figures[name]['mean']:.3f} ({figures[name]['low']:.3f} to {figures[name]['high']:.3f})"
            for name in columns
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def save_pairs(
    path: Path, kind: str, maps: torch.Tensor, true: Sequence[Image], images: dict[str, list[Image]]
) -> None:
    """A row for each of the first pairs: its map, what was drawn under it, the map of that, and the true image."""
    is_computed = kind in COMPUTED
    columns = [UNDER, *(name for name in images if name not in (UNDER, FLOOR, BOUND)), FLOOR]
    rows: list[list[Cell | Image | None]] = []
    for n in range(min(SHOWN, len(true))):
        row: list[Cell | Image | None] = [to_image(maps[n] * 2 - 1)]
        for name in columns:
            row += [
                images[name][n],
                *([compute_map(kind, images[name][n])] if is_computed and name == UNDER else []),
            ]
        rows.append([*row, true[n]])
    titles = [kind, UNDER, *(["map of the drawn"] if is_computed else []), *columns[1:], "true"]
    save_png(path, draw_sheet(rows, column_titles=titles))
