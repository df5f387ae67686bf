"""The other ways to compute a LoRA's layers have peft's outputs and gradients, so that their times may be compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backbone.adapters.lora import add_lora
from benchmarks.speed.lora import WAYS, Forward, format_row, make_acts, use_forward


@pytest.mark.parametrize("forward", WAYS.values(), ids=WAYS)
def test_a_layer_has_the_outputs_and_gradients_of_peft(forward: Forward) -> None:
    torch.manual_seed(0)
    network = nn.ModuleDict({"layer": nn.Linear(6, 5)}).requires_grad_(False)
    learned = list(add_lora(network, "a", rank=2, alpha=3.0, targets=["layer"]).values())
    for value in learned:
        value.data.normal_()
    x = torch.randn(2, 7, 6, requires_grad=True)

    def pass_through() -> list[torch.Tensor]:
        y = network["layer"](x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *learned])]

    plain = pass_through()
    with use_forward(network, forward):
        found = pass_through()
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(plain, pass_through(), strict=True))


def test_a_row_has_the_medians_of_the_turns() -> None:
    seconds = {"peft": [2.0, 4.0, 6.0], "addmm": [1.0, 4.0, 12.0], "merged": [4.0, 8.0, 12.0]}
    assert list(make_acts(nn.ModuleList(), lambda: None)) == list(seconds)
    assert format_row("a layer", seconds) == "| a layer | 4000.00 | 1.00× | 0.50× |"
