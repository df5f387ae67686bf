"""The dtype in which a network takes its inputs is found without a walk over all its modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from backbone.adapters.lora import add_lora
from backbone.families.base import working_dtype


class KeptInPart(UNet2DConditionModel):  # type: ignore[misc]
    """A network whose first layers stay in fp32."""

    _keep_in_fp32_modules = ("conv_in", "time_embedding")


def network(kind: type = UNet2DConditionModel) -> Any:
    return kind(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 8), norm_num_groups=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_diffusers_says(dtype: torch.dtype) -> None:
    found = network().to(dtype)
    add_lora(found, "concept", rank=2, alpha=2, targets=("conv1", "to_q"))
    assert working_dtype(found) == found.dtype == dtype


def test_layers_that_are_kept_in_fp32_do_not_count() -> None:
    found = network(KeptInPart).to(torch.bfloat16)
    found.conv_in.float()
    assert working_dtype(found) == found.dtype == torch.bfloat16


def test_weights_that_are_stored_in_a_byte_are_not_what_is_computed_in() -> None:
    found = network()
    found.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert working_dtype(found) == found.dtype == torch.bfloat16
