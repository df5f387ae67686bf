"""A few-step model that is a LoRA on its base (LCM-LoRA, Luo et al. 2023): its record and its weights.

The folder holds `few_step.json` (the base's name, and sampling settings), the adapter, and a scheduler of its own.
`locate` treats it as a model, and `Backbone` adds the adapter to the base's weights as they load, so that the rest of
the code sees an ordinary model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbone.cli.sampling import Sampler
from backbone.io.console import UserError
from backbone.io.files import content_hash, read_json, read_tensors
from backbone.io.records import parse_json, read_as
from backbone.models.defaults import ModelDefaults, read_section
from backbone.models.locate import ADAPTER, FEW_STEP


def read_few_step(folder: Path) -> dict[str, Any]:
    """A folder's `few_step.json`: the base's name, and settings to draw with. `UserError` where it is damaged."""
    path = folder / FEW_STEP
    record = read_json(path)
    kinds: dict[str, Any] = {"base": str, "steps": int, "guidance": float, "sampler": Sampler}
    values = {key: read_as(kind, record.get(key), path, key) for key, kind in kinds.items()}
    return {"base": values.pop("base"), **read_section(ModelDefaults, values, path)}


def hash_few_step(folder: Path) -> str:
    """The hash of a few-step adapter's weights and its scheduler."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return content_hash(folder / ADAPTER) + content_hash(scheduler)


@torch.no_grad()
def fuse_lora(path: Path, denoiser: nn.Module) -> None:
    """Add a LoRA file's update to the denoiser's weights, W + α/r · B·A, summed in fp32.

    Raises `UserError` for another kind of adapter, or one of another model.
    """
    tensors, header = read_tensors(path)
    layers = dict(denoiser.named_modules())
    downs = {key: value for key, value in tensors.items() if key.endswith(".lora_A.weight")}
    if not downs or len(tensors) != 2 * len(downs):
        raise UserError(
            f"{path} is no LoRA on a denoiser alone. Make it again with recipes.moji.adapters.turbo."
        )
    metadata = read_as(dict[str, Any], parse_json(header.get("lora_adapter_metadata", "{}"), path), path)
    for key, down in downs.items():
        name = re.sub(r"^(unet|transformer)\.", "", key.removesuffix(".lora_A.weight"))
        up, layer = tensors.get(key.replace(".lora_A.", ".lora_B.")), layers.get(name)
        weight = getattr(layer, "weight", None)
        if up is None or weight is None or not _shapes_fit(weight, up, down):
            raise UserError(
                f"{path} was made for another model than this one ({name} has another shape there, or is missing). "
                "Make it again, or restore few_step.json."
            )
        change = (up.float().flatten(1) @ down.float().flatten(1)).reshape(weight.shape)
        weight.copy_(weight.float() + _read_scale(metadata, len(down)) * change.to(weight.device))


def _shapes_fit(weight: Tensor, up: Tensor, down: Tensor) -> bool:
    # Convolutions too
    return len(up) == len(weight) and up[0].numel() == len(down) and down[0].numel() == weight[0].numel()


def _read_scale(metadata: Mapping[str, Any], rank: int) -> float:
    """α/r of a file, from the metadata that diffusers reads; 1 where it has none."""
    alpha = next((value for key, value in metadata.items() if key.endswith(".lora_alpha")), rank)
    return float(alpha) / rank
