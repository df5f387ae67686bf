"""LoRAs merged into the weights during sampling: a layer's factors are multiplied once, not in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from backbone.models.model import Backbone

LARGEST = 1 << 30  # bytes of weights that are held twice


def fast_draws(model: Backbone) -> AbstractContextManager[Callable[[], None]]:
    """A context for fast sampling: on a CPU LoRAs are merged into the weights, where the denoiser is whole.

    Yields a function to call after an adapter's strength has changed inside.
    """
    if model.device.type != "cpu" or model.compiles or not model.holds_whole_denoiser:
        return nullcontext(lambda: None)
    return merged_loras(model.denoiser)


@contextmanager
def merged_loras(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside the `with`, layers of plain LoRAs have W + Σ scale · B A as their weight, and one product each.

    They are added in fp32 and rounded once to the weights' precision, which is closer to fp32 than a sum of products
    rounded separately. Afterwards the original tensors are restored. Inside, no adapter may be switched on or off.
    Does nothing for DoRA, LoHa, LoKr and quantised layers, and for a model whose adapted weights exceed a GiB: there
    the factors are a small part of a step, and memory is scarce.

    Yields a function that merges again, for strengths that change inside.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _can_merge(layer)]
    if sum(_base_weight(layer).nbytes for layer in layers) > LARGEST:
        layers = []
    originals = [(layer, _base_weight(layer), _base_weight(layer).data) for layer in layers]

    def merge() -> None:
        for layer, weight, original in originals:
            weight.data = _merge(layer, original)

    try:
        merge()
        for layer, *_ in originals:
            layer._disable_adapters = True
        yield merge
    finally:
        for layer, weight, original in originals:
            weight.data = original
            layer._disable_adapters = False


def _base_weight(layer: LoraLayer) -> Tensor:
    return cast(Tensor, layer.get_base_layer().weight)


def _can_merge(layer: LoraLayer) -> bool:
    """Whether a layer adds only low-rank products to a plain weight."""
    is_plain = (
        type(layer.get_base_layer()) in (nn.Linear, nn.Conv2d) and _base_weight(layer).is_floating_point()
    )
    is_active = bool(layer.active_adapters) and not layer.disable_adapters and not layer.merged
    return is_plain and is_active and not layer.lora_variant and not any(layer.lora_bias.values())


@torch.no_grad()
def _merge(layer: LoraLayer, weight: Tensor) -> Tensor:
    """The weight with the products of the layer's active adapters, in its precision and memory format."""
    merged = weight.float()
    for name in layer.active_adapters:
        if name in layer.lora_A:
            merged = merged + cast(Any, layer).get_delta_weight(name).float()
    return torch.empty_like(weight).copy_(merged)
