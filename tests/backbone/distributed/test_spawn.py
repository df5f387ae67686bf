"""Several processes that train one model agree on every weight, and on when to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backbone.distributed import spawn
from backbone.distributed.processes import any_process, average_in_place
from backbone.distributed.spawn import run_workers
from backbone.io.files import read_tensors, write_tensors
from backbone.training.loop import Update, train
from backbone.training.optimizer import warm_constant


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


def wait_for(true: Callable[[], bool], seconds: float) -> bool:
    """Whether something is true within so many seconds."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_workers_end_with_the_process_that_asked_for_them_however_it_ends(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from backbone.distributed import spawn\n"
        "def work(rank, folder):\n"
        "    open(os.path.join(folder, str(os.getpid())), 'w').close()\n"
        "    time.sleep(300)\n"
        "if __name__ == '__main__':\n"
        "    spawn.PRELOADED = ['torch']\n"
        "    spawn.run_workers(work, (sys.argv[1],), processes=2)\n"
    )
    folder = tmp_path / "workers"
    folder.mkdir()
    with subprocess.Popen([sys.executable, str(program), str(folder)], start_new_session=True) as asked:
        try:
            assert wait_for(lambda: len(list(folder.iterdir())) == 2, 120)
        finally:
            asked.kill()
    workers = [int(path.name) for path in folder.iterdir()]
    try:
        assert wait_for(lambda: not any(map(is_running, workers)), 20)
    finally:
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)


def is_running(process: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_alone_nothing_is_averaged() -> None:
    tensor = torch.ones(3)
    average_in_place([tensor])
    assert torch.equal(tensor, torch.ones(3))
    assert not any_process(False)
