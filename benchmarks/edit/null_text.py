"""Null-text inversion: PSNR of the reconstruction against the number of inner iterations.

    python -m benchmarks.edit.null_text                   20 scenes of MojiEdit at 0, 2 and 10 iterations, 25 steps
    python -m benchmarks.edit.null_text --scenes 4 --steps 10

A scene is inverted, its unconditional embeddings are optimised (Mokady et al. 2023), and the guided sample is
decoded and compared with the image. 0 iterations are plain DDIM inversion, sampled with guidance. Writes
`null-text.md` and `null-text.json`; scenes that are already in `null-text.json` are not done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from backbone.cli.commands import run_main
from backbone.evaluation import image_metrics as measure
from backbone.io.files import read_json, write_json, write_text
from backbone.io.progress import progress
from backbone.models.model import Backbone
from backbone.world.rendering.render import find_font
from benchmarks.edit.scenes import format_number, make_cases
from edit.inversion.inversion import invert, reconstruct

ITERATIONS = (0, 2, 10)


def main(
    scenes: Annotated[int, typer.Option(min=1, help="Scenes of MojiEdit, in its order.")] = 20,
    steps: Annotated[int, typer.Option(min=2, help="Steps of every inversion and edit.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale of the edit.")] = 7.5,
    model: Annotated[str, typer.Option(help="moji, or a diffusers folder of its world.")] = "moji",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/edit"),
) -> None:
    """Inverts, walks back, and writes the table."""
    find_font()
    backbone = Backbone.open(model, device=device, precision=precision)
    facts = {
        "model": model, "fingerprint": backbone.fingerprint, "steps": steps, "guidance": guidance,
        "machine": f"{device}, {backbone.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }  # fmt: skip
    file = out / "null-text.json"
    saved = read_json(file) if file.exists() else {}
    rows: list[dict[str, Any]] = saved["rows"] if {name: saved.get(name) for name in facts} == facts else []
    cases = list(make_cases(max(scenes, 8)))[:scenes]
    with progress(len(cases), "inverting", done=min(len(rows), len(cases))) as bar:
        for case in cases[len(rows) :]:
            picture = case.rendered()[0]
            row: dict[str, Any] = {"seed": case.before.seed, "source": case.source}
            for iterations in ITERATIONS:
                inversion = invert(
                    backbone, picture, case.source, method="null-text", steps=steps, guidance=guidance,
                    iterations=iterations,
                )  # fmt: skip
                reconstructed = backbone.decode(reconstruct(inversion, guidance=guidance)[None].float())[0]
                row[f"psnr_db_{iterations}"] = measure.psnr(inversion.image, reconstructed.cpu())
                row[f"evaluations_{iterations}"] = inversion.nfe
            round_trip = backbone.decode(inversion.clean[None])[0]
            rows.append({**row, "autoencoder_psnr_db": measure.psnr(inversion.image, round_trip.cpu())})
            write_json(file, {**facts, "rows": rows})
            bar.advance(images=1)
    text = format_markdown(facts, rows[:scenes])
    write_text(out / "null-text.md", text)
    print(text)


def format_markdown(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table: mean decibels, how many scenes got worse than with fewer iterations, evaluations."""
    lines = [
        f"`{facts['model']}`: {len(rows)} scenes, {facts['steps']} steps, guidance {facts['guidance']:g} "
        f"({facts['machine']})",
        "",
        "| inner iterations | PSNR dB | scenes worse than the line above by 0.1 dB | evaluations |",
        "|---|---|---|---|",
    ]
    previous: list[float] | None = None
    for iterations in ITERATIONS:
        values = [float(row[f"psnr_db_{iterations}"]) for row in rows]
        worse = (
            "–" if previous is None else str(sum(a < b - 0.1 for a, b in zip(values, previous, strict=True)))
        )
        calls = measure.mean_of_defined([row[f"evaluations_{iterations}"] for row in rows])
        lines.append(
            f"| {iterations} | {format_number(measure.mean_of_defined(values))} | {worse} | {format_number(calls, 0)} |"
        )
        previous = values
    bound = measure.mean_of_defined([row["autoencoder_psnr_db"] for row in rows])
    return "\n".join([*lines, f"| the autoencoder alone | {format_number(bound)} | | |", ""])


if __name__ == "__main__":
    run_main(main)
