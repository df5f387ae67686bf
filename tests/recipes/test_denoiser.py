"""The recipes' training goes on where it stopped, to the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.moji.denoiser import Plan, Training

PLAN = Plan(
    steps=6, batch=2, learning_rate=1e-2, matrix_rate=1e-2, text_rows=0, simple_steps=1, decay=2, minutes=1e9,
    device="cpu", seed=0, workdir=Path(),
)  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def trained(plan: Plan) -> dict[str, Tensor]:
    """The weights after the plan, beginning at its folder's checkpoint."""
    model = network()
    weights = dict(model.named_parameters())
    training = Training(plan, "toy", weights, [weights["0.weight"]], slow=[weights["1.weight"]])

    def losses(step: int) -> Iterator[Tensor]:
        given = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        yield model(given).square().mean()

    training.follow(losses, 0)
    return model.state_dict()


def test_a_stopped_training_ends_at_the_same_weights(tmp_path: Path) -> None:
    whole = trained(replace(PLAN, workdir=tmp_path / "whole"))
    parts = tmp_path / "parts"
    trained(replace(PLAN, workdir=parts, minutes=0.0))  # stops, and saves, after its first step
    assert (parts / "toy-stable.safetensors").exists()
    resumed = trained(replace(PLAN, workdir=parts))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert any(not torch.equal(value, whole[name]) for name, value in network().state_dict().items())


def test_a_finished_training_changes_nothing(tmp_path: Path) -> None:
    plan = replace(PLAN, workdir=tmp_path)
    once, twice = trained(plan), trained(plan)
    assert all(torch.equal(once[name], value) for name, value in twice.items())
