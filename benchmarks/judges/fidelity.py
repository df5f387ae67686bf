"""Glyph fidelity: whether a sampled thing is the true glyph, or a distorted one that a classifier still recognises.

    python -m benchmarks.judges.fidelity                                     300 prompts of benchmarks.moji, drawn once
    python -m benchmarks.judges.fidelity --from-true 0.3 --from-true 0.7     and where in the steps it is lost
    python -m benchmarks.judges.fidelity --grades benchmarks/results/grades.json      how well it agrees with an eye

The world of `moji` knows the true glyph of every noun. It is registered to the picture over place, size and mirroring
by weighted least squares (the weights are the glyph's opacity), with a gain and an offset of each colour channel, since
the picture need not have the very tint; a thing in a style is the glyph in that style. What is compared is the picture
with itself where the registered glyph is laid over it, weighted over the glyph: SSIM (Wang et al. 2004), PSNR, and the
correlation of their colours, which agrees best with an eye, since SSIM likes whatever is flat. *Bound* is the same of
the true rendering through the model's autoencoder, which a perfect denoiser would reach. Needs the emoji font. Writes
`fidelity.md`, `fidelity.json`, and `fidelity.png`: pictures from the least to the most faithful.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.cli.sampling import describe_guidance_interval
from backbone.evaluation.image_metrics import psnr_from_mse, ssim_map
from backbone.io.console import run_app
from backbone.io.files import read_json, write_json, write_text
from backbone.io.progress import progress
from backbone.media.sheet import Cell, draw_sheet, save_png, split_rows
from backbone.models.model import Backbone
from backbone.models.sample import GivenLatents
from backbone.world.rendering.render import SIZE, Figure, draw_sprite, render
from backbone.world.rendering.styles import STYLES
from backbone.world.scene import Scene
from backbone.world.words import Thing
from benchmarks.judges.classifier import prepare_images
from benchmarks.moji import WHAT, DrawingSettings, sample_images, select_scenes

SIZES = {"small": range(26, 46, 4), "one": range(52, 92, 5), "two": range(38, 66, 4)}  # longest sides, pixels
NEARBY = (-2, -1, 1, 2)  # sizes that are tried around the best of these
GAIN, OFFSET = (0.75, 1.25), 0.12  # how far a channel's tint may go
LEAST_VISIBLE = 0.85  # share of a glyph's opacity that must lie inside the picture
GROUND = (128, 128, 128)  # around a glyph when a style is applied to it
PADDED = 160  # side of the transforms: a quarter of a glyph may stand outside on either side
BATCH = 20


app = script_app()


@dataclass(frozen=True, kw_only=True)
class FidelitySettings(DrawingSettings):
    """Settings of the benchmark."""

    prompts: Annotated[int, Option("How many held-out prompts.", WHAT, min=1)] = 300
    grades: Annotated[
        Path | None, Option("JSON of seeds with a grade by eye: the rank correlation is added.", WHAT)
    ] = None
    from_true: Annotated[
        tuple[float, ...],
        Option("Also from the true scenes, noised, by this last share of the steps alone (0.3).", WHAT),
    ] = ()


@settled_command(app, FidelitySettings)
def main(settings: FidelitySettings) -> None:
    """Draws what is missing, registers the true glyphs, writes the table and the sheet."""
    model, setting, out = settings.model, settings.setting, settings.out
    backbone = Backbone.open(model, device=settings.device)
    scenes = select_scenes(settings.prompts)
    pictures = settings.draw(backbone, scenes)
    exact = Backbone.open(model, device=settings.device, precision="fp32")
    measured = measure_all(scenes, pictures, "drawn")
    bound = measure_all(scenes, decode_renderings(exact, scenes), "bound")
    facts: dict[str, Any] = {
        "model": model, "prompts": len(scenes), "steps": setting.steps, "guidance": setting.guidance,
        "sampler": setting.resolve_sampler(backbone), "guided": setting.resolve_guided(backbone),
        "rows": [summarize_group(name, scenes, measured, bound) for name in GROUPS],
        "each": [
            {"seed": scene.seed, "prompt": scene.caption(), **asdict(fidelity)}
            for scene, fidelity in zip(scenes, measured, strict=True)
        ],
    }  # fmt: skip
    if settings.from_true:
        facts["from_true"] = [
            measure_from_true(backbone, scenes, settings, share) for share in settings.from_true
        ]
    if settings.grades is not None:
        facts["agreement"] = correlate_grades(read_json(settings.grades)["grades"], scenes, measured)
    write_json(out / "fidelity.json", facts)
    table = format_markdown(facts)
    write_text(out / "fidelity.md", table)
    order = sorted(range(len(scenes)), key=lambda k: measured[k].correlation)
    cells: list[Cell | Image.Image | None] = [
        Cell(pictures[k], f"{measured[k].correlation:.2f} {scenes[k].caption()}")
        for k in order[:: max(1, len(order) // 64)]
    ]
    note = "From the least faithful to the most: correlation of the picture and the true glyph."
    title = f"{model}, {setting.steps} steps"
    save_png(out / "fidelity.png", draw_sheet(split_rows(cells, 8), title=title, note=note, cell=SIZE))
    print(table)


# Registration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fidelity:
    """How well the true glyphs fit a picture: means over the things that were asked for."""

    correlation: float
    ssim: float
    psnr_db: float


@dataclass(frozen=True)
class Template:
    """A glyph at one size: colours [3, h, w] in 0…1, opacity [h, w], spectra [7, …] of w, wt and wt², conjugated."""

    colours: Tensor
    opacity: Tensor
    spectra: Tensor


@dataclass(frozen=True)
class Fit:
    """Where a template lies (upper left corner), its tint (gain and offset [3]), its mean squared error."""

    template: Template
    top: int
    left: int
    gain: Tensor
    offset: Tensor
    error: float


def measure(scene: Scene, picture: Tensor) -> Fidelity:
    """Fidelity of a picture [3, 128, 128] in 0…1 to the things of its scene."""
    values_by_thing = [astuple(compare(picture, fit)) for fit in find_things(scene, picture)]
    return Fidelity(*(sum(values) / len(values_by_thing) for values in zip(*values_by_thing, strict=True)))


def find_things(scene: Scene, picture: Tensor) -> list[Fit]:
    """Where the things of a scene lie in a picture [3, 128, 128] in 0…1: all sizes, then those beside the best."""
    placed: list[Fit] = []
    for thing in scene.things * (2 if scene.pair else 1):
        kind = "two" if scene.pair or len(scene.things) == 2 else "small" if thing.small else "one"
        coarse = [(size, mirrored) for size in SIZES[kind] for mirrored in (False, True)]
        fits = [
            register(picture, render_template(thing, *pose, scene.style), apart_from=placed)
            for pose in coarse
        ]
        size, mirrored = min(zip(fits, coarse, strict=True), key=lambda pair: pair[0].error)[1]
        fine = [render_template(thing, size + change, mirrored, scene.style) for change in NEARBY]
        fits += [register(picture, choice, apart_from=placed) for choice in fine]
        placed.append(min(fits, key=lambda fit: fit.error))
    return placed


def register(picture: Tensor, choice: Template, *, apart_from: Sequence[Fit] = ()) -> Fit:
    """The place and tint of a template of least weighted squared error; not upon what is taken already.

    With weights w (opacity), template t and picture x, all sums over the template's pixels are correlations:
    Σw, Σwx, Σwx², Σwt, Σwt², Σwtx. From them the least-squares gain and offset of each channel and the error follow
    for all places at once, and the gain's and offset's bounds keep a flat patch from passing for a glyph.
    """
    weights, (height, width) = choice.opacity, choice.opacity.shape
    ones, x, xx = picture_spectra(picture).split((1, 3, 3))
    w, wt, wtt = choice.spectra.split((1, 3, 3))
    products = torch.cat([w * ones, w * x, w * xx, wt * ones, wtt * ones, wt * x])
    sums = torch.fft.irfft2(products, s=(PADDED, PADDED))
    # Corners from −height/4 on, so that a glyph may stand a little outside of the frame.
    up, left = min(height // 4, PADDED - SIZE), min(width // 4, PADDED - SIZE)
    sums = sums.roll((up, left), (-2, -1))[..., : SIZE - height + 2 * up, : SIZE - width + 2 * left]
    total = sums[0].clamp(min=1e-3)
    mean_x, mean_xx, mean_t, mean_tt, mean_tx = (part / total for part in sums[1:].split(3))
    variance, covariance = mean_tt - mean_t.square(), mean_tx - mean_t * mean_x
    gain = (covariance / variance.clamp(min=1e-6)).clamp(*GAIN)
    offset = (mean_x - gain * mean_t).clamp(-OFFSET, OFFSET)
    errors = (
        mean_xx - 2 * gain * mean_tx - 2 * offset * mean_x
        + gain.square() * mean_tt + 2 * gain * offset * mean_t + offset.square()
    ).mean(0)  # fmt: skip
    errors = torch.where(sums[0] < LEAST_VISIBLE * weights.sum(), torch.inf, errors)
    for fit in apart_from:
        exclude_near(errors, choice, fit, (up, left))
    row, column = divmod(int(errors.argmin()), errors.shape[1])
    tint = gain[:, row, column], offset[:, row, column]
    return Fit(choice, row - up, column - left, *tint, float(errors[row, column]))


def picture_spectra(picture: Tensor) -> Tensor:
    """Spectra [7, …] of ones, of a picture [3, 128, 128], and of its square."""
    stack = torch.cat([torch.ones(1, SIZE, SIZE), picture, picture.square()])
    spectra: Tensor = torch.fft.rfft2(stack, s=(PADDED, PADDED))
    return spectra


def exclude_near(errors: Tensor, choice: Template, fit: Fit, corner: tuple[int, int]) -> None:
    """Sets errors to infinity where the template's middle would be nearer to `fit`'s than half of its size."""
    height, width = choice.opacity.shape
    rows = torch.arange(errors.shape[0])[:, None] - corner[0] + height / 2
    columns = torch.arange(errors.shape[1]) - corner[1] + width / 2
    middle = fit.top + fit.template.opacity.shape[0] / 2, fit.left + fit.template.opacity.shape[1] / 2
    near = (rows - middle[0]).square() + (columns - middle[1]).square()
    errors[near < (max(fit.template.opacity.shape) / 2) ** 2] = torch.inf


def compare(picture: Tensor, fit: Fit) -> Fidelity:
    """SSIM and PSNR of the picture and itself with the tinted glyph laid over it, averaged over the glyph."""
    canvas, opacity = torch.zeros(3, SIZE, SIZE), torch.zeros(SIZE, SIZE)
    height, width = fit.template.opacity.shape
    top, left = max(0, fit.top), max(0, fit.left)
    bottom, right = min(SIZE, fit.top + height), min(SIZE, fit.left + width)
    inside = slice(top - fit.top, bottom - fit.top), slice(left - fit.left, right - fit.left)
    tinted = fit.gain[:, None, None] * fit.template.colours + fit.offset[:, None, None]
    canvas[:, top:bottom, left:right] = tinted[(slice(None), *inside)].clamp(0, 1)
    opacity[top:bottom, left:right] = fit.template.opacity[inside]
    laid = picture * (1 - opacity) + canvas * opacity
    weight = opacity / opacity.sum()
    error = float(((laid - picture).square().mean(0) * weight).sum())
    ssim = float((ssim_map(picture, laid).mean(0) * weight).sum())
    return Fidelity(correlate(canvas, picture, weight), ssim, psnr_from_mse(error))


def correlate(first: Tensor, second: Tensor, weight: Tensor) -> float:
    """Correlation of two images [3, H, W] over pixels and channels, weights [H, W] of sum 1, channels' means apart."""
    x, y = (image - (image * weight).sum((1, 2), keepdim=True) for image in (first, second))
    covariance, *variances = (float((a * b * weight).sum()) for a, b in ((x, y), (x, x), (y, y)))
    return covariance / math.sqrt(math.prod(variances) + 1e-12)


@lru_cache(maxsize=256)
def render_template(thing: Thing, size: int, mirrored: bool, style: str | None) -> Template:
    """The thing with this longest side in pixels, as its style draws it."""
    sprite, _, _ = draw_sprite(Figure(thing, size, 0, 0, mirrored, 0))
    return make_template(sprite.crop(sprite.getbbox()), style)


def make_template(sprite: Image.Image, style: str | None) -> Template:
    """A sprite (RGBA) as its style draws it."""
    if style is not None:
        ground = Image.new("RGB", (sprite.width + 16, sprite.height + 16), GROUND)
        ground.paste(sprite, (8, 8), sprite)
        styled = STYLES[style](ground).crop((8, 8, 8 + sprite.width, 8 + sprite.height))
        styled.putalpha(sprite.getchannel("A"))
        sprite = styled
    pixels = torch.from_numpy(np.asarray(sprite.convert("RGBA"), dtype=np.float32) / 255)
    colours, opacity = pixels[..., :3].permute(2, 0, 1).contiguous(), pixels[..., 3].contiguous()
    stack = torch.cat([opacity[None], opacity * colours, opacity * colours.square()])
    return Template(colours, opacity, torch.fft.rfft2(stack, s=(PADDED, PADDED)).conj())


def measure_all(
    scenes: Sequence[Scene], pictures: Sequence[Image.Image] | Tensor, name: str
) -> list[Fidelity]:
    """Fidelity of each picture, of images or of a tensor [B, 3, 128, 128] in −1…1."""
    stacked = pictures if isinstance(pictures, Tensor) else prepare_images(pictures)
    fidelities = []
    with progress(len(scenes), f"registering ({name})") as bar:
        for scene, picture in zip(scenes, (stacked.clamp(-1, 1) + 1) / 2, strict=True):
            fidelities.append(measure(scene, picture))
            bar.advance(images=1)
    return fidelities


@torch.no_grad()
def decode_renderings(model: Backbone, scenes: Sequence[Scene]) -> Tensor:
    """The scenes as rendered, through the autoencoder, rounded as files are."""
    parts = []
    for first in range(0, len(scenes), BATCH):
        clean = prepare_images([render(scene).image for scene in scenes[first : first + BATCH]])
        parts.append(model.decode(model.encode(clean).mean).cpu().float())
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def measure_from_true(
    model: Backbone, scenes: Sequence[Scene], settings: FidelitySettings, share: float
) -> dict[str, float]:
    """Mean figures of the scenes drawn by the last `share` of the steps alone, from true renderings noised so far."""
    images: list[Image.Image] = []
    with progress(len(scenes), f"drawing (the last {share:.0%})") as bar:
        for first in range(0, len(scenes), settings.batch):
            batch = scenes[first : first + settings.batch]
            clean = model.encode(prepare_images([render(scene).image for scene in batch])).mean
            images += sample_images(model, batch, settings.setting, GivenLatents(clean, share))
            bar.advance(len(batch), images=len(batch))
    fidelities = measure_all(scenes, images, f"the last {share:.0%}")
    names = ("correlation", "ssim", "psnr_db")
    return {"share": share} | {
        name: sum(getattr(fidelity, name) for fidelity in fidelities) / len(fidelities) for name in names
    }


# The table -----------------------------------------------------------------------------------------------------

GROUPS = ("all", "one thing, plain", "with an accessory", "in a style", "two things")


def is_in_group(group: str, scene: Scene) -> bool:
    """Whether a scene belongs to a row of the table."""
    two = scene.pair or len(scene.things) == 2
    accessory = scene.things[0].accessory is not None
    match group:
        case "one thing, plain":
            return not two and not accessory and scene.style is None
        case "with an accessory":
            return accessory
        case "in a style":
            return scene.style is not None
        case "two things":
            return two
        case _:
            return True


def summarize_group(
    group: str, scenes: Sequence[Scene], measured: Sequence[Fidelity], bound: Sequence[Fidelity]
) -> dict[str, Any]:
    """Means of a group with the bound; the ratio is of the mean correlations."""
    indices = [k for k, scene in enumerate(scenes) if is_in_group(group, scene)]

    def mean(values: Iterator[float]) -> float:
        return sum(values) / len(indices) if indices else math.nan

    figures: dict[str, Any] = {"group": group, "n": len(indices)}
    for name in ("correlation", "ssim", "psnr_db"):
        figures[name] = mean(getattr(measured[k], name) for k in indices)
        figures[f"bound_{name}"] = mean(getattr(bound[k], name) for k in indices)
    return {**figures, "ratio": figures["correlation"] / figures["bound_correlation"]}


def correlate_grades(
    grades: dict[str, float], scenes: Sequence[Scene], measured: Sequence[Fidelity]
) -> dict[str, float]:
    """Spearman's rank correlation of grades by eye (by seed) with each figure, and the number of pictures."""
    from scipy.stats import spearmanr

    graded = [k for k, scene in enumerate(scenes) if str(scene.seed) in grades]
    eye = [grades[str(scenes[k].seed)] for k in graded]
    correlations = {
        name: float(spearmanr(eye, [getattr(measured[k], name) for k in graded]).statistic)
        for name in ("correlation", "ssim", "psnr_db")
    }
    return {**correlations, "n": len(graded)}


def format_markdown(facts: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"`{facts['model']}`: {facts['prompts']} held-out prompts, {facts['steps']} steps "
        f"({facts['sampler']}), guidance {facts['guidance']:g}{describe_guidance_interval(facts['guided'])}",
        "",
        "| glyph fidelity | correlation | bound | ratio | SSIM | bound | PSNR dB | bound | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['group']} | {row['correlation']:.3f} | {row['bound_correlation']:.3f} | {row['ratio']:.2f} "
        f"| {row['ssim']:.3f} | {row['bound_ssim']:.3f} | {row['psnr_db']:.1f} | {row['bound_psnr_db']:.1f} "
        f"| {row['n']} |"
        for row in facts["rows"]
    ]
    if "from_true" in facts:
        lines += [
            "",
            "| from the true scenes, by the last | correlation | SSIM | PSNR dB |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row['share']:.0%} of the steps | {row['correlation']:.3f} | {row['ssim']:.3f} | {row['psnr_db']:.1f} |"
            for row in facts["from_true"]
        ]
    if "agreement" in facts:
        eye = facts["agreement"]
        text = ", ".join(f"{name} {value:.2f}" for name, value in eye.items() if name != "n")
        lines += ["", f"Rank correlation with grades by eye (n = {eye['n']}): {text}."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_app(app)
