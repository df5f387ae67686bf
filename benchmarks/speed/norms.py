"""What group norms plane by plane save (`backbone.families.unet.norms`), in one run.

    python -m benchmarks.speed.norms --clock cpu      single norms, predictions and a training step of `moji`

torch's kernel for channels_last on a CPU loops over the numbers of maps below 32 × 32 where a group has few channels.
Each row is computed by it and plane by plane in turn, in bf16.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn

from backbone.cli.commands import run_main
from backbone.families.unet.norms import PlanarGroupNorm, use_planar_norms
from backbone.io.files import write_text
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from benchmarks.speed.customize import BareStep, make_material, make_settings
from benchmarks.speed.shapes import CLOCKS, CLOCKS_OF, ClockFlag, describe_machine, time_in_turns
from customize.objectives.dreambooth import DreamBooth

NORMS = ((2, 64, 16), (20, 64, 16), (20, 128, 8), (20, 256, 4))  # rows, channels, a side
ROWS = (1, 2, 8, 20)  # of a prediction: an image takes two where it is guided
COUNTS, STEPS = (1, 4, 10), 25


def main(
    warm: Annotated[int, typer.Option(min=1, help="Timed passes of each kind, after one that is not.")] = 15,
    clock: ClockFlag = "wall",
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("build/benchmarks/norms.md"),
) -> None:
    """Single norms, then predictions and a training step of `moji`, by both ways in turn."""
    time_them = partial(time_in_turns, turns=warm, device="cpu", clock=CLOCKS_OF[clock])
    lines = [
        f"{CLOCKS[clock]}, medians of {warm} of each kind in turn ({describe_machine('cpu')}).",
        "",
        "| | channels_last, ms | plane by plane, ms | ratio |",
        "|---|---|---|---|",
    ]
    for rows, channels, side in NORMS:
        title = f"a norm of {rows} × {channels} × {side} × {side}"
        lines.append(format_row(title, time_them(make_norm_acts(rows, channels, side))))
    model = Backbone.open("moji", device="cpu", precision="bf16")
    for rows in ROWS:
        lines.append(
            format_row(f"`moji`, a prediction of {rows}", time_them(make_prediction_acts(model, rows)))
        )
    for count in COUNTS:
        title = f"`moji`, {count} image{'s' * (count > 1)} of {STEPS} steps"
        lines.append(format_row(title, time_them(make_sampling_acts(model, count))))
    lines.append(format_row("`moji`, a training step, rank 4", time_them(make_step_acts(model))))
    text = "\n".join(lines) + "\n"
    write_text(out, text)
    print(text)


def make_norm_acts(rows: int, channels: int, side: int) -> dict[str, Callable[[], object]]:
    """A single norm of maps [rows, channels, side, side]."""
    norm = use_planar_norms(nn.GroupNorm(32, channels, dtype=torch.bfloat16))
    maps = torch.randn(rows, channels, side, side).to(torch.bfloat16, memory_format=torch.channels_last)
    return make_acts(norm, torch.no_grad()(lambda: norm(maps)))


def make_prediction_acts(model: Backbone, rows: int) -> dict[str, Callable[[], object]]:
    """A prediction of this many rows."""
    network = cast(Any, model.denoiser)
    noisy = torch.randn(rows, network.config.in_channels, *model.latent_shape[1:])
    noisy = noisy.to(torch.bfloat16, memory_format=torch.channels_last)
    words = torch.randn(rows, 77, network.config.cross_attention_dim).to(torch.bfloat16)
    return make_acts(network, torch.no_grad()(lambda: network(noisy, 500, words)))


def make_sampling_acts(model: Backbone, count: int) -> dict[str, Callable[[], object]]:
    """Sampling this many images in one batch, as `moji` is guided."""
    requests = [Request("a dog in the snow", (0, number)) for number in range(count)]
    asked = {"steps": STEPS, "guidance": model.defaults["guidance"], "seed": 0, "batch": count}
    return make_acts(model.denoiser, lambda: list(sample(model, requests, **asked)))


def make_step_acts(model: Backbone) -> dict[str, Callable[[], object]]:
    """Forward, loss and backward of a model with a LoRA on attention."""
    data = make_material(model)
    return make_acts(model.denoiser, BareStep(DreamBooth(model, data, make_settings(1)), data).step)


def make_acts(network: nn.Module, act: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The same by torch's norms and by planar ones."""

    def by_group_norms() -> None:
        with use_group_norms(network):
            act()

    return {"group_norm": by_group_norms, "planar": act}


@contextmanager
def use_group_norms(network: nn.Module) -> Iterator[None]:
    """Inside the `with`, a network's planar norms are torch's."""
    planar = [module for module in network.modules() if type(module) is PlanarGroupNorm]
    for module in planar:
        cast(Any, module).__class__ = nn.GroupNorm
    try:
        yield
    finally:
        for module in planar:
            module.__class__ = PlanarGroupNorm


def format_row(title: str, seconds: Mapping[str, list[float]]) -> str:
    """A line of the table; the ratio is the median of each turn's."""
    plain, planar = seconds["group_norm"], seconds["planar"]
    ratio = statistics.median(a / b for a, b in zip(plain, planar, strict=True))
    medians = " | ".join(f"{1000 * statistics.median(side):.2f}" for side in (plain, planar))
    return f"| {title} | {medians} | {ratio:.2f}× |"


if __name__ == "__main__":
    run_main(main)
