"""`align` in two processes: the same weights, figures and pictures as in one, one cache of both, one writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align.settings import EVALUATIONS, REWARDS, SUMMARY
from align.training.run import resume_preferences
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.distributed.spawn import run_workers
from backbone.io.files import read_json, read_jsonl, read_tensors
from backbone.io.run_folder import CHECKPOINT
from backbone.models.cache import VARIABLE
from backbone.training.run import LOG
from tests.align.conftest import PROMPTS, picture, write_lines
from tests.align.together import CASES, ONLINE, cold_worker, everything, online, online_worker, worker


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs of four prompts."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(16):
        picture(number).save(folder / f"{number}.png")
    rows = [
        {"prompt": PROMPTS[number % 4], "chosen": f"{2 * number}.png", "rejected": f"{2 * number + 1}.png"}
        for number in range(8)
    ]
    return write_lines(folder / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, source: Path, prompts: Path) -> Path:
    """The folders `one` and `two`: the same done by one process and by two, each with a cold cache."""
    folder = tmp_path_factory.mktemp("both")
    run_workers(worker, (folder, tiny_folder, source, prompts), processes=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder / "cache of one"))
        everything(folder / "one", tiny_folder, source, prompts)
    return folder


@pytest.fixture(scope="module")
def both_online(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, prompts: Path, bright: Path
) -> Path:
    """The same for what learns from a scorer."""
    folder = tmp_path_factory.mktemp("online")
    run_workers(online_worker, (folder, tiny_folder, prompts, bright), processes=2)
    online(folder / "one", tiny_folder, prompts, bright)
    return folder


def apart(one: Path, other: Path) -> dict[str, float]:
    """How far the tensors of two files are apart."""
    first, second = read_tensors(one)[0], read_tensors(other)[0]
    assert set(first) == set(second)
    return {name: float((first[name] - second[name]).abs().max()) for name in first}


def weights(apart: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in apart.items() if name.startswith("parameter/")}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(both: Path, name: str) -> None:
    learned_alike(both, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONLINE)
def test_two_processes_learn_from_a_scorer_what_one_does(both_online: Path, name: str) -> None:
    learned_alike(both_online, name)


def learned_alike(both: Path, name: str) -> None:
    one, two = both / "one" / name, both / "two" / name
    assert max(weights(apart(one / CHECKPOINT, two / CHECKPOINT)).values()) < 1e-5
    logs = [read_jsonl(run / LOG) for run in (one, two)]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4], "one process alone writes"
    for first, second in zip(*logs, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-3, abs=1e-6)
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-3, abs=1e-6)
    assert sorted(read_json(one / SUMMARY)) == sorted(read_json(two / SUMMARY))


@pytest.mark.slow
def test_whole_micro_batches_give_the_same_bits_and_the_same_evaluations(both: Path) -> None:
    assert set(apart(both / "one/micros" / CHECKPOINT, both / "two/micros" / CHECKPOINT).values()) == {0.0}
    one, two = (read_jsonl(both / count / "micros" / EVALUATIONS) for count in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_the_cached_reference_holds_what_both_have_asked(both: Path) -> None:
    for name in ("rows", "kto", "full"):
        one, two = (read_json(both / count / name / SUMMARY) for count in ("one", "two"))
        assert two["cached_errors"] == one["cached_errors"] and two["reference_rows"] == one["reference_rows"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_they_go_on_bit_for_bit(both: Path) -> None:
    assert read_tensors(both / "two/half-way" / CHECKPOINT)[1]["step"] == "3"
    assert set(apart(both / "two/longer" / CHECKPOINT, both / "two/resumed" / CHECKPOINT).values()) == {0.0}


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_began(both: Path) -> None:
    run = both / "two" / "half-way"
    resume_preferences(run)
    assert [line["step"] for line in read_jsonl(run / LOG)] == [1, 2, 3, 4, 5, 6]
    assert max(weights(apart(both / "one/longer" / CHECKPOINT, run / CHECKPOINT)).values()) < 1e-5


@pytest.mark.slow
def test_two_processes_prepare_and_learn_from_it_what_one_does_which_goes_on_with_what_they_began(
    both: Path,
) -> None:
    one = both / "one" / "longer-prepared" / CHECKPOINT
    assert max(weights(apart(one, both / "two/longer-prepared" / CHECKPOINT)).values()) < 1e-5
    half_way = both / "two" / "half-way-prepared"
    assert read_tensors(half_way / CHECKPOINT)[1]["step"] == "3"
    resume_preferences(half_way)
    assert [line["step"] for line in read_jsonl(half_way / LOG)] == [1, 2, 3, 4, 5, 6]
    assert max(weights(apart(one, half_way / CHECKPOINT)).values()) < 1e-5


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(both: Path) -> None:
    for rank in range(2):
        assert "cannot be shared by 2 processes" in (both / f"refused-{rank}.txt").read_text()
    assert not (both / "two" / "alone").exists()


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_number_of_processes(both: Path) -> None:
    drawn_alike(both / "one" / "drawn", both / "two" / "drawn", 20)


@pytest.mark.slow
def test_rounds_of_pictures_do_not_depend_on_the_number_of_processes(both_online: Path) -> None:
    one, two = (both_online / count / "rounds" for count in ("one", "two"))
    drawn_alike(one, two, 2 * 10)
    assert read_jsonl(one / REWARDS) == read_jsonl(two / REWARDS)


def drawn_alike(one: Path, two: Path, count: int) -> None:
    """The same pictures bit for bit."""
    drawn = sorted(one.rglob("pictures/*.png"))
    assert len(drawn) == count
    for path in drawn:
        assert Image.open(path).tobytes() == Image.open(two / path.relative_to(one)).tobytes()


def started_alike(folder: Path, times: int) -> None:
    for number in range(times):
        first, second = (folder / f"cold-{number}-of-{rank}" for rank in range(2))
        assert set(apart(first / CHECKPOINT, second / CHECKPOINT).values()) == {0.0}
        assert not list((folder / f"cold-{number}").rglob("*.partial"))
        (cache,) = (folder / f"cold-{number}" / "reference").rglob("*.npy")
        assert not np.isnan(np.load(cache, allow_pickle=False)).all()


@pytest.mark.slow
def test_twenty_times_runs_that_start_cold_together_share_caches_and_a_cached_reference_without_a_race(
    tmp_path: Path, source: Path, tiny_folder: Path
) -> None:
    run_workers(cold_worker, (tmp_path, tiny_folder, source, 20), processes=2)
    started_alike(tmp_path, 20)


# Real launches ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accelerate_launches_two_processes_that_draw_and_learn_what_one_does(
    tmp_path: Path, source: Path, tiny_folder: Path, prompts: Path
) -> None:
    root = str(Path(__file__).parents[2])

    def align(processes: str, *arguments: object) -> str:
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
        words = [*launch, "--num_processes", processes, "-m", "align.cli", *map(str, arguments)]
        cache = str(tmp_path / f"cache-{processes}")
        environment = {
            **os.environ,
            "PYTHONPATH": root,
            "OMP_NUM_THREADS": "1",
            VARIABLE: cache,
            "HF_HOME": cache,
        }
        done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    where = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu")
    few = (
        "--steps",
        "4",
        "--train-batch-size",
        "2",
        "--rank",
        "2",
        "--draws",
        "2",
        "--evaluation-draws",
        "1",
    )
    for number in ("1", "2"):
        said = align(
            number, "sample", "--prompts", prompts, "--out", f"drawn-{number}", "--steps", "2", *where
        )
        assert said.count("20 images of 5 prompts") == 1
        align(
            number,
            "train",
            source,
            "--any-model",
            "--held-out",
            "0.3",
            "--out",
            f"run-{number}",
            *few,
            *where,
        )
    assert max(apart(tmp_path / "run-1" / LORA_WEIGHTS, tmp_path / "run-2" / LORA_WEIGHTS).values()) < 1e-5
    drawn_alike(tmp_path / "drawn-1", tmp_path / "drawn-2", 20)
