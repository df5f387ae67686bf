"""Cached base predictions: those of the frozen base model for fixed noise samples, computed once and reused.

Noise sample k fixes the image, the timestep and the noise by a counter-based seed; the timesteps are stratified over
the samples. Prior preservation regularises the adapted model towards these predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import add_noise, generator
from backbone.io.files import content_hash
from backbone.io.progress import progress
from backbone.models.cache import load_or_compute
from backbone.models.model import Backbone, Posterior


@dataclass(frozen=True)
class BasePredictions:
    """K noise samples and the base's predictions for them.

    noisy       latents [K, …]
    level       indices of their noise levels [K]
    prediction  the base's raw predictions [K, …]
    """

    noisy: Tensor
    level: Tensor
    prediction: Tensor

    def __len__(self) -> int:
        return len(self.level)

    @staticmethod
    def cat(parts: Sequence[BasePredictions]) -> BasePredictions:
        """All parts, concatenated."""
        return BasePredictions(
            torch.cat([part.noisy for part in parts]),
            torch.cat([part.level for part in parts]),
            torch.cat([part.prediction for part in parts]),
        )


def base_predictions(
    model: Backbone,
    posteriors: Sequence[Posterior],
    conditions: Conditions,
    *,
    count: int,
    seed: int,
    batch: int = 8,
) -> BasePredictions:
    """The base model's predictions for `count` noised images under one prompt `conditions` [1], cached on disk.

    Call it while no adapter is active.
    """
    means = torch.cat([posterior.mean for posterior in posteriors])
    facts = (
        model.fingerprint,
        model.dtype,
        *model.placement.rounding,
        count,
        seed,
        _hash(means),
        *(_hash(value) for value in conditions.tensors()),
    )
    key = content_hash("\n".join(map(str, facts)).encode())
    batch = 1 if model.placement.one_by_one else batch
    return BasePredictions(
        **load_or_compute(
            "base-predictions", key, lambda: _predict(model, posteriors, conditions, count, seed, batch)
        )
    )


def draw_stratified_levels(
    count: int, total: int, random: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """One level index in each of `count` equal strata of 0 … total − 1, in random order [count].

    With `weights` [total] the strata are of equal weight.
    """
    strata = (torch.arange(count) + torch.rand(count, generator=random)) / count
    if weights is None:
        levels = (strata * total).long()
    else:
        cumulative = weights.double().cumsum(0)
        levels = torch.searchsorted(cumulative, strata.double() * cumulative[-1], right=True)
    return levels.clamp(max=total - 1)[torch.randperm(count, generator=random)]


@torch.no_grad()
def _predict(
    model: Backbone,
    posteriors: Sequence[Posterior],
    conditions: Conditions,
    count: int,
    seed: int,
    batch: int,
) -> dict[str, Tensor]:
    levels = model.path.levels
    index = draw_stratified_levels(count, len(levels), generator(seed, "bank"))
    noisy, predictions = [], []
    with progress(count, "the base's predictions", brief=True) as bar:
        for first in range(0, count, batch):
            numbers = range(first, min(first + batch, count))
            # sample k has its own generator, so that its latents and noise do not depend on the batch
            random = [generator(seed, "bank", k) for k in numbers]
            clean = torch.cat(
                [posteriors[k % len(posteriors)].sample(r) for k, r in zip(numbers, random, strict=True)]
            )
            noise = torch.stack([torch.randn(clean.shape[1:], generator=r) for r in random]).to(clean.device)
            level_index = index[first : first + batch]
            x = add_noise(clean, noise, levels[level_index])
            noisy.append(x)
            predictions.append(model.predict(x, level_index, conditions.repeat(len(x))))
            bar.advance_images(len(x))
    return {"noisy": torch.cat(noisy), "level": index, "prediction": torch.cat(predictions)}


def _hash(tensor: Tensor) -> str:
    return content_hash(tensor.detach().float().cpu().contiguous().numpy().tobytes())
