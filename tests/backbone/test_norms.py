"""Group norms plane by plane: the same numbers, in the same layout, only where that is faster."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from backbone.families.unet.norms import PlanarGroupNorm, use_planar_norms
from backbone.models.model import Backbone

BF16 = torch.bfloat16


def maps(side: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    noise = torch.randn(2, 64, side, side, generator=torch.Generator().manual_seed(0))
    return noise.to(dtype, memory_format=torch.channels_last)


def norms(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    plain, planar = (nn.GroupNorm(32, 64, dtype=dtype) for _ in range(2))
    for norm in (plain, planar):
        norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        norm.bias.data.normal_(generator=torch.Generator().manual_seed(2))
    return plain, use_planar_norms(planar)


@pytest.mark.parametrize("side", [4, 16, 32])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_norm_plane_by_plane_has_the_outputs_the_gradients_and_the_layout_of_group_norm(
    side: int, dtype: torch.dtype
) -> None:
    results = []
    for norm in norms(dtype):
        x = maps(side, dtype).requires_grad_()
        y = norm(x)
        (gradient,) = torch.autograd.grad(y.float().pow(3).sum(), x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y.detach(), gradient))
    for plain, planar in zip(*results, strict=True):
        torch.testing.assert_close(
            planar.float(), plain.float(), rtol=0.02, atol=0.02 * plain.abs().max().item()
        )


def test_groups_of_many_channels_and_other_norms_are_left_as_they_are() -> None:
    network = nn.Sequential(nn.GroupNorm(32, 64), nn.GroupNorm(4, 64), nn.LayerNorm(8))
    assert [type(module) for module in use_planar_norms(network).children()] == [
        PlanarGroupNorm,
        nn.GroupNorm,
        nn.LayerNorm,
    ]


def test_moji_s_predictions_are_as_near_to_fp32_s_by_planar_norms_as_by_group_norms() -> None:
    full, half = (Backbone.open("moji", device="cpu", precision=precision) for precision in ("fp32", "bf16"))
    noisy = torch.randn(1, 24, 16, 16, generator=torch.Generator().manual_seed(0))
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    words = torch.zeros(1, 77, cast(Any, full.denoiser).config.cross_attention_dim)
    planar = [module for module in half.denoiser.modules() if type(module) is PlanarGroupNorm]
    assert planar

    @torch.no_grad()
    def predict(network: Any, dtype: torch.dtype) -> torch.Tensor:
        prediction: torch.Tensor = network(noisy.to(dtype), 500, words.to(dtype)).sample.float()
        return prediction

    exact = predict(full.denoiser, torch.float32)
    error = (predict(half.denoiser, BF16) - exact).norm()
    for module in planar:
        cast(Any, module).__class__ = nn.GroupNorm
    assert error < 1.1 * (predict(half.denoiser, BF16) - exact).norm() < 0.1 * exact.norm()
