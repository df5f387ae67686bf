"""Copies from the processor to a device that nobody waits for.

A plain `tensor.to("cuda")` of what lies in the processor's memory waits until the device has done everything before,
so one such copy inside a training step takes the processor's lead away. From pinned memory the copy is queued like any
other work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. What lies in the processor's memory is copied without waiting; the rest as usual."""
    device = torch.device(device)
    ahead = tensor.device.type == "cpu" and device.type in ("cpu", "cuda")
    if ahead and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=ahead)
