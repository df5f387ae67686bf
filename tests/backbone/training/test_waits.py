"""No step of a training makes the processor wait for the device, and what is not finite still reaches no weight.

On this machine the device is the processor: `tests.syncs` marks what would lie on a GPU, and `fused` AdamW, which can
leave out an update by a flag, is asked for as a GPU would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from backbone.diffusion.transfer import send
from backbone.training.loop import Monitor, NotFiniteError, train
from backbone.training.optimizer import warm_constant
from backbone.training.run import take_steps
from customize.objectives.dreambooth import DreamBooth
from tests.customize.test_methods import begun, fresh
from tests.customize.test_methods import settings as concept_settings
from tests.syncs import HostSyncs, count_waits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "textual-inversion"},
        pytest.param({"method": "pivotal"}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2, "loss_weighting": "min-snr", "noise_offset": 0.1, "flip": True},
        pytest.param(
            {"prior": "class-images", "num_class_images": 2, "guidance": 1.0, "lora_dropout": 0.1},
            marks=pytest.mark.slow,
        ),
        pytest.param({"mask": "auto"}, marks=pytest.mark.slow),
    ],
    ids=["lora", "word", "pivotal", "accumulated", "class images", "mask"],
)
def test_no_step_of_customize_waits_for_the_device(
    tiny_folder: Path, subject: Path, changes: dict[str, Any]
) -> None:
    model = fresh(tiny_folder)
    training, _ = begun(model, subject, concept_settings(subject, steps=8, **changes))
    assert count_waits(training, model) == []


def test_a_plain_copy_in_a_step_is_found(
    tiny_folder: Path, subject: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backbone.data.prefetch.send", lambda tensor, device: tensor.to(device))
    model = fresh(tiny_folder)
    training, _ = begun(model, subject, concept_settings(subject, steps=8))
    found = count_waits(training, model)
    assert found and all(line.startswith(".to(device)") for line in found)


def test_the_instrument_sees_what_waits() -> None:
    weight, host = torch.ones(3), torch.arange(3)
    waiting: dict[str, Callable[[], object]] = {
        ".item()": lambda: weight.sum().item(),
        ".tolist()": lambda: (weight * 2).tolist(),
        ".__bool__()": lambda: bool((weight > 0).all()),
        ".__float__()": lambda: float(weight.mean()),
        ".cpu()": lambda: (weight + 1).cpu(),
        "aten::nonzero": lambda: (weight > 0).nonzero(),
        "aten::index by a mask": lambda: weight[weight > 0],
        ".to(device)": lambda: host.to(weight.device),
        "aten::mul of both memories": lambda: weight * host,
    }
    for what, act in waiting.items():
        with HostSyncs() as waits:
            waits.own(weight)
            act()
        assert [line.partition(" at ")[0] for line in waits.found] == [what]
    with HostSyncs() as waits:
        waits.own(weight)
        weight[send(host, weight.device)].where(weight > 0, weight).sum()
        assert host.tolist() == [0, 1, 2] and bool((host >= 0).all())
    assert waits.found == []


def test_an_update_that_is_not_finite_leaves_weights_moments_and_count_as_they_are() -> None:
    def losses(step: int) -> Iterator[Tensor]:
        yield (parameter - 3).square().sum() * (float("nan") if step >= 4 else 1.0)

    def begin() -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
        parameter = torch.nn.Parameter(torch.zeros(5))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)

    parameter, optimizer = begin()
    how: dict[str, Any] = {"lr_schedule": warm_constant()}
    list(train(losses, {"w": parameter}, optimizer=optimizer, steps=3, **how))
    expected = [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
    parameter, optimizer = begin()
    told = Monitor(explain=lambda step: f"picture {step} is.", read_every=10)
    taken = train(losses, {"w": parameter}, optimizer=optimizer, steps=20, monitor=told, **how)
    assert [next(taken).step for _ in range(9)] == list(range(1, 10))
    with pytest.raises(NotFiniteError, match=r"stopped at step 4: picture 4 is\."):
        next(taken)  # the tenth, with which all are read
    found = [parameter.detach(), *optimizer.state[parameter].values()]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(cast(Tensor, one), cast(Tensor, other))


def test_whoever_looks_earlier_is_told_earlier() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))

    def losses(step: int) -> Iterator[Tensor]:
        yield parameter.sum() * (float("inf") if step == 2 else 1.0)

    optimizer = torch.optim.AdamW([parameter], fused=True)
    taken = train(
        losses,
        {"w": parameter},
        optimizer=optimizer,
        lr_schedule=warm_constant(),
        steps=9,
        monitor=Monitor(read_every=9),
    )
    first = next(taken)
    assert not first.is_read and first.loss == 0 and first.is_read
    with pytest.raises(NotFiniteError, match="step 2"):
        _ = next(taken).gradient_norm


@pytest.mark.parametrize("every", [1, 3])
def test_steps_read_together_log_what_steps_read_alone_do(
    tiny_folder: Path, subject: Path, every: int
) -> None:
    training, _ = begun(fresh(tiny_folder), subject, concept_settings(subject, steps=5))
    training.optimizer = torch.optim.AdamW(training.parameters.values(), lr=1e-2, fused=True)
    logged = [
        (step.step, step.loss, step.gradient_norm) for step in list(take_steps(training, read_every=every))
    ]
    other, _ = begun(fresh(tiny_folder), subject, concept_settings(subject, steps=5))
    other.optimizer = torch.optim.AdamW(other.parameters.values(), lr=1e-2, fused=True)
    assert logged == [(step.step, step.loss, step.gradient_norm) for step in take_steps(other)]
    assert isinstance(training, DreamBooth)
    for name, value in training.parameters.items():
        assert torch.equal(value, other.parameters[name])
