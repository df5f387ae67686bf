"""Contexts that change how attention is computed leave nothing behind."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward


def said(model: Backbone) -> Tensor:
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *model.latent_shape, generator=random)
    text = Conditions({"hidden": torch.randn(2, 77, 16, generator=random)})
    with torch.no_grad():
        return model.family.network(model.denoiser, text)(noisy, torch.tensor([10, 500]))


def test_attention_for_training_predicts_the_same_and_is_put_back(tiny: Backbone) -> None:
    denoiser = cast(Any, tiny.denoiser)
    before, prediction = dict(denoiser.attn_processors), said(tiny)
    with fast_attention_backward(tiny.denoiser):
        assert {type(p).__name__ for p in denoiser.attn_processors.values()} == {"AttnProcessor"}
        assert torch.allclose(said(tiny), prediction, atol=1e-5)
    assert denoiser.attn_processors == before
    assert torch.equal(said(tiny), prediction)


def test_it_is_put_back_after_an_error(tiny: Backbone) -> None:
    before = dict(cast(Any, tiny.denoiser).attn_processors)
    with pytest.raises(RuntimeError), fast_attention_backward(tiny.denoiser):
        raise RuntimeError
    assert cast(Any, tiny.denoiser).attn_processors == before
