"""A Gaussian mixture in the plane, three unequal modes, whose score is known at every noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.diffusion.noise import Estimate, Level


@dataclass(frozen=True)
class Mixture:
    """weights [K], means [K, 2], and the standard deviation of each (round) mode [K]."""

    weights: Tensor
    means: Tensor
    deviations: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Clean samples [count, 2], float64."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return self.means[mode] + self.deviations[mode, None] * noise

    def predict(self, noisy: Tensor, level: Level) -> Estimate:
        """The exact E[x0 | x] and E[ε | x]; regular at a = 0 and b = 0."""
        a, b = level.a, level.b
        variance = (a * self.deviations) ** 2 + b**2  # of each mode at this level [K]
        x, y = offset = (
            noisy.T[:, None] - a * self.means.T[..., None]
        )  # [2, K, B]: sums over long rows are quick
        log_share = (self.weights.log() - variance.log())[:, None] - (x**2 + y**2) / (2 * variance[:, None])
        share = log_share.softmax(0)  # how likely each mode is, given x [K, B]
        offset = share * offset
        kept = (a * self.deviations**2 / variance)[:, None] * offset
        return Estimate(share.T @ self.means + kept.sum(1).T, ((b / variance)[:, None] * offset).sum(1).T)

    def log_density(self, x: Tensor, level: Level) -> Tensor:
        """log p(x) at this level [B], up to the constant −log 2π."""
        variance = (level.a * self.deviations) ** 2 + level.b**2
        distance = (x[:, None] - level.a * self.means).square().sum(-1)
        return (self.weights.log() - variance.log() - distance / (2 * variance)).logsumexp(1)

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        centred = self.means - self.mean()
        return torch.einsum("k,ki,kj->ij", self.weights, centred, centred) + (
            self.weights @ self.deviations**2
        ) * torch.eye(2, dtype=torch.float64)

    def shares(self, x: Tensor) -> Tensor:
        """The fraction of samples nearest to each mode [K]."""
        nearest = torch.cdist(x, self.means).argmin(1)
        return torch.bincount(nearest, minlength=len(self.weights)) / len(x)


THREE_MODES = Mixture(
    weights=torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64),
    means=torch.tensor([[1.2, 0.6], [-1.3, 0.4], [0.1, -1.6]], dtype=torch.float64),
    deviations=torch.tensor([0.25, 0.15, 0.2], dtype=torch.float64),
)
