"""`customize train` and `customize sample`, on a random tiny model, as their console script runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image, ImageOps

from backbone.adapters.lora import LORA_WEIGHTS
from backbone.io.files import append_jsonl, read_jsonl, read_tensors
from backbone.training.loop import Report
from backbone.training.run import log_to_tensorboard
from tests.commands import Started, run_command, run_here

Command = Callable[..., subprocess.CompletedProcess[str]]
TRAIN = ("train", "--token", "[V]", "--class", "dog", "--precision", "fp32", "--device", "cpu")


@pytest.fixture
def customize(tmp_path: Path) -> Command:
    """Runs `customize` in an empty folder."""

    def call(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run_here("customize", *arguments, cwd=tmp_path, check=check)

    return call


def test_a_run_leaves_everything_that_it_should(
    customize: Command, tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    customize(*TRAIN, "--images", str(subject), "--model", str(tiny_folder), "--validation_steps", "2")
    run = tmp_path / "runs" / "subject"
    assert {path.name for path in run.iterdir()} == {
        LORA_WEIGHTS,
        "concept.json",
        "settings.json",
        "log.jsonl",
        "sheet.png",
        "README.md",
        "checkpoint.safetensors",
        "previews",
        "report.html",
    }
    assert [line["step"] for line in read_jsonl(run / "log.jsonl")] == [1, 2, 3, 4]
    assert Image.open(run / "sheet.png").size[0] > 400
    record = json.loads((run / "settings.json").read_text())
    assert record["settings"]["steps"] == 4
    assert {"torch", "diffusers", "peft"} <= set(record["versions"])
    assert record["timings"]["all"] > 0
    assert "customize train" in (run / "README.md").read_text()
    sampled = customize(
        "sample", "a [V] dog in the snow", "a dog", "--concept", "runs/subject", "--count", "2", "--out", "o"
    )
    assert "4 images" in sampled.stderr
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert names == {"p00-s00.png", "p00-s01.png", "p01-s00.png", "p01-s01.png", "sheet.png", "samples.json"}
    assert (
        json.loads((tmp_path / "o" / "samples.json").read_text())["pictures"][0]["prompt"]
        == "a [V] dog in the snow"
    )


def test_a_run_that_was_stopped_by_a_signal_goes_on_bit_for_bit(
    customize: Command, tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    flags = [*TRAIN, "--images", str(subject), "--model", str(tiny_folder)]
    flags += ["--steps", "12", "--checkpointing_steps", "5"]
    customize(*flags, "--out", "whole")
    log = tmp_path / "parts" / "log.jsonl"

    def terminate(path: Path, line: Any) -> None:
        append_jsonl(path, line)
        if line["step"] == 7:
            assert callable(signal.getsignal(signal.SIGTERM)), "this process would end"
            os.kill(os.getpid(), signal.SIGTERM)

    with patch("backbone.training.run.append_jsonl", terminate):
        stopped = customize(*flags, "--out", "parts", check=False)
    assert stopped.returncode == 130, stopped.stderr
    assert "customize train --resume parts" in stopped.stderr
    assert 7 <= len(read_jsonl(log)) < 12 and not (tmp_path / "parts" / LORA_WEIGHTS).exists()
    customize("train", "--resume", "parts")
    one, other = (read_tensors(tmp_path / name / LORA_WEIGHTS)[0] for name in ("whole", "parts"))
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [line["step"] for line in read_jsonl(log)] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_a_run_killed_again_and_again_ends_bit_for_bit_like_one_that_was_not(
    tmp_path: Path, subject: Path, tiny_folder: Path, kills: int
) -> None:
    customize = partial(run_command, "customize", cwd=tmp_path)
    asked = [*TRAIN, "--images", str(subject), "--model", str(tiny_folder), "--optimizer", "adamw"]
    asked += ["--checkpointing_steps", "3", "--steps", str(20 * kills), "--ema_decay", "0.9"]
    customize(*asked, "--out", "whole")
    random = Random(0)
    log = tmp_path / "parts" / "log.jsonl"
    arguments = [*asked, "--out", "parts"]
    for number in range(kills):
        wanted = 20 * number + random.randint(4, 19)  # a step that the run has not taken yet
        process = Started("customize", *arguments, cwd=tmp_path)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < wanted):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))  # also in the middle of a step, a line, a checkpoint
        process.kill()
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        arguments = ["train", "--resume", "parts"]
    customize("train", "--resume", "parts")
    one, other = (read_tensors(tmp_path / name / LORA_WEIGHTS)[0] for name in ("whole", "parts"))
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [line["step"] for line in read_jsonl(log)] == list(range(1, 20 * kills + 1))


def test_two_subjects_are_learned_at_once_and_resumed(
    customize: Command, tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (70, 64), "green").save(other / "a.png")
    flags = ["--images", str(subject), "--subject", "other:[W]:cat", "--model", str(tiny_folder)]
    customize(*TRAIN, *flags, "--steps", "2", "--out", "two")
    concept = json.loads((tmp_path / "two" / "concept.json").read_text())
    assert list(concept["tokens"]) == ["[V]", "[W]"]
    assert len(set(concept["tokens"].values())) == 2
    customize("sample", "a [V] dog", "a [W] cat", "--concept", "two", "--steps", "2")
    customize("train", "--resume", "two")
    done = customize(*TRAIN, "--images", str(subject), "--subject", "other:[V]:cat", check=False)
    assert done.returncode == 2
    assert "its own" in done.stderr


def test_curves_for_tensorboard_lie_beside_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, (1, 2, 3, 4)), (2, (3,))):  # stopped, and gone on with from step 2
        with log_to_tensorboard(tmp_path, enabled=True, done=done) as note:
            for step in steps:
                note(Report(step=step, loss=1 / step, gradient_norm=0.5, learning_rate=1e-3, seconds=0.1))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
    assert found.Scalars("loss")[1].value == 0.5


def test_every_bad_picture_is_listed_before_anything_is_written(
    customize: Command, tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    (subject / "text.jpg").write_text("no picture")
    (subject / "empty.png").write_bytes(b"")
    done = customize(*TRAIN, "--images", str(subject), "--model", str(tiny_folder), check=False)
    assert done.returncode == 2
    assert "text.jpg" in done.stderr
    assert "empty.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "--images"),
        (["train", "--images", "nowhere"], "nowhere"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["sample", "a [V] dog", "--model", "TINY"], r"[V]"),
        (["sample", "a dog", "--model", "TINY", "--sampler", "magic"], "magic"),
        (["sample", "a dog", "--model", "nowhere/at/all"], "nowhere/at/all"),
        (["sample", "a dog", "--concept", "nowhere"], "nowhere"),
        (["sample", "a dog", "--model", "TINY", "--steps", "0"], "steps"),
    ],
)
def test_a_mistake_gives_one_sentence_and_exit_code_2(
    customize: Command, tiny_folder: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = customize(*[a.replace("TINY", str(tiny_folder)) for a in arguments], check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("samples/*"))


def test_a_run_folder_is_never_overwritten(
    customize: Command, tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    flags = [*TRAIN, "--images", str(subject), "--model", str(tiny_folder), "--steps", "1", "--out", "run"]
    customize(*flags)
    before = (tmp_path / "run" / LORA_WEIGHTS).read_bytes()
    done = customize(*flags, check=False)
    assert done.returncode == 2
    assert "--resume run" in done.stderr
    assert (tmp_path / "run" / LORA_WEIGHTS).read_bytes() == before


def test_a_concept_of_another_model_is_refused(
    customize: Command, tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    from tests.tiny import tiny_pipeline

    other = tiny_pipeline(tmp_path / "other", seed=5)
    customize(*TRAIN, "--images", str(subject), "--model", str(tiny_folder), "--steps", "1", "--out", "run")
    done = customize("sample", "a [V] dog", "--concept", "run", "--model", str(other), check=False)
    assert done.returncode == 2
    assert "other weights" in done.stderr


def test_the_example_is_written_once_and_spares_what_lies_there(customize: Command, tmp_path: Path) -> None:
    customize("example", "dog/")
    customize("example", "dog/")
    assert len(list((tmp_path / "dog").glob("*.png"))) == 5 and (tmp_path / "dog" / "example").is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert customize("example", "mine", check=False).returncode == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_run_from_own_class_images_repeats_from_its_record(
    customize: Command, tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for path in subject.iterdir():
        ImageOps.invert(Image.open(path).convert("RGB")).save(others / path.name)
    flags = ["--images", str(subject), "--model", str(tiny_folder), "--class_data_dir", str(others)]
    customize(*TRAIN, *flags, "--num_class_images", "4", "--resolution", "48", "--steps", "2", "--out", "one")
    kept = json.loads((tmp_path / "one" / "settings.json").read_text())["settings"]
    assert (kept["prior"], kept["class_images"], kept["resolution"]) == ("class-images", [str(others)], 48)
    customize("train", "--config", "one/settings.json", "--out", "two")
    again = json.loads((tmp_path / "two" / "settings.json").read_text())["settings"]
    assert again == kept
    one, other = (read_tensors(tmp_path / name / LORA_WEIGHTS)[0] for name in ("one", "two"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_folder_is_taken_once_a_step_is_saved_and_not_by_a_failed_try(
    customize: Command, tmp_path: Path, subject: Path, tiny_folder: Path
) -> None:
    flags = [*TRAIN, "--images", str(subject), "--model", str(tiny_folder), "--prior", "off", "--out", "run"]
    failed = customize(*flags, "--steps", "9", "--learning-rate", "1e30", check=False)
    assert failed.returncode == 2 and "--learning-rate" in failed.stderr
    assert (tmp_path / "run" / "log.jsonl").is_file()
    customize(*flags, "--steps", "2")
    assert [line["step"] for line in read_jsonl(tmp_path / "run" / "log.jsonl")] == [1, 2]
    refused = customize(*flags, "--steps", "2", check=False).stderr
    assert "--resume run" in refused and "starting" not in refused  # before torch is imported
