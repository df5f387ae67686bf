"""How well a model samples the world of `moji`: 300 held-out prompts, scored by the classifier.

    python -m benchmarks.moji                                 some minutes on two cores
    python -m benchmarks.moji --also 25:1 --also 25:2.5 --also 25:6 --also 15:4      a sweep of steps:guidance
    python -m benchmarks.moji --beside older/ --beside newer/                        other weights, same prompts

Prompts are the canonical captions of scenes that no part was trained on (seeds from 1,000,000). Every share has its
Wilson 95 % interval. The column of true pictures is the same classifier on the same scenes as rendered: what a perfect
model would get; it needs the emoji font and stays empty without it, as do the autoencoder's metrics on scenes. PSNR is
the mean of the pictures' decibels. A sweep uses other prompts than the table, so a setting can be chosen by it.
Pictures stay in `pictures/` and are not drawn again; predictions are always given anew. Writes `table.md`,
`table.json`, `predictions.jsonl`, `sheet.png` (64 prompts), `without-guidance.png` (the same 64), and `worst.png`: the
images with the least likelihood of their prompt's attributes. With `--card` the metrics and the worst images go into
the model's own card.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.cli.sampling import Sampler, describe_guidance_interval, name_sampler
from backbone.evaluation.image_metrics import psnr_8_bit
from backbone.evaluation.statistics import wilson_interval
from backbone.io.console import UserError, notify, run_app
from backbone.io.files import append_jsonl, read_json, write_bytes, write_json, write_text
from backbone.io.progress import progress
from backbone.media.sheet import GREEN, RED, Cell, draw_sheet, save_png, split_rows
from backbone.media.sources.pictures import list_images
from backbone.media.transforms import crop_square
from backbone.models.few_step.model import get_sampling_defaults
from backbone.models.model import Backbone
from backbone.models.sample import GivenLatents, Request, sample
from backbone.world.edits import GREY_STYLES
from backbone.world.rendering.render import find_font, render
from backbone.world.rendering.textures import draw_texture
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from benchmarks.judges.classifier import (
    FACTS,
    FOLDER,
    NONE,
    TWO_DIFFERENT,
    TWO_OF_A_KIND,
    Classifier,
    Prediction,
    Reading,
    is_top_glyph,
    load_classifier,
    most_likely,
    prepare_images,
)
from benchmarks.judges.tables import format_interval, format_percent, name_drawing

TEXTURES = 200
SHEET, WORST = 64, 16
FIGURES = "## Figures (`python -m benchmarks.moji --card`)"
app = script_app()
WHAT, HOW, OUTPUT = "What is measured", "Sampling", "Output"


@dataclass(frozen=True)
class Setting:
    """Sampling settings; without a sampler or a stop of guidance the model's own are used."""

    steps: int
    guidance: float
    sampler: Sampler | None = None
    guidance_stop: float | None = None

    def __str__(self) -> str:
        return f"{self.steps}, {self.guidance:g}" + (f", {self.sampler}" if self.sampler else "")

    def resolve_guided(self, model: Backbone) -> tuple[float, float]:
        """The interval of guidance, as shares of the steps."""
        guided = get_sampling_defaults(model).guided
        return guided if self.guidance_stop is None else (0.0, self.guidance_stop)

    def resolve_sampler(self, model: Backbone) -> Sampler:
        """The sampler for a model."""
        return self.sampler or get_sampling_defaults(model).sampler


@dataclass(frozen=True, kw_only=True)
class DrawingSettings:
    """Sampling settings of the pictures that are measured."""

    model: Annotated[str, Option("moji, or a diffusers folder.", WHAT)] = "moji"
    steps: Annotated[int, Option("Sampling steps.", HOW, min=1)] = 25
    guidance: Annotated[float, Option("Guidance scale; 1 is without.", HOW)] = 4.0
    sampler: Annotated[
        Sampler | None,
        Option("Sampler.", HOW, choices=get_args(Sampler), convert=name_sampler, default_text="by model"),
    ] = None
    guidance_stop: Annotated[
        float | None,
        Option("Share of the steps after which guidance ends.", HOW, default_text="by model", min=0, max=1),
    ] = None
    batch: Annotated[int, Option("Pictures drawn together.", HOW, min=1)] = 10
    device: Annotated[str, Option("Where to draw.", HOW, choices=("cpu", "cuda"))] = "cpu"
    out: Annotated[Path, Option("Where the results go; drawn pictures are shared.", OUTPUT)] = Path(
        "build/benchmarks/moji"
    )

    @property
    def setting(self) -> Setting:
        """Steps, guidance and sampler of the pictures."""
        return Setting(self.steps, self.guidance, self.sampler, self.guidance_stop)

    @property
    def gallery(self) -> Gallery:
        """The pictures that lie in `out`, which are not drawn again."""
        return Gallery(self.out / "pictures", self.batch)

    def draw(self, model: Backbone, scenes: Sequence[Scene]) -> list[Image.Image]:
        """The pictures of scenes."""
        return self.gallery.load_or_draw(model, scenes, self.setting)


@dataclass(frozen=True, kw_only=True)
class MeasureSettings(DrawingSettings):
    """Settings of the benchmark."""

    prompts: Annotated[int, Option("How many held-out prompts.", WHAT, min=1)] = 300
    also: Annotated[
        tuple[str, ...], Option("STEPS:GUIDANCE or STEPS:GUIDANCE:SAMPLER, compared on other prompts.", HOW)
    ] = ()
    also_prompts: Annotated[int, Option("How many prompts the sweep uses.", WHAT, min=1)] = 150
    beside: Annotated[tuple[str, ...], Option("Other models, on the table's prompts.", WHAT)] = ()
    classifier: Annotated[Path, Option("The classifier's folder.", WHAT)] = FOLDER
    photographs: Annotated[Path | None, Option("Also measure the autoencoder on these.", WHAT)] = None
    card: Annotated[bool, Option("Renew the figures in the model's README.md.", OUTPUT)] = False


@settled_command(app, MeasureSettings)
def main(settings: MeasureSettings) -> None:
    """Samples, classifies, and writes the tables and the sheets."""
    sweep = [parse_setting(text) for text in settings.also]
    classifier = load_classifier(settings.classifier)
    model = Backbone.open(settings.model, device=settings.device)
    gallery = settings.gallery
    scenes = select_scenes(settings.prompts)
    images = settings.draw(model, scenes)
    unguided = gallery.load_or_draw(model, scenes[:SHEET], Setting(settings.steps, 1.0, settings.sampler))
    predictions = classifier.classify(images)
    truth = render_images(scenes)
    facts: dict[str, Any] = {
        "model": settings.model, "prompts": len(scenes), "first_seed": BENCHMARK_SEEDS[0],
        "steps": settings.steps, "guidance": settings.guidance, "sampler": settings.setting.resolve_sampler(model),
        "guided": settings.setting.resolve_guided(model),
        "rows": score_predictions(scenes, predictions),
        "true_pictures": score_predictions(scenes, classifier.classify(truth)) if truth else [],
        "beside": compare_models(settings, gallery, classifier, scenes),
        "sweep": compare_settings(settings, sweep, model, gallery, classifier),
        "gradient": measure_relative_gradient(images, truth),
        "psnr_db": measure_autoencoder(
            Backbone.open(settings.model, device=settings.device, precision="fp32"),
            scenes, truth, settings.photographs,
        ),
        "seconds_per_picture": time_sampling(model, scenes[: settings.batch], settings.setting),
        "classifier": read_json(settings.classifier / FACTS).get("held_out"),
        "machine": f"{settings.device}, {model.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }  # fmt: skip
    write_json(settings.out / "table.json", facts)
    write_predictions(settings.out / "predictions.jsonl", scenes, predictions)
    write_sheets(settings, scenes, images, predictions)
    save_sheet(
        settings.out / "without-guidance.png", scenes[:SHEET], unguided, classifier.classify(unguided),
        title=f"{settings.model}, {settings.steps} steps, without guidance",
    )  # fmt: skip
    table = format_markdown(facts)
    text = table + format_comparisons(settings, facts)
    write_text(settings.out / "table.md", text)
    if settings.card and model.location.folder is not None:
        write_card(model.location.folder, table, settings.out / "worst.png")
    print(text)


def compare_models(
    settings: MeasureSettings, gallery: Gallery, classifier: Classifier, scenes: Sequence[Scene]
) -> dict[str, list[Row]]:
    """The table's rows for the models of --beside, on the same prompts."""
    scores = {}
    for name in settings.beside:
        backbone = Backbone.open(name, device=settings.device)
        images = gallery.load_or_draw(backbone, scenes, settings.setting)
        scores[name] = score_predictions(scenes, classifier.classify(images))
    return scores


def compare_settings(
    settings: MeasureSettings,
    sweep: Sequence[Setting],
    model: Backbone,
    gallery: Gallery,
    classifier: Classifier,
) -> dict[str, list[Row]]:
    """The table's rows by steps and guidance, on prompts that the table does not have."""
    if not sweep:
        return {}
    scenes = select_scenes(settings.prompts + settings.also_prompts)[settings.prompts :]
    return {
        str(setting): score_predictions(
            scenes, classifier.classify(gallery.load_or_draw(model, scenes, setting))
        )
        for setting in sweep
    }


def write_predictions(path: Path, scenes: Sequence[Scene], predictions: Sequence[Prediction]) -> None:
    """Write the classifier's predictions, one line per picture."""
    path.unlink(missing_ok=True)
    for scene, prediction in zip(scenes, predictions, strict=True):
        labels = {head: most_likely(reading) for head, reading in asdict(prediction).items()}
        append_jsonl(path, {"seed": scene.seed, "prompt": scene.caption(), **labels})


def write_sheets(
    settings: MeasureSettings,
    scenes: Sequence[Scene],
    images: Sequence[Image.Image],
    predictions: Sequence[Prediction],
) -> None:
    """`sheet.png`, the first prompts, and `worst.png`, those whose prompts the classifier finds least likely."""
    title = f"{settings.model}, {settings.steps} steps, guidance {settings.guidance:g}"
    save_sheet(settings.out / "sheet.png", scenes[:SHEET], images, predictions, title=title)
    worst = sorted(range(len(scenes)), key=lambda k: log_likelihood(scenes[k], predictions[k]))[:WORST]
    save_sheet(
        settings.out / "worst.png", [scenes[k] for k in worst], [images[k] for k in worst],
        [predictions[k] for k in worst], title=f"{title}: the {WORST} worst of {len(scenes)}",
        note="Those to whose things, place, colour, accessory and style together the classifier gives least.",
    )  # fmt: skip


def format_comparisons(settings: MeasureSettings, facts: Mapping[str, Any]) -> str:
    """Further tables: other models on the same prompts, other settings on others."""
    text = ""
    if facts["beside"]:
        columns = {settings.model: facts["rows"], **facts["beside"]}
        text += format_columns(columns, f"{facts['prompts']} prompts of the table", "model")
    if facts["sweep"]:
        text += format_columns(
            facts["sweep"], f"{settings.also_prompts} other prompts", "steps, guidance, sampler"
        )
    return text


def write_card(folder: Path, table: str, worst: Path) -> None:
    """Put the table and the worst pictures at the end of a model's `README.md`, in place of older ones."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    head = text.split(FIGURES)[0].rstrip()
    write_text(
        path, f"{head}\n\n{FIGURES}\n\n{table}\nThe worst of these pictures:\n\n![failures](worst.png)\n"
    )
    write_bytes(folder / "worst.png", worst.read_bytes())


def parse_setting(text: str) -> Setting:
    """`25:4` → 25 steps, guidance 4; `25:4:ddim` by this sampler. Raises `UserError` for anything else."""
    try:
        steps, guidance, *sampler = text.split(":", 2)
        return Setting(int(steps), float(guidance), read_sampler(sampler[0]) if sampler else None)
    except ValueError:
        raise UserError(
            f"--also wants STEPS:GUIDANCE or STEPS:GUIDANCE:SAMPLER, such as 25:4:ddim, not {text!r}."
        ) from None


def read_sampler(text: str | None) -> Sampler | None:
    """The sampler of this name, ours or another tool's; None without a name. Raises `UserError` for other names."""
    if text is None:
        return None
    name = name_sampler(text)
    if name in get_args(Sampler):
        return cast(Sampler, name)
    raise UserError(f"There is no sampler {text!r}. Choose one of: {', '.join(get_args(Sampler))}.")


@dataclass(frozen=True)
class Gallery:
    """Pictures of scenes' captions on disk, by model and setting; what is missing is drawn."""

    folder: Path
    batch: int

    def load_or_draw(self, model: Backbone, scenes: Sequence[Scene], setting: Setting) -> list[Image.Image]:
        """The pictures in the order of the scenes."""
        name = name_drawing(
            setting.steps, setting.guidance, setting.resolve_sampler(model), setting.resolve_guided(model)
        )
        folder = self.folder / f"{model.fingerprint[:12]}-{name}"
        paths = [folder / f"{scene.seed}.png" for scene in scenes]
        missing = [pair for pair in zip(scenes, paths, strict=True) if not pair[1].exists()]
        with progress(len(missing), f"drawing ({setting})") as bar:
            for first in range(0, len(missing), self.batch):
                chunk = missing[first : first + self.batch]
                images = sample_images(model, [scene for scene, _ in chunk], setting)
                for picture, (_, path) in zip(images, chunk, strict=True):
                    save_png(path, picture)
                bar.advance(len(chunk), images=len(chunk))
        return [Image.open(path).convert("RGB") for path in paths]


def sample_images(
    model: Backbone, scenes: Sequence[Scene], setting: Setting, given: GivenLatents | None = None
) -> list[Image.Image]:
    """One picture of each scene's caption, from noise of the scene's seed, independent of the rest of the batch.

    Or from `given` latents [B, C, h, w], one for each scene.
    """
    requests = [Request(scene.caption(), (scene.seed, 0)) for scene in scenes]
    images = sample(
        model, requests, steps=setting.steps, guidance=setting.guidance, sampler=setting.sampler,
        guided=setting.resolve_guided(model), seed=0, batch=len(requests), given=given,
    )  # fmt: skip
    return list(images)


def select_scenes(count: int) -> list[Scene]:
    """The first fair scenes among the benchmark's seeds."""
    scenes = (sample_scene(seed) for seed in BENCHMARK_SEEDS)
    return list(itertools.islice(filter(is_fair, scenes), count))


# Classification --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question to the classifier: for which scenes it applies, and when a picture passes."""

    name: str
    applies: Callable[[Scene], bool]
    passes: Callable[[Scene, Prediction], bool]


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


def is_one_kind(scene: Scene) -> bool:
    return len(scene.things) == 1


def has_noun(scene: Scene, prediction: Prediction) -> bool:
    return is_top_glyph(prediction, scene.things[0].noun)


def has_place(scene: Scene, prediction: Prediction) -> bool:
    return most_likely(prediction.place) == scene.place


QUESTIONS = (
    Question("noun", is_one_kind, has_noun),
    Question("place", lambda scene: True, has_place),
    Question(
        "noun and place",
        is_one_kind,
        lambda scene, prediction: has_noun(scene, prediction) and has_place(scene, prediction),
    ),
    Question(
        "colour",
        lambda scene: scene.things[0].colour is not None and scene.style not in GREY_STYLES,
        lambda scene, prediction: most_likely(prediction.colour) == scene.things[0].colour,
    ),
    Question(
        "accessory",
        lambda scene: scene.things[0].accessory is not None,
        lambda scene, prediction: most_likely(prediction.accessory) == scene.things[0].accessory,
    ),
    Question(
        "style",
        lambda scene: scene.style is not None,
        lambda scene, prediction: most_likely(prediction.style) == scene.style,
    ),
    Question(
        "two of a kind",
        lambda scene: scene.pair,
        lambda scene, prediction: (
            most_likely(prediction.count) == TWO_OF_A_KIND and has_noun(scene, prediction)
        ),
    ),
    Question(
        "two different, both right",
        lambda scene: len(scene.things) == 2,
        lambda scene, prediction: (
            most_likely(prediction.count) == TWO_DIFFERENT
            and prediction.two_glyphs == {thing.noun for thing in scene.things}
        ),
    ),
)


def score_predictions(scenes: Sequence[Scene], predictions: Sequence[Prediction]) -> list[Row]:
    """A row for every question."""
    rows = []
    for question in QUESTIONS:
        passed = [
            question.passes(scene, prediction)
            for scene, prediction in zip(scenes, predictions, strict=True)
            if question.applies(scene)
        ]
        rows.append(
            Row(question.name, sum(passed), len(passed), *wilson_interval(sum(passed), len(passed))[1:])
        )
    return rows


# Further metrics --------------------------------------------------------------------------------------------


def render_images(scenes: Sequence[Scene]) -> list[Image.Image]:
    """The scenes as rendered; none, with a notice, if the font is missing."""
    try:
        find_font()
    except UserError as error:
        notify(f"{error} Until then the columns of true pictures stay empty.")
        return []
    return [render(scene).image for scene in scenes]


def measure_relative_gradient(pictures: Sequence[Image.Image], truth: Sequence[Image.Image]) -> float:
    """Differences of neighbouring pixels, drawn over true: below 1 is smear, above it grain. nan without truth."""
    if not truth:
        return math.nan
    drawn_gradient, true_gradient = (
        float(measure_gradient(prepare_images(images))) for images in (pictures, truth)
    )
    return round(drawn_gradient / true_gradient, 3)


def measure_gradient(pictures: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, across and down, of pictures [B, 3, H, W]."""
    across = pictures[..., 1:] - pictures[..., :-1]
    down = pictures[..., 1:, :] - pictures[..., :-1, :]
    return across.abs().mean() + down.abs().mean()


@torch.no_grad()
def measure_autoencoder(
    model: Backbone, scenes: Sequence[Scene], truth: Sequence[Image.Image], photographs: Path | None
) -> dict[str, dict[str, float]]:
    """Mean PSNR in dB with the number of pictures: of scenes, by style, of textures, of photographs."""
    figures: dict[str, dict[str, float]] = {}

    def record(name: str, values: Tensor) -> None:
        figures[name] = {"db": round(float(values.mean()), 2), "n": len(values)}

    if truth:
        psnrs = measure_psnr(model, truth)
        record("scenes", psnrs)
        for style in sorted({scene.style or "" for scene in scenes}):
            selected = torch.tensor([(scene.style or "") == style for scene in scenes])
            record(f"scenes, {style.removesuffix(' of') or 'plain'}", psnrs[selected])
    seeds = range(BENCHMARK_SEEDS[0], BENCHMARK_SEEDS[0] + TEXTURES)
    record("textures", measure_psnr(model, [Image.fromarray(draw_texture(seed)) for seed in seeds]))
    if photographs is not None:
        record(
            "photographs",
            measure_psnr(model, [crop_square(photo.open(), 128) for photo in list_images(photographs)]),
        )
    return figures


def measure_psnr(model: Backbone, images: Sequence[Image.Image], *, batch: int = 20) -> Tensor:
    """PSNR [B] of each picture against its own round trip through the latents' means."""
    parts = []
    for first in range(0, len(images), batch):
        clean = prepare_images(images[first : first + batch])
        parts.append(psnr_8_bit(model.decode(model.encode(clean).mean).cpu(), clean))
    return torch.cat(parts)


def time_sampling(model: Backbone, scenes: Sequence[Scene], setting: Setting) -> dict[str, float]:
    """Seconds a picture takes: all of these together, and one at a time (median of four after a warm-up)."""

    def time_chunk(chunk: Sequence[Scene]) -> float:
        began = time.perf_counter()
        sample_images(model, chunk, setting)
        return (time.perf_counter() - began) / len(chunk)

    time_chunk(scenes)
    batched = time_chunk(scenes)
    single = [time_chunk([scene]) for scene in scenes[:5]]
    return {
        f"in batches of {len(scenes)}": round(batched, 3),
        "one at a time": round(float(np.median(single[1:] or single)), 3),
    }


def log_likelihood(scene: Scene, prediction: Prediction) -> float:
    """Log-likelihood of a scene's attributes by the classifier, its heads taken as independent."""
    thing = scene.things[0]
    readings: list[tuple[Reading, str | None]] = [
        (prediction.place, scene.place),
        (prediction.style, scene.style or NONE),
    ]
    readings += [(prediction.glyphs, item.noun) for item in scene.things]
    readings.append((prediction.accessory, thing.accessory or NONE))
    if scene.style not in GREY_STYLES:
        readings.append((prediction.colour, thing.colour or NONE))
    return sum(math.log(reading[label] + 1e-9) for reading, label in readings if label is not None)


def format_markdown(facts: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    reference = facts["true_pictures"]
    lines = [
        f"`{facts['model']}`: {facts['prompts']} held-out prompts, {facts['steps']} steps "
        f"({facts['sampler']}), guidance {facts['guidance']:g}{describe_guidance_interval(facts['guided'])}",
        "",
        "| attribute | right | 95 % | n | true pictures |",
        "|---|---|---|---|---|",
    ]
    for number, row in enumerate(facts["rows"]):
        ceiling = format_percent(reference[number].share) if reference else "–"
        interval = format_interval(row.low, row.high)
        lines.append(f"| {row.name} | {format_percent(row.share)} | {interval} | {row.n} | {ceiling} |")
    if not math.isnan(facts["gradient"]):
        lines += ["", f"Drawn pictures have {facts['gradient']:.2f} × the gradient of the true ones."]
    lines += ["", "| autoencoder | PSNR dB | n |", "|---|---|---|"]
    lines += [f"| {name} | {value['db']:.2f} | {value['n']} |" for name, value in facts["psnr_db"].items()]
    speeds = [f"{seconds:.2f} s {name}" for name, seconds in facts["seconds_per_picture"].items()]
    return "\n".join([*lines, "", f"A picture takes {', '.join(speeds)} ({facts['machine']}).", ""])


def format_columns(columns: Mapping[str, Sequence[Row]], prompts: str, source: str) -> str:
    """A table with a column for every model or setting."""
    lines = [
        "",
        f"The same by {source}, {prompts}:",
        "",
        f"| attribute | {' | '.join(columns)} | n |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for rows in zip(*columns.values(), strict=True):
        cells = [f"{format_percent(row.share)} ({format_interval(row.low, row.high)})" for row in rows]
        lines.append(f"| {rows[0].name} | {' | '.join(cells)} | {rows[0].n} |")
    return "\n".join([*lines, ""])


def save_sheet(
    path: Path,
    scenes: Sequence[Scene],
    pictures: Sequence[Image.Image],
    predictions: Sequence[Prediction],
    *,
    title: str,
    note: str = "Every prompt in order, none chosen. Green: the classifier sees the things that were asked for.",
) -> None:
    """These scenes' pictures; in a red frame if the classifier misses a thing that was asked for."""
    cells: list[Cell | Image.Image | None] = []
    for scene, picture, prediction in zip(scenes, pictures, predictions, strict=False):
        nouns = {thing.noun for thing in scene.things}
        right = prediction.two_glyphs == nouns if len(nouns) == 2 else prediction.glyph in nouns
        cells.append(Cell(picture, scene.caption(), GREEN if right else RED))
    save_png(path, draw_sheet(split_rows(cells, 8), title=title, note=note, cell=128))


if __name__ == "__main__":
    run_app(app)
