"""Where two prompts see a picture differently."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backbone.diffusion.noise import Estimate, Level
from backbone.models.model import Backbone
from edit.inversion.inversion import Inversion, invert
from edit.masks import SHARES, compute_difference_maps
from tests.edit.models import photo

SOURCE, TARGET = "a cat in the snow", "a red dog in a park"


@pytest.fixture(scope="module")
def inversion(kept: Backbone) -> Inversion:
    return invert(kept, photo(), SOURCE, steps=10)


def test_a_difference_is_a_share_of_its_greatest_and_the_same_both_ways(inversion: Inversion) -> None:
    found, asked = compute_difference_maps(inversion, [(SOURCE, TARGET), (TARGET, SOURCE), (SOURCE, "a cat")])
    assert found.shape == (3, *inversion.states.shape[-2:])
    assert found.min() >= 0 and torch.allclose(found.amax((1, 2)), torch.ones(3))
    assert torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])
    assert asked == len(SHARES) * 3, "every different prompt is predicted once a step"


def test_the_same_prompt_differs_nowhere(inversion: Inversion) -> None:
    found, _ = compute_difference_maps(inversion, [(SOURCE, SOURCE)])
    assert not found.any()


def test_the_place_is_where_the_predictions_differ(
    inversion: Inversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that says noise 1 in one corner for one of two prompts, 0 elsewhere."""
    size = inversion.states.shape[-1]

    def predictor(text: dict[str, Tensor]) -> object:
        def predict(noisy: Tensor, level: Level) -> Estimate:
            assert level.a.shape == (len(noisy),), "every row at its own level"
            noise = torch.zeros_like(noisy)
            noise[1::2, :, :3, :3] = 1  # every second row is the target's
            return Estimate(noisy, noise)

        return predict

    monkeypatch.setattr(inversion.model, "predictor", predictor)
    found, _ = compute_difference_maps(inversion, [(SOURCE, TARGET)])
    assert found[0, 0, 0] == 1 and not found[0, 4:].any() and not found[0, :, 4:].any() and size > 4
    assert found[0, 1, 3] == pytest.approx(1 / 3), "smoothed over 3 × 3 places"
