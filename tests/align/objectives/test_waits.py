"""No step of `align` makes the processor wait for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.objectives.draft import RewardGradients
from align.objectives.reference import CachedReference
from backbone.io.prompts import Prompt
from backbone.models.model import Backbone
from tests.align.objectives.test_preference import training as preference_training
from tests.align.objectives.test_reward import brightness
from tests.align.objectives.test_reward import settings as reward_settings
from tests.syncs import count_waits


@pytest.mark.parametrize(
    "changes",
    [
        {"draws": 4},  # every sample is new: the reference is evaluated
        pytest.param({"draws": 1}, marks=pytest.mark.slow),  # every sample was seen
        {"loss": "kto", "micro_batch": 1},
        pytest.param({"loss": "dspo", "reference": "live"}, marks=pytest.mark.slow),
        pytest.param({"prompt_dropout": 0.5, "flip": True, "safeguard": 0.5}, marks=pytest.mark.slow),
    ],
    ids=["each once", "again", "kto", "dspo", "dropout"],
)
def test_no_step_of_align_waits_for_the_device(
    tiny_folder: Path, pairs_file: Path, changes: dict[str, Any]
) -> None:
    training = preference_training(tiny_folder, pairs_file, steps=8, batch=2, **changes)
    assert count_waits(training, training.model) == []
    if isinstance(training.reference, CachedReference):
        assert training.reference.filled > 0


@pytest.mark.slow
def test_no_step_through_a_reward_waits_for_the_device(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.objectives.draft.open_reward", lambda name: brightness)
    training = RewardGradients(tiny, [Prompt("a red dog"), Prompt("a cat")], reward_settings())
    assert count_waits(training, tiny, training.conditions.tensors(), tiny.autoencoder) == []
