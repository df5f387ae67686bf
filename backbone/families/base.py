"""What differs from one model family to the next, one small file each.

A family knows how its parts are stored, how its text is encoded, how its network is called, and on which noise path it
was trained. Everything else in the project asks a `Family` and never asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions, Text
from backbone.diffusion.noise import Level, PredictionType, Schedule
from backbone.families.location import Location
from backbone.io.files import Header

Network = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents [B, …], times [] or [B]) → the network's raw prediction [B, …]."""


@dataclass(frozen=True)
class Side:
    """One text encoder of a family: its name in the diffusers layout, its tokenizer and its transformer."""

    name: str
    tokenizer: Any
    model: Any


@dataclass(frozen=True)
class Stretch:
    """One of the stretches that the network's text tokens consist of: how a prompt is cut there, and padded.

    tokenizer  which cuts it; None where nothing is said (zeros in the place of an encoder that is missing)
    tokens     how many there are, with padding
    heard      the prompt as this tokenizer is given it
    """

    tokenizer: Any
    tokens: int
    heard: Callable[[str], str] = str


class TextEncoder(Protocol):
    """The text side of a family, loaded. `tokenizer` is the first side's."""

    tokenizer: Any

    @property
    def sides(self) -> tuple[Side, ...]:
        """Every encoder that can learn words or carry an adapter."""
        ...

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """Which token of a prompt stands where in what the network attends to, one stretch behind the other."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts; differentiable in what is trained."""
        ...

    def to(self, device: torch.device) -> TextEncoder:
        """Moves to a device."""
        ...


@dataclass(frozen=True, eq=False)
class Streams:
    """One call of an attention layer over text and picture jointly, up to the product.

    query, key, value  [B, heads, tokens, D]: the text's tokens and the picture's, one behind the other
    text               where the text's are; nowhere in a layer over the picture alone
    finish             what was attended to [B, heads, tokens, D] → what the layer answers
    bias               what is added to the score of each key, [1, tokens], if anything is
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text: slice
    finish: Callable[[Tensor], Any]
    bias: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The product over all of this call's keys, whatever was made of them: [B, heads, queries, D]."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)

    @property
    def picture(self) -> slice:
        """Where the picture's tokens are: all that are not the text's, row by row."""
        return (
            slice(0, self.text.start) if self.text.start > 0 else slice(self.text.stop, self.query.shape[2])
        )


@dataclass(frozen=True)
class Attention:
    """What there is to know of a denoiser's attention for who changes it (`edit`).

    joint   of layers over text and picture jointly, by the class of their processors: a processor's call → `Streams`.
            Layers over the picture alone and from the picture to the text are diffusers' `Attention` everywhere
    coarse  the most queries of a layer that says where things are; None where all layers have one resolution
    late    how the names of the layers begin that draw the details
    """

    joint: Mapping[type, Callable[..., Streams]] = field(default_factory=dict)
    coarse: int | None = 1024
    late: tuple[str, ...] = ("up_blocks.",)


class Family(Protocol):
    """One family of models, as the rest of the project sees it."""

    name: ClassVar[str]
    names: ClassVar[dict[str, str]]  # short names of published models, and the hub ids that they stand for
    pipelines: ClassVar[tuple[str, ...]]  # diffusers' pipeline classes that this file serves
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]  # named sets of layers, as peft's `target_modules`

    def single_file(self, header: Header) -> tuple[Path, ...] | None:
        """The `settings` of a checkpoint in one file, told by its header; None if it is not of this family.

        `UserError` if it is of this family and lacks a part.
        """
        ...

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        """The network that predicts."""
        ...

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        """The autoencoder; kept in fp32 where half precision overflows."""
        ...

    def text_encoder(self, location: Location, dtype: torch.dtype) -> TextEncoder:
        """The text side. The working precision is for encoders of billions of parameters; smaller ones are in fp32."""
        ...

    def outline(self, location: Location, dtype: torch.dtype) -> Outline:
        """The model by its settings alone, each part in the precision that it has where the working one is `dtype`."""
        ...

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        """The shape of a latent at the model's own resolution: (C, H, W), or (C, F, H, W) with F frames."""
        ...

    def longest_side(self, location: Location) -> int | None:
        """The most latents a side that the network has places for; None where it takes any."""
        ...

    def defaults(self, location: Location) -> dict[str, Any]:
        """What works well with the family's models, where it is not what works with most: `steps`, `guidance` …"""
        ...

    def path(self, location: Location) -> NoisePath:
        """The noise path and what the network predicts on it."""
        ...

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        """The denoiser with its conditions filled in.

        Size conditioning (SDXL) and positions follow from the noisy latents' shape.
        """
        ...

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> Attention:
        """The denoiser's attention layers, as they are called with such conditions."""
        ...

    def distilled(self, denoiser: nn.Module, conditions: Conditions, guidance: float) -> Conditions | None:
        """The conditions with the guidance scale among them, for a guidance-distilled network.

        None where guidance takes a second call with an empty prompt (Ho & Salimans 2022).
        """
        ...


@dataclass(frozen=True)
class NoisePath:
    """A noise path: the levels that the model was trained at, and the noise schedule of a sampler.

    prediction_type  what the network predicts
    levels           [T], clean to noisy: a uniform choice among them is what training drew from
    schedule         (steps S, size (H, W) of the latents) → noise levels [S + 1], noisy to clean
    """

    prediction_type: PredictionType
    levels: Level
    schedule: Callable[[int, tuple[int, int]], Schedule]


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
    """A model's parts, and the shapes of one encoded prompt, without the batch dimension."""

    denoiser: Part
    autoencoder: Part
    encoders: Mapping[str, Part]
    text: Mapping[str, tuple[int, ...]]

    def blank(self, rows: int, device: str = "meta") -> Conditions:
        """So many conditions of zeros; a mask of tokens is of whole numbers."""
        return Conditions({name: _zeros(name, (rows, *shape), device) for name, shape in self.text.items()})


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
