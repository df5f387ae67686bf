"""`customize` in two processes: the same weights and pictures as in one, one writer, no race, no wait without end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbone.adapters.lora import LORA_WEIGHTS
from backbone.distributed import processes
from backbone.distributed.spawn import run_workers
from backbone.io.console import UserError
from backbone.io.files import read_json, read_jsonl, read_tensors
from backbone.io.run_folder import CHECKPOINT
from backbone.models.cache import VARIABLE
from customize.objectives.dreambooth import find_share
from customize.settings import Settings
from customize.training.run import resume_concept
from tests.customize.together import CASES, cold_worker, everything, worker

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
TRAIN = ("train", "--token", "[V]", "--class", "dog", "--precision", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folders `one` and `two`: the same done by one process and by two, each with a cold cache."""
    folder = tmp_path_factory.mktemp("both")
    pictures = folder / "subject"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        pixels = random.integers(0, 255, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    run_workers(worker, (folder, tiny_folder, pictures), processes=2)
    everything(folder / "one", tiny_folder, pictures)
    return folder


def apart(one: Path, other: Path) -> dict[str, float]:
    """How far the tensors of two checkpoints or adapters are apart."""
    first, second = read_tensors(one)[0], read_tensors(other)[0]
    assert set(first) == set(second)
    return {name: float((first[name] - second[name]).abs().max()) for name in first}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "half"])
def test_two_processes_learn_what_one_does(both: Path, name: str) -> None:
    found = apart(both / "one" / name / CHECKPOINT, both / "two" / name / CHECKPOINT)
    assert any("/exp_avg/" in key for key in found), "the gradients' averages are compared too"
    assert max(found.values()) < 1e-5
    logs = [read_jsonl(both / count / name / "log.jsonl") for count in ("one", "two")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4], "one process alone writes"
    for key in ("loss", "gradient_norm"):
        assert [line[key] for line in logs[1]] == pytest.approx([line[key] for line in logs[0]], rel=1e-5)


@pytest.mark.slow
def test_in_half_precision_a_batch_that_is_cut_up_differs_by_its_rounding(both: Path) -> None:
    """bf16 has 8 bits, so parts of a batch add up to another last bit; whole micro-batches do not (below)."""
    logs = [read_jsonl(both / count / "half" / "log.jsonl") for count in ("one", "two")]
    for key in ("loss", "gradient_norm"):
        assert [line[key] for line in logs[1]] == pytest.approx([line[key] for line in logs[0]], rel=2**-6)


@pytest.mark.slow
def test_whole_micro_batches_give_the_same_bits(both: Path) -> None:
    assert set(apart(both / "one/micros" / CHECKPOINT, both / "two/micros" / CHECKPOINT).values()) == {0.0}


@pytest.mark.slow
def test_two_processes_leave_the_same_files(both: Path) -> None:
    def files(count: str) -> set[str]:
        root = both / count
        stopped = {"resumed", "half-way"}
        return {str(path.relative_to(root)) for path in root.rglob("*") if not stopped & set(path.parts)}

    assert files("one") == files("two")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_they_go_on_bit_for_bit(both: Path) -> None:
    assert read_tensors(both / "two/half-way" / CHECKPOINT)[1]["step"] == "3"
    assert set(apart(both / "two/longer" / CHECKPOINT, both / "two/resumed" / CHECKPOINT).values()) == {0.0}


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began(both: Path) -> None:
    run = both / "two" / "half-way"
    resume_concept(run)
    assert [line["step"] for line in read_jsonl(run / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert max(apart(both / "one/longer" / CHECKPOINT, run / CHECKPOINT).values()) < 1e-5


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(both: Path) -> None:
    for rank in range(2):
        assert "cannot be shared by 2 processes" in (both / f"refused-{rank}.txt").read_text()
    assert not (both / "two" / "alone").exists()


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_number_of_processes(both: Path) -> None:
    one, two = both / "one", both / "two"
    names = sorted(path.name for path in (one / "many").glob("p*.png"))
    assert len(names) == 20
    for name in [*names, "sheet.png"]:
        assert np.array_equal(pixels(one / "many" / name), pixels(two / "many" / name))
    for name in ("p00-s00.png", "p01-s00.png"):  # drawn apart, so rounded otherwise
        assert np.abs(pixels(one / "few" / name) - pixels(two / "few" / name)).max() <= 1
    said = [read_json(folder / "many" / "samples.json")["pictures"] for folder in (one, two)]
    assert said[0] == said[1]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def test_dropout_needs_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    asked = Settings(images="", token="", class_noun="", batch=4, lora_dropout=0.1)
    with pytest.raises(UserError, match="--gradient-accumulation-steps 2"):
        find_share(asked)
    assert find_share(replace(asked, batch=2, gradient_accumulation_steps=2)).scale == 1


def started_alike(folder: Path, times: int) -> None:
    for number in range(times):
        first, second = (folder / f"cold-{number}-of-{rank}" for rank in range(2))
        assert set(apart(first / CHECKPOINT, second / CHECKPOINT).values()) == {0.0}
        assert not list((folder / f"cold-{number}").rglob("*.partial"))
        for path in (folder / f"cold-{number}").rglob("*.safetensors"):
            read_tensors(path)


@pytest.mark.slow
def test_twenty_times_runs_that_start_cold_together_share_a_cache_without_a_race(
    tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    run_workers(cold_worker, (tmp_path, tiny_folder, subject, 20), processes=2)
    started_alike(tmp_path, 20)


# Real launches ------------------------------------------------------------------------------------------------


def launch(*command: str, cache: Path, cwd: Path) -> subprocess.Popen[str]:
    """`accelerate launch` for two processes on this machine's CPU."""
    root = str(Path(__file__).parents[2])
    asked = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *command]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", VARIABLE: str(cache)}
    environment["HF_HOME"] = str(cache)  # no configuration of whoever runs the tests
    return subprocess.Popen(
        asked, cwd=cwd, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


FLAGS = {
    "on a CPU": ("--num_processes", "2", "--cpu"),
    "through torchrun": ("--num_processes", "2", "--multi_gpu", "--main_process_port", "0"),
    "with FSDP": ("--config_file", str(ACCELERATE / "fsdp.yaml"), "--main_process_port", "0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", FLAGS)
def test_accelerate_launches_two_processes_that_learn_what_one_does(
    tmp_path: Path, subject: Path, tiny_folder: Path, how: str
) -> None:
    asked = (*TRAIN, "--images", str(subject), "--model", str(tiny_folder), "--train_batch_size", "2")
    two = launch(
        *FLAGS[how], "-m", "customize.cli", *asked, "--out", "two", cache=tmp_path / "two-cache", cwd=tmp_path
    )
    said = two.communicate(timeout=600)[1]
    assert two.returncode == 0, said
    assert said.count("two/sheet.png shows it") == 1
    alone = launch(
        "--cpu", "-m", "customize.cli", *asked, "--out", "one", cache=tmp_path / "cache", cwd=tmp_path
    )
    assert alone.wait(timeout=600) == 0
    assert max(apart(tmp_path / "one" / LORA_WEIGHTS, tmp_path / "two" / LORA_WEIGHTS).values()) < 1e-5
    drawn = launch(
        *FLAGS[how], "-m", "customize.cli", "sample", "a [V] dog", "a dog", "--concept", "two", "--steps", "2",
        cache=tmp_path / "cache", cwd=tmp_path,
    )  # fmt: skip
    assert drawn.wait(timeout=600) == 0
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {"p00-s00.png", "p01-s00.png", "samples.json", "sheet.png"}


@pytest.mark.slow
def test_a_process_that_is_killed_takes_the_others_with_it_and_the_run_goes_on(
    tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    asked = [*TRAIN, "--images", str(subject), "--model", str(tiny_folder), "--train_batch_size", "2"]
    asked += ["--steps", "400", "--checkpointing_steps", "2", "--out", "run"]
    flags = FLAGS["through torchrun"]
    running = launch(*flags, "-m", "customize.cli", *asked, cache=tmp_path / "cache", cwd=tmp_path)
    log, deadline = tmp_path / "run" / "log.jsonl", time.time() + 300
    while time.time() < deadline and (not log.exists() or len(read_jsonl(log)) < 5):
        time.sleep(0.05)
    second = next(
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/environ")
        if b"RANK=1\0" in read(path) and str(tmp_path).encode() in read(path.with_name("environ"))
        and b"customize.cli" in read(path.with_name("cmdline"))
    )  # fmt: skip
    os.kill(second, signal.SIGKILL)
    said = running.communicate(timeout=120)[1]
    assert running.returncode != 0
    assert len(read_jsonl(log)) < 400, said
    assert all(
        bool(value.isfinite().all()) for value in read_tensors(tmp_path / "run" / CHECKPOINT)[0].values()
    )


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
