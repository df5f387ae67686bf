"""How well `customize train` learns a subject in its default two minutes: the twelve development concepts of the world.

    python -m benchmarks.customize                   about 35 minutes on two cores; needs the emoji font
    python -m benchmarks.customize --concepts peacock --concepts canoe

Every concept is a glyph that the base has never seen. Its five training pictures are plain renders in five places; the
real commands `customize train` and `customize sample` then draw it in the other seven. The judge names the glyph among
all that it knows, and the place. Beside it stands the base model without training, asked with the same words. Wilson
95 % intervals over the pictures, and a bootstrap over concepts, which differ more than pictures do. Writes `table.md`,
`table.json` and every run with its sheet. Concepts that `--out` has results of are not trained again, so several
processes can share the work; use another `--out` for other flags.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from backbone.concept import read_concept
from backbone.console import run, say
from backbone.files import read_json, write_json, write_text
from backbone.sheet import GREEN, RED, Cell, save_png, sheet
from backbone.world.render import font_path, render
from backbone.world.words import vocabulary
from benchmarks.judge import Verdict, load_judge, shows, top
from benchmarks.moji import per_cent, wilson
from recipes.moji.example_dog import TRAINING_PLACES, concept_pictures

TOKEN = "[V]"


@dataclass(frozen=True)
class Result:
    """One concept: how many of its pictures show the glyph and the place, after training and before."""

    concept: str
    pictures: int
    glyph: int
    place: int
    glyph_before: int
    place_before: int
    seconds: float


def main(
    concepts: Annotated[list[str] | None, typer.Option(help="Which ones; all twelve when left out.")] = None,
    count: Annotated[int, typer.Option(help="Pictures in each of the seven places.")] = 3,
    flags: Annotated[str, typer.Option(help="More flags for customize train, in one string.")] = "",
    model: Annotated[str, typer.Option(help="The base model.")] = "moji",
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("build/benchmarks/customize"),
) -> None:
    """Trains, draws, judges, and writes the table."""
    font_path()
    words = vocabulary()
    judge = load_judge()
    results: list[Result] = []
    for number, concept in enumerate(concepts or list(words.development_concepts)):
        pictures = out / "pictures" / concept.replace(" ", "-")
        for k, scene in enumerate(concept_pictures(concept, first_seed=1_900_000 + 10 * number)):
            save_png(pictures / f"{k}.png", render(scene).image)
        trained = out / "runs" / f"{pictures.name}-{seed}"
        known = out / "results" / f"{trained.name}.json"
        if known.exists():
            results.append(Result(**read_json(known)))
            continue
        noun = words.classes[concept]
        began = time.perf_counter()
        customize(
            "train",
            "--images",
            str(pictures),
            "--token",
            TOKEN,
            "--class",
            noun,
            "--model",
            model,
            "--seed",
            str(seed),
            "--out",
            str(trained),
            *flags.split(),
        )
        seconds = time.perf_counter() - began
        places = [place for place in words.places if place not in TRAINING_PLACES]
        told = read_concept(trained).tokens[TOKEN]
        after = drawn(
            [f"a {TOKEN} {noun} {place}" for place in places],
            out / "after" / trained.name,
            ["--concept", str(trained)],
            model,
            count,
            seed,
        )
        before = drawn(
            [f"a {told} {noun} {place}" for place in places],
            out / "before" / trained.name,
            [],
            model,
            count,
            seed,
        )
        asked = [place for place in places for _ in range(count)]
        seen, seen_before = judge.verdicts(after), judge.verdicts(before)
        results.append(
            Result(
                concept,
                len(after),
                glyphs(seen, concept),
                places_right(seen, asked),
                glyphs(seen_before, concept),
                places_right(seen_before, asked),
                round(seconds, 1),
            )
        )
        show(out / "sheets" / f"{trained.name}.png", concept, after, asked, seen, count)
        say(json.dumps(asdict(results[-1])))
        write_json(known, asdict(results[-1]))
    facts = {"seed": seed, "flags": flags, "results": [asdict(result) for result in results]}
    write_json(out / "table.json", facts)
    write_text(out / "table.md", table(results))
    print(table(results))


def customize(*arguments: str) -> None:
    """The real command in a process of its own."""
    subprocess.run([sys.executable, "-m", "customize.cli", *arguments], check=True)


def drawn(
    prompts: list[str], folder: Path, more: list[str], model: str, count: int, seed: int
) -> list[Image.Image]:
    """The pictures that `customize sample` draws, in order."""
    customize(
        "sample",
        *prompts,
        "--out",
        str(folder),
        "--count",
        str(count),
        "--seed",
        str(seed),
        "--model",
        model,
        *more,
    )
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("p??-s??.png"))]


def glyphs(seen: Sequence[Verdict], concept: str) -> int:
    """In how many pictures the judge names this glyph first among all that it knows."""
    return sum(shows(verdict, concept) for verdict in seen)


def places_right(seen: Sequence[Verdict], asked: Sequence[str]) -> int:
    """In how many pictures it names the place that was asked for."""
    return sum(top(verdict.place) == place for verdict, place in zip(seen, asked, strict=True))


def show(
    path: Path, concept: str, pictures: list[Image.Image], asked: list[str], seen: list[Verdict], count: int
) -> None:
    """A sheet of all pictures, framed by what the judge said."""
    cells = [
        Cell(picture, f"{place}: {verdict.glyph}", GREEN if shows(verdict, concept) else RED)
        for picture, place, verdict in zip(pictures, asked, seen, strict=True)
    ]
    rows = [[cells[place * count + k] for place in range(len(cells) // count)] for k in range(count)]
    save_png(
        path, sheet(rows, title=concept, note="Green: the judge names the concept's glyph first.", cell=128)
    )


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for every concept, then all of them with intervals."""
    lines = [
        "| concept | glyph | place | glyph, base | place, base | training |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        n = result.pictures
        shares = (result.glyph / n, result.place / n, result.glyph_before / n, result.place_before / n)
        lines.append(f"| {result.concept} | {' | '.join(map(per_cent, shares))} | {result.seconds:.0f} s |")
    total = sum(result.pictures for result in results)
    cells = []
    for name in ("glyph", "place", "glyph_before", "place_before"):
        right = sum(getattr(result, name) for result in results)
        low, high = wilson(right, total)
        lowest, highest = over_concepts([getattr(result, name) / result.pictures for result in results])
        cells.append(
            f"{per_cent(right / total)} ({per_cent(low)}–{per_cent(high)}; "
            f"over concepts {per_cent(lowest)}–{per_cent(highest)})"
        )
    longest = max(result.seconds for result in results)
    return "\n".join([*lines, f"| all, n = {total} | {' | '.join(cells)} | at most {longest:.0f} s |", ""])


def over_concepts(shares: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean share when the concepts themselves are drawn anew (percentile bootstrap)."""
    random = np.random.default_rng(0)
    means = random.choice(np.asarray(shares), size=(4000, len(shares))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    run(lambda: typer.run(main))
