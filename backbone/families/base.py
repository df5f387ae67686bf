"""What differs from one model family to the next, one small file each.

A family knows how its parts are stored, how its text is encoded, how its network is called, and on which noise path it
was trained. Everything else in the project asks a `Family` and never asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.diffusion.noise import Kind, Ladder, Level
from backbone.families.location import Location
from backbone.io.files import Header

if TYPE_CHECKING:
    pass

Text = dict[str, Tensor]
"""What a family's network wants to know of some prompts: named tensors, [B, ...] each."""

Network = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents [B, C, H, W], times [] or [B]) → the network's raw prediction [B, C, H, W]."""


@dataclass(frozen=True)
class TextEncoderSlot:
    """One text encoder of a family: its name in the diffusers layout, its tokenizer and its transformer."""

    name: str
    tokenizer: Any
    model: Any


@dataclass(frozen=True)
class TextSegment:
    """One of the stretches that the network's text tokens consist of: how a prompt is cut there, and padded.

    tokenizer  which cuts it; None where nothing is said (zeros in the place of an encoder that is missing)
    tokens     how many there are, with padding
    heard      the prompt as this tokenizer is given it
    """

    tokenizer: Any
    tokens: int
    preprocess: Callable[[str], str] = str


class TextEncoder(Protocol):
    """The text side of a family, loaded. `tokenizer` is the first side's."""

    tokenizer: Any

    @property
    def slots(self) -> tuple[TextEncoderSlot, ...]:
        """Every encoder that can learn words or carry an adapter."""
        ...

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        """Which token of a prompt stands where in what the network attends to, one stretch behind the other."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts; differentiable in what is trained."""
        ...

    def to(self, device: torch.device) -> TextEncoder:
        """Moves to a device."""
        ...


@dataclass(frozen=True, eq=False)
class JointAttentionInputs:
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
    project_output: Callable[[Tensor], Any]
    bias: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The product over all of this call's keys, whatever was made of them: [B, heads, queries, D]."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)

    @property
    def image(self) -> slice:
        """Where the picture's tokens are: all that are not the text's, row by row."""
        return (
            slice(0, self.text.start) if self.text.start > 0 else slice(self.text.stop, self.query.shape[2])
        )


@dataclass(frozen=True)
class AttentionLayout:
    """What there is to know of a denoiser's attention for who changes it (`edit`).

    joint   of layers over text and picture jointly, by the class of their processors: a processor's call →
            `JointAttentionInputs`. Layers over the picture alone and from the picture to the text are diffusers'
            `Attention` everywhere
    coarse  the most queries of a layer that says where things are; None where all layers have one resolution
    late    how the names of the layers begin that draw the details
    """

    joint_inputs: Mapping[type, Callable[..., JointAttentionInputs]] = field(default_factory=dict)
    max_map_queries: int | None = 1024
    detail_layers: tuple[str, ...] = ("up_blocks.",)


class Family(Protocol):
    """One family of models, as the rest of the project sees it."""

    name: ClassVar[str]
    hub_ids: ClassVar[dict[str, str]]  # short names of published models, and the hub ids that they stand for
    pipeline_classes: ClassVar[tuple[str, ...]]  # diffusers' pipeline classes that this file serves
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]  # named sets of layers, as peft's `target_modules`

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
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

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        """The model by its settings alone, each part in the precision that it has where the working one is `dtype`."""
        ...

    def latent_shape(self, location: Location) -> tuple[int, int, int]:
        """(C, H, W) of a latent at the model's own resolution."""
        ...

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        """What works well with the family's models, where it is not what works with most: `steps`, `guidance` …"""
        ...

    def path(self, location: Location) -> NoisePath:
        """The noise path and what the network predicts on it."""
        ...

    def network(self, denoiser: nn.Module, text: Text) -> Network:
        """The denoiser with its prompts filled in.

        What else it is told (the size of the picture, say) follows from the noisy latents.
        """
        ...

    def attention(self, denoiser: nn.Module, text: Text) -> AttentionLayout:
        """The denoiser's attention layers, as they are called with such prompts."""
        ...

    def embed_guidance(self, denoiser: nn.Module, text: Text, guidance: float) -> Text | None:
        """The prompts with the guidance, for a network that learned to answer as if guided by one call.

        None where guidance takes a second call without the prompt (Ho & Salimans 2022).
        """
        ...


@dataclass(frozen=True)
class NoisePath:
    """A noise path: the levels that the model was trained at, and the ladder of a sampler.

    kind    what the network predicts
    levels  [T], clean to noisy: a uniform choice among them is what training drew from
    ladder  (steps S, size (H, W) of the latents) → the rungs [S + 1], noisy to clean
    """

    prediction_type: Kind
    levels: Level
    ladder: Callable[[int, tuple[int, int]], Ladder]


@dataclass(frozen=True)
class ModuleSpec:
    """A network that is not loaded: how it is built, and the precision in which it will be held."""

    build: Callable[[], nn.Module]
    dtype: torch.dtype

    def instantiate(self, device: str = "meta") -> nn.Module:
        """The network with weights as they come, frozen; on `meta` it has no storage."""
        with torch.device(device):
            network = self.build()
        nn.Module.to(network, self.dtype)
        nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.requires_grad_(False).eval()


@dataclass(frozen=True)
class ModelSpec:
    """A model's parts, and the shapes of one prompt's `Text`, without the prompt's own dimension."""

    denoiser: ModuleSpec
    autoencoder: ModuleSpec
    text_encoders: Mapping[str, ModuleSpec]
    text_shapes: Mapping[str, tuple[int, ...]]

    def blank_text(self, rows: int, device: str = "meta") -> Text:
        """`Text` of so many prompts that say nothing; a mask of tokens is of whole numbers."""
        return {name: _zeros(name, (rows, *shape), device) for name, shape in self.text_shapes.items()}


def diffusers_spec(kind: Any, location: Location, part: str, dtype: torch.dtype) -> ModuleSpec:
    """A network of diffusers."""
    config = location.config(part)
    return ModuleSpec(lambda: cast(nn.Module, kind.from_config(config)), dtype)


def transformers_spec(
    kind: Any, location: Location, part: str, dtype: torch.dtype = torch.float32
) -> ModuleSpec:
    """A text encoder of transformers."""
    config = location.config(part)
    return ModuleSpec(lambda: cast(nn.Module, kind(kind.config_class.from_dict(config))), dtype)


def _zeros(name: str, shape: tuple[int, ...], device: str) -> Tensor:
    dtype = torch.int64 if name == "mask" else torch.float32
    return torch.zeros(shape, dtype=dtype, device=device)
