"""Several processes take one step together, agree, wait for the writer, and speak with one voice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backbone.distributed import processes, spawn
from backbone.distributed.spawn import run_workers
from backbone.io import console
from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors, write_json, write_tensors
from backbone.io.progress import progress
from backbone.io.run_folder import FORWARDED_SIGNAL_SECONDS, catch_interrupts
from backbone.training.loop import Update, train
from backbone.training.optimizer import warm_constant


def of(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """Makes this process one of several, as far as dealing out is concerned."""
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(processes, "world_size", lambda: world)


# Dealing out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micros", "rows", "world"), [(1, 6, 2), (1, 7, 3), (4, 1, 2), (4, 3, 2), (3, 5, 4), (6, 2, 3), (2, 3, 1)]
)
def test_the_shares_of_a_step_make_up_the_step(
    monkeypatch: pytest.MonkeyPatch, micros: int, rows: int, world: int
) -> None:
    values = torch.arange(micros * rows, dtype=torch.float64).view(micros, rows).exp()
    seen = torch.zeros(micros, rows)
    means = []
    for rank in range(world):
        of(monkeypatch, rank, world)
        own = processes.find_share_of_step(micros, rows)
        seen[own.micros, own.rows] += 1
        means.append(torch.stack([one[own.rows].sum() * own.scale for one in values[own.micros]]).mean())
    assert bool((seen == 1).all())
    assert float(torch.stack(means).mean()) == pytest.approx(float(values.sum(1).mean()), rel=1e-12)


def test_whole_micro_batches_are_dealt_out_where_they_come_out_even(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, 1, 2)
    assert processes.find_share_of_step(4, 1) == processes.Share(slice(2, 4), slice(None), 1)


def test_a_step_with_too_few_rows_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    of(monkeypatch, 0, 2)
    with pytest.raises(UserError, match=r"1 × 1 cannot be shared by 2 processes\. Raise --batch"):
        processes.find_share_of_step(1, 1)


@pytest.mark.parametrize("count", [0, 1, 3, 8, 15, 16, 17, 40])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_item_is_done_by_one_process(monkeypatch: pytest.MonkeyPatch, count: int, world: int) -> None:
    found: list[int] = []
    for rank in range(world):
        of(monkeypatch, rank, world)
        found += processes.split_items(range(count), batch=8)
    assert sorted(found) == list(range(count))


def test_where_there_are_enough_the_batches_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for rank in range(2):
        of(monkeypatch, rank, 2)
        own = processes.split_items(range(20), batch=8)
        parts += [tuple(own[first : first + 8]) for first in range(0, len(own), 8)]
    assert sorted(parts) == [tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 20))]


# Together -----------------------------------------------------------------------------------------------------

DATA = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.5], [-2.0, 1.0], [4.0, 0.0], [1.0, 1.0]])


def fit(*, fails: bool = False) -> tuple[Tensor, list[float]]:
    """Three steps over six rows, whoever does them; rank 1 may meet a NaN in its second step."""
    weight = torch.nn.Parameter(torch.zeros(2))
    own = processes.find_share_of_step(1, len(DATA))

    def losses(step: int) -> Iterator[Tensor]:
        each = (DATA[own.rows] @ weight - step).square()
        bad = float("nan") if fails and step == 2 and processes.rank() == 1 else 1.0
        yield each.sum() * bad * (own.scale / len(DATA))

    optimizer = torch.optim.AdamW([weight], lr=0.1)
    reports = train(
        losses,
        {"w": weight},
        optimizer=optimizer,
        lr_schedule=warm_constant(),
        steps=3,
        update=Update(reduce=processes.gradient_averaging()),
    )
    said = []
    with pytest.raises(UserError, match="step 2") if fails else nullcontext():
        for report in reports:
            said += [report.loss, report.gradient_norm]
    return weight.detach().clone(), said


def work_together(rank: int, folder: Path) -> None:
    processes.BUCKET_ELEMENTS = 3  # so that a message holds less than all of it
    many = [torch.full((2,), float(rank + k)) for k in range(5)]
    processes.average_in_place(many)
    halves = torch.zeros(4)
    halves[2 * rank : 2 * rank + 2] = rank + 1.0
    processes.sum_in_place([halves])
    with processes.main_process_first():
        if rank == 0:
            time.sleep(0.2)
            write_json(folder / "first.json", {})
        there = (folder / "first.json").exists()
    done = processes.split_items(range(5), batch=1)
    rows = processes.gather_rows(torch.tensor([[float(row)] for row in done]))
    weight, said = fit()
    safe, before = fit(fails=True)
    facts = {
        "any": [processes.any_process(rank == 1), processes.any_process(False)],
        "total": processes.reduce_sum([rank, 10.0]),
        "mean": float(processes.reduce_mean(torch.arange(1 + rank, dtype=torch.float32))),
        "writer": [processes.is_main_process(), there],
        "done": done,
        "rows": rows.flatten().tolist(),
        "said": said,
        "steps before the NaN": len(before) // 2,
    }
    write_json(folder / f"{rank}.json", facts)
    tensors = {
        "many": torch.cat(many),
        "halves": halves,
        "weight": weight,
        "safe": safe,
    }
    write_tensors(folder / f"{rank}.safetensors", tensors)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn, "PRELOADED", ["torch"])  # nothing here needs diffusers or peft
        run_workers(work_together, (folder,), processes=2)
    return folder


def test_two_processes_are_as_good_as_one(together: Path) -> None:
    first, second = (read_tensors(together / f"{rank}.safetensors")[0] for rank in range(2))
    assert set(first) == {name for name in second if torch.equal(first[name], second[name])}
    assert torch.equal(first["many"], torch.arange(5).repeat_interleave(2) + 0.5)
    assert first["halves"].tolist() == [1, 1, 2, 2]
    weight, said = fit()
    assert torch.allclose(first["weight"], weight, atol=1e-6, rtol=0)
    facts = [read_json(together / f"{rank}.json") for rank in range(2)]
    assert facts[0]["said"] == facts[1]["said"] == pytest.approx(said, rel=1e-6)
    assert [one["any"] for one in facts] == [[True, False]] * 2
    assert [one["total"] for one in facts] == [[1, 20]] * 2
    assert [one["mean"] for one in facts] == pytest.approx([1 / 3] * 2)
    assert [one["writer"] for one in facts] == [[True, True], [False, True]]
    assert sorted(facts[0]["done"] + facts[1]["done"]) == list(range(5))
    assert facts[0]["rows"] == facts[1]["rows"] == facts[0]["done"] + facts[1]["done"]


def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_it_reaches_the_weights(
    together: Path,
) -> None:
    safe = [read_tensors(together / f"{rank}.safetensors")[0]["safe"] for rank in range(2)]
    assert bool(safe[0].isfinite().all()) and torch.equal(*safe)
    assert [read_json(together / f"{rank}.json")["steps before the NaN"] for rank in range(2)] == [1, 1]


def test_alone_nothing_waits_and_nothing_changes() -> None:
    tensor = torch.ones(3)
    processes.average_in_place([tensor])
    processes.sum_in_place([tensor])
    with processes.main_process_first():
        processes.barrier()
    processes.end_process()
    assert torch.equal(tensor, torch.ones(3)) and processes.is_main_process()
    assert processes.gradient_averaging() is None and not processes.any_process(False)
    assert processes.split_items([1, 2, 3], batch=2) == [1, 2, 3]


# Launchers, voices, signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "said"), [("DEEPSPEED", "DEEPSPEED"), ("MEGATRON_LM", "MEGATRON-LM")])
def test_engines_that_split_the_model_are_refused(
    monkeypatch: pytest.MonkeyPatch, engine: str, said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=said):
        processes.init_process("cpu")


def test_processes_cannot_all_have_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Leave out --device cuda:0"):
        processes.init_process("cuda:0")


def test_a_launcher_that_started_too_few_for_an_unknown_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in (*processes.WORLD_SIZE_VARIABLES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_read_num_processes", lambda: 0)
    with pytest.raises(UserError, match="--multi_gpu"):
        processes.init_process("cpu")
    monkeypatch.setattr(processes, "_read_num_processes", lambda: 1)
    processes.init_process("cpu")
    assert processes.world_size() == 1


@pytest.mark.parametrize("name", ["cpu", "gpus", "fsdp", "machines"])
def test_accelerate_reads_the_configurations_of_the_recipes(name: str) -> None:
    from accelerate.commands.config import load_config_from_file

    path = Path(__file__).parents[3] / "recipes" / "accelerate" / f"{name}.yaml"
    found = load_config_from_file(str(path))
    assert found.num_processes == (16 if name == "machines" else 2)
    assert found.use_cpu == (name == "cpu")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE of the environment is “two”.*unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "tells of 2 processes, which did not meet.*unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "127.0.0.1"}, "which did not meet"),
    ],
)
def test_an_environment_without_its_launcher_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name in (*processes.WORLD_SIZE_VARIABLES, "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        processes.init_process("cpu")


@pytest.mark.parametrize("said", ["", "0", "1"])
def test_an_empty_number_of_processes_is_one(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", said)
    processes.init_process("cpu")
    assert processes.world_size() == 1
    with catch_interrupts():
        pass


def test_of_several_processes_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        console.notify(f"process {rank}")
        with progress(1, f"bar {rank}") as bar:
            bar.advance()
    said = capsys.readouterr().err
    assert "process 0" in said and "bar 0 1/1" in said
    assert "process 1" not in said and "bar 1" not in said


def test_a_mistake_of_one_process_alone_is_said_after_the_first_had_its_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    def app() -> None:
        raise UserError("The disk of this machine is missing.")

    with pytest.raises(SystemExit) as ended:
        console.run_app(app)
    assert ended.value.code == 2
    assert waited == [console.MAIN_PROCESS_GRACE_SECONDS]
    assert capsys.readouterr().err == "Process 1: Error: The disk of this machine is missing.\n"


def test_a_signal_that_the_launcher_passes_on_again_is_not_a_second_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with catch_interrupts() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop == [signal.SIGINT]
        now += FORWARDED_SIGNAL_SECONDS
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_is_refused_leaves_no_settings_behind(tmp_path: Path, there: bool) -> None:
    run = tmp_path / "run"

    def refused_with(*files: str) -> None:
        with processes.hold_new_run(run):
            for name in files:
                write_json(run / name, {})
            raise UserError("It is not to be.")

    if there:  # a folder that somebody made is not ours to remove
        run.mkdir()
    with pytest.raises(UserError, match="not to be"):
        refused_with("settings.json")
    assert list(tmp_path.rglob("*")) == [run] * there
    with pytest.raises(UserError, match="not to be"):
        refused_with("settings.json", "log.jsonl")
    assert sorted(entry.name for entry in run.iterdir()) == ["log.jsonl", "settings.json"]
