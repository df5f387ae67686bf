"""Motion adapters and motion LoRAs in AnimateDiff's format, for its trainer and AnimateDiff-Evolved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from backbone.adapters.lora import LORA_WEIGHTS
from backbone.adapters.motion import read_motion_lora
from backbone.io.console import UserError, format_count
from backbone.io.files import atomic_write, write_tensors
from backbone.models.clips.motion import POSITIONS, name_original, read_motion_adapter

CLOSE = 1e-5  # relative difference of a layer's change that rounding in float32 may leave


def export_animatediff(source: Path, out: Path, *, dtype: torch.dtype | None = None) -> str:
    """Write a motion adapter or a motion LoRA as AnimateDiff's file and verify it; returns a sentence to print.

    Raises `UserError` for anything else.
    """
    is_adapter = source.is_dir() and (source / "config.json").is_file()
    tensors = _name_adapter(source) if is_adapter else _name_lora(source)
    stored = {name: value if dtype is None else value.to(dtype) for name, value in tensors.items()}
    with atomic_write(out) as unfinished:
        write_tensors(
            unfinished, {name: value.contiguous() for name, value in stored.items()}, {"format": "pt"}
        )
        limit = CLOSE if dtype is None else 8 * torch.finfo(dtype).eps
        if is_adapter:
            worst = _measure_difference(
                _list_weights(read_motion_adapter(str(source))),
                _list_weights(read_motion_adapter(str(unfinished))),
            )
        else:
            worst = _measure_difference(
                _compute_changes(_find_lora_file(source)), _compute_changes(unfinished)
            )
        if not worst <= limit:
            raise UserError(
                f"Nothing was written: read back, a layer differs by {worst:.1e} of its size. Leave out --precision."
            )
    kind = "a motion adapter" if is_adapter else "a motion LoRA"
    return f"{out}: {kind} under AnimateDiff's names, {format_count(len(stored), 'tensor')}, read back and compared."


def _find_lora_file(source: Path) -> Path:
    return source / LORA_WEIGHTS if source.is_dir() else source


def _name_lora(source: Path) -> dict[str, Tensor]:
    """The factors by `….processor.to_q_lora.down.weight`; scales go into `up`, since such files have none."""
    tensors, config = read_motion_lora(_find_lora_file(source))
    renamed = {}
    for name, value in tensors.items():
        layer, _, factor = name.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        block, _, projection = layer.removesuffix(".0").rpartition(".")
        if not projection.startswith("to_"):
            raise UserError(
                f"{source} changes {layer}, and AnimateDiff's motion LoRAs change attention alone."
            )
        rank = int(value.shape[1 if factor == "lora_B" else 0])
        if factor == "lora_B":
            value = value.float() * (config.layer_alpha(layer, rank=rank) / rank)
        end = "up" if factor == "lora_B" else "down"
        renamed[f"{name_original(block)}.processor.{projection}_lora.{end}.weight"] = value
    return renamed


def _name_adapter(source: Path) -> dict[str, Tensor]:
    """All weights of a motion adapter, and its positional encodings, which such files contain too."""
    adapter = cast(Any, read_motion_adapter(str(source)))
    renamed = {name_original(name): value for name, value in _list_weights(adapter).items()}
    for name, value in cast(nn.Module, adapter).named_buffers():
        if name.endswith(".pos_embed.pe"):
            block = name.removesuffix("pos_embed.pe")
            for attention in ("attn1", "attn2"):
                renamed[f"{name_original(block + attention)}.{POSITIONS}"] = value.clone()
    return renamed


def _list_weights(adapter: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in cast(nn.Module, adapter).state_dict().items()}


def _compute_changes(path: Path) -> dict[str, Tensor]:
    """ΔW of every layer of a motion LoRA's file."""
    tensors, config = read_motion_lora(path)
    updates = {}
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer, rank = name.removesuffix(".lora_A.weight"), int(down.shape[0])
        up = tensors[f"{layer}.lora_B.weight"].float()
        updates[layer] = (
            config.layer_alpha(layer.removeprefix("unet."), rank=rank) / rank * (up @ down.float())
        )
    return updates


def _measure_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a layer; infinite if a layer is not in both."""
    if set(first) != set(second):
        return float("inf")
    return max(
        float((value.float() - second[name].float()).norm()) / (float(value.float().norm()) or 1.0)
        for name, value in first.items()
    )
