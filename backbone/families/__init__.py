"""What differs from one model family to the next, one small file each.

A family knows how its parts are stored, how its text is encoded, how its network is called, and on which noise path it
was trained. Everything else in the project asks a `Family` and never asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from backbone.noise import Kind, Ladder, Level

Text = dict[str, Tensor]
"""What a family's network wants to know of some prompts: named tensors, [B, ...] each."""

Network = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents [B, C, H, W], times [] or [B]) → the network's raw prediction [B, C, H, W]."""


@dataclass(frozen=True)
class Location:
    """Where a model is: a diffusers folder, a hub id, or a single checkpoint file; `index` is its model_index.json."""

    name: str
    place: str
    index: dict[str, Any]

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, or None."""
        return Path(self.place) if Path(self.place).is_dir() else None


class TextEncoder(Protocol):
    """The text side of a family, loaded."""

    tokenizer: Any

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts."""
        ...

    def to(self, device: torch.device) -> TextEncoder:
        """Moves to a device."""
        ...


class Family(Protocol):
    """One family of models, as the rest of the project sees it."""

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # diffusers' pipeline classes that this file serves
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]  # named sets of layers, as peft's `target_modules`

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        """The network that predicts."""
        ...

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        """The autoencoder; kept in fp32 where half precision overflows."""
        ...

    def text_encoder(self, location: Location, dtype: torch.dtype) -> TextEncoder:
        """The text side."""
        ...

    def path(self, location: Location) -> NoisePath:
        """The noise path and what the network predicts on it."""
        ...

    def network(self, denoiser: nn.Module, text: Text) -> Network:
        """The denoiser with its prompts filled in."""
        ...


@dataclass(frozen=True)
class NoisePath:
    """A noise path: every level that the model was trained at, and the ladder of a sampler with S steps."""

    kind: Kind
    levels: Level  # all training levels [T], clean to noisy
    ladder: Callable[[int], Ladder]


def families() -> list[Family]:
    """Every family of this version."""
    from backbone.families.stable_diffusion import StableDiffusion

    return [StableDiffusion()]
