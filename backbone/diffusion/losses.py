"""The training error and its weight per timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from backbone.diffusion.noise import Level, PredictionType, at_least_float32, target, unknown_prediction_type
from backbone.diffusion.transfer import send


def denoising_score_matching(
    prediction: Tensor,
    clean: Tensor,
    *,
    noise: Tensor,
    level: Level,
    prediction_type: PredictionType,
    weight: Tensor | None = None,
) -> Tensor:
    """Denoising score matching [B]: `squared_error` against the target that the noise path gives.

    Vincent 2011 (J_DSM); Song & Ermon 2019, eqs. 5–6. `uniform`, `variance`, `min_snr`, `debiased` make weights.
    """
    return squared_error(prediction, target(clean, noise, level, prediction_type), weight)


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over all but the first dimension of weight · (prediction − target)² [B], for tensors [B, …] of any rank.

    `weight` is [] or [B], one for each sample, or a map that broadcasts to [B, …]; 1 if left out. Half
    precision is compared in float32.
    """
    error = (at_least_float32(prediction) - at_least_float32(target)).square()
    if weight is None:
        return error.flatten(1).mean(1)
    if weight.ndim > 1:  # a map: before the mean
        return (error * send(weight.to(error.dtype), error.device)).flatten(1).mean(1)
    return send(weight.to(error.dtype), error.device) * error.flatten(1).mean(1)


def uniform(level: Level) -> Tensor:
    """Weight 1 at every level, [] or [B] as all weights here: with ε, the simple loss of Ho et al. 2020, eq. 14."""
    return torch.ones_like(level.a)


def variance(level: Level) -> Tensor:
    """Weight b²: makes the score's error at all levels count alike (Song & Ermon 2019, below eq. 6)."""
    return level.b**2


def min_snr(level: Level, gamma: float = 5.0, prediction_type: PredictionType = "epsilon") -> Tensor:
    """The weight that gives the error in x0 the weight min(SNR, γ), expressed for a loss of this prediction type.

    Hang et al. 2023 (Min-SNR-γ): min(SNR, γ) times (∂x̂0/∂prediction)². Finite at both ends.
    """
    a2, b2 = level.a**2, level.b**2
    match prediction_type:
        case "sample":
            return (a2 / b2).clamp(max=gamma)
        case "epsilon":
            return (gamma * b2 / a2).clamp(max=1)
        case "v_prediction":
            return torch.minimum(a2, gamma * b2) / (a2 + b2) ** 2
        case "flow":
            return torch.minimum(a2, gamma * b2) / (level.a + level.b) ** 2
        case "score":
            return b2 * (gamma * b2 / a2).clamp(max=1)
    raise unknown_prediction_type(prediction_type)


def debiased(level: Level, prediction_type: PredictionType = "epsilon", *, most: float = 10.0) -> Tensor:
    """The weight 1/√SNR of the error in ε, at most `most`, expressed for a loss of this prediction type.

    Yu et al. 2023 (debiased estimation loss): noisy levels, where a small error in ε is a large one in the picture,
    count more.
    """
    a, b = level.a, level.b
    weight = (b / a).clamp(max=most)
    match prediction_type:
        case "epsilon":
            return weight
        case "sample":
            return weight * (a / b) ** 2
        case "v_prediction":
            return weight * (a / (a**2 + b**2)) ** 2
        case "flow":
            return weight * (a / (a + b)) ** 2
        case "score":
            return weight * b**2
    raise unknown_prediction_type(prediction_type)
