"""A LoRA of the UNet that belongs to a T2I-Adapter and acts on controlled rows alone.

A T2I-Adapter adds its features to a frozen network, which can still draw only what it could before. Low-rank changes
of the layers that read the features let it draw more (things that lie, one before the other). Like the features, they
act on the rows that a map controls and at the map's scale, so every other row is the base's, bit for bit. Hooks do
that, for the length of one call: nothing of the denoiser is replaced, and peft's adapters may be on the same layers.
diffusers' `UNet2DConditionModel.load_lora_adapter` reads the file beside the adapter's, and applies it to all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backbone.conditions.control import Control
from backbone.diffusion.transfer import send
from backbone.families.control import made_for_another_model
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.io.run_folder import LORA_WEIGHTS

PREFIX, DOWN, UP = "unet.", ".lora_A.weight", ".lora_B.weight"  # of a layer's name
TARGETS = ("conv1", "conv2")  # of the residual blocks


class RowLora(nn.Module):
    """The factors down and up of every target layer, at α equal to the rank.

    `layers` are the names of the denoiser's layers, in the order of `down` and `up`.
    """

    def __init__(self, denoiser: nn.Module, ranks: dict[str, int]) -> None:
        super().__init__()
        self.layers = tuple(ranks)
        pairs = [_make_low_rank(_find_base_layer(denoiser, name), rank) for name, rank in ranks.items()]
        self.down = nn.ModuleList([down for down, _ in pairs])
        self.up = nn.ModuleList([up for _, up in pairs])

    @property
    def rank(self) -> int:
        """The rank of the first layer; in a new LoRA all layers have the same."""
        return len(cast(Tensor, self.down[0].weight))

    @contextmanager
    def acting(self, denoiser: nn.Module, rows: Tensor, scale: Tensor, count: int) -> Iterator[None]:
        """Inside the `with`, the LoRA acts on these rows [N] of a call's `count`, each at its scale [N]."""
        device = next(self.parameters()).device
        index = _index_rows(rows, count, device)
        strength = None if bool((scale == 1).all()) else send(scale, device)
        with ExitStack() as stack:
            for name, down, up in zip(self.layers, self.down, self.up, strict=True):
                hook = _make_hook(down, up, index, strength)
                stack.callback(denoiser.get_submodule(name).register_forward_hook(hook).remove)
            yield

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every factor with its name in a file, which is diffusers'."""
        for name, down, up in zip(self.layers, self.down, self.up, strict=True):
            yield f"{PREFIX}{name}{DOWN}", cast(Tensor, down.weight)
            yield f"{PREFIX}{name}{UP}", cast(Tensor, up.weight)

    def write(self, folder: Path) -> None:
        """Write the factors beside the adapter's file."""
        tensors = {key: weight.detach().cpu().contiguous() for key, weight in self.named_weights()}
        write_tensors(folder / LORA_WEIGHTS, tensors, {"format": "pt"})


def make_row_lora(denoiser: nn.Module, rank: int) -> RowLora:
    """A LoRA that changes nothing yet, fp32, on every convolution of the residual blocks."""
    names = [name for name, _ in denoiser.named_modules() if name.endswith(TARGETS)]
    lora = RowLora(denoiser, dict.fromkeys(names, rank)).to(next(denoiser.parameters()).device)
    return cast(RowLora, cast(Any, lora).to(memory_format=torch.channels_last))  # as the denoiser's


def read_row_lora(path: Path, denoiser: nn.Module) -> RowLora:
    """Read a LoRA from a file, in fp32; `UserError` for one that was made for another denoiser or is damaged."""
    tensors, _ = read_tensors(path)
    ranks = {
        key.removeprefix(PREFIX).removesuffix(DOWN): len(value)
        for key, value in tensors.items()
        if key.endswith(DOWN)
    }
    layers = {name for name, _ in denoiser.named_modules()}
    if foreign := next((name for name in ranks if name not in layers), None):
        raise made_for_another_model(f"layer {foreign}", "changed", "no such layer")
    lora = RowLora(denoiser, ranks)
    weights = dict(lora.named_weights())
    if tensors.keys() != weights.keys():
        raise UserError(f"{path} is no LoRA of a control network: each layer has a lora_A and a lora_B.")
    for key, weight in weights.items():
        if weight.shape != tensors[key].shape:
            raise made_for_another_model(key, tuple(tensors[key].shape), tuple(weight.shape))
        weight.data.copy_(tensors[key])
    return lora


@contextmanager
def apply_row_loras(controls: Sequence[Control], denoiser: nn.Module) -> Iterator[None]:
    """Inside the `with`, the controls' LoRAs act on the controlled rows of one call of the denoiser."""
    with ExitStack() as stack:
        for control in controls:
            lora, rows = find_row_lora(control), control.scale.nonzero().flatten()
            if lora is not None and len(rows):
                stack.enter_context(lora.acting(denoiser, rows, control.scale[rows], len(control)))
        yield


def find_row_lora(control: Control) -> RowLora | None:
    """The LoRA that belongs to a control's network, if there is one."""
    lora = getattr(control.network.module, "lora", None)
    return lora if isinstance(lora, RowLora) else None


def _find_base_layer(denoiser: nn.Module, name: str) -> nn.Module:
    """A layer of the denoiser, without any adapter on it."""
    layer = denoiser.get_submodule(name)
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _make_low_rank(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """Make factors down and up for a layer, whose product is zero."""
    if isinstance(layer, nn.Conv2d):
        size: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "bias": False}
        down: nn.Module = nn.Conv2d(layer.in_channels, rank, cast(Any, layer.kernel_size), **size)
        up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    elif isinstance(layer, nn.Linear):
        down = nn.Linear(layer.in_features, rank, bias=False)
        up = nn.Linear(rank, layer.out_features, bias=False)
    else:
        raise made_for_another_model("changed layer", type(layer).__name__, "convolutions and linear layers")
    nn.init.zeros_(cast(Tensor, up.weight))
    return down, up


def _index_rows(rows: Tensor, count: int, device: torch.device) -> Tensor | slice | None:
    """An index of these rows among `count`: None for all; a slice, which copies nothing, where they are consecutive."""
    if len(rows) == count:
        return None
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first == len(rows) - 1 else send(rows, device)


def _make_hook(
    down: nn.Module, up: nn.Module, rows: Tensor | slice | None, scale: Tensor | None
) -> Callable[..., Tensor]:
    """A forward hook that adds up(down(x)) to a layer's output, on these rows or on all."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change: Tensor = up(down(inputs[0] if rows is None else inputs[0][rows]))
        if scale is not None:
            change = change * scale.to(change.dtype).reshape(-1, *[1] * (change.ndim - 1))
        if rows is None:
            return output + change.to(output.dtype)
        changed = output.clone() if output.requires_grad else output  # in place where nothing learns
        changed[rows] += change.to(output.dtype)
        return changed

    return add
