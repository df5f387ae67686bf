"""How well `edit remove` removes: rendered scenes of one and two things, whose true answer is known.

    python -m benchmarks.edit.remove                  100 scenes, half of them of two things

A scene is rendered with a thing and without it, everything else where it was, from seeds that nothing was trained on.
The prompt is the scene's caption, what is removed the thing's noun. By the classifier of the benchmarks: the thing is
*gone* when it is neither on top nor has a quarter of the probability, and the other thing is *kept* when it is on top.
The background is what the true answer leaves as it was, beside what the autoencoder alone makes of it (the bound);
`filled` compares the rest with the true answer. Controls: the source itself, and the true answer. Needs the emoji font
and the classifier. Writes `table.md`, `table.json` and `sheet.png`; pictures that `--out` holds are not made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image, ImageChops, ImageFilter

from backbone.cli.commands import run_main
from backbone.evaluation import image_metrics as measure
from backbone.evaluation.statistics import wilson_interval
from backbone.io.console import notify
from backbone.io.files import write_json, write_text
from backbone.io.progress import progress
from backbone.media.sheet import GREEN, RED, Cell, draw_sheet, save_png
from backbone.media.sources.decode import open_rgb
from backbone.media.transforms import mask_to_tensor, to_image, to_tensor
from backbone.models.model import Backbone
from backbone.world.rendering.render import find_font, render
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from backbone.world.words import Thing
from benchmarks.edit.scenes import format_number, mark_visible, resize_to
from benchmarks.judges.classifier import FOLDER, Classifier, Prediction, is_top_glyph, load_classifier
from benchmarks.judges.tables import format_percent
from edit.inversion.inversion import invert
from edit.methods.remove import remove

FIRST_SEED = BENCHMARK_SEEDS[0] + 500_000
SHARE = 0.25  # of the glyphs' probability: a removed thing stays below
METHODS = ("no edit", "edit remove", "the true answer")
SHEET = 24  # scenes of the sheet


def main(
    count: Annotated[int, typer.Option(min=2, help="Scenes, half of them of two things.")] = 100,
    model: Annotated[str, typer.Option(help="moji, or a diffusers folder of its world.")] = "moji",
    steps: Annotated[int, typer.Option(help="Steps of the inversion and of the removal.")] = 50,
    first: Annotated[int, typer.Option(help="The seed of the first scene.")] = FIRST_SEED,
    classifier: Annotated[Path, typer.Option(help="The classifier's folder.")] = FOLDER,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/remove"),
) -> None:
    """Removes, classifies, and writes the table and the sheet."""
    find_font()
    judge = load_classifier(classifier, device=device)
    backbone = Backbone.open(model, device=device, precision=precision)
    cases = list(make_cases(count, first=first))
    rows: list[dict[str, Any]] = []
    with progress(len(cases), "removing") as bar:
        for number, case in enumerate(cases):
            edited = edit_case(backbone, case, steps, out / "pictures" / f"{number:03d}.png")
            rows += measure_case(backbone, judge, case, edited)
            bar.advance(images=1)
    facts = {
        "model": model, "scenes": len(cases), "first_seed": first, "steps": steps,
        "machine": f"{device}, {backbone.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }  # fmt: skip
    table = summarize(rows)
    write_json(out / "table.json", {**facts, "summary": table, "rows": rows})
    text = format_markdown(facts, table)
    write_text(out / "table.md", text)
    save_sheet(out, cases[:SHEET], [row for row in rows if row["method"] == "edit remove"])
    print(text)


@dataclass(frozen=True)
class Case:
    """A scene, and the index of the thing to remove."""

    scene: Scene
    index: int

    @property
    def thing(self) -> Thing:
        """The thing to remove."""
        return self.scene.things[self.index]

    @property
    def other(self) -> Thing | None:
        """The thing that stays, if any."""
        return self.scene.things[1 - self.index] if len(self.scene.things) == 2 else None

    def rendered(self) -> tuple[Image.Image, Image.Image, Image.Image]:
        """The picture, the true answer, and a mask: white where they differ, and the thing with a small margin."""
        before, after = render(self.scene), render(self.scene, without=self.index)
        thing = before.masks[self.index].point(mark_visible).filter(ImageFilter.MaxFilter(9))
        differs = ImageChops.difference(before.image, after.image).convert("L").point(mark_visible)
        return before.image, after.image, ImageChops.lighter(thing, differs)


def make_cases(count: int, *, first: int) -> Iterator[Case]:
    """`count` cases from seed `first` on, of one thing and of two in turn."""
    waiting: dict[int, list[Case]] = {1: [], 2: []}
    seed = first
    for number in range(count):
        things = 1 + number % 2
        while not waiting[things]:
            scene = sample_scene(seed)
            if not scene.pair and is_fair(scene):
                index = seed % 2 if len(scene.things) == 2 else 0
                waiting[len(scene.things)].append(Case(scene, index))
            seed += 1
        yield waiting[things].pop(0)


def edit_case(model: Backbone, case: Case, steps: int, path: Path) -> Image.Image:
    """The picture without the thing, kept at a path."""
    if not path.exists():
        inversion = invert(model, case.rendered()[0], case.scene.caption(), steps=steps)
        save_png(path, remove(inversion, case.thing.noun, seed=case.scene.seed).images[0])
    return open_rgb(path)


@torch.no_grad()
def measure_case(
    model: Backbone, classifier: Classifier, case: Case, edited: Image.Image
) -> list[dict[str, Any]]:
    """A row for each method."""
    source_image, truth, changed = case.rendered()
    source, mask = to_tensor(source_image), mask_to_tensor(changed)[0]
    round_trip = resize_to(to_image(model.decode(model.encode(source[None]).mean)[0]), source_image)
    bound = measure.background_metrics(source, to_tensor(round_trip), mask)["background_psnr_db"]
    pictures = (source_image, resize_to(edited, source_image), truth)
    return [
        {
            "method": name,
            "things": len(case.scene.things),
            "seed": case.scene.seed,
            "source": case.scene.caption(),
            "removed": case.thing.noun,
            "gone": is_gone(case, prediction),
            "kept": None if case.other is None else is_top_glyph(prediction, case.other.noun),
            "background_psnr_db": measure.background_metrics(source, to_tensor(picture), mask)[
                "background_psnr_db"
            ],
            "bound_psnr_db": bound,
            "filled_psnr_db": measure.background_metrics(to_tensor(truth), to_tensor(picture), 1 - mask)[
                "background_psnr_db"
            ],
        }
        for name, picture, prediction in zip(METHODS, pictures, classifier.classify(pictures), strict=True)
    ]


def is_gone(case: Case, prediction: Prediction) -> bool:
    """Whether the classifier no longer sees the removed thing."""
    return prediction.glyphs[case.thing.noun] < SHARE and not is_top_glyph(prediction, case.thing.noun)


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each method and number of things."""
    lines = []
    for method in METHODS:
        for things in (1, 2, None):
            method_rows = [row for row in rows if row["method"] == method and things in (None, row["things"])]
            line: dict[str, Any] = {"method": method, "things": things or "all", "n": len(method_rows)}
            for name in ("gone", "kept"):
                values = [bool(row[name]) for row in method_rows if row[name] is not None]
                line[name] = wilson_interval(sum(values), len(values))._asdict() if values else None
            for name in ("background_psnr_db", "bound_psnr_db", "filled_psnr_db"):
                line[name] = measure.mean_of_defined([row[name] for row in method_rows])
            lines.append(line)
    return lines


def format_markdown(facts: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        f"`{facts['model']}`: {facts['scenes']} scenes from seed {facts['first_seed']}, {facts['steps']} steps "
        f"({facts['machine']})",
        "",
        "| method | things | n | removed thing gone | 95 % | other thing kept | 95 % | background dB | bound dB | "
        "filled, to the truth dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in table:
        shares = []
        for name in ("gone", "kept"):
            share = line[name]
            shares += (
                ["–", "–"]
                if share is None
                else [
                    format_percent(share["value"]),
                    f"{format_percent(share['low'])}–{format_percent(share['high'])}",
                ]
            )
        numbers = [format_number(line[f"{name}_psnr_db"]) for name in ("background", "bound", "filled")]
        lines.append(
            f"| {' | '.join(map(str, [line['method'], line['things'], line['n'], *shares, *numbers]))} |"
        )
    return "\n".join([*lines, ""])


def save_sheet(out: Path, cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> None:
    """The first scenes, none chosen: source, true answer and edit, two scenes a row."""
    groups: list[list[Cell | Image.Image | None]] = []
    for number, (case, row) in enumerate(zip(cases, rows, strict=False)):
        source, truth, _ = case.rendered()
        frame = GREEN if row["gone"] and row["kept"] is not False else RED
        edited = open_rgb(out / "pictures" / f"{number:03d}.png")
        groups.append(
            [
                Cell(source, row["source"]),
                Cell(truth, "true answer"),
                Cell(edited, f"without {row['removed']}", frame),
            ]
        )
    lines = [[cell for group in groups[k : k + 2] for cell in group] for k in range(0, len(groups), 2)]
    note = "Every scene in order, none chosen. Green: the removed thing is gone and the other one kept."
    save_png(out / "sheet.png", draw_sheet(lines, title="edit remove", note=note, cell=128))


if __name__ == "__main__":
    notify("edit remove")
    run_main(main)
