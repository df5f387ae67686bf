"""The parts of the autoencoder's training that no picture would show to be wrong."""

from __future__ import annotations

import numpy as np
import torch

from recipes.moji.autoencoder import SCALING_FACTOR, build, fold_scaling, sample_crops, sample_noise
from recipes.moji.data.pictures import SHARD


def test_noise_lies_on_a_share_of_the_latents_and_is_never_louder_than_asked() -> None:
    latents = torch.randn(400, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[:, 1] *= 5
    noise = sample_noise(latents, 0.2, 0.25, torch.Generator().manual_seed(1))
    noisy = noise.flatten(1).abs().sum(1) > 0
    assert 0.18 < float(noisy.float().mean()) < 0.32
    loudness = (noise[noisy] / latents.std((0, 2, 3), keepdim=True)).std((2, 3))
    assert float(loudness.mean()) < 0.13 and float(loudness.max()) < 0.3
    # Of each channel's deviation
    assert torch.allclose(loudness[:, 0].mean(), loudness[:, 1].mean(), atol=0.01)


def test_scaled_latents_have_deviation_one_and_decode_to_the_same_picture() -> None:
    torch.manual_seed(0)
    model = build(4).eval()
    pictures = torch.rand(6, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = model.encode(pictures).latent_dist
        decoded = model.decode(before.mean).sample
        fold_scaling(model, before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3)))
        after = model.encode(pictures).latent_dist
        assert torch.allclose(model.decode(after.mean).sample, decoded, atol=1e-4)
    latents = after.mean * SCALING_FACTOR
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    ratio = before.std / before.mean.std((0, 2, 3), keepdim=True)
    assert torch.allclose(after.std * SCALING_FACTOR, ratio, rtol=1e-3)


def test_crops_are_a_function_of_their_generator_and_of_the_asked_size() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    shards = [np.broadcast_to(picture, (SHARD, *picture.shape))]
    first, second = (
        sample_crops(np.random.default_rng(5), shards, shards, batch=3, crop=16, texture_share=0.5)
        for _ in range(2)
    )
    assert first.shape == (3, 3, 16, 16) and torch.equal(first, second)
    assert float(first.min()) >= -1 and float(first.max()) <= 1
