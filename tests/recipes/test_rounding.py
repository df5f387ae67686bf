"""A denoiser put on the grid of exported weights says what it said before, more nearly than by rounding alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from backbone.io.files import read_tensors
from recipes.moji.rounding import FILES, Networks, RoundingSettings, app, learn_rounding
from recipes.moji.training.run import GRID, fill, round_to_grid
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RoundingSettings:
    """Of a rounding of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("rounding")
    tiny_pipeline(folder / "exact")
    return RoundingSettings(
        steps=100, batch=8, learning_rate=1e-5, model=folder / "exact", workdir=folder / "work"
    )


@pytest.fixture(scope="module")
def scenes(settings: RoundingSettings) -> Any:
    """Latents and captions, as many as are asked for."""
    unet = Networks(settings.model, "cpu").unet

    def batch(count: int, random: torch.Generator, shares: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        latents = torch.randn(count, unet.config.in_channels, 8, 8, generator=random)
        return latents, torch.randint(90, (count, 77), generator=random)

    return SimpleNamespace(batch=batch)


@pytest.fixture(scope="module")
def exported(settings: RoundingSettings, scenes: Any) -> Path:
    """The folder that a finished rounding writes."""
    learn_rounding(settings, scenes)
    out = settings.workdir / "rounded"
    done = CliRunner().invoke(app, ["export", "--out", str(out), "--workdir", str(settings.workdir)])
    assert done.exit_code == 0, done.output
    return out


@torch.no_grad()
def test_it_is_nearer_to_the_exact_networks_than_rounding_without_training(
    settings: RoundingSettings, scenes: Any, exported: Path
) -> None:
    exact, nearest, learned = (
        Networks(folder, "cpu") for folder in (settings.model, settings.model, exported)
    )
    fill(dict(nearest.named_parameters()), round_to_grid(dict(exact.named_parameters())))
    random = torch.Generator().manual_seed(99)
    latents, tokens = scenes.batch(16, random, {})
    index = torch.randint(1000, (16,), generator=random)
    wanted, by_rounding, by_learning = (one(latents, index, tokens) for one in (exact, nearest, learned))
    assert 0 < (by_learning - wanted).square().mean() < 0.8 * (by_rounding - wanted).square().mean()


def test_every_matrix_of_the_exported_folder_lies_on_the_grid_and_all_else_is_as_it_was(
    settings: RoundingSettings, exported: Path
) -> None:
    for part, name in FILES.items():
        tensors, said = read_tensors(exported / part / name)
        before, said_before = read_tensors(settings.model / part / name)
        assert said == said_before and {k: v.dtype for k, v in tensors.items()} == {
            key: value.dtype for key, value in before.items()
        }
        for key, value in tensors.items():
            if value.ndim > 1:
                rows = value.float().flatten(1)
                finest = torch.exp2((rows.square().mean(1, keepdim=True).sqrt() / GRID).log2().round() - 1)
                assert torch.equal(rows, (rows / finest).round() * finest)
                assert not torch.equal(value, before[key])
            else:
                assert torch.equal(value, before[key])
    weights = [Path(part) / name for part, name in FILES.items()]
    for path in settings.model.rglob("*"):
        relative = path.relative_to(settings.model)
        if path.is_file() and relative not in weights:
            assert (exported / relative).read_bytes() == path.read_bytes()


def test_a_stopped_rounding_ends_at_the_same_weights(
    settings: RoundingSettings, scenes: Any, tmp_path: Path
) -> None:
    short = replace(settings, steps=3)
    whole = learn_rounding(replace(short, workdir=tmp_path / "whole"), scenes).kept
    learn_rounding(replace(short, workdir=tmp_path / "parts", minutes=0.0), scenes)  # stops after a step
    parts = learn_rounding(replace(short, workdir=tmp_path / "parts"), scenes).kept
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_the_folder_that_is_rounded_is_not_written_over(settings: RoundingSettings, exported: Path) -> None:
    words = ["export", "--out", str(settings.model), "--workdir", str(settings.workdir)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0 and "Name another by --out" in str(done.exception)
