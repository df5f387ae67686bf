"""Low-memory placement of a frozen model: 8-bit or NF4 weights, CPU-offloaded layers, a tiled autoencoder.

The base of an adapter is only read, so it may be stored in NF4 (Dettmers et al. 2023, section 3) or in 8 bits (Dettmers
et al. 2022) by bitsandbytes, or stay in the CPU's memory and be copied while a layer computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from backbone.distributed import processes
from backbone.distributed.fsdp import shard
from backbone.families.components.latents import has_frames, patch_size, pixels_per_latent
from backbone.io.console import UserError

# The repeated blocks: nearly all of a denoiser's weights
BLOCKS = re.compile(r"(^|_)blocks?\.|^(layers|\w+_refiner)\.")
KINDS = {"8bit": 1 + 4 / 2048, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a weight: a scale for each row of about 2048, or one byte for each 64 and four for each 64 × 256."""
INSTALL = "pip install bitsandbytes"


@dataclass(frozen=True)
class Placement:
    """Where and in which precision the parts of a model lie.

    quantize     `8bit` or `nf4`: the linear layers of the frozen denoiser
    offload      share 0…1 of the denoiser's layers, by bytes, that lie in the CPU's memory
    tiling       the autoencoder works on tiles of half a side
    text_on_cpu  the text encoders stay on the CPU
    one_by_one   where nothing is learned, pictures go through the denoiser and the autoencoder one at a time
    """

    quantize: str = ""
    offload: float = 0.0
    tiling: bool = False
    text_on_cpu: bool = False
    one_by_one: bool = False

    @property
    def rounding(self) -> tuple[str, ...]:
        """What the base's predictions depend on besides its model and dtype, for the key of a cache."""
        return (self.quantize,) if self.quantize else ()

    def __post_init__(self) -> None:
        if self.quantize and self.quantize not in KINDS:
            raise UserError(
                f"There is no precision {self.quantize} of the base. Choose {' or '.join(KINDS)}."
            )
        if not 0 <= self.offload <= 1:
            raise UserError(f"The offloaded share lies between 0 and 1, and {self.offload} does not.")
        if self.quantize and self.offload:
            raise UserError("A quantised base is not offloaded as well. Choose one of the two.")
        if self.quantize or self.offload or self.one_by_one:
            processes.require_whole_model(
                "A base that is quantised, offloaded to the CPU or asked picture by picture"
            )


def get_placement(settings: Any) -> Placement:
    """The placement in a run's settings: `quantize`, `cpu_offload`, `vae_tiling`, `text_on_cpu`, `one_by_one`."""
    return Placement(
        settings.quantize,
        settings.cpu_offload,
        settings.vae_tiling,
        settings.text_on_cpu,
        settings.one_by_one,
    )


def place_denoiser(denoiser: nn.Module, placement: Placement, device: torch.device) -> nn.Module:
    """Put a loaded, frozen denoiser on its device, as `placement` says; sharded where the launcher asked for that."""
    if processes.is_sharded():
        return shard(denoiser, device)
    if placement.quantize:
        quantize(denoiser, placement.quantize)
    if placement.offload:
        for layer in find_offloadable_layers(denoiser, placement.offload):
            offload(layer, pinned=device.type == "cuda")
    return nn.Module.to(denoiser, device)


def enable_tiling(autoencoder: nn.Module, side: int) -> None:
    """Make a diffusers autoencoder work on tiles of at most this many pixels a side, one picture at a time."""
    network = cast(Any, autoencoder)
    factor = pixels_per_latent(network.config) // patch_size(network.config)
    network.enable_tiling()
    network.enable_slicing()
    if has_frames(network.config):
        # Tiles of `side` pixels that overlap by a quarter
        side = max(side, factor)
        network.tile_sample_min_height = network.tile_sample_min_width = side
        network.tile_sample_stride_height = network.tile_sample_stride_width = max(
            factor, side * 3 // 4 // factor * factor
        )
        return
    network.tile_latent_min_size = max(1, side // factor)
    network.tile_sample_min_size = network.tile_latent_min_size * factor


# 8 and 4 bits -----------------------------------------------------------------------------------------------


def find_quantizable_layers(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """The layers stored in fewer bits: the linear ones of the blocks, by name."""
    return {
        name: layer
        for name, layer in denoiser.named_modules()
        if type(layer) is nn.Linear and BLOCKS.search(name)
    }


def quantize(denoiser: nn.Module, kind: str) -> None:
    """Replace linear layers by bitsandbytes'; their weights shrink when they are moved to the device.

    Raises `UserError` where bitsandbytes is missing.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise UserError(f"A base of {kind} needs bitsandbytes. Run: {INSTALL}") from error
    for name, layer in find_quantizable_layers(denoiser).items():
        size, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        if kind == "nf4":
            # NF4: blocks of weights as 4-bit normal quantiles, multiplied in the base's own precision
            new = bnb.nn.Linear4bit(
                *size, has_bias, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta"
            )
            new.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", module=new
            )
        else:
            # 8 bits: each row of weights with a scale of its own; inputs are quantised likewise at each call
            new = bnb.nn.Linear8bitLt(*size, has_bias, has_fp16_weights=False, device="meta")
            new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), last, new)
    # peft recognises such a base by these
    cast(Any, denoiser).is_loaded_in_4bit = kind == "nf4"
    cast(Any, denoiser).is_loaded_in_8bit = kind == "8bit"


# Layers offloaded to the CPU's memory --------------------------------------------------------------------------


def find_offloadable_layers(denoiser: nn.Module, share: float = 1.0) -> list[nn.Module]:
    """The layers whose weights stay in the CPU's memory: the blocks' largest, up to at least this share of them."""
    layers = [
        layer
        for name, layer in denoiser.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d) and BLOCKS.search(name)
    ]
    sizes = [cast(Any, layer).weight.numel() for layer in layers]

    # The largest first, until the share of all weights is reached
    chosen: list[nn.Module] = []
    remaining = share * sum(sizes)
    for size, layer in sorted(zip(sizes, layers, strict=True), key=lambda pair: -pair[0]):
        if remaining <= 0:
            break
        chosen.append(layer)
        remaining -= size
    return chosen


def offload(layer: nn.Module, *, pinned: bool = False) -> None:
    """Keep the layer's frozen weights where they are, and copy them to its input's device at each use."""
    layer.requires_grad_(False)
    if pinned:
        for value in layer.parameters():
            value.data = value.data.pin_memory()
    layer.__class__ = OffloadedLinear if isinstance(layer, nn.Linear) else OffloadedConv2d


class _Offloaded:
    """Base class of offloaded layers, which stay when their network is moved."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; its weights are copied for this call alone, and again for the backward pass."""
        return cast(Tensor, _Use.apply(x, self))  # type: ignore[no-untyped-call]


class OffloadedLinear(_Offloaded, nn.Linear):
    """A linear layer whose weights lie elsewhere."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def back(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight


class OffloadedConv2d(_Offloaded, nn.Conv2d):
    """A convolution whose weights lie elsewhere."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, self._conv_forward(x, weight, bias))

    def back(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return cast(
            Tensor,
            conv2d_input(
                shape,
                weight,
                gradient,
                cast(Any, self.stride),
                cast(Any, self.padding),
                self.dilation,
                self.groups,
            ),
        )


class _Use(torch.autograd.Function):
    """One use of an offloaded layer. Only the layer itself is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        # y = x·Wᵀ + b on the input's device; the copies are freed when this returns
        weight = layer.weight.to(x.device, non_blocking=True)
        bias = None if layer.bias is None else layer.bias.to(x.device, non_blocking=True)
        return cast(Tensor, layer.compute(x.to(weight.dtype), weight, bias))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # The base is frozen, so the gradient by x is all that is needed
        weight = ctx.layer.weight.to(gradient.device, non_blocking=True)
        back = ctx.layer.back(gradient.to(weight.dtype), weight, ctx.shape)
        return back.to(ctx.dtype), None
