"""Bytes of learning a motion: the step is counted as a real one computes, what learns with its optimiser's state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions
from backbone.memory.count import tensor_bytes, training_step_bytes
from backbone.memory.motion import MotionEstimator, MotionWorkload
from backbone.memory.planner import MemoryEstimator, MemorySettings
from backbone.models.clips.motion import attach_motion, find_motion, rows_as_clips
from backbone.models.model import Backbone
from tests.tiny import tiny_motion_adapter

FRAMES = 3


def whole(denoiser: nn.Module) -> Iterable[Tensor]:
    motion = find_motion(denoiser)
    assert motion is not None
    return list(cast(nn.Module, motion.adapter).requires_grad_(True).parameters())


@pytest.fixture
def estimator(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> MotionEstimator:
    monkeypatch.setattr(MemoryEstimator, "_count_autoencoder", lambda *call: 0)
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    learned = MotionWorkload(FRAMES, tiny_motion_adapter().config, whole, prior=True)
    return MotionEstimator(model, learned, device="cpu")


@pytest.mark.parametrize("again", [False, True])
def test_a_step_of_a_clip_is_counted_as_a_real_one(again: bool, estimator: MotionEstimator) -> None:
    model, network = estimator.model, estimator.model.denoiser.requires_grad_(False)
    attach_motion(network, tiny_motion_adapter())
    whole(network)
    noisy, hidden = (
        torch.randn(FRAMES, 4, 8, 8),
        torch.randn(FRAMES, *model.encode_prompts(["a"]).text["hidden"].shape[1:]),
    )
    conditions = Conditions({"hidden": hidden})

    def forward() -> Tensor:
        return model.family.network(network, conditions)(noisy, torch.full((FRAMES,), 500.0))

    with rows_as_clips(network, FRAMES):
        real = training_step_bytes(
            network, forward, device="cpu", checkpointing=again, inputs=[noisy, hidden]
        )
    assert estimator.step_bytes("fp32", again).peak == pytest.approx(real.peak, rel=0.05)


def test_what_learns_counts_with_its_optimizer_s_state(estimator: MotionEstimator) -> None:
    phases = estimator.phases(MemorySettings("fp32"))
    adapter = tensor_bytes(tiny_motion_adapter().parameters())
    assert list(phases) == ["encoding", "clips of the class", "training"]
    denoiser = tensor_bytes(estimator.model.denoiser.parameters())
    assert phases["training"].resident_bytes == denoiser + 3 * adapter
