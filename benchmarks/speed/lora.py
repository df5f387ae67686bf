"""Whether other forward passes of a LoRA's layers are faster than peft's, in one run.

    python -m benchmarks.speed.lora --clock cpu        Stable Diffusion 1.5's layers and a step of `moji`: minutes
    python -m benchmarks.speed.lora --device cuda      for a GPU; `benchmarks.gpu` has whole steps, compiled too

peft computes y = W·x + b, and then y + (B·(A·x))·s: the last product is written, scaled and added, three passes over
the output [tokens, out]. `addmm` adds it, scaled, inside of that product. `merged` makes W + s·B·A [out, in] and
multiplies once; its backward pass needs the whole gradient of that matrix.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from peft.tuners.lora import Linear
from torch import Tensor, nn

from backbone.adapters.lora import add_lora
from backbone.cli.commands import run_main
from backbone.io.files import write_text
from backbone.models.model import Backbone
from benchmarks.speed.customize import BareStep, make_material, make_settings
from benchmarks.speed.shapes import CLOCKS, CLOCKS_OF, ClockFlag, describe_machine, time_in_turns
from customize.objectives.dreambooth import DreamBooth

Forward = Callable[[Any, Tensor], Tensor]
LAYERS = ((4096, 320, 320), (1024, 640, 640), (256, 1280, 1280), (77, 768, 320))  # tokens, in, out at 512²
RANKS = (4, 32)


def addmm(layer: Any, x: Tensor) -> Tensor:
    """y + s·(A·x)·Bᵀ in one product."""
    down, up, scale = read_factors(layer)
    y: Tensor = layer.base_layer(x)
    hidden = F.linear(x.to(down.dtype), down).flatten(0, -2)
    return torch.addmm(y.flatten(0, -2), hidden, up.t(), alpha=scale).view(y.shape).to(y.dtype)


def merged(layer: Any, x: Tensor) -> Tensor:
    """(W + s·B·A)·x + b."""
    down, up, scale = read_factors(layer)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    return F.linear(x, torch.addmm(weight, up.to(weight), down.to(weight), alpha=scale), bias)


def read_factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """A [rank, in], B [out, rank] and the scale of a layer's one active LoRA."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


@contextmanager
def use_forward(model: nn.Module, forward: Forward) -> Iterator[None]:
    """Inside the `with`, a network's linear layers with a LoRA without dropout use this forward pass."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


WAYS: Mapping[str, Forward] = {"addmm": addmm, "merged": merged}


def main(
    warm: Annotated[int, typer.Option(min=1, help="Timed passes of each kind, after one that is not.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="Of the step's network; the layers are in fp32.")] = "fp32",
    clock: ClockFlag = "wall",
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("build/benchmarks/lora.md"),
) -> None:
    """Forward and backward of single layers, then a training step of `moji`, each by every way in turn."""
    time_them = partial(time_in_turns, turns=warm, device=device, clock=CLOCKS_OF[clock])
    lines = [
        f"{CLOCKS[clock]}, medians of {warm} of each kind in turn ({describe_machine(device)}).",
        "",
        "| forward and backward | peft, ms | peft / addmm | peft / merged |",
        "|---|---|---|---|",
    ]
    for tokens, inner, outer in LAYERS:
        for rank in RANKS:
            acts = make_layer_acts(tokens, inner, outer, rank, device)
            lines.append(format_row(f"{inner} → {outer}, {tokens} tokens, rank {rank}", time_them(acts)))
    acts = make_step_acts(Backbone.open("moji", device=device, precision=precision))
    lines.append(format_row("`moji`, a whole step, rank 4", time_them(acts)))
    text = "\n".join(lines) + "\n"
    write_text(out, text)
    print(text)


def make_layer_acts(
    tokens: int, inner: int, outer: int, rank: int, device: str
) -> dict[str, Callable[[], object]]:
    """Forward and backward of one layer, to the factors and to what comes before it, by every way."""
    layers = nn.ModuleDict({"layer": nn.Linear(inner, outer)}).requires_grad_(False).to(device)
    learned = list(add_lora(layers, "a", rank=rank, alpha=float(rank), targets=["layer"]).values())
    x = torch.randn(1, tokens, inner, device=device, requires_grad=True)
    gradient = torch.randn(1, tokens, outer, device=device)

    def act() -> None:
        torch.autograd.grad(layers["layer"](x), [x, *learned], gradient)

    return make_acts(layers, act)


def make_step_acts(model: Backbone) -> dict[str, Callable[[], object]]:
    """Forward, loss and backward of a model with a LoRA on attention, by every way."""
    data = make_material(model)
    return make_acts(model.denoiser, BareStep(DreamBooth(model, data, make_settings(1)), data).step)


def make_acts(network: nn.Module, act: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The same by peft's forward pass, and by the others."""

    def inside(forward: Forward) -> None:
        with use_forward(network, forward):
            act()

    return {"peft": act, **{name: partial(inside, forward) for name, forward in WAYS.items()}}


def format_row(title: str, seconds: Mapping[str, list[float]]) -> str:
    """A line of the table; ratios are medians of each turn's ratio, so other work on the machine matters little."""
    ratios = [
        statistics.median(peft / ours for peft, ours in zip(seconds["peft"], seconds[name], strict=True))
        for name in WAYS
    ]
    median = 1000 * statistics.median(seconds["peft"])
    return f"| {title} | {median:.2f} | " + " | ".join(f"{ratio:.2f}×" for ratio in ratios) + " |"


if __name__ == "__main__":
    run_main(main)
