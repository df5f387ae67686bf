"""Networks without weights: shapes as ever, nothing drawn, and afterwards layers begin as torch has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backbone.families.components.empty import without_weights


def make() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2), nn.LayerNorm(2), nn.Embedding(5, 2)
    )


def test_a_network_without_weights_has_their_shapes_and_takes_those_of_a_file() -> None:
    whole = make()
    with without_weights():
        empty = make()
    assert all(value.is_meta for value in empty.parameters())
    shapes = [(name, value.shape) for name, value in whole.named_parameters()]
    assert [(name, value.shape) for name, value in empty.named_parameters()] == shapes
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert all(torch.equal(value, empty.state_dict()[name]) for name, value in whole.state_dict().items())


def test_no_number_is_drawn_and_layers_begin_as_ever_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    expected = make().state_dict()
    torch.manual_seed(0)
    try:
        with without_weights(), monkeypatch.context() as patch:
            patch.setattr(nn.init, "kaiming_uniform_", lambda *given, **named: pytest.fail("drawn"))
            make()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        found = make().state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
