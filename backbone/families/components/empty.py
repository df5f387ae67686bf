"""Building networks without values, to be filled from a file."""

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
def without_initialisation() -> Iterator[None]:
    """Inside the `with`, layers are built without drawing random weights, which takes as long as all the rest."""
    originals = [(layer, layer.reset_parameters) for layer in LAYERS]
    try:
        for layer in LAYERS:
            layer.reset_parameters = _skip_reset
        yield
    finally:
        for layer, original in originals:
            layer.reset_parameters = original


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside the `with`, networks are built without memory for weights that will come from a file."""
    with without_initialisation(), init_empty_weights():
        yield


def _skip_reset(layer: nn.Module) -> None:
    """Takes the place of `reset_parameters`."""
