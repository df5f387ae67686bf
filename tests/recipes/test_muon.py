"""Muon: what it does to a matrix, and that its processes share the work without changing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recipes.moji.training.muon import Muon, as_matrix, as_tensor, assign_shares, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_all_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix).float()
    assert torch.linalg.svdvals(found).min() > 0.6
    assert torch.linalg.svdvals(found).max() < 1.25
    assert (left.T @ found @ right.T).diagonal().min() > 0.6  # the same singular vectors


def test_a_convolution_comes_back_from_its_matrix() -> None:
    weight = torch.randn(6, 4, 3, 3)
    assert torch.equal(as_tensor(as_matrix(weight), weight), weight)


def test_a_step_goes_down_and_leaves_other_groups_to_adamw() -> None:
    torch.manual_seed(0)
    weight, bias = torch.zeros(8, 4, 3, 3, requires_grad=True), torch.zeros(8, requires_grad=True)
    wanted = torch.nn.Conv2d(4, 8, 3)
    pictures = torch.randn(16, 4, 8, 8)
    groups: list[dict[str, Any]] = [{"params": [bias]}, {"params": [weight], "momentum": 0.9, "lr": 0.02}]
    optimizer = Muon(groups, lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        error = torch.nn.functional.conv2d(pictures, weight, bias) - wanted(pictures).detach()
        loss = error.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    assert set(optimizer.state[weight]) == {"exp_avg"}
    assert "exp_avg_sq" in optimizer.state[bias]


def test_every_piece_of_work_has_an_owner_and_loads_are_even() -> None:
    costs = [9, 7, 5, 4, 3, 2, 2]
    owners = assign_shares(costs, 2)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == k) for k in range(2)]
    assert sum(loads) == sum(costs)
    assert abs(loads[0] - loads[1]) <= 2
