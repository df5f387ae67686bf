"""The interface of a model family: everything that differs between Stable Diffusion, SDXL, SD3, FLUX and PixArt.

A family loads its components, encodes prompts, calls its denoiser, and knows its noise path. The rest of the project
uses a `Family` through this protocol and never asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions, Text
from backbone.diffusion.noise import Estimate, Level, PredictionType, Schedule, guide
from backbone.families.components.empty import without_initialisation
from backbone.families.location import Location
from backbone.io.console import UserError
from backbone.io.files import Header
from backbone.io.weights import refuse_damaged

Network = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents [B, …], times [] or [B]) → the network's raw prediction [B, …]."""


@dataclass(frozen=True)
class TextEncoderSlot:
    """A text encoder of a pipeline: its name in the diffusers layout (`text_encoder_2`), tokenizer and model."""

    name: str
    tokenizer: Any
    model: Any


@dataclass(frozen=True)
class TextSegment:
    """A segment of the text sequence that the network attends to: the tokens of one tokenizer.

    tokenizer   None for a segment of zeros, where an encoder is missing
    tokens      its length with padding
    preprocess  prompt → what the tokenizer is given
    frame       the texts before and after it for the tokenizer: a chat's template
    dropped     tokens at the start that are not in the segment
    """

    tokenizer: Any
    tokens: int
    preprocess: Callable[[str], str] = str
    frame: tuple[str, str] = ("", "")
    dropped: int = 0


class TextEncoder(Protocol):
    """The loaded text encoders of a model. `tokenizer` is that of the first slot."""

    tokenizer: Any

    @property
    def slots(self) -> tuple[TextEncoderSlot, ...]:
        """The encoders that may learn tokens or carry an adapter."""
        ...

    @property
    def all_slots(self) -> tuple[TextEncoderSlot, ...]:
        """All encoders, including those that neither learn tokens nor carry an adapter."""
        ...

    @property
    def segments(self) -> tuple[TextSegment, ...]:
        """The segments of the text sequence that the network attends to, in order."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encode prompts; differentiable with respect to trained weights."""
        ...

    def to(self, device: torch.device) -> TextEncoder:
        """Move every encoder to a device."""
        ...


class SeeingTextEncoder(TextEncoder, Protocol):
    """A text encoder that also reads images: a prompt's embedding depends on them."""

    def __call__(self, prompts: Sequence[str], images: Sequence[Image] = ()) -> Text:
        """Encode prompts, each with the same images; the shape does not depend on the images."""
        ...


@dataclass(frozen=True)
class ImageInput:
    """The images that a pipeline reads beside a prompt: at most how many, and whether its text encoder sees them."""

    max_images: int
    text_sees: bool = False


NO_IMAGES = ImageInput(0)


@dataclass(frozen=True, eq=False)
class JointAttentionInputs:
    """One call of a joint text-image attention layer (MMDiT), up to the attention product.

    query, key, value  [B, heads, tokens, D], text and image tokens concatenated
    text               the slice of the text tokens; empty in a layer over image tokens alone
    project_output     attention output [B, heads, tokens, D] → what the layer returns
    bias               added to the logits of each key, [1, tokens], or which keys a row has, [B, 1, 1, tokens]; or None
    padding            tokens after the image's own that pad it and are not part of the image
    causal             whether the text stands before the image, and a text token sees only those up to itself
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text: slice
    project_output: Callable[[Tensor], Any]
    bias: Tensor | None = None
    padding: int = 0
    causal: bool = False

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: slice | Sequence[int] = slice(None),
        first: int = 0,
    ) -> Tensor:
        """Scaled dot-product attention of some rows with this call's bias → [B, heads, queries, D].

        `first` is the token that the first of the queries belongs to.
        """
        bias = self.bias if self.bias is None or self.bias.ndim < 4 else self.bias[rows]
        words = min(max(0, self.text.stop - first), query.shape[2]) if self.causal else 0
        if not words:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        assert first == self.text.start == 0
        text = F.scaled_dot_product_attention(
            query[:, :, :words], key[:, :, :words], value[:, :, :words], is_causal=True
        )
        if words == query.shape[2]:
            return text
        image = F.scaled_dot_product_attention(query[:, :, words:], key, value, attn_mask=bias)
        return torch.cat([text, image], dim=2)

    @property
    def image(self) -> slice:
        """The slice of the image tokens, in row-major order: all that are neither text nor padding."""
        if self.text.start > 0:
            return slice(0, self.text.start - self.padding)
        return slice(self.text.stop, self.query.shape[2] - self.padding)


@dataclass(frozen=True)
class AttentionLayout:
    """The denoiser's attention layers, for code that controls attention (`edit`).

    joint_inputs     for joint text-image layers, by processor class: a processor's call → `JointAttentionInputs`;
                     self- and cross-attention layers are diffusers' `Attention` in every family
    max_map_queries  layers with at most this many queries give attention maps; None where all have one resolution
    detail_layers    name prefixes of the layers that draw details
    """

    joint_inputs: Mapping[type, Callable[..., JointAttentionInputs]] = field(default_factory=dict)
    max_map_queries: int | None = 1024
    detail_layers: tuple[str, ...] = ("up_blocks.",)


class Family(Protocol):
    """A model family, as the rest of the project sees it."""

    name: ClassVar[str]
    hub_ids: ClassVar[dict[str, str]]  # short names of published models, and the hub ids that they stand for
    pipeline_classes: ClassVar[tuple[str, ...]]  # diffusers' pipeline classes that this file serves
    reads_images: ClassVar[Mapping[str, ImageInput]]  # of these pipeline classes: images beside a prompt
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]  # named sets of layers, as peft's `target_modules`

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        """The `settings` folders of a single-file checkpoint, recognised by its header; None for another family's file.

        Raises `UserError` for a file of this family that lacks a component.
        """
        ...

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        """Find the components that a checkpoint of this family leaves to `other_files`: component → its file.

        Raises `UserError` for a file that has no use, and for a component that is in no file.
        """
        ...

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        """Load the UNet or transformer."""
        ...

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        """Load the VAE; in fp32 where half precision overflows."""
        ...

    def text_encoder(self, location: Location, dtype: torch.dtype) -> TextEncoder:
        """Load the text encoders: those of billions of parameters in `dtype`, smaller ones in fp32."""
        ...

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        """Describe the model by its configs alone, each component in the precision it has when loaded with `dtype`."""
        ...

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        """The shape of a latent at the model's own resolution: (C, H, W), or (C, F, H, W) with F frames."""
        ...

    def longest_side(self, location: Location) -> int | None:
        """The longest side, in latents, that the network has positions for; None where it takes any."""
        ...

    def licence(self, location: Location) -> str:
        """A sentence on the limits of the weights' licence ("FLUX.2 dev's published weights are under …"), or ""."""
        ...

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        """Sampling settings that differ from the project's defaults: `steps`, `guidance` …"""
        ...

    def path(self, location: Location) -> NoisePath:
        """The noise path that the model was trained on, and its prediction type."""
        ...

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        """The denoiser with its conditions filled in.

        Size conditioning (SDXL) and positions follow from the noisy latents' shape.
        """
        ...

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        """The denoiser's attention layers, as they are called with such conditions."""
        ...

    def embed_guidance(
        self, denoiser: nn.Module, conditions: Conditions, guidance: float
    ) -> Conditions | None:
        """The conditions with the guidance scale among them, for a guidance-distilled network.

        None where guidance takes a second call with an empty prompt (Ho & Salimans 2022).
        """
        ...


class ImageEncoder(Protocol):
    """The image encoder of an image-to-video network."""

    def to(self, device: torch.device) -> ImageEncoder:
        """The same encoder on another device."""
        ...

    def __call__(self, pictures: Tensor) -> Tensor:
        """Images [B, 3, H, W] in −1…1, of any size, to embeddings [B, T, D]."""
        ...


@runtime_checkable
class ImageToVideoFamily(Protocol):
    """A family whose network is conditioned on an image instead of words, and makes a clip of it.

    Its conditions are `hidden` [B, T, D] of the image and `ids` [B, 3] (frames per second less one, motion bucket,
    standard deviation of the noise on the image), and one reference, the image's latents at the autoencoder's own
    scale.
    """

    def image_encoder(self, location: Location, dtype: torch.dtype) -> ImageEncoder:
        """Load the encoder that gives `hidden` of an image."""
        ...


def classifier_free_guidance(
    conditional: Estimate, unconditional: Estimate, scale: float, level: Level
) -> Estimate:
    """Classifier-free guidance, the same at every level (Ho & Salimans 2022, eq. 6)."""
    return guide(conditional, unconditional, scale)


@dataclass(frozen=True)
class NoisePath:
    """The noise levels that a model was trained on, and its sampling schedule.

    prediction_type  what the network predicts
    levels           [T], clean to noisy: a uniform choice among them is what training drew from
    schedule         (steps S, size (H, W) of the latents) → noise levels [S + 1], noisy to clean
    guide            (estimates with the prompt and without, scale, level) → the guided estimate
    """

    prediction_type: PredictionType
    levels: Level
    schedule: Callable[[int, tuple[int, int]], Schedule]
    guide: Callable[[Estimate, Estimate, float, Level], Estimate] = classifier_free_guidance

    def count_noised_steps(self, steps: int, strength: float) -> int:
        """How many of S steps SDEdit of a strength in 0…1 takes, as diffusers' img2img pipelines count them.

        A part of a step counts as a whole one on a flow, and not at all on a variance-preserving path.
        """
        if self.prediction_type == "flow":
            return steps - int(steps - steps * strength)
        return int(steps * strength)


@dataclass(frozen=True)
class ModuleSpec:
    """A module that is not loaded: how to construct it, its dtype, and names of inner modules that stay in fp32."""

    build: Callable[[], nn.Module]
    dtype: torch.dtype
    in_fp32: tuple[str, ...] = ()

    def instantiate(self, device: str = "meta") -> nn.Module:
        """Construct the frozen module with random weights; on `meta` it has no storage."""
        with torch.device(device), without_initialisation() if device == "meta" else nullcontext():
            network = self.build()
        nn.Module.to(network, device, self.dtype)  # tensors made by torch.Tensor are not on the device yet
        for name, module in network.named_modules() if self.in_fp32 else ():
            if set(name.split(".")) & set(self.in_fp32):
                nn.Module.float(module)
        if all(value.ndim < 5 for value in network.parameters()):  # kernels over time have another layout
            nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.requires_grad_(False).eval()


@dataclass(frozen=True)
class ModelSpec:
    """A model's parts, and the shapes of one encoded prompt, without the batch dimension."""

    denoiser: ModuleSpec
    autoencoder: ModuleSpec
    text_encoders: Mapping[str, ModuleSpec]
    text_shapes: Mapping[str, tuple[int, ...]]

    def blank_text(self, rows: int, device: str = "meta") -> Conditions:
        """`rows` conditions of zeros; a mask is ones."""
        return Conditions(
            {name: _make_blank(name, (rows, *shape), device) for name, shape in self.text_shapes.items()}
        )


def working_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of a network's inputs: that of its first floating parameter that is not kept in fp32.

    diffusers' `dtype` gives the same after a walk over all modules, which at every call is a tenth of `moji`'s time
    under a LoRA. It is used where weights are stored in less than two bytes and cast layer by layer.
    """
    in_fp32 = getattr(type(network), "_keep_in_fp32_modules", None) or ()
    for name, value in network.named_parameters():
        if value.is_floating_point() and not any(part in name for part in in_fp32):
            if value.dtype.itemsize > 1:
                return value.dtype
            break
    return cast(torch.dtype, network.dtype)


def refuse_beside(header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
    """`find_parts` of a family whose checkpoints hold all components: {}, or `UserError` where a file is named."""
    if other_files:
        raise UserError(
            f"A checkpoint like {header.path} is read with its own autoencoder and text encoders, and "
            f"{other_files[0].path} has no use. Leave it out."
        )
    return {}


def diffusers_spec(kind: Any, location: Location, part: str, dtype: torch.dtype) -> ModuleSpec:
    """The spec of a diffusers model (`kind` is its class), from its config."""
    config = location.config(part)

    def build() -> nn.Module:
        with refuse_damaged(location.name, part):
            return cast(nn.Module, kind.from_config(config))

    return ModuleSpec(build, dtype, tuple(getattr(kind, "_keep_in_fp32_modules", None) or ()))


def transformers_spec(
    kind: Any, location: Location, part: str, dtype: torch.dtype = torch.float32
) -> ModuleSpec:
    """The spec of a transformers text encoder (`kind` is its class), from its config."""
    config = location.config(part)

    def build() -> nn.Module:
        with refuse_damaged(location.name, part):
            return cast(nn.Module, kind(kind.config_class.from_dict(config)))

    return ModuleSpec(build, dtype)


def _make_blank(name: str, shape: tuple[int, ...], device: str) -> Tensor:
    if name == "mask":
        return torch.ones(shape, dtype=torch.int64, device=device)
    return torch.zeros(shape, device=device)
