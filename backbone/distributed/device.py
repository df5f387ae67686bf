"""The default device and the working precision."""

from __future__ import annotations

import re

import torch

from backbone.io.console import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> str:
    """The fastest device that torch sees: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_device(name: str) -> torch.device:
    """The device of a name, `auto` the fastest; `UserError` for one that torch does not see here."""
    if name == "auto":
        return torch.device(choose_device())
    kind, _, index = name.partition(":")
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (index and not re.fullmatch(r"\d{1,4}", index)) or int(index or 0) >= counts.get(kind, 0):
        available = ", ".join(word for word, count in counts.items() if count)
        raise UserError(f"There is no device {name} here. Choose auto or one of {available}.")
    return torch.device(name)


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision's name; `auto` is the fastest one that is safe on the device.

    Raises `UserError` for an unknown name.
    """
    if precision != "auto":
        if precision not in PRECISIONS:
            raise UserError(f"There is no precision {precision}. Choose auto, {', '.join(PRECISIONS)}.")
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return torch.bfloat16
    return torch.float32
