"""Split layers that the original transformer code fuses (queries, keys and values in one) into diffusers' layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backbone.io.console import UserError
from customize.formats.factors import LayerUpdate
from customize.formats.layers.relatives import find_relatives_of_layer
from customize.formats.layers.translate import Target

# The factors whose rows are the layer's: these are cut, all others stay whole.
_ROW_FACTORS = {"lora": ("up",), "loha": ("hada_w1_a", "hada_w2_a")}


def split_layer(target: Target, layer: LayerUpdate, path: Path) -> dict[str, LayerUpdate]:
    """The update of each of a target's layers, from that of the stored layer.

    Parts of a LoRA that are not updated are dropped, and of the others the rank dimensions that do not contribute.
    Raises `UserError` for a layer of no published form, and for updates that cannot be cut there.
    """
    count = len(target.layers)
    if count > 1 or target.swap != "never":
        layer = layer.reshape(layer.shape)  # always linear layers
    layer = _swap_halves(target, layer, path)
    if count == 1:
        kernel = target.kernels[0] if target.kernels else None
        return {target.layers[0]: layer if kernel is None else _with_kernel(layer, kernel)}
    # All parts are as high as the layer is wide, but FLUX's fourth (its MLP), which takes the remaining rows.
    rows, width = layer.shape
    heights = [width] * min(count, 3) + [rows - 3 * width] * (count - 3)
    if target.layers[0].endswith(".gate_layer"):
        # Qwen-Image 2.1's gate and what it multiplies are equally high
        heights = [rows // 2] * 2
    if sum(heights) != rows or min(heights) <= 0:
        raise _explain_unknown_size(target.layers[0], rows, width, path)

    # Rows [start, end) of each part: ΔW_i = up[start:end]·down, without the rank dimensions where up is zero
    layers: dict[str, LayerUpdate] = {}
    bounds = torch.tensor([0, *heights]).cumsum(0).tolist()
    for name, start, end in zip(target.layers, bounds, bounds[1:], strict=False):
        part = _take_rows(name, layer, slice(start, end), path)
        if layer.algorithm == "lora":
            used = (part.factors["up"] != 0).any(dim=0)
            if not bool(used.any()):
                continue
            factors = {"down": part.factors["down"][used], "up": part.factors["up"][:, used]}
            part = replace(part, factors=factors, rank=int(used.sum()), alpha=part.scale * int(used.sum()))
        layers[name] = part
    return layers


def _explain_unknown_size(layer: str, rows: int, width: int, path: Path) -> UserError:
    """The error for a fused layer whose parts are no supported model's; it names a related model, where one fits."""
    name = layer.partition(".")[2]
    if found := find_relatives_of_layer(name, width):
        return UserError(
            f"{path} adapts {' or '.join(found)} ({layer} and others are {rows} × {width} together), which is not "
            "supported. Give a LoRA of a supported model."
        )
    return UserError(
        f"{layer} and others in {path} are {rows} × {width} together, which no published model has. Check the file."
    )


def _with_kernel(layer: LayerUpdate, kernel: tuple[int, ...]) -> LayerUpdate:
    """A LoRA's factors as a matrix for a linear layer and as kernels for a convolution, however they are stored."""
    rows, columns = layer.shape
    if layer.algorithm != "lora" or (layer.factors["down"].ndim == 4) == bool(kernel):
        return layer
    size = kernel[0] * kernel[1] if kernel else 1
    if columns % size or (not kernel and layer.factors["down"].shape[2:].numel() != 1):
        return layer  # of another shape than any known one: the model's own is compared where there is one
    return layer.reshape((rows, columns // size, *kernel))


def swap_halves(layer: LayerUpdate, refuse: Callable[[str], UserError]) -> LayerUpdate:
    """The update of a modulation whose (shift, scale) is (scale, shift) on the other side; its own inverse."""
    half = layer.shape[0] // 2
    return _map_rows(layer, lambda value: torch.cat([value[half:], value[:half]]), (half,), refuse)


def _swap_halves(target: Target, layer: LayerUpdate, path: Path) -> LayerUpdate:
    rows, width = layer.shape
    if target.swap == "never" or (target.swap == "halves of two" and rows != 2 * width):
        return layer
    return swap_halves(layer, lambda why: _cannot_cut(target.layers[0], path, why))


def _take_rows(name: str, layer: LayerUpdate, rows: slice, path: Path) -> LayerUpdate:
    edges = (rows.start, rows.stop)
    return _map_rows(layer, lambda value: value[rows], edges, lambda why: _cannot_cut(name, path, why))


def _map_rows(
    layer: LayerUpdate,
    cut: Callable[[Tensor], Tensor],
    edges: tuple[int, ...],
    refuse: Callable[[str], UserError],
) -> LayerUpdate:
    """Apply `cut`, which cuts at `edges`, to what has the layer's rows; LoKr's W₁ has one row for a block of them."""
    if layer.magnitude is not None and layer.magnitude.ndim == 2:
        raise refuse("its DoRA scales run over the inputs, of all its parts together")
    magnitude = None if layer.magnitude is None else cut(layer.magnitude)
    if layer.algorithm != "lokr":
        cut_factors = {name: cut(layer.factors[name]) for name in _ROW_FACTORS[layer.algorithm]}
        return replace(layer, factors={**layer.factors, **cut_factors}, magnitude=magnitude)
    return replace(layer, factors=_cut_kronecker(layer, cut, edges, refuse), magnitude=magnitude)


def _cut_kronecker(
    layer: LayerUpdate,
    cut: Callable[[Tensor], Tensor],
    edges: tuple[int, ...],
    refuse: Callable[[str], UserError],
) -> Mapping[str, Tensor]:
    """LoKr's factors with the rows of W₁ that hold the wanted rows of W₁ ⊗ W₂."""
    left = next(name for name in ("lokr_w1", "lokr_w1_a") if name in layer.factors)
    block = layer.shape[0] // layer.factors[left].shape[0]
    if any(place % block for place in edges):
        raise refuse(f"its Kronecker product has blocks of {block} rows")
    index = cut(torch.arange(layer.shape[0]))[::block] // block
    return {**layer.factors, left: layer.factors[left][index]}


def _cannot_cut(name: str, path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} fuses {name} with other layers, and cannot be split: {reason}. Export it again in diffusers' names."
    )
