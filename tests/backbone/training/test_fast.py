"""Steps are fast and the same, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from backbone.adapters.lora import AdapterKind, add_lora
from backbone.training.fast import fast_steps, uncast_inputs


@pytest.fixture(params=["lora", "dora", "loha"])
def adapted(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor]]:
    """A network in half precision with an adapter that changes it."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 8), norm_num_groups=2,
        cross_attention_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).bfloat16()  # fmt: skip
    kind = AdapterKind(request.param)
    values = add_lora(network, "concept", rank=2, alpha=2, targets=("conv1", "to_q", "ff.net.2"), kind=kind)
    for value in values.values():
        torch.nn.init.normal_(value, std=0.2)
    return network, values


def test_autocast_alone_casts_the_inputs_of_a_lora_to_the_same_bits(
    adapted: tuple[Any, dict[str, Tensor]],
) -> None:
    network, values = adapted

    def stepped() -> list[Tensor]:
        random = torch.Generator().manual_seed(1)
        noisy, text = torch.randn(2, 2, 8, 8, generator=random), torch.randn(2, 3, 8, generator=random)
        with torch.autocast("cpu", torch.bfloat16):
            said = network(noisy.bfloat16(), torch.tensor(7), text.bfloat16()).sample
        return [said.detach(), *torch.autograd.grad(said.float().square().sum(), list(values.values()))]

    before = stepped()
    with uncast_inputs(network):
        inside = stepped()
    assert all(torch.equal(some, other) for some, other in zip(before, inside, strict=True))
    with fast_steps(network):
        assert any(layer.cast_input_dtype_enabled for layer in layers_of(network)) != plain(network)
    assert all(layer.cast_input_dtype_enabled for layer in layers_of(network))


def layers_of(network: Any) -> list[Any]:
    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]


def plain(network: Any) -> bool:
    """Whether the adapter is a LoRA and no variant of one."""
    return all(getattr(layer, "lora_variant", True) == {} for layer in layers_of(network))
