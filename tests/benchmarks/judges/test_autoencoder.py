"""The autoencoder's judge: how much of a latent its neighbours explain."""

from __future__ import annotations

import torch

from benchmarks.judges.autoencoder import measure_predictability


def test_neighbours_explain_flat_latents_and_nothing_of_noise() -> None:
    random = torch.Generator().manual_seed(0)
    flat = torch.randn(60, 2, 1, 1, generator=random).expand(-1, -1, 8, 8)
    noise = torch.randn(60, 2, 8, 8, generator=random)
    assert measure_predictability(flat) > 0.99
    assert abs(measure_predictability(noise)) < 0.1
