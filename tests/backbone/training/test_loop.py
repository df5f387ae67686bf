"""The training loop: what it minimises, what it refuses, and that resuming changes nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbone.diffusion.noise import generator
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.io.run_folder import read_steps_taken
from backbone.training.checkpoint import load_checkpoint, save_checkpoint
from backbone.training.loop import Average, NotFiniteError, Update, train
from backbone.training.optimizer import make_adamw, warm_constant, warm_cosine


class Bowl:
    """Noisy regression towards a fixed vector."""

    def __init__(self) -> None:
        self.parameters = {"w": torch.nn.Parameter(torch.zeros(3))}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1)
        self.average = Average(self.parameters, decay=0.9)

    def losses(self, step: int) -> Iterator[Tensor]:
        noise = 0.1 * torch.randn(3, generator=generator(7, step))
        yield (self.parameters["w"] - torch.tensor([1.0, -2.0, 0.5]) + noise).square().sum()

    def run(self, steps: int, done: int = 0) -> None:
        for _ in train(
            self.losses,
            self.parameters,
            optimizer=self.optimizer,
            lr_schedule=warm_cosine(60),
            steps=steps,
            done=done,
            update=Update(average=self.average),
        ):
            pass


def test_training_reaches_the_minimum() -> None:
    bowl = Bowl()
    bowl.run(60)
    assert torch.allclose(bowl.parameters["w"], torch.tensor([1.0, -2.0, 0.5]), atol=0.1)


def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    whole = Bowl()
    whole.run(40)
    first = Bowl()
    first.run(17)
    save_checkpoint(
        tmp_path / "c.safetensors",
        step=17,
        parameters=first.parameters,
        optimizer=first.optimizer,
        average=first.average,
        facts={"note": "x"},
    )
    second = Bowl()
    done, facts = load_checkpoint(
        tmp_path / "c.safetensors",
        parameters=second.parameters,
        optimizer=second.optimizer,
        average=second.average,
    )
    second.run(40, done=done)
    assert (done, facts) == (17, {"note": "x"})
    assert torch.equal(second.parameters["w"], whole.parameters["w"])
    assert torch.equal(second.average.values["w"], whole.average.values["w"])


def test_weights_in_another_memory_layout_go_on_bit_for_bit(tmp_path: Path) -> None:
    """A fused step goes by memory, so what a checkpoint restores lies as its weight does."""
    path = tmp_path / "c.safetensors"

    def stepped(steps: range) -> Tensor:
        start = torch.randn(4, 3, 3, 3, generator=generator(7, 0)).to(memory_format=torch.channels_last)
        weight = torch.nn.Parameter(start)
        optimizer = make_adamw([{"params": [weight], "lr": 0.1}], weight_decay=0.01)
        assert optimizer.defaults["fused"]
        if steps.start > 0:
            load_checkpoint(path, parameters={"w": weight}, optimizer=optimizer)
        for step in steps:
            weight.grad = torch.randn(4, 3, 3, 3, generator=generator(7, 1 + step)).to(
                memory_format=torch.channels_last
            )
            optimizer.step()
        save_checkpoint(path, step=steps.stop, parameters={"w": weight}, optimizer=optimizer)
        return weight.detach()

    whole = stepped(range(6))
    stepped(range(3))
    assert torch.equal(stepped(range(3, 6)), whole)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    bowl = Bowl()
    save_checkpoint(tmp_path / "c.safetensors", step=1, parameters=bowl.parameters, optimizer=bowl.optimizer)
    other = {"v": torch.nn.Parameter(torch.zeros(3))}
    with pytest.raises(UserError, match="another kind of run"):
        load_checkpoint(
            tmp_path / "c.safetensors", parameters=other, optimizer=torch.optim.SGD(other.values())
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors, header: tensors["parameter/w"].fill_(math.nan),
            "parameter/w holds values that are not",
        ),
        (
            lambda tensors, header: tensors["optimizer/exp_avg/w"].fill_(math.inf),
            "exp_avg/w holds values that",
        ),
        (
            lambda tensors, header: tensors.pop("optimizer/exp_avg/w"),
            "it holds other tensors than were saved",
        ),
        (lambda tensors, header: tensors.update({"parameter/w": torch.zeros(3).bfloat16()}), "other tensors"),
        (lambda tensors, header: tensors.update({"optimizer/exp_avg/w": torch.zeros(4)}), "other tensors"),
        (lambda tensors, header: header.update(step="-5"), "its step is -5"),
        (
            lambda tensors, header: header.update(optimizer="Prodigy"),
            "its optimiser is Prodigy, and AdamW is",
        ),
    ],
    ids=["nan", "moments", "missing", "bf16", "shape", "step", "optimiser"],
)
def test_a_checkpoint_that_is_not_as_it_was_saved_is_refused_before_anything_changes(
    tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], object], said: str
) -> None:
    path, first, second = tmp_path / "c.safetensors", Bowl(), Bowl()
    first.run(3)
    save_checkpoint(path, step=3, parameters=first.parameters, optimizer=first.optimizer)
    tensors, header = read_tensors(path)
    change(tensors, header)
    write_tensors(path, tensors, header)
    with pytest.raises(UserError, match=said):
        load_checkpoint(path, parameters=second.parameters, optimizer=second.optimizer)
    assert not second.parameters["w"].any() and not second.optimizer.state


@pytest.mark.parametrize("finished", [False, True])
def test_a_damaged_checkpoint_says_what_can_be_done_with_its_run(tmp_path: Path, finished: bool) -> None:
    """Nobody else has a run's own file: it cannot be downloaded again."""
    path, bowl = tmp_path / "checkpoint.safetensors", Bowl()
    bowl.run(3)
    save_checkpoint(path, step=3, parameters=bowl.parameters, optimizer=bowl.optimizer)
    if finished:
        (tmp_path / "concept.json").write_text("{}")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def refused(damaged: bytes) -> str:
        path.write_bytes(damaged)
        second = Bowl()
        with pytest.raises(UserError) as error:
            load_checkpoint(path, parameters=second.parameters, optimizer=second.optimizer)
        assert not second.parameters["w"].any() and not second.optimizer.state
        return str(error.value)

    for damaged in (
        b"",
        whole[: header // 2],
        whole[:-3],
        bytes(len(whole)),
        whole[:header] + bytes(len(whole) - header),
    ):
        said = refused(damaged)
        assert said.startswith(f"{path} is damaged: it") and "ownload" not in said
        assert "Put a copy of it back" in said
        assert (
            "give another --out" if finished else f"Or remove it: --resume {tmp_path} begins anew"
        ) in said
    for at in (header, header + 5, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        assert "its numbers are not those that were saved in it" in refused(bytes(flipped))
    for at in range(0, header, 7):  # may be refused in other words, in one sentence in any case
        flipped = bytearray(whole)
        flipped[at] ^= 4
        path.write_bytes(bytes(flipped))
        with contextlib.suppress(UserError):
            read_steps_taken(tmp_path)
            load_checkpoint(path, parameters=Bowl().parameters, optimizer=Bowl().optimizer)


class Finds(torch.optim.SGD):
    """Keeps what it finds in its groups and not in its state, as Prodigy does."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, lr=1.0)
        self.param_groups[0].update(d=1e-3, k=0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # steps without a loss
        """A step whose length grows by what it has found."""
        group = self.param_groups[0]
        group.update(d=group["d"] * 1.1, k=group["k"] + 1)
        for parameter in group["params"]:
            parameter.data.sub_(group["lr"] * group["d"] * parameter.grad)


def test_the_length_of_steps_that_an_optimiser_has_found_is_gone_on_with(tmp_path: Path) -> None:
    whole, first, second = Bowl(), Bowl(), Bowl()
    for one in (whole, first, second):
        one.optimizer = Finds(one.parameters.values())  # type: ignore[assignment]  # whichever optimiser
    whole.run(20)
    first.run(8)
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, step=8, parameters=first.parameters, optimizer=first.optimizer)
    second.optimizer.param_groups[0]["lr"] = 2.0
    done, _ = load_checkpoint(path, parameters=second.parameters, optimizer=second.optimizer)
    assert second.optimizer.param_groups[0]["lr"] == 2.0, "a rate that was said anew stays"
    second.optimizer.param_groups[0]["lr"] = 1.0
    second.run(20, done=done)
    assert torch.equal(second.parameters["w"], whole.parameters["w"])


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights() -> None:
    bowl = Bowl()
    bowl.run(3)
    before = bowl.parameters["w"].detach().clone()

    def broken(step: int) -> Iterator[Tensor]:
        yield bowl.parameters["w"].sum() * float("nan")

    with pytest.raises(NotFiniteError, match="stopped at step 1: the loss is nan"):
        next(train(broken, bowl.parameters, optimizer=bowl.optimizer, lr_schedule=warm_constant(), steps=1))
    assert torch.equal(bowl.parameters["w"], before)


def test_micro_batches_give_the_gradient_of_their_mean() -> None:
    def learned(parts: int) -> Tensor:
        parameter = torch.nn.Parameter(torch.ones(2))
        data = torch.arange(8.0).reshape(4, 2)

        def losses(step: int) -> Iterator[Tensor]:
            for chunk in data.chunk(parts):
                yield ((parameter * chunk).sum(1) ** 2).mean()

        optimizer = torch.optim.SGD([parameter], lr=1e-3)
        list(
            train(
                losses,
                {"p": parameter},
                optimizer=optimizer,
                lr_schedule=warm_constant(),
                steps=1,
                update=Update(1e9),
            )
        )
        return parameter.detach()

    assert torch.allclose(learned(1), learned(2))


def test_the_generator_depends_on_its_key_alone() -> None:
    first = torch.randn(4, generator=generator(1, "a", 2))
    assert torch.equal(first, torch.randn(4, generator=generator(1, "a", 2)))
    assert not torch.equal(first, torch.randn(4, generator=generator(1, "a", 3)))


def test_the_cosine_warms_up_and_ends_at_its_floor() -> None:
    factor = warm_cosine(100, warmup=10, floor=0.1)
    assert factor(5) == pytest.approx(0.5)
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)
