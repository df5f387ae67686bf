"""Asynchronous copies from the host to a device.

A plain `tensor.to("cuda")` from pageable host memory blocks until the device has finished everything before, so that
the CPU can no longer queue work ahead. A copy from pinned memory is queued like any other work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device: copied asynchronously from host memory, as usual from elsewhere."""
    device = torch.device(device)
    is_async = tensor.device.type == "cpu" and device.type in ("cpu", "cuda")
    if is_async and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=is_async)
