"""The recipe runs, writes what it says, and its score gets better by learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from recipes.learn_a_score import (
    SAMPLERS,
    compute_energy_distances,
    learn,
    main,
    measure,
    sample_by_ode,
    spiral_and_blob,
)


def test_a_run_writes_the_picture_and_the_distances(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(out=tmp_path / "score", steps=5, points=60, seed=0)
    assert Image.open(tmp_path / "score" / "score.png").size == (1340, 708)
    rows = json.loads((tmp_path / "score" / "distances.json").read_text())
    assert list(rows) == [*SAMPLERS, "data again", "a Gaussian instead"]
    assert all(row["low"] <= row["high"] for row in rows.values())
    printed = capsys.readouterr().out
    assert "step 5/5" in printed and all(name in printed for name in rows)


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    for name in ("first", "second"):
        main(out=tmp_path / name, steps=2, points=40, seed=3)
    first, second = ((tmp_path / name / "distances.json").read_text() for name in ("first", "second"))
    assert first == second


@pytest.mark.slow
def test_learning_brings_the_samples_nearer_to_the_data() -> None:
    fresh = spiral_and_blob(600, torch.Generator().manual_seed(1))
    before, after = (after_learning(steps, fresh) for steps in (10, 800))
    assert before > 0.05
    assert after < before / 2


def after_learning(steps: int, fresh: torch.Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    predict = learn(steps, generator=generator, report=lambda line: None, batch=256)
    return measure(sample_by_ode(predict, 600, generator), fresh, generator).distance


def test_the_energy_distance_by_hand() -> None:
    x, y = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    once = torch.ones(1, 2)
    # between: 1, √5, √5, 1 on average; within both: 2
    expected = 2 * (1 + 5**0.5) / 2 - 2 - 2
    torch.testing.assert_close(compute_energy_distances(x, y, once, once), torch.tensor([expected]))


def test_a_resample_counts_a_point_as_often_as_it_holds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 2, generator=generator), torch.randn(4, 2, generator=generator)
    twice = torch.tensor([[2.0, 0.0, 1.0, 1.0, 1.0]])
    held = x[[0, 0, 2, 3, 4]]
    once = torch.ones(1, 4)
    got = compute_energy_distances(x, y, twice, once)
    # the two copies of a point are not a pair: 18 ordered pairs are left of 20
    within = torch.cdist(held, held).sum() / 18
    expected = 2 * torch.cdist(held, y).mean() - within - torch.cdist(y, y).sum() / 12
    torch.testing.assert_close(got, expected[None])
