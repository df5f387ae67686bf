"""What an edit leaves behind: pictures, the sheet, heat maps, a film, the report, and the record that repeats it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from backbone.io.files import write_bytes, write_json, write_text
from backbone.io.report import command, heading, image_figure, paragraph, table, write_report
from backbone.io.run_folder import package_versions
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.transforms import mask_to_tensor

RECORD = "run.json"
REPORT = "report.html"
INVERSION = "inversion.safetensors"
TITLES = {
    "psnr_db": "PSNR to the source, dB",
    "background_psnr_db": "background PSNR, dB",
    "background_ssim": "background SSIM",
    "structure_distance": "structure distance",
    "scorer_whole": "scorer, whole",
    "scorer_edited_region": "scorer, edited region",
}


@dataclass(frozen=True)
class Result:
    """An edit, ready to be written.

    source          the picture as the model was shown it
    edits           with their captions
    reconstruction  what an edit that changes nothing would give, if the method has one
    masks           where each edit was let differ [mode L], None for everywhere
    heatmaps        word → one picture for the source (if it says the word) and each edit
    frames          of the film
    alignments      printed ones, one for each edit
    measured        figures of each edit; `facts` and `counts` are of the whole run
    """

    title: str
    source: Image.Image
    edits: Sequence[Image.Image]
    captions: Sequence[str]
    facts: Mapping[str, Any]
    counts: Mapping[str, Any]
    measured: Sequence[Mapping[str, float | None]] = ()
    reconstruction: Image.Image | None = None
    masks: Sequence[Image.Image | None] = ()
    heatmaps: Mapping[str, Sequence[Cell]] = field(default_factory=dict)
    frames: Sequence[Image.Image] = ()
    alignments: Sequence[str] = ()


def publish(folder: Path, result: Result, *, name: str, wishes: Mapping[str, Any], said: str) -> None:
    """Writes everything that a run folder holds; `said` is the command that was typed, if one was."""
    save_png(folder / "source.png", result.source)
    for number, (edit, caption) in enumerate(zip(result.edits, result.captions, strict=True)):
        save_png(folder / f"edit_{number}.png", edit, text={"prompt": caption})
    if result.reconstruction is not None:
        save_png(folder / "reconstruction.png", result.reconstruction)
    for number, mask in enumerate(result.masks):
        if mask is not None:
            save_png(folder / f"mask_{number}.png", mask)
    drawn = page(result)
    save_png(folder / "sheet.png", drawn)
    maps = {word: draw_sheet([list(cells)], cell=160) for word, cells in result.heatmaps.items()}
    for word, strip in maps.items():
        save_png(folder / f"heatmap_{slug(word)}.png", strip)
    if result.frames:
        write_bytes(folder / "trajectory.gif", film(result.frames))
    again = f"edit replay {folder / RECORD}"
    write_json(
        folder / RECORD,
        {
            "command": name,
            "said": said,
            "settings": dict(wishes),
            **result.facts,
            **result.counts,
            "edits": [
                {
                    "file": f"edit_{k}.png",
                    "prompt": caption,
                    **(result.measured[k] if result.measured else {}),
                }
                for k, caption in enumerate(result.captions)
            ],
            "alignment": list(result.alignments),
            "versions": package_versions(),
        },
    )
    report(folder / REPORT, result, drawn, maps, again=again)
    write_text(folder / "README.md", readme(result, again=again, said=said))


def page(result: Result) -> Image.Image:
    """The sheet: source, reconstruction and edits; below, where they were let differ, and how far they do."""
    lead: list[Cell | Image.Image | None] = [Cell(result.source, "source")]
    if result.reconstruction is not None:
        lead.append(Cell(result.reconstruction, "reconstruction"))
    rows = [[*lead, *(Cell(e, c) for e, c in zip(result.edits, result.captions, strict=True))]]
    blank: list[Cell | Image.Image | None] = [None] * len(lead)
    if any(mask is not None for mask in result.masks):
        rows.append([*blank, *(None if mask is None else Cell(mask, "mask") for mask in result.masks)])
    rows.append(
        [*blank, *(Cell(difference(result.source, e), "difference to the source") for e in result.edits)]
    )
    return draw_sheet(rows, title=result.title, cell=192)


def difference(first: Image.Image, second: Image.Image) -> Image.Image:
    """|first − second|, black where nothing changed."""
    return ImageChops.difference(first.convert("RGB"), second.convert("RGB"))


def film(frames: Sequence[Image.Image]) -> bytes:
    """An animated GIF that shows its last frame longest."""
    buffer = io.BytesIO()
    lasting = [120] * (len(frames) - 1) + [1500]
    frames[0].save(buffer, "GIF", save_all=True, append_images=list(frames[1:]), duration=lasting, loop=0)
    return buffer.getvalue()


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for number, one in enumerate(pictures):
        row.paste(one, (number * width, 0))
    return row


def report(
    path: Path, result: Result, drawn: Image.Image, maps: Mapping[str, Image.Image], *, again: str
) -> None:
    """`report.html`: the sheet, the figures, the alignment and the heat maps on one page."""
    parts = [image_figure(drawn, "source, reconstruction, edits, masks and differences")]
    if result.measured:
        names = [n for n in TITLES if any(m.get(n) is not None for m in result.measured)]
        rows = [
            (caption, *("–" if (value := m.get(n)) is None else value for n in names))
            for caption, m in zip(result.captions, result.measured, strict=True)
        ]
        parts += [heading("Figures"), table(("edit", *(TITLES[n] for n in names)), rows)]
        parts.append(
            paragraph(
                "The background is what lies outside the mask, measured over its own pixels. A structure distance and "
                "a scorer's likeness compare with those of the same scorer only."
            )
        )
    counts = [
        (name.replace("_", " "), "–" if value is None else value) for name, value in result.counts.items()
    ]
    parts += [heading("The run"), table(("", ""), counts)]
    if result.alignments:
        parts += [heading("What became of the words"), *(command(text) for text in result.alignments)]
    if maps:
        parts += [heading("Where words look"), *(image_figure(strip, word) for word, strip in maps.items())]
    parts += [heading("Again"), command(again)]
    write_report(path, result.title, parts)


def readme(result: Result, *, again: str, said: str) -> str:
    """The run's README.md."""
    lines = [f"# {result.title}", "", "The command that repeats this run:", "", f"    {again}", ""]
    if said:
        lines += ["What was typed:", "", f"    {said}", ""]
    lines += [f"- `edit_{number}.png`: {caption}" for number, caption in enumerate(result.captions)]
    lines += [
        "- `sheet.png`, `report.html`: everything side by side, with figures",
        f"- `{RECORD}`: settings, versions, figures",
        "",
    ]
    return "\n".join(lines)


def slug(word: str) -> str:
    """A word as part of a file's name."""
    return re.sub(r"[^\w-]+", "-", word).strip("-") or "word"


def heat(places: Tensor, over: Image.Image, greatest: float) -> Image.Image:
    """A map [h, w] laid over a picture: bright where it is strong, the picture darkened where it is weak."""
    share = (places.detach().float().cpu() / max(greatest, 1e-12)).clamp(0, 1)
    large = F.interpolate(share[None, None], (over.height, over.width), mode="bilinear", align_corners=False)[
        0, 0
    ]
    picture = mask_to_tensor(over.convert("L"))[0]
    strength = large.clamp(0, 1)
    channels = (
        0.25 * picture + 0.75 * (1.6 * strength).clamp(0, 1),
        0.25 * picture + 0.75 * (2.2 * strength - 0.8).clamp(0, 1),
        0.25 * picture + 0.75 * (0.35 * (1 - strength)),
    )
    pixels = (torch.stack(channels, -1).clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels)
