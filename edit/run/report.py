"""The output of an edit: images, the sheet, heat maps, a film, the report, and the record that repeats it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from backbone.io.files import write_bytes, write_json, write_text
from backbone.io.report import command_block, heading, image_figure, paragraph, table, write_report
from backbone.io.run_folder import package_versions
from backbone.media.parameters import describe_concepts, describe_drawing
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.transforms import mask_to_tensor
from edit.attention.alignment import restore_placeholders
from edit.masks import mask_to_image
from edit.result import Result

RECORD = "run.json"
REPORT = "report.html"
INVERSION = "inversion.safetensors"
LEFT_OUT = (  # in an image: where files lay, and what changes nothing in it
    *(
        "image",
        "inversion",
        "mask",
        "first",
        "second",
        "model",
        "scorer",
        "metrics",
        "film",
        "device",
        "scale",
    ),
    *("condition", "controlnet", "source_condition"),
    *("prompt", "first_prompt", "second_prompt"),  # which the image's own prompt says
)
TITLES = {
    "psnr_db": "PSNR to the source, dB",
    "background_psnr_db": "background PSNR, dB",
    "background_ssim": "background SSIM",
    "structure_distance": "structure distance",
    "scorer_whole": "scorer, whole",
    "scorer_edited_region": "scorer, edited region",
}


DRIFT = {
    "drift_px": "drift, px",
    "drift_percent": "of the longer side, %",
    "shift_right_px": "to the right, px",
    "shift_down_px": "down, px",
    "scale": "scale",
    "tone_percent": "colours off, %",
    "changed_share": "share that changed",
    "background_psnr_db_as_edited": "background PSNR as drawn, dB",
    "background_psnr_db_registered": "after registration, dB",
}
AS_DRAWN = "all of it as it was drawn"
UNSEEN_DRIFT = 0.005  # pixels, which would be written as 0.00
COUNTS = {
    "nfe": "evaluations of the denoiser (NFE)",
    "nfe_of_inversion": "of these for the inversion",
    "reconstruction_psnr_db": "PSNR of the reconstruction, dB",
    "autoencoder_psnr_db": "PSNR of the autoencoder alone, dB",
    "seconds": "time, s",
    "peak_memory_mb": "peak memory, MB",
}


def publish(
    folder: Path,
    result: Result,
    *,
    command: str,
    frames: Sequence[Image.Image],
    figures: Sequence[Mapping[str, float | None]],
    counts: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    """Write the contents of a run folder.

    `figures` are of each edit, none if they were not measured; `counts` are of the run; `record` says what was run,
    with which model and files, `command` is the command that repeats it.
    """
    images, masks = result.images, render_masks(result)
    save_images(folder, result, images, masks, record)
    page = draw_result_sheet(result, images, masks)
    save_png(folder / "sheet.png", page)
    strips = {
        restore_placeholders(word, result.placeholders): strip
        for word, strip in draw_heatmaps(result, images).items()
    }
    for word, strip in strips.items():
        save_png(folder / f"heatmap_{slug(word)}.png", strip)
    if frames:
        write_bytes(folder / "trajectory.gif", encode_gif(frames))
    # The record, from which `edit replay` repeats the run
    edits = [
        {"file": f"edit_{number}.png", "prompt": prompt, **(figures[number] if figures else {})}
        for number, prompt in enumerate(result.prompts)
    ]
    alignments = [alignment.describe(result.placeholders) for alignment in result.alignments]
    entries = {"edits": edits, "alignment": alignments, "versions": package_versions()}
    write_json(
        folder / RECORD, {**record, "image": dict(result.encoded.facts), **result.facts, **counts, **entries}
    )
    # The report, in reading order
    parts = [image_figure(page, "source, reconstruction, edits, masks and differences")]
    parts += tabulate_metrics(result.prompts, figures) if figures else []
    parts += tabulate_drift(result.prompts, result.facts.get("drift", ()))
    if frames:
        parts += [
            image_figure(folder / "trajectory.gif", "what the edits were estimated to become, step by step")
        ]
    rows = [(COUNTS.get(name, name), "–" if value is None else value) for name, value in counts.items()]
    parts += [heading("The run"), table(("", ""), rows)]
    if alignments:
        parts += [heading("What became of the words"), *(command_block(text) for text in alignments)]
    if strips:
        parts += [heading("Where words look"), *(image_figure(strip, word) for word, strip in strips.items())]
    write_report(folder / REPORT, result.title, [*parts, heading("Again"), command_block(command)])
    write_text(
        folder / "README.md",
        format_readme(result, command=command, typed=record["said"], measured=bool(figures)),
    )


def save_images(
    folder: Path,
    result: Result,
    images: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    record: Mapping[str, Any],
) -> None:
    """Write the source, the edits (with their settings as metadata), the reconstruction, the masks and the maps."""
    save_png(folder / "source.png", result.source)
    for number, (image, prompt) in enumerate(zip(images, result.prompts, strict=True)):
        text = describe_drawing(prompt, image.size, {**describe_edit(result, record), "edit_number": number})
        save_png(folder / f"edit_{number}.png", image, text=text)
    if result.trajectory is not None:
        save_png(folder / "reconstruction.png", result.reconstruction)
    for number, mask in enumerate(masks):
        save_png(folder / f"mask_{number}.png", mask)
    for number, condition in enumerate(result.layout.conditions):
        save_png(folder / f"condition_{number}_{condition.facts['kind']}.png", condition.map)


def describe_edit(result: Result, record: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an edit's image: command, model, concepts and every setting that is a plain value."""
    settings = {
        name: value
        for name, value in record["settings"].items()
        if isinstance(value, (str, int, float)) and name not in LEFT_OUT
    }
    steps = {"steps": result.inversions[0].steps} if result.inversions else {}
    guidance = {name: value for name, value in result.facts.items() if isinstance(value, (str, float))}
    return {
        "edit": record["command"],
        "sampler": settings.pop("method", record["command"]),
        "model": record["model"],
        **settings,
        **steps,
        **guidance,
        **describe_concepts([concept["folder"] for concept in record["concepts"]], record["scale"]),
        "conditions": [condition.brief() for condition in result.layout.conditions],
    }


def render_masks(result: Result) -> list[Image.Image]:
    """Where each edit was allowed to differ [mode L]; none if everywhere."""
    masks = [] if result.masks is None else list(result.masks)
    return [mask_to_image(mask, result.source.size) for mask in masks]


def draw_result_sheet(
    result: Result, images: Sequence[Image.Image], masks: Sequence[Image.Image]
) -> Image.Image:
    """The sheet: source and reconstruction, then a row per edit with its mask and its difference."""
    lead: list[Cell | Image.Image | None] = [Cell(result.source, "source")]
    if result.trajectory is not None:
        lead.append(Cell(result.reconstruction, "reconstruction"))
    lead += [Cell(condition.map, str(condition.facts["kind"])) for condition in result.layout.conditions]
    rows = []
    for number, (image, prompt) in enumerate(zip(images, result.prompts, strict=True)):
        drift = result.facts.get("drift", ())
        drift_text = f"\n{describe_drift(drift[number])}" if drift else ""
        row = [*lead, Cell(image, prompt + drift_text)]
        row += [Cell(masks[number], "mask")] if masks else []
        rows.append([*row, Cell(draw_difference(result.source, image), "difference to the source")])
        lead = [None] * len(lead)
    return draw_sheet(rows, title=result.title)


def draw_heatmaps(result: Result, images: Sequence[Image.Image]) -> dict[str, Image.Image]:
    """Every word's maps, laid over the images whose prompts have it."""
    pictures, captions = [result.source, *images], ["source", *result.prompts]
    return {
        word: draw_sheet(
            [
                [
                    Cell(overlay_heatmap(heatmap, image), caption)
                    for heatmap, image, caption in zip(maps, pictures, captions, strict=True)
                    if bool(heatmap.any())
                ]
            ],
            cell=160,
        )
        for word, maps in result.heatmaps.items()
    }


def overlay_heatmap(heatmap: Tensor, image: Image.Image) -> Image.Image:
    """A map [h, w] laid over an image: bright where it is strong, the image darkened where it is weak."""
    share = heatmap.detach().float().cpu()
    share = (share / max(float(share.max()), 1e-12)).clamp(0, 1)
    size = (image.height, image.width)
    strength = F.interpolate(share[None, None], size, mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)
    grey = mask_to_tensor(image.convert("L"))[0]
    channels = (
        0.25 * grey + 0.75 * (1.6 * strength).clamp(0, 1),
        0.25 * grey + 0.75 * (2.2 * strength - 0.8).clamp(0, 1),
        0.25 * grey + 0.75 * (0.35 * (1 - strength)),
    )
    return Image.fromarray((torch.stack(channels, -1).clamp(0, 1) * 255).round().byte().numpy())


def tabulate_metrics(prompts: Sequence[str], figures: Sequence[Mapping[str, float | None]]) -> list[str]:
    """The available metrics of every edit, as parts of the report."""
    names = [name for name in TITLES if any(row.get(name) is not None for row in figures)]
    rows = [
        (prompt, *("–" if (value := row.get(name)) is None else value for name in names))
        for prompt, row in zip(prompts, figures, strict=True)
    ]
    note = (
        "The background is what lies outside the mask, measured over its own pixels. A structure distance and a "
        "scorer's similarity compare with those of the same scorer only."
    )
    return [heading("Figures"), table(("edit", *(TITLES[name] for name in names)), rows), paragraph(note)]


def describe_drift(drift: Mapping[str, float | None]) -> str:
    """The drift of an edit against the image before it, in a few words."""
    if drift["drift_px"] is None:
        return AS_DRAWN
    if drift["drift_px"] < UNSEEN_DRIFT and not drift["tone_percent"]:
        return "the rest did not drift"
    tone = f", colours {drift['tone_percent']:.1f} % off" if drift["tone_percent"] else ""
    return (
        f"drifted {drift['drift_px']:.2f} px, {drift['drift_percent']:.2f} % of its longer side{tone}; undone"
    )


def tabulate_drift(prompts: Sequence[str], drifts: Sequence[Mapping[str, float | None]]) -> list[str]:
    """The drift of each edit by instruction against the image before it, as parts of the report."""
    if not drifts:
        return []
    names = [name for name in DRIFT if any(row.get(name) is not None for row in drifts)]
    rows = [
        (prompt, *("–" if (value := row.get(name)) is None else value for name in names))
        for prompt, row in zip(prompts, drifts, strict=True)
    ]
    described = [describe_drift(row) for row in drifts]
    note = "The model drew the whole image anew, and the background was put back"
    if any(text.endswith("undone") for text in described):
        note += "; where the image drifted from the one before, that was undone"
    if AS_DRAWN in described:
        note += ". What changed nearly everything is as it was drawn"
    return [heading("Drift"), table(("edit", *(DRIFT[name] for name in names)), rows), paragraph(f"{note}.")]


def draw_difference(first: Image.Image, second: Image.Image) -> Image.Image:
    """|first − second|, black where nothing changed."""
    return ImageChops.difference(first.convert("RGB"), second.convert("RGB"))


def encode_gif(frames: Sequence[Image.Image]) -> bytes:
    """An animated GIF that shows its last frame longest."""
    buffer = io.BytesIO()
    durations = [120] * (len(frames) - 1) + [1500]
    frames[0].save(buffer, "GIF", save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)
    return buffer.getvalue()


def format_readme(result: Result, *, command: str, typed: str, measured: bool) -> str:
    """The run's README.md."""
    lines = [f"# {result.title}", "", "The command that repeats this run:", "", f"    {command}", ""]
    if typed:
        lines += ["What was typed:", "", f"    {typed}", ""]
    lines += [f"- `edit_{number}.png`: {prompt}" for number, prompt in enumerate(result.prompts)]
    lines += [
        f"- `sheet.png`, `report.html`: everything side by side{', with figures' if measured else ''}",
        f"- `{RECORD}`: settings, versions{', figures' if measured else ''}",
        "",
    ]
    return "\n".join(lines)


def slug(word: str) -> str:
    """A word as part of a file's name."""
    return re.sub(r"[^\w-]+", "-", word).strip("-") or "word"
