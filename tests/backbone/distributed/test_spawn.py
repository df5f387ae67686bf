"""Several processes that train one model agree on every weight, and on when to stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backbone.distributed import spawn
from backbone.distributed.processes import any_process, average_in_place
from backbone.distributed.spawn import run_workers
from backbone.io.files import read_tensors, write_tensors
from backbone.training.loop import Update, train, warm_constant


def learn(rank: int, folder: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    data = torch.tensor([[1.0, 2.0], [3.0, -4.0]])

    def losses(step: int) -> Iterator[Tensor]:
        yield (weight * data[rank]).sum() + weight.square().sum()

    optimizer = torch.optim.SGD([weight], lr=0.1)
    for report in train(
        losses,
        {"w": weight},
        optimizer=optimizer,
        lr_schedule=warm_constant(),
        steps=9,
        update=Update(1e9, average_in_place),
    ):
        if any_process(rank == 1 and report.step == 5):
            break
    write_tensors(folder / f"{rank}.safetensors", {"w": weight, "steps": torch.tensor(report.step)})


def test_two_processes_take_the_step_of_their_mean_gradient_and_stop_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "PRELOADED", ["torch"])  # nothing here needs diffusers or peft
    run_workers(learn, (tmp_path,), processes=2)
    first, second = (read_tensors(tmp_path / f"{rank}.safetensors")[0] for rank in range(2))
    expected = torch.zeros(2)
    for _ in range(5):
        expected -= 0.1 * (torch.tensor([2.0, -1.0]) + 2 * expected)
    assert int(first["steps"]) == int(second["steps"]) == 5
    assert torch.equal(first["w"], second["w"])
    assert torch.allclose(first["w"], expected)


def test_alone_nothing_is_averaged() -> None:
    tensor = torch.ones(3)
    average_in_place([tensor])
    assert torch.equal(tensor, torch.ones(3))
    assert not any_process(False)
