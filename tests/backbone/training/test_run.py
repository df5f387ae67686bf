"""What surrounds the loop: the log, checkpoints, validation, early stopping, and a clean end."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backbone.diffusion.noise import generator
from backbone.io.console import UserError
from backbone.io.files import read_json, read_jsonl, write_json
from backbone.io.run_folder import CHECKPOINT, catch_interrupts
from backbone.training.run import LOG, Every, Objective, drive, take_steps


@dataclass(frozen=True)
class Settings:
    steps: int = 6
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 2
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 4


class Nearest(Objective):
    """A point that learns to lie near random ones."""

    def __init__(self, settings: Settings = Settings()) -> None:
        self.settings = settings
        point = torch.ones(3, requires_grad=True)
        self.parameters: dict[str, Tensor] = {"point": point}
        self.optimizer = torch.optim.AdamW([point], lr=0.1)
        self.figures: dict[str, float] = {}
        self.interrupts_at = 0

    @property
    def images(self) -> int:
        return 2

    def losses(self, step: int) -> Iterator[Tensor]:
        if step == self.interrupts_at:
            signal.raise_signal(signal.SIGTERM)
        wanted = torch.randn(3, generator=generator(0, step))
        self.figures = {"distance": float(step)}
        yield (self.parameters["point"] - wanted).square().mean()

    def learning(self) -> AbstractContextManager[None]:
        return nullcontext()

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        return {}


def test_every_step_is_logged_with_its_figures(tmp_path: Path) -> None:
    assert not drive(Nearest(), tmp_path, command="learn")
    lines = read_jsonl(tmp_path / LOG)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["distance"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_a_signal_ends_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = Nearest(), Nearest(), Nearest()
    drive(whole, tmp_path / "whole", command="learn")
    first.interrupts_at = 3
    with pytest.raises(KeyboardInterrupt, match=r"step 3 of 6.*learn --resume"):
        drive(first, tmp_path / "broken", command="learn")
    second.resume(tmp_path / "broken")
    assert second.done == 3
    drive(second, tmp_path / "broken", command="learn")
    assert torch.equal(second.parameters["point"], whole.parameters["point"])
    assert [line["step"] for line in read_jsonl(tmp_path / "broken" / LOG)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("moved", [False, True])
def test_a_folder_that_goes_away_while_a_run_trains_is_a_run_again(
    tmp_path: Path, moved: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run, training = tmp_path / "run", Nearest(Settings(checkpointing_steps=1))
    write_json(run / "settings.json", {"command": "learn"})

    def goes_away(step: int) -> str:
        if step == 3:
            run.rename(tmp_path / "elsewhere") if moved else shutil.rmtree(run)
        return ""

    drive(training, run, command="learn", validate=Every(1, goes_away))
    assert read_json(run / "settings.json") == {"command": "learn"}
    assert capsys.readouterr().err.count("was moved or removed during training") == 1
    again = Nearest()
    again.resume(run)
    assert again.done == 6


class InRounds(Nearest):
    """One whose state within a round of three steps is not kept."""

    def save(self, run: Path) -> None:
        if self.done % 3 == 0:
            super().save(run)


@pytest.mark.parametrize(
    ("at", "said"), [(2, "nothing is saved"), (3, "saved at step 3"), (5, "step 3 is what was saved")]
)
def test_what_stops_within_a_round_says_from_where_it_goes_on(tmp_path: Path, at: int, said: str) -> None:
    training = InRounds(Settings(checkpointing_steps=1))
    training.interrupts_at = at
    with pytest.raises(KeyboardInterrupt, match=said):
        drive(training, tmp_path, command="learn")
    again = InRounds()
    again.resume(tmp_path)
    assert again.done == again.saved == at // 3 * 3


def test_a_kill_costs_the_steps_since_the_last_checkpoint_alone(tmp_path: Path) -> None:
    whole, first, second = Nearest(), Nearest(), Nearest()
    drive(whole, tmp_path / "whole", command="learn")

    def killed(step: int) -> str:
        if step == 5:
            raise RuntimeError("killed")
        return ""

    with pytest.raises(RuntimeError, match="killed"):
        drive(first, tmp_path / "broken", command="learn", validate=Every(1, killed))
    second.resume(tmp_path / "broken")
    assert second.done == 4
    drive(second, tmp_path / "broken", command="learn")
    assert torch.equal(second.parameters["point"], whole.parameters["point"])
    assert [line["step"] for line in read_jsonl(tmp_path / "broken" / LOG)] == [1, 2, 3, 4, 5, 6]


class Exploding(Nearest):
    """The same, whose loss is not finite from a step on."""

    def losses(self, step: int) -> Iterator[Tensor]:
        for loss in super().losses(step):
            yield loss * (float("inf") if step >= self.explodes_at else 1.0)

    explodes_at = 2


def test_a_loss_that_is_not_finite_promises_only_what_was_saved(tmp_path: Path) -> None:
    objective = Exploding()
    with pytest.raises(UserError, match="No step was saved yet, so the folder can be used again"):
        drive(objective, tmp_path / "early", command="learn")
    late = Exploding()
    late.explodes_at = 5
    with pytest.raises(UserError, match=r"checkpoint\.safetensors holds the finite weights of step 4"):
        drive(late, tmp_path / "late", command="learn")


def test_a_bound_of_zero_on_gradients_is_none(tmp_path: Path) -> None:
    free, wide, cut = (Nearest(Settings(max_grad_norm=bound)) for bound in (0.0, 1e9, 1e-9))
    for name, objective in (("free", free), ("wide", wide), ("cut", cut)):
        drive(objective, tmp_path / name, command="learn")
    assert torch.equal(free.parameters["point"], wide.parameters["point"])
    assert not torch.equal(free.parameters["point"], torch.ones(3))
    norms = [line["gradient_norm"] for line in read_jsonl(tmp_path / "free" / LOG)]
    assert all(norm > 0 for norm in norms)


def test_a_warm_up_longer_than_the_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drive(Nearest(Settings(lr_warmup_steps=100_000)), tmp_path, command="learn")
    said = "The warm-up takes 100000 steps and the run 6: the learning rate reaches 6e-05"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("pool", "said"), [(2, True), (3, False), (0, False)])
def test_a_batch_far_beyond_what_there_is_is_said(
    pool: int, said: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nearest, "images", 48)
    objective = Nearest()
    objective.pool = pool
    list(take_steps(objective))
    assert ("48 images, and there are 2 images: each is in it 24 times" in capsys.readouterr().err) == said


@pytest.mark.parametrize(("every", "expected"), [(4, [0, 4, 6]), (0, [0, 6]), (3, [0, 3, 6])])
def test_validation_comes_first_at_its_steps_and_last(
    tmp_path: Path, every: int, expected: list[int]
) -> None:
    seen: list[int] = []

    def validate(step: int) -> str:
        seen.append(step)
        return ""

    drive(Nearest(), tmp_path, command="learn", validate=Every(every, validate))
    assert seen == expected


def test_a_reason_stops_the_run_early_and_saves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Nearest()
    stopped = drive(
        objective, tmp_path, command="learn", validate=Every(1, lambda step: "enough." if step == 2 else "")
    )
    assert stopped and objective.done == 2
    assert (tmp_path / CHECKPOINT).is_file()
    assert "step 2: enough." in capsys.readouterr().err
    again = Nearest()
    again.resume(tmp_path)
    assert drive(again, tmp_path, command="learn", validate=Every(1, lambda step: "enough."))
    assert again.done == 2  # where it stopped it stops again


def test_previews_come_between_the_ends(tmp_path: Path) -> None:
    seen: list[int] = []
    drive(Nearest(), tmp_path, command="learn", preview=Every(2, seen.append))
    assert seen == [2, 4]


def test_rounds_are_driven_one_after_the_other(tmp_path: Path) -> None:
    whole, parts = Nearest(), Nearest()
    drive(whole, tmp_path / "whole", command="learn")
    for end in (2, 6):
        drive(parts, tmp_path / "parts", command="learn", until=end)
    assert torch.equal(whole.parameters["point"], parts.parameters["point"])
    assert len(read_jsonl(tmp_path / "parts" / LOG)) == 6


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal")
def test_a_terminal_that_is_closed_stops_a_run_as_ctrl_c_does_unless_nohup_is_there() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with catch_interrupts() as caught:
            signal.raise_signal(signal.SIGHUP)
            assert caught
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with catch_interrupts() as caught:
            signal.raise_signal(signal.SIGHUP)
            assert not caught
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_inside_two_contexts_is_seen_by_both() -> None:
    with catch_interrupts() as outer:
        with catch_interrupts() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner
        assert outer


@pytest.mark.parametrize("changed", ["model", "images"])
def test_a_run_goes_on_with_the_same_sources_alone(tmp_path: Path, changed: str) -> None:
    first = Nearest()
    first.sources = {"model": "m", "images": "i"}
    first.save(tmp_path)
    again = Nearest()
    again.sources = {"model": "m", "images": "i"}
    again.resume(tmp_path)
    other = Nearest()
    other.sources = {"model": "m", "images": "i"} | {changed: "another"}
    with pytest.raises(UserError, match=f"another {changed} than there is now"):
        other.resume(tmp_path)


def test_settings_that_somebody_has_changed_since_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Nearest()
    first.done = 3
    first.save(tmp_path)
    Nearest(Settings(steps=9)).resume(tmp_path)  # --steps beside --resume
    assert not capsys.readouterr().err
    Nearest(Settings(lr_scheduler="constant", max_grad_norm=0.5)).resume(tmp_path)
    assert capsys.readouterr().err.endswith(
        "was trained up to step 3 with other settings: lr_scheduler was cosine and is constant; "
        "max_grad_norm was 1.0 and is 0.5. It goes on with the new ones.\n"
    )


def test_another_limner_json_of_the_model_than_a_run_began_with_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Nearest()
    vars(first)["model"] = SimpleNamespace(defaults={"steps": 9, "sampler": "ddim"})
    first.done = 3
    first.save(tmp_path)
    again = Nearest()
    vars(again)["model"] = SimpleNamespace(
        defaults={"steps": 4, "sampler": "ddim"}
    )  # the run has its own steps
    again.resume(tmp_path)
    assert not capsys.readouterr().err
    vars(again)["model"] = SimpleNamespace(defaults={"sampler": "ancestral", "guidance_stop": 0.6})
    again.resume(tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "limner.json has changed since step 3" in said
    assert "sampler was ddim and is ancestral; guidance_stop was None and is 0.6." in said


def test_a_checkpoint_of_other_shapes_is_refused_before_anything_changes(tmp_path: Path) -> None:
    Nearest().save(tmp_path)
    other = Nearest()
    other.parameters = {"point": torch.ones(4, requires_grad=True)}
    with pytest.raises(UserError, match=r"point is \(3,\), and \(4,\) is wanted"):
        other.resume(tmp_path)
    assert torch.equal(other.parameters["point"], torch.ones(4))


@pytest.fixture
def read_in_fours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a step is not read before others are taken."""
    monkeypatch.setattr("backbone.training.loop.choose_read_every", lambda parameters: 4)


def fused(objective: Nearest) -> Nearest:
    objective.optimizer = torch.optim.AdamW(objective.parameters.values(), lr=0.1, fused=True)
    return objective


@pytest.mark.usefixtures("read_in_fours")
def test_steps_that_are_read_together_are_logged_one_by_one_before_anything_is_due(tmp_path: Path) -> None:
    training = fused(Nearest(Settings(checkpointing_steps=100)))
    seen: list[int] = []

    def validate(step: int) -> str:
        seen.append(len(read_jsonl(tmp_path / LOG)) if step else 0)
        return ""

    drive(training, tmp_path, command="learn", validate=Every(3, validate))
    lines = read_jsonl(tmp_path / LOG)
    assert [(line["step"], line["distance"]) for line in lines] == [(n, float(n)) for n in range(1, 7)]
    assert seen == [0, 3, 6] and all(line["seconds"] > 0 for line in lines)


@pytest.mark.usefixtures("read_in_fours")
def test_what_was_not_finite_between_two_reads_is_named_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    late = Exploding(Settings(steps=20, checkpointing_steps=4))
    late.explodes_at = 6
    fused(late)
    with pytest.raises(UserError, match=r"stopped at step 6: .*holds the finite weights of step 4"):
        drive(late, tmp_path, command="learn")
    assert late.parameters["point"].isfinite().all()
    assert [line["step"] for line in read_jsonl(tmp_path / LOG)] == [1, 2, 3, 4]


@pytest.mark.usefixtures("read_in_fours")
def test_a_signal_between_two_reads_stops_at_the_step_that_was_taken(tmp_path: Path) -> None:
    whole, first, second = (fused(Nearest()) for _ in range(3))
    drive(whole, tmp_path / "whole", command="learn")
    first.interrupts_at = 3
    with pytest.raises(KeyboardInterrupt, match="step 3 of 6"):
        drive(first, tmp_path / "broken", command="learn")
    second.resume(tmp_path / "broken")
    drive(second, tmp_path / "broken", command="learn")
    assert torch.equal(second.parameters["point"], whole.parameters["point"])
