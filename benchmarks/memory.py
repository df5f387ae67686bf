"""The memory that each family's published shapes ask for, counted from their configs: the table of docs/families.md.

    python -m benchmarks.memory                             every family, for a GPU of 8 GiB
    python -m benchmarks.memory z-image chroma --vram 12

A LoRA of rank 8 is trained in bf16 with gradient checkpointing, one image a step, at the model's own resolution.
Nothing is loaded and no GPU is needed: these are the plans of `customize train --vram`, which may be of a quantised
base (bitsandbytes). Writes `memory.md` and `memory.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer

from backbone.cli.commands import run_main
from backbone.families.location import PUBLISHED_CONFIGS
from backbone.io.console import UserError, progress
from backbone.io.files import read_json, write_json, write_text
from backbone.memory.planner import GIB, MemoryEstimator, MemorySettings, plan_memory
from backbone.models.model import Backbone, Task
from backbone.models.placement import Placement
from customize.settings import resolve_settings
from customize.training.memory import work_of


class Shape(NamedTuple):
    """A published model: its pipeline's class, and the folders of its configs, those that count first."""

    pipeline: str
    folders: tuple[str, ...]


CLIPS = ("stable-diffusion-xl", "stable-diffusion-1")  # with the configs of both of CLIP's text encoders
SHAPES = {
    "sd15": Shape("StableDiffusionPipeline", CLIPS[1:]),
    "Stable Diffusion 2.1": Shape("StableDiffusionPipeline", ("768", "stable-diffusion-2", *CLIPS[1:])),
    "sdxl": Shape("StableDiffusionXLPipeline", CLIPS),
    "sd3": Shape("StableDiffusion3Pipeline", ("stable-diffusion-3.5-medium", "stable-diffusion-3", *CLIPS)),
    "Stable Diffusion 3.5 large": Shape(
        "StableDiffusion3Pipeline", ("stable-diffusion-3.5-large", "stable-diffusion-3", *CLIPS)
    ),
    "flux": Shape("FluxPipeline", ("flux-dev", "flux", *CLIPS[1:])),
    "chroma": Shape("ChromaPipeline", ("chroma", "flux")),
    "z-image": Shape("ZImagePipeline", ("z-image",)),
    "flux2-klein": Shape("Flux2KleinPipeline", ("flux2-klein",)),
    "flux2-klein-9b": Shape("Flux2KleinPipeline", ("flux2-klein-9b", "flux2-klein")),
    "flux2-dev": Shape("Flux2Pipeline", ("flux2-dev", "flux2-klein")),
    "krea2": Shape("Krea2Pipeline", ("krea2", "qwen-image")),
    "qwen-image": Shape("QwenImagePipeline", ("qwen-image",)),
    "qwen-image-edit": Shape("QwenImageEditPipeline", ("qwen-image",)),
    "qwen-image-2.1": Shape("QwenImage21Pipeline", ("qwen-image-2.1",)),
}


class Row(NamedTuple):
    """Bytes of the training step as it comes, and the plan for a smaller device: what it changes, its largest phase.

    parameters  of the network
    changes     None where nothing fits
    """

    name: str
    parameters: int
    training: int
    changes: Sequence[str] | None
    planned: int


def open_shape(name: str, place: Path) -> Backbone:
    """A published model as its configs have it, laid into a folder without weights.

    Raises `UserError` for a name that there is not.
    """
    if name not in SHAPES:
        raise UserError(f"There is no published shape {name}. Choose of {', '.join(SHAPES)}.")
    shape, index = SHAPES[name], dict[str, object]()
    for folder in reversed(shape.folders):  # those that count first are laid over the others
        for config in sorted((PUBLISHED_CONFIGS / folder).glob("*/*.json")):
            part = config.parent.name
            write_json(place / part / config.name, read_json(config))
            index[part] = ["transformers" if part.startswith("text") else "diffusers", ""]
    write_json(place / "model_index.json", {**index, "_class_name": shape.pipeline})
    task: Task = "edit" if "Edit" in shape.pipeline else "text-to-image"
    return Backbone.open(str(place), device="cpu", precision="bf16", task=task)


def count(name: str, model: Backbone, size: float) -> Row:
    """A row of the table, for a GPU of `size` GiB."""
    asked = {"images": "", "token": "[V]", "class_noun": "dog", "rank": 8, "batch": 1, "prior": "off"}
    if model.edits_by_instruction:
        asked |= {"pairs": "pairs"}
    estimator = MemoryEstimator(model, work_of(model, resolve_settings(asked, model.defaults)))
    start = MemorySettings("bf16", checkpointing=True, placement=Placement())
    training = estimator.phases(start)["training"].total_bytes
    parameters = sum(value.numel() for value in estimator.meta_denoiser("bf16").parameters())
    try:
        plan = plan_memory(estimator, size, start, library=True)
    except UserError:
        return Row(name, parameters, training, None, 0)
    planned = max(phase.total_bytes for phase in plan.phases.values())
    return Row(name, parameters, training, tuple(plan.reasons), planned)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of published model shapes.", show_default="all")
    ] = None,
    vram: Annotated[float, typer.Option(help="Memory of the GPU to plan for, in GiB.", min=0.1)] = 8.0,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("build/benchmarks/memory"),
) -> None:
    """Counts and writes the table."""
    rows, chosen = [], list(names or SHAPES)
    with TemporaryDirectory() as place, progress(len(chosen), "counting") as bar:
        models = {name: open_shape(name, Path(place) / str(number)) for number, name in enumerate(chosen)}
        for name, model in models.items():
            rows.append(count(name, model, vram))
            bar.advance()
    write_text(out / "memory.md", table_of(rows, vram))
    write_json(out / "memory.json", {"vram": vram, "rows": [row._asdict() for row in rows]})
    typer.echo((out / "memory.md").read_text())


def table_of(rows: Sequence[Row], size: float) -> str:
    """The rows in GiB."""
    lines = [f"| | network, billions | training, GiB | `--vram {size:g}` |", "|---|---|---|---|"]
    for name, parameters, training, changes, planned in rows:
        said = (
            "does not fit"
            if changes is None
            else f"{', '.join(changes) or 'as it comes'}: {planned / GIB:.1f}"
        )
        shown = name if " " in name else f"`{name}`"
        lines.append(f"| {shown} | {parameters / 1e9:.2f} | {training / GIB:.1f} | {said} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_main(main)
