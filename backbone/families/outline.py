"""A model by its settings alone: its networks without weights, and the shape of what its prompts become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from backbone.families import Location, Text


@dataclass(frozen=True)
class Part:
    """A network that is not loaded: how it is built, and the precision in which it will be held."""

    build: Callable[[], nn.Module]
    dtype: torch.dtype

    def bare(self, device: str = "meta") -> nn.Module:
        """The network with weights as they come, frozen; on `meta` it has no storage."""
        with torch.device(device):
            network = self.build()
        nn.Module.to(network, self.dtype)
        nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.requires_grad_(False).eval()


@dataclass(frozen=True)
class Outline:
    """A model's parts, and the shapes of one prompt's `Text`, without the prompt's own dimension."""

    denoiser: Part
    autoencoder: Part
    encoders: Mapping[str, Part]
    text: Mapping[str, tuple[int, ...]]

    def blank(self, rows: int, device: str = "meta") -> Text:
        """`Text` of so many prompts that say nothing; a mask of tokens is of whole numbers."""
        return {name: _zeros(name, (rows, *shape), device) for name, shape in self.text.items()}


def network(kind: Any, location: Location, part: str, dtype: torch.dtype) -> Part:
    """A network of diffusers."""
    config = location.config(part)
    return Part(lambda: cast(nn.Module, kind.from_config(config)), dtype)


def encoder(kind: Any, location: Location, part: str, dtype: torch.dtype = torch.float32) -> Part:
    """A text encoder of transformers."""
    config = location.config(part)
    return Part(lambda: cast(nn.Module, kind(kind.config_class.from_dict(config))), dtype)


def _zeros(name: str, shape: tuple[int, ...], device: str) -> Tensor:
    dtype = torch.int64 if name == "mask" else torch.float32
    return torch.zeros(shape, dtype=dtype, device=device)
