"""A base that is sharded over two processes (FSDP) learns what one process does, in half of the memory for weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from align.pairs.read import read_preferences
from align.pairs.records import check_preferences
from align.training.online import train_online
from align.training.prepare import prepare_pairs
from align.training.run import resume_preferences, train_preferences
from backbone.cli.sampling import DrawingOptions
from backbone.distributed import fsdp as shards
from backbone.distributed import processes
from backbone.distributed.spawn import run_workers
from backbone.io.console import UserError
from backbone.io.files import append_jsonl, read_jsonl, read_tensors
from backbone.models.cache import VARIABLE
from backbone.models.model import Backbone
from backbone.models.placement import Placement
from backbone.training.run import LOG
from customize.sampling import sample_to_folder
from customize.settings import Subject
from customize.training.run import train_concept
from tests import tiny
from tests.align.conftest import PROMPTS, picture, write_lines

SHAPES: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.tiny_pipeline,
    "sdxl": tiny.tiny_stable_diffusion_xl,
    "sd3": tiny.tiny_stable_diffusion_3,
    "flux": tiny.tiny_flux,
}
CONCEPT: dict[str, Any] = {"batch": 2, "steps": 2, "prior_draws": 4, "sample_steps": 2, "lr_warmup_steps": 0}
CONCEPTS: dict[str, dict[str, Any]] = {
    "sd": {"adapter": "lokr", "mask": "auto", "validation_steps": 1, "evaluation_steps": 1},
    "sdxl": {"gradient_checkpointing": True},
    "sd3": {"precision": "bf16", "gradient_accumulation_steps": 2, "batch": 1},
    "flux": {"method": "pivotal"},
}
PAIRS: dict[str, Any] = {
    "steps": 5, "batch": 3, "rank": 2, "draws": 2, "held_out": 0.3, "evaluation_draws": 1, "evaluation_steps": 3,
    "lr_warmup_steps": 0, "any_model": True, "device": "cpu", "precision": "fp32", "checkpointing_steps": 3,
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "--method full": {"method": "full"},
    "DoRA": {"adapter": "dora"},
    "offloaded to the CPU": {"cpu_offload": 0.5},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `one` and `two`: the same done by one process, and by two that hold half of the base each."""
    folder = tmp_path_factory.mktemp("shards")
    for name, build in SHAPES.items():
        build(folder / name)
    (folder / "subject").mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        pixels = random.integers(0, 255, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "subject" / f"{number}.png")
    for number in range(16):
        picture(number).save(folder / f"{number}.png")
    rows = [
        {"prompt": PROMPTS[n % 4], "chosen": f"{2 * n}.png", "rejected": f"{2 * n + 1}.png"} for n in range(8)
    ]
    write_lines(folder / "pairs.jsonl", rows)
    run_workers(worker, (folder,), processes=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(VARIABLE, str(folder / "cache of one"))
        everything(folder, "one")
    return folder


def everything(folder: Path, count: str) -> None:
    """Concepts of four shapes, a taste that is stopped and goes on, pictures."""
    for name, asked in CONCEPTS.items():
        train(folder, count, name, asked)
    found, out = check_preferences(read_preferences(str(folder / "pairs.jsonl"))), folder / count / "taste"
    asked = {**PAIRS, "model": str(folder / "sd3"), "pairs": str(folder / "pairs.jsonl")}
    with patch("backbone.training.run.append_jsonl", stopping), suppress(KeyboardInterrupt):
        train_preferences(asked, found, out=out)
    resume_preferences(out)
    opened = Backbone.open(str(folder / "sd3"), device="cpu", precision="fp32")
    ready = prepare_pairs(
        read_preferences(str(folder / "pairs.jsonl")), opened, folder / count / "ready", any_model=True
    )
    train_preferences({**asked, "pairs": str(ready.folder)}, ready, out=folder / count / "prepared")
    drawn = DrawingOptions(model=str(folder / "sd3"), count=3, steps=2, precision="fp32", device="cpu")
    sample_to_folder(PROMPTS[:3], drawn, folder / count / "drawn")


def train(folder: Path, count: str, name: str, asked: Mapping[str, Any], *, run: str = "") -> None:
    """A concept, learned on the tiny model of this name."""
    usual = {**CONCEPT, "model": str(folder / name), "device": "cpu", "precision": "fp32"}
    subject = Subject(str(folder / "subject"), "[V]", "dog")
    train_concept({**usual, **asked}, [subject], out=folder / count / (run or name))


def stopping(path: Path, line: Mapping[str, Any]) -> None:
    """Logs, and stops the run behind its step 3."""
    import signal

    append_jsonl(path, line)
    if path.name == LOG and line["step"] == 3:
        signal.raise_signal(signal.SIGTERM)


def worker(rank: int, folder: Path) -> None:
    """One of two processes that a launcher with FSDP has started."""
    launched = {"ACCELERATE_USE_FSDP": "true", "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {VARIABLE: str(folder / "cache"), **launched}
    with patch.object(processes, "end_process", processes.barrier):
        everything(folder, "two")
        measured(rank, folder)
        for number, (said, asked) in enumerate(REFUSED.items()):
            refused(
                folder / f"refused-{rank}.txt",
                said,
                partial(train, folder, "two", "sd3", asked, run=f"no{number}"),
            )
        asked = {**PAIRS, "model": str(folder / "sd3"), "pairs": str(folder / "pairs.jsonl")}
        found = check_preferences(read_preferences(asked["pairs"]))
        out = folder / "two" / "no"
        full = partial(train_preferences, {**asked, "full": True}, found, out=out)
        refused(folder / f"refused-{rank}.txt", "--full", full)
        (folder / "prompts.txt").write_text("a dog\n")
        online = {"prompts": str(folder / "prompts.txt"), "online": "moji", "pairs": "", "rounds": 1}
        refused(
            folder / f"refused-{rank}.txt", "--online", partial(train_online, {**asked, **online}, out=out)
        )


def measured(rank: int, folder: Path) -> None:
    """Writes how many of the base's numbers this process holds, and how far its prediction is from the whole one's."""
    cut = Backbone.open(str(folder / "sd3"), device="cpu", precision="fp32")
    with patch.object(processes, "is_sharded", lambda: False):
        whole = Backbone.open(str(folder / "sd3"), device="cpu", precision="fp32")
        whole.denoiser  # noqa: B018 (loads)
    own = sum(value.to_local().numel() for value in cut.denoiser.parameters())  # type: ignore[attr-defined]
    every = sum(value.numel() for value in whole.denoiser.parameters())
    text = whole.encode_prompts(["a dog"])
    noisy = torch.randn(1, *whole.latent_shape, generator=torch.Generator().manual_seed(rank))
    level = whole.schedule(4)[0]
    with torch.no_grad():
        first, second = (model.predictor(text)(noisy, level).noise for model in (cut, whole))
    distance = float((first - second).abs().max())
    (folder / f"measured-{rank}.txt").write_text(f"{own / every} {distance}")


def refused(said_so: Path, expected: str, ask: Callable[[], object]) -> None:
    """Adds a line for what is refused with these words."""
    try:
        ask()
    except UserError as error:
        with said_so.open("a") as file:
            file.write(f"{expected in str(error) and 'gpus.yaml' in str(error)} {error}\n")


def apart(both: Path, file: str) -> float:
    """How far the trained tensors of the two runs are apart."""
    first, second = (read_tensors(both / count / file)[0] for count in ("one", "two"))
    assert set(first) == set(second)
    names = [name for name in first if name.startswith("parameter/")]
    assert names
    return max(float((first[name] - second[name]).abs().max()) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_is_learned_as_by_one_process(both: Path, name: str) -> None:
    distance = apart(both, f"{name}/checkpoint.safetensors")
    assert distance == 0 if name == "sd3" else distance < 1e-5  # its micro-batches are whole
    logs = [read_jsonl(both / count / name / "log.jsonl") for count in ("one", "two")]
    assert [line["step"] for line in logs[1]] == [1, 2], "one process alone writes"
    assert [line["loss"] for line in logs[1]] == pytest.approx([line["loss"] for line in logs[0]], rel=1e-5)


@pytest.mark.slow
def test_a_preference_is_learned_as_by_one_process_cached_reference_stop_resume_and_preparation_included(
    both: Path,
) -> None:
    assert apart(both, "taste/checkpoint.safetensors") < 1e-5
    assert apart(both, "prepared/checkpoint.safetensors") < 1e-5
    one, two = (read_jsonl(both / count / "taste" / "evaluations.jsonl") for count in ("one", "two"))
    assert [line["step"] for line in two] == [0, 3, 5]
    for first, second in zip(one, two, strict=True):
        assert second["held_out"]["winner_change"] == pytest.approx(
            first["held_out"]["winner_change"], abs=1e-5
        )


@pytest.mark.slow
def test_the_same_files_and_pictures_are_written(both: Path) -> None:
    def files(count: str) -> set[str]:
        return {str(path.relative_to(both / count)) for path in (both / count).rglob("*")}

    assert files("one") == files("two")
    pictures = sorted((both / "one" / "drawn").glob("*.png"))
    assert len(pictures) == 10
    for path in pictures:
        other = np.asarray(Image.open(both / "two" / "drawn" / path.name), dtype=int)
        assert np.abs(np.asarray(Image.open(path), dtype=int) - other).max() <= 1


@pytest.mark.slow
def test_each_process_holds_half_of_the_base_and_predicts_what_the_whole_does(both: Path) -> None:
    for rank in range(2):
        share, distance = map(float, (both / f"measured-{rank}.txt").read_text().split())
        assert share == pytest.approx(0.5, abs=0.02)
        assert distance < 1e-5


@pytest.mark.slow
def test_what_needs_the_whole_base_is_refused_before_anything_is_written(both: Path) -> None:
    for rank in range(2):
        lines = (both / f"refused-{rank}.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == ["True"] * (len(REFUSED) + 2), lines
    assert not list((both / "two").glob("no*"))


def test_inner_blocks_are_cut_before_the_blocks_that_hold_them() -> None:
    network = nn.Module()
    network.down_blocks = nn.ModuleList([nn.Module()])
    network.down_blocks[0].transformer_blocks = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    inner = list(network.down_blocks[0].transformer_blocks)
    assert list(shards.repeated_blocks(network)) == [*inner, network.down_blocks[0]]


def test_alone_nothing_is_cut_up(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not processes.is_sharded() and processes.is_participant()
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32", placement=Placement(offload=1.0))
    assert next(model.denoiser.parameters()).__class__ is nn.Parameter
