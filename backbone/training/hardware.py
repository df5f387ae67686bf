"""Settings of the hardware for training, and their description for a run's record."""

from __future__ import annotations

from typing import Any

import torch

from backbone.families.unet.family import UNetFamily
from backbone.models.model import Backbone


def use_tensor_cores(device: torch.device) -> None:
    """Let a GPU multiply fp32 matrices in TF32: 10 bits of mantissa, sums in fp32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def describe_hardware(model: Backbone, settings: Any) -> dict[str, str]:
    """Device, precision and attention of a run, for its record."""
    on_gpu = model.device.type == "cuda"
    convolves = isinstance(model.family, UNetFamily)
    fused = on_gpu and getattr(settings, "optimizer", "adamw") == "adamw"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else str(model.device),
        "precision": str(model.dtype).removeprefix("torch."),
        "fp32 matrices": "TF32" if on_gpu else "fp32",
        "memory format": "channels last" if convolves else "contiguous",
        "optimiser": "one fused kernel" if fused else "as it is",
        "blocks": "compiled" if settings.compile else "as they are",
    }
