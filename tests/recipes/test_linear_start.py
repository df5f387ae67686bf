"""The autoencoder's linear start is the transform that it says it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from backbone.evaluation.image_metrics import psnr_8_bit
from recipes.moji.autoencoder import build
from recipes.moji.training.linear_start import begin_linear, combine_quarters, fit_components, fit_convolution

CHANNELS = 12


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Random pictures with soft and hard places, of no particular world: [48, 3, 64, 64]."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(48, 3, 8, 8, generator=random)
    fine = torch.randn(48, 3, 32, 32, generator=random)
    soft = F.interpolate(coarse, size=64, mode="bicubic") + 0.3 * F.interpolate(
        fine, size=64, mode="bilinear"
    )
    return torch.tanh(soft)


@pytest.fixture(scope="module")
def begun(pictures: Tensor) -> AutoencoderKL:
    torch.manual_seed(0)
    model = build(CHANNELS).eval()
    begin_linear(model, pictures)
    return model


def test_components_of_patches_are_uncorrelated_and_complete(pictures: Tensor) -> None:
    whole = fit_components(pictures, 4)
    found = whole.project(pictures, 48)
    rows = found.permute(0, 2, 3, 1).reshape(-1, 48)
    assert torch.allclose(rows.T @ rows / len(rows), torch.eye(48), atol=1e-2)
    assert torch.allclose(whole.reconstruct(found), pictures, atol=1e-4)


def test_a_patch_is_its_four_quarters(pictures: Tensor) -> None:
    fine, coarse = fit_components(pictures, 2), fit_components(pictures, 4)
    weight, bias = combine_quarters(fine, coarse, 20)
    merged = F.conv2d(fine.project(pictures, 12), weight, bias, stride=2)
    assert torch.allclose(merged, coarse.project(pictures, 20), atol=1e-3)


def test_a_fit_finds_the_convolution_that_is_there() -> None:
    torch.manual_seed(0)
    convolution, given = torch.nn.Conv2d(4, 6, 3, padding=1), torch.randn(8, 4, 16, 16)
    with torch.no_grad():
        weight, bias = fit_convolution(given, convolution(given))
    assert torch.allclose(weight, convolution.weight, atol=1e-2)
    assert convolution.bias is not None and torch.allclose(bias, convolution.bias, atol=1e-2)


def test_latents_begin_as_the_principal_components(begun: AutoencoderKL, pictures: Tensor) -> None:
    with torch.no_grad():
        mean = begun.encode(pictures).latent_dist.mean
    exact = fit_components(pictures, 8).project(pictures, CHANNELS)
    scale = (mean * exact).sum() / exact.square().sum()
    assert 0.9 < float(scale) < 1.1
    # The group's deviation moves a little with the picture: not to the last digit
    for channel in range(CHANNELS):
        left = mean[:, channel] - scale * exact[:, channel]
        assert float(left.square().mean() / mean[:, channel].square().mean()) < 0.01


def test_posteriors_begin_narrow(begun: AutoencoderKL, pictures: Tensor) -> None:
    with torch.no_grad():
        deviation = begun.encode(pictures).latent_dist.std
    assert float(deviation.min()) > 0.03 and float(deviation.max()) < 0.07


def test_a_round_trip_begins_near_that_of_the_linear_transform(
    begun: AutoencoderKL, pictures: Tensor
) -> None:
    with torch.no_grad():
        decoded = begun.decode(begun.encode(pictures).latent_dist.mean).sample
    whole = fit_components(pictures, 8)
    floor = psnr_8_bit(whole.reconstruct(whole.project(pictures, CHANNELS)), pictures).mean()
    assert psnr_8_bit(decoded, pictures).mean() > floor - 3


def test_every_weight_can_learn(begun: AutoencoderKL, pictures: Tensor) -> None:
    begun.zero_grad()
    decoded = begun.decode(begun.encode(pictures[:4]).latent_dist.mean).sample
    (decoded - pictures[:4]).abs().mean().backward()
    still = [
        name
        for name, value in begun.named_parameters()
        if value.grad is None or not value.grad.abs().max() > 0
    ]
    # Behind a second convolution that is zero
    assert all(".conv1." in name or ".norm" in name for name in still)
