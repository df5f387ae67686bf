"""A bank of base predictions: what the untouched model says at fixed draws, computed once and read afterwards.

A draw k fixes the picture, the timestep and the noise by a counter-based seed, and the timesteps are stratified over
the draws. Prior preservation compares the adapted model with it; so does preference optimisation's reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.diffusion.noise import add_noise, generator
from backbone.families.base import Text
from backbone.io.files import content_hash
from backbone.models.cache import load_or_compute
from backbone.models.model import Backbone, Posterior


@dataclass(frozen=True)
class Bank:
    """K draws: noisy latents [K, C, H, W], indices of their levels [K], the base's raw predictions [K, C, H, W]."""

    noisy: Tensor
    level: Tensor
    prediction: Tensor

    def __len__(self) -> int:
        return len(self.level)


def bank_of(
    model: Backbone, posteriors: Sequence[Posterior], text: Text, *, draws: int, seed: int, batch: int = 8
) -> Bank:
    """Asks the base model about noised pictures under one prompt `text` [1, ...], or remembers what it said.

    Call it while no adapter is active.
    """
    means = torch.cat([posterior.mean for posterior in posteriors])
    facts = (
        model.fingerprint,
        model.dtype,
        *([model.placement.quantize] if model.placement.quantize else []),  # another base
        draws,
        seed,
        _hash(means),
        *(_hash(value) for value in text.values()),
    )
    key = content_hash("\n".join(map(str, facts)).encode())
    batch = 1 if model.placement.one_by_one else batch
    return Bank(**load_or_compute("bank", key, lambda: _ask(model, posteriors, text, draws, seed, batch)))


def stratified_levels(count: int, total: int, random: torch.Generator) -> Tensor:
    """One level index in each of `count` equal strata of 0 … total − 1, in random order [count]."""
    strata = (torch.arange(count) + torch.rand(count, generator=random)) / count
    return (strata * total).long().clamp(max=total - 1)[torch.randperm(count, generator=random)]


@torch.no_grad()
def _ask(
    model: Backbone, posteriors: Sequence[Posterior], text: Text, draws: int, seed: int, batch: int
) -> dict[str, Tensor]:
    levels = model.path.levels
    chosen = stratified_levels(draws, len(levels), generator(seed, "bank"))
    noisy, said = [], []
    for first in range(0, draws, batch):
        numbers = range(first, min(first + batch, draws))
        random = [generator(seed, "bank", k) for k in numbers]
        clean = torch.cat(
            [posteriors[k % len(posteriors)].sample(r) for k, r in zip(numbers, random, strict=True)]
        )
        noise = torch.stack([torch.randn(clean.shape[1:], generator=r) for r in random]).to(clean.device)
        index = chosen[first : first + batch]
        level = levels[index]
        x = add_noise(clean, noise, level)
        assert level.time is not None
        rows = {name: value.expand(len(x), *value.shape[1:]) for name, value in text.items()}
        network = model.family.network(model.denoiser, rows)
        noisy.append(x)
        said.append(network(x, level.time.to(x.device)).float())
    return {"noisy": torch.cat(noisy), "level": chosen, "prediction": torch.cat(said)}


def _hash(tensor: Tensor) -> str:
    return content_hash(tensor.detach().float().cpu().contiguous().numpy().tobytes())
