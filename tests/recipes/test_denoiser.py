"""The recipes' training goes on where it stopped, to the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recipes.moji.denoiser import LatentSettings, LatentTraining
from recipes.moji.training.run import round_to_grid

SETTINGS = LatentSettings(steps=6, batch=2, learning_rate=1e-2, matrix_rate=1e-2, text_rows=0, decay=2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def trained(settings: LatentSettings) -> dict[str, Tensor]:
    """The weights at the end, beginning at the folder's checkpoint; rounded ones are seen on the grid alone."""
    model = network()
    weights = dict(model.named_parameters())
    training = LatentTraining(settings, "toy", weights, [weights["0.weight"]], slow=[weights["1.weight"]])

    def losses(step: int) -> Iterator[Tensor]:
        given = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        seen = {name: value.detach() for name, value in weights.items()}
        on_grid = all(torch.equal(value, seen[name]) for name, value in round_to_grid(seen).items())
        assert on_grid == settings.rounded
        yield model(given).square().mean()

    training.follow(losses, 0)
    return model.state_dict()


@pytest.mark.parametrize("rounded", [False, True])
def test_a_stopped_training_ends_at_the_same_weights(tmp_path: Path, rounded: bool) -> None:
    settings = replace(SETTINGS, rounded=rounded)
    whole = trained(replace(settings, workdir=tmp_path / "whole"))
    parts = tmp_path / "parts"
    trained(replace(settings, workdir=parts, minutes=0.0))  # stops, and saves, after its first step
    assert (parts / "toy-stable.safetensors").exists()
    resumed = trained(replace(settings, workdir=parts))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert any(not torch.equal(value, whole[name]) for name, value in network().state_dict().items())


def test_a_finished_training_changes_nothing(tmp_path: Path) -> None:
    settings = replace(SETTINGS, workdir=tmp_path)
    once, twice = trained(settings), trained(settings)
    assert all(torch.equal(once[name], value) for name, value in twice.items())
