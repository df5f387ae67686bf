"""Muon: momentum whose matrices are made orthogonal, for the denoiser's inner weights; AdamW for the rest.

The update of a matrix is the nearest (semi-)orthogonal one to its momentum (Jordan et al. 2024), scaled so that its
entries are as large as AdamW's usually are (Liu et al. 2025, "Muon is scalable", eq. 4). A convolution is the matrix
of its output channels against everything that each of them sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; singular values end up in about 0.7…1.2
ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """Steps the groups that name a `momentum` by orthogonalised Nesterov momentum, the others as AdamW does.

    Several processes share the work: each orthogonalises some matrices and they add up what they have.
    """

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step, from gradients that are the same in every process."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "momentum" not in group]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group)

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        owners = assign_shares([count_operations(parameter) for parameter in parameters], world)
        updates = []
        for parameter, owner in zip(parameters, owners, strict=True):
            state: dict[str, Any] = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter)
            gradient, moving = parameter.grad, state["exp_avg"]
            assert gradient is not None
            moving.lerp_(gradient, 1 - group["momentum"])
            update = as_matrix(gradient.lerp(moving, group["momentum"]))
            scale = 0.2 * max(update.shape) ** 0.5
            mine = owner == rank
            updates.append(
                scale * orthogonalize(update) if mine else torch.zeros_like(update, dtype=torch.bfloat16)
            )
        if world > 1:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)
            parts = flat.split([update.numel() for update in updates])
            updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(as_tensor(update, parameter).to(parameter.dtype), alpha=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to one [M, N], roughly and in bfloat16: singular values brought near 1.

    Five steps of a quintic iteration, written for the small square Gram matrix, since all its factors are polynomials
    of it and commute: a fifth of the arithmetic for the wide matrices of convolutions.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = identity
    a, b, c = COEFFICIENTS
    for iteration in range(ITERATIONS):
        factor = torch.addmm(a * identity + b * gram, gram, gram, alpha=c)
        product = factor @ product if iteration else factor
        if iteration < ITERATIONS - 1:
            gram = factor @ gram @ factor
    half = choose_half(matrix.device)  # half the time, and its rounding is far below 0.7…1.2
    near: Tensor = (product.to(half) @ wide.to(half)).bfloat16()
    return near if matrix.shape[0] <= matrix.shape[1] else near.T


def choose_half(device: torch.device) -> torch.dtype:
    """bfloat16, but float32 on processors that only emulate it, which takes many times as long."""
    return (
        torch.float32
        if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
        else torch.bfloat16
    )


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight as [outputs, all inputs]; a convolution's inputs in the order of channels_last, so nothing is copied."""
    return tensor.permute(0, 2, 3, 1).reshape(len(tensor), -1) if tensor.ndim == 4 else tensor


def as_tensor(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_matrix`."""
    if like.ndim != 4:
        return matrix
    outputs, inputs, height, width = like.shape
    return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


def count_operations(parameter: Tensor) -> int:
    """What orthogonalising a weight costs, in multiplications."""
    rows, columns = as_matrix(parameter).shape
    small, large = min(rows, columns), max(rows, columns)
    return 2 * small**2 * large + 4 * ITERATIONS * small**3


def assign_shares(costs: Sequence[int], processes: int) -> list[int]:
    """Which process does which piece: the most expensive first, each to the process that has least."""
    loads = [0] * processes
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners
