"""How well a model draws the world of `moji`: 300 held-out prompts, read by the judge.

    python -m benchmarks.moji                                 some minutes on two cores

Prompts are the canonical captions of scenes that no part was trained on (seeds from 1,000,000). Every share
has its Wilson 95 % interval. The column of true pictures is the same judge on the same scenes as rendered:
what a perfect model would get; it needs the emoji font and stays empty without it, as do the autoencoder's
figures on scenes. PSNR is the mean of the pictures' decibels. Writes `table.md`, `table.json`,
`verdicts.jsonl` and `sheet.png` (64 prompts).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from backbone.console import UserError, progress, run, say
from backbone.files import append_jsonl, read_json, write_json, write_text
from backbone.images import read_folder, square
from backbone.model import Backbone
from backbone.sample import Request, sample
from backbone.sheet import GREEN, RED, Cell, in_rows, save_png, sheet
from backbone.world.render import font_path, render
from backbone.world.scene import BENCHMARK_SEEDS, Scene, fair, sample_scene
from benchmarks.judge import (
    FACTS,
    FOLDER,
    GREY_STYLES,
    TWO_DIFFERENT,
    TWO_OF_A_KIND,
    Verdict,
    load_judge,
    prepared,
    shows,
    top,
)
from recipes.moji.autoencoder import psnr
from recipes.moji.pictures import texture

TEXTURES = 200
SHEET = 64


def main(
    model: Annotated[str, typer.Option(help="moji, or a diffusers folder.")] = "moji",
    prompts: Annotated[int, typer.Option(help="How many held-out prompts.")] = 300,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is without.")] = 4.0,
    batch: Annotated[int, typer.Option(help="Pictures drawn together.")] = 10,
    judge: Annotated[Path, typer.Option(help="The judge's folder.")] = FOLDER,
    photographs: Annotated[Path | None, typer.Option(help="Also measure the autoencoder on these.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/moji"),
) -> None:
    """Draws, judges, and writes the tables and the sheet."""
    judges = load_judge(judge)
    backbone = Backbone.open(model, device=device)
    exact = Backbone.open(model, device=device, precision="fp32")
    scenes = benchmark_scenes(prompts)
    began = time.perf_counter()
    pictures = []
    with progress(len(scenes), "drawing") as bar:
        for first in range(0, len(scenes), batch):
            some = scenes[first : first + batch]
            pictures += pictures_of(backbone, some, steps=steps, guidance=guidance)
            bar.advance(len(some), images=len(some))
    together = (time.perf_counter() - began) / len(scenes)
    verdicts = judges.verdicts(pictures)
    truth = true_pictures(scenes)
    reference = judged(scenes, judges.verdicts(truth)) if truth else None
    results = judged(scenes, verdicts)
    facts: dict[str, Any] = {
        "model": model, "prompts": len(scenes), "first_seed": BENCHMARK_SEEDS[0], "steps": steps,
        "guidance": guidance, "rows": [asdict(row) for row in results],
        "true_pictures": [asdict(row) for row in reference or []],
        "psnr_db": autoencoder_figures(exact, scenes, truth, photographs),
        "seconds_per_picture": {
            f"in batches of {batch}": round(together, 3),
            "one at a time": round(alone(backbone, scenes[:4], steps, guidance), 3),
        },
        "judge": read_json(judge / FACTS).get("held_out"),
        "machine": f"{device}, {backbone.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }  # fmt: skip
    write_json(out / "table.json", facts)
    table = markdown(facts, results, reference)
    write_text(out / "table.md", table)
    save_sheet(
        out / "sheet.png", scenes, pictures, verdicts, title=f"{model}, {steps} steps, guidance {guidance:g}"
    )
    (out / "verdicts.jsonl").unlink(missing_ok=True)
    for scene, verdict in zip(scenes, verdicts, strict=True):
        seen = {head: top(reading) for head, reading in asdict(verdict).items()}
        append_jsonl(out / "verdicts.jsonl", {"seed": scene.seed, "prompt": scene.caption(), **seen})
    print(table)


def pictures_of(
    model: Backbone, scenes: Sequence[Scene], *, steps: int, guidance: float
) -> list[Image.Image]:
    """One picture of each scene's caption, from noise of the scene's seed, whatever stands in the batch beside it."""
    requests = [Request(scene.caption(), (scene.seed, 0)) for scene in scenes]
    return list(sample(model, requests, steps=steps, guidance=guidance, seed=0, batch=len(requests)))


def benchmark_scenes(count: int) -> list[Scene]:
    """The first fair scenes among the benchmark's seeds."""
    every = (sample_scene(seed) for seed in BENCHMARK_SEEDS)
    return list(itertools.islice(filter(fair, every), count))


# --- what the judge says ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Which scenes it is asked of, and when a picture passes."""

    name: str
    asked: Callable[[Scene], bool]
    passed: Callable[[Scene, Verdict], bool]


@dataclass(frozen=True)
class Row:
    """A share of right pictures with its 95 % interval."""

    name: str
    right: int
    n: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.right / self.n if self.n else math.nan


def one_kind(scene: Scene) -> bool:
    return len(scene.things) == 1


def has_noun(scene: Scene, verdict: Verdict) -> bool:
    return shows(verdict, scene.things[0].noun)


def has_place(scene: Scene, verdict: Verdict) -> bool:
    return top(verdict.place) == scene.place


QUESTIONS = (
    Question("noun", one_kind, has_noun),
    Question("place", lambda scene: True, has_place),
    Question(
        "noun and place", one_kind, lambda scene, seen: has_noun(scene, seen) and has_place(scene, seen)
    ),
    Question(
        "colour",
        lambda scene: scene.things[0].colour is not None and scene.style not in GREY_STYLES,
        lambda scene, seen: top(seen.colour) == scene.things[0].colour,
    ),
    Question(
        "accessory",
        lambda scene: scene.things[0].accessory is not None,
        lambda scene, seen: top(seen.accessory) == scene.things[0].accessory,
    ),
    Question(
        "style", lambda scene: scene.style is not None, lambda scene, seen: top(seen.style) == scene.style
    ),
    Question(
        "two of a kind",
        lambda scene: scene.pair,
        lambda scene, seen: top(seen.count) == TWO_OF_A_KIND and has_noun(scene, seen),
    ),
    Question(
        "two different, both right",
        lambda scene: len(scene.things) == 2,
        lambda scene, seen: (
            top(seen.count) == TWO_DIFFERENT and seen.two_glyphs == {thing.noun for thing in scene.things}
        ),
    ),
)


def judged(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> list[Row]:
    """A row for every question."""
    rows = []
    for question in QUESTIONS:
        passed = [
            question.passed(scene, seen)
            for scene, seen in zip(scenes, verdicts, strict=True)
            if question.asked(scene)
        ]
        rows.append(Row(question.name, sum(passed), len(passed), *wilson(sum(passed), len(passed))))
    return rows


def wilson(right: int, n: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """The score interval of a binomial share (Wilson 1927); (0, 1) when nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


# --- what else is measured ----------------------------------------------------------------------------------


def true_pictures(scenes: Sequence[Scene]) -> list[Image.Image]:
    """The scenes as rendered; none, with a sentence, where the font is missing."""
    try:
        font_path()
    except UserError as error:
        say(f"{error} Until then the columns of true pictures stay empty.")
        return []
    return [render(scene).image for scene in scenes]


@torch.no_grad()
def autoencoder_figures(
    model: Backbone, scenes: Sequence[Scene], truth: Sequence[Image.Image], photographs: Path | None
) -> dict[str, dict[str, float]]:
    """Mean PSNR in dB with the number of pictures: of scenes, by style, of textures, of photographs."""
    figures: dict[str, dict[str, float]] = {}

    def note(name: str, values: Tensor) -> None:
        figures[name] = {"db": round(float(values.mean()), 2), "n": len(values)}

    if truth:
        each = decibels(model, truth)
        note("scenes", each)
        for style in sorted({scene.style or "" for scene in scenes}):
            chosen = torch.tensor([(scene.style or "") == style for scene in scenes])
            note(f"scenes, {style.removesuffix(' of') or 'plain'}", each[chosen])
    seeds = range(BENCHMARK_SEEDS[0], BENCHMARK_SEEDS[0] + TEXTURES)
    note("textures", decibels(model, [Image.fromarray(texture(seed)) for seed in seeds]))
    if photographs is not None:
        note(
            "photographs", decibels(model, [square(photo.open(), 128) for photo in read_folder(photographs)])
        )
    return figures


def decibels(model: Backbone, images: Sequence[Image.Image], *, batch: int = 20) -> Tensor:
    """PSNR [B] of each picture against its own round trip through the latents' means."""
    parts = []
    for first in range(0, len(images), batch):
        clean = prepared(images[first : first + batch])
        parts.append(psnr(model.decode(model.encode(clean).mean).cpu(), clean))
    return torch.cat(parts)


def alone(model: Backbone, scenes: Sequence[Scene], steps: int, guidance: float) -> float:
    """Median seconds for one picture at a time; the first one warms up."""
    seconds = []
    for scene in scenes:
        began = time.perf_counter()
        pictures_of(model, [scene], steps=steps, guidance=guidance)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:] or seconds))


def markdown(facts: dict[str, Any], rows: Sequence[Row], reference: Sequence[Row] | None) -> str:
    """The tables as Markdown."""
    lines = [
        f"`{facts['model']}`: {facts['prompts']} held-out prompts, {facts['steps']} steps, "
        f"guidance {facts['guidance']:g}",
        "",
        "| judged | right | 95 % | n | true pictures |",
        "|---|---|---|---|---|",
    ]
    for number, row in enumerate(rows):
        ceiling = per_cent(reference[number].share) if reference else "–"
        interval = f"{per_cent(row.low)}–{per_cent(row.high)}"
        lines.append(f"| {row.name} | {per_cent(row.share)} | {interval} | {row.n} | {ceiling} |")
    lines += ["", "| autoencoder | PSNR dB | n |", "|---|---|---|"]
    lines += [f"| {name} | {value['db']:.2f} | {value['n']} |" for name, value in facts["psnr_db"].items()]
    speeds = [f"{seconds:.2f} s {how}" for how, seconds in facts["seconds_per_picture"].items()]
    return "\n".join([*lines, "", f"A picture takes {', '.join(speeds)} ({facts['machine']}).", ""])


def per_cent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def save_sheet(
    path: Path,
    scenes: Sequence[Scene],
    pictures: Sequence[Image.Image],
    verdicts: Sequence[Verdict],
    *,
    title: str,
) -> None:
    """The first 64 prompts in order; a red frame where the judge misses a thing that was asked for."""
    cells: list[Cell | Image.Image | None] = []
    for scene, picture, seen in list(zip(scenes, pictures, verdicts, strict=True))[:SHEET]:
        asked = {thing.noun for thing in scene.things}
        right = seen.two_glyphs == asked if len(asked) == 2 else seen.glyph in asked
        cells.append(Cell(picture, scene.caption(), GREEN if right else RED))
    note = "Every prompt in order, none chosen. Green: the judge sees the things that were asked for."
    save_png(path, sheet(in_rows(cells, 8), title=title, note=note, cell=128))


if __name__ == "__main__":
    run(lambda: typer.run(main))
