"""Gradients in fp16: small ones are not lost, large ones do not stop a run, and a resumed run has the same scale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbone.models.model import Backbone
from backbone.training.loop import NotFiniteError, Update, train
from backbone.training.loss_scale import MOST, LossScale, make_loss_scale
from backbone.training.run import take_steps
from customize.objectives.dreambooth import DreamBooth
from edit.inversion.null_text import compute_gradient
from tests.customize.objectives.test_dreambooth import dataset, settings


class Half(torch.autograd.Function):
    """A weight as a network in fp16 reads it, whose gradient fp16 holds."""

    @staticmethod
    def forward(context: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.half().float()


def as_half(weight: Tensor) -> Tensor:
    """The weight, of which a gradient comes back through fp16."""
    read: Any = Half
    return read.apply(weight)  # type: ignore[no-any-return]


def learned(slopes: list[float], scale: LossScale | None) -> tuple[Tensor, list[float]]:
    """The weight [], from 0, after a step of SGD down each slope; and the norms of the gradients."""
    weight = torch.nn.Parameter(torch.zeros(()))

    def losses(step: int) -> Iterator[Tensor]:
        for _ in range(2):
            yield slopes[step - 1] * as_half(weight)

    steps = train(
        losses,
        {"weight": weight},
        optimizer=torch.optim.SGD([weight], lr=1.0),
        lr_schedule=lambda step: 1.0,
        steps=len(slopes),
        update=Update(0.0, scale=scale),
    )
    norms = [step.gradient_norm for step in steps]
    return weight.detach(), norms


def test_a_gradient_that_fp16_has_no_number_for_is_learned_from() -> None:
    assert learned([1e-8], None)[0] == 0
    weight, norms = learned([1e-8], LossScale())
    torch.testing.assert_close(weight, torch.tensor(-1e-8), atol=0, rtol=2e-3)
    assert norms == [pytest.approx(1e-8, rel=2e-3)]


def test_a_gradient_that_overflows_by_the_scale_is_computed_with_a_lower_one_and_no_step_is_lost() -> None:
    scale = LossScale()
    weight, norms = learned([1.0, 100.0, 1.0], scale)
    torch.testing.assert_close(weight, torch.tensor(-102.0), atol=0, rtol=1e-3)
    assert norms[1] == pytest.approx(100, rel=1e-3) and scale.value == MOST / 4**4
    scale.end_step(999)
    assert scale.value == MOST / 4**4
    scale.end_step(1000)
    assert scale.value == MOST / 4**3


def test_a_gradient_that_is_not_finite_at_any_scale_stops_the_run() -> None:
    with pytest.raises(NotFiniteError, match="step 2"):
        learned([1.0, float("inf")], LossScale())
    with pytest.raises(NotFiniteError, match="step 1"):
        learned([1e6], LossScale())


def test_null_text_inversion_has_the_gradient_of_a_small_error() -> None:
    trained = torch.zeros(3, requires_grad=True)
    for slope, scale in ((1e-8, LossScale()), (1e4, LossScale()), (3.0, None)):
        compute_gradient(slope * as_half(trained).sum(), trained, scale)
        assert trained.grad is not None
        torch.testing.assert_close(trained.grad, torch.full((3,), slope), atol=0, rtol=2e-3)


def test_only_fp16_has_a_scale_and_a_checkpoint_holds_it(
    tiny_folder: Path, subject: Path, tmp_path: Path
) -> None:
    assert make_loss_scale(torch.bfloat16) is None and make_loss_scale(torch.float32) is None

    def make() -> DreamBooth:
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp16")
        asked = settings(subject, steps=2, precision="fp16")
        return DreamBooth(model, dataset(model, subject, asked), asked)

    training = make()
    for step in take_steps(training, until=1):
        assert step.gradient_norm > 0
    assert training.loss_scale is not None and training.loss_scale.value == MOST
    training.loss_scale.lower()
    training.save(tmp_path)
    resumed = make()
    resumed.resume(tmp_path)
    assert resumed.loss_scale is not None and resumed.loss_scale.value == MOST / 4
    list(take_steps(resumed))
    assert resumed.done == 2
