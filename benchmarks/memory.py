"""The memory that each family's published shapes need, counted from their configs: the tables of docs/families/.

    python -m benchmarks.memory                             every family, for GPUs of 8 to 48 GiB
    python -m benchmarks.memory z-image chroma --vram 10

A run of `customize train` with its defaults in bf16, at the model's own resolution: as it comes, and with what `--vram`
changes until the whole run fits, previews and encoders included, where bitsandbytes is installed. Nothing is loaded
and no GPU is needed. Writes `memory.md` and `memory.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from backbone.cli.commands import run_main
from backbone.families.location import PUBLISHED_CONFIGS
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json, write_text
from backbone.io.progress import progress
from customize.settings import resolve_settings

if TYPE_CHECKING:
    from backbone.models.model import Backbone, Task

GIB = 2**30
SIZES = (8.0, 12.0, 16.0, 24.0, 48.0)  # GiB of common GPUs


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


class Plan(NamedTuple):
    """A run for a device of `vram` GiB: the plan's changes, and the bytes of its largest phase."""

    vram: float
    changes: Sequence[str]
    most: int


class Row(NamedTuple):
    """Bytes of each phase of a run as it comes, and the plans for the smaller devices that it fits.

    parameters  of the network
    """

    name: str
    parameters: int
    phases: Mapping[str, int]
    plans: Sequence[Plan]


def open_shape(name: str, folder: Path) -> Backbone:
    """A published model from its configs, in a folder without weights.

    Raises `UserError` for an unknown name.
    """
    if name not in SHAPES:
        raise UserError(f"There is no published shape {name}. Choose of {', '.join(SHAPES)}.")
    from backbone.models.model import Backbone

    shape = SHAPES[name]
    write_json(folder / "model_index.json", {**lay_out(shape, folder), "_class_name": shape.pipeline})
    task: Task = "edit" if "Edit" in shape.pipeline else "text-to-image"
    return Backbone.open(str(folder), device="cpu", precision="bf16", task=task)


def lay_out(shape: Shape, target: Path) -> dict[str, object]:
    """Writes the configs of a shape into a folder; returns its components as an index names them."""
    index = dict[str, object]()
    for folder in reversed(shape.folders):  # those that count first are laid over the others
        for config in sorted((PUBLISHED_CONFIGS / folder).glob("*/*.json")):
            part = config.parent.name
            write_json(target / part / config.name, read_json(config))
            library = "transformers" if part.startswith(("text", "image")) else "diffusers"
            index[part] = [library, ""]
    return index


def count(name: str, model: Backbone, sizes: Sequence[float]) -> Row:
    """A row of the table, for GPUs of these GiB."""
    from backbone.memory.planner import MemoryEstimator, MemorySettings, plan_memory
    from backbone.models.placement import Placement
    from customize.training.memory import make_workload

    options = {"images": "", "token": "[V]", "class_noun": "dog"}
    if model.edits_by_instruction:
        options |= {"pairs": "pairs"}
    estimator = MemoryEstimator(model, make_workload(model, resolve_settings(options, model.defaults)))
    start = MemorySettings("bf16", placement=Placement())
    phases = {phase: counted.total_bytes for phase, counted in estimator.phases(start).items()}
    parameters = sum(value.numel() for value in estimator.meta_denoiser("bf16").parameters())
    plans = []
    for size in sizes:
        try:
            plan = plan_memory(estimator, size, start, library=True)
        except UserError:
            continue
        most = max(phase.total_bytes for phase in plan.phases.values())
        plans.append(Plan(size, tuple(plan.reasons), most))
    return Row(name, parameters, phases, plans)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of published model shapes.", show_default="all")
    ] = None,
    vram: Annotated[
        list[float], typer.Option(help="Memory of a GPU to plan for, in GiB. Repeatable.", min=0.1)
    ] = list(SIZES),  # noqa: B006  typer copies it
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("build/benchmarks/memory"),
) -> None:
    """Counts and writes the table."""
    rows, selected = [], list(names or SHAPES)
    with TemporaryDirectory() as folder, progress(len(selected), "counting") as bar:
        models = {name: open_shape(name, Path(folder) / str(number)) for number, name in enumerate(selected)}
        for name, model in models.items():
            rows.append(count(name, model, sorted(vram)))
            bar.advance()
    write_text(out / "memory.md", format_table(rows, sorted(vram)))
    record = [row._asdict() | {"plans": [plan._asdict() for plan in row.plans]} for row in rows]
    write_json(out / "memory.json", {"rows": record})
    typer.echo((out / "memory.md").read_text())


def format_table(rows: Sequence[Row], sizes: Sequence[float]) -> str:
    """The rows in GiB: of each model as it comes, then at every size."""
    lines = ["| | `--vram` | what the plan changes | peak, GiB |", "|---|---|---|---|"]
    for name, parameters, phases, plans in rows:
        title = name if " " in name else f"`{name}`"
        parts = ", ".join(f"{phase} {size / GIB:.1f}" for phase, size in phases.items())
        most = max(phases.values()) / GIB
        lines.append(f"| {title}, {parameters / 1e9:.2f} billion | – | nothing: {parts} | {most:.1f} |")
        plans_by_size = {plan.vram: plan for plan in plans}
        for size in sizes:
            plan = plans_by_size.get(size)
            changes = "does not fit" if plan is None else ", ".join(plan.changes) or "nothing"
            lines.append(f"| | {size:g} | {changes} | {'–' if plan is None else f'{plan.most / GIB:.1f}'} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_main(main)
