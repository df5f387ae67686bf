"""Networks of which only the layers are there, for what comes from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import init_empty_weights
from torch import nn

LAYERS: tuple[Any, ...] = (
    *(nn.Linear, nn.Embedding, nn.modules.conv._ConvNd),
    *(nn.GroupNorm, nn.LayerNorm),
)


@contextmanager
def without_first_values() -> Iterator[None]:
    """Inside the `with`, layers begin with whatever is there: what nobody reads takes as long as all of the rest."""
    before = [(layer, layer.reset_parameters) for layer in LAYERS]
    try:
        for layer in LAYERS:
            layer.reset_parameters = _draw_nothing
        yield
    finally:
        for layer, reset in before:
            layer.reset_parameters = reset


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside the `with`, networks are made without memory for weights that will come from a file."""
    with without_first_values(), init_empty_weights():
        yield


def _draw_nothing(layer: nn.Module) -> None:
    """In the place of `reset_parameters`."""
