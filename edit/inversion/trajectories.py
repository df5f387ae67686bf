"""Trajectories from a clean latent to noise that can be sampled back, and their steps.

A trajectory is [S + 1, B, ...], one state for each level of a schedule, noisiest first like the schedule. All functions
take a `Predict`, independent of the model.

| trajectory             | what its states are                                       | down again                    |
|------------------------|-----------------------------------------------------------|-------------------------------|
| `invert_ddim`          | the ODE integrated upward (DDIM inversion)                | about, by `deterministic_step` |
| `invert_implicit`      | fixed points: a deterministic step leads to the one below | as exact as they are found    |
| `invert_two_step`      | a two-step rule that is its own inverse                   | but for rounding, by `two_step` |
| `noise_independently`  | the clean latent with fresh noise at every level          | exact, by `corrected_step`    |
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from backbone.diffusion.noise import (
    Estimate,
    Level,
    Predict,
    Randomness,
    Schedule,
    add_noise,
    broadcast_like,
    randn_like,
)
from backbone.diffusion.samplers import ancestral_step, deterministic_step, trajectory, with_noisier_time


def invert_ddim(clean: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The trajectory [S + 1, B, ...] of DDIM inversion, noisiest first, from a clean latent [B, ...]. NFE: S.

    Song, Meng & Ermon 2021, section 4.3; on a flow, Euler's steps upward.
    """
    return torch.stack(list(trajectory(clean, predict, schedule.flip()))).flip(0)


# Fixed points -----------------------------------------------------------------------------------------------


def invert_implicit(
    clean: Tensor, predict: Predict, schedule: Schedule, *, rounds: int = 4, tolerance: float = 1e-4
) -> Tensor:
    """Implicit inversion: each noisier state is solved for, so that its deterministic step lands on the current one.

    From a clean latent [B, ...] to the trajectory [S + 1, B, ...], noisiest first.

    Garibi et al. 2024 (ReNoise, eq. 6), Pan et al. 2023 (AIDI): fixed-point iteration x ← x + step_size·residual,
    where the residual is the current state minus the result of the step from x. At most `rounds` iterations a step,
    until every sample's residual is below `tolerance` (root mean square). NFE: 2 to 2 + rounds a step.
    """
    states = [clean]
    for level, noisier in pairwise(schedule.flip()):
        current = states[-1]
        # The initial guess is DDIM inversion's
        x = deterministic_step(current, predict(current, with_noisier_time(level, noisier)), level, noisier)
        residual = current - deterministic_step(x, predict(x, noisier), noisier, level)
        # Step length: (a + b)/(a' + b'), what the residual would need if the velocity u = ε̂ − x̂0 of
        # (1 − τ)·x0 + τ·ε stayed the same; no level is singular in it
        step_size = broadcast_like((noisier.a + noisier.b) / (level.a + level.b), x) * torch.ones_like(
            _rms(residual)
        )
        for _ in range(rounds):
            if bool((_rms(residual) < tolerance).all()):
                break
            candidate = x + step_size * residual
            candidate_residual = current - deterministic_step(
                candidate, predict(candidate, noisier), noisier, level
            )
            is_better = _rms(candidate_residual) < _rms(residual)
            # Then the secant's: how much the residual changed with the last update (Barzilai & Borwein 1988, eq. 6)
            change = _rms(residual - candidate_residual).square().clamp(min=1e-30)
            secant = (step_size * residual * (residual - candidate_residual)).mean(
                tuple(range(1, residual.ndim)), keepdim=True
            ) / change
            step_size = torch.where(secant > 0, secant, step_size / 2)
            # A sample whose residual did not shrink goes back
            x, residual = (
                torch.where(is_better, candidate, x),
                torch.where(is_better, candidate_residual, residual),
            )
        states.append(x)
    return torch.stack(states).flip(0)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each sample [B, 1, ...]."""
    return x.square().mean(tuple(range(1, x.ndim)), keepdim=True).sqrt()


# The reversible rule ----------------------------------------------------------------------------------------


def invert_two_step(clean: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The first step up by Euler's rule, all others by `two_step`, which retraces them on the way down. NFE: S.

    From a clean latent [B, ...] to the trajectory [S + 1, B, ...], noisiest first. The states should be float64, so
    that rounding errors stay small along the way.
    """
    levels = list(schedule.flip())
    first = predict(clean, with_noisier_time(levels[0], levels[1]))
    states = [clean, deterministic_step(clean, first, levels[0], levels[1])]
    for cleaner, level, noisier in zip(levels, levels[1:], levels[2:], strict=False):
        noisy = states[-1]
        # A schedule that ends with the same level twice: the first step was the identity
        if cleaner.tau == level.tau:
            estimate = predict(noisy, with_noisier_time(level, noisier))
            states.append(deterministic_step(noisy, estimate, level, noisier))
        else:
            states.append(two_step(states[-2], noisy, predict(noisy, level), cleaner, level, noisier))
    return torch.stack(states).flip(0)


def two_step(
    previous: Tensor,
    noisy: Tensor,
    estimate: Estimate,
    previous_level: Level,
    level: Level,
    next_level: Level,
) -> Tensor:
    """The states [B, ...] at `next_level` from those at `previous_level` and `level` and the prediction at `level`.

    The bidirectional explicit two-step rule of second order (O-BELM, Wang et al. 2024, eq. 18), written for the state
    x̃ = x/(a + b) over τ = b/(a + b), where the ODE is dx̃/dτ = ε̂ − x̂0 on every path and nothing is singular:

        x̃'' = p·x̃ + (1 − p)·x̃' + h'·(h + h')/h·u,   p = (h'/h)²

    with h and h' the two steps in τ. Exchanging `previous` with the result and `previous_level` with `next_level`
    undoes it.
    """
    first, second = level.tau - previous_level.tau, next_level.tau - level.tau
    p, q = (second / first) ** 2, second * (first + second) / first
    velocity = estimate.noise - estimate.clean
    straight = (
        broadcast_like(p, noisy) * previous / broadcast_like(previous_level.a + previous_level.b, noisy)
        + broadcast_like(1 - p, noisy) * noisy / broadcast_like(level.a + level.b, noisy)
        + broadcast_like(q, noisy) * velocity
    )
    return broadcast_like(next_level.a + next_level.b, noisy) * straight


# Noise maps -------------------------------------------------------------------------------------------------


def noise_independently(clean: Tensor, schedule: Schedule, *, generator: Randomness = None) -> Tensor:
    """States [S + 1, B, ...]: the clean latent under fresh noise at every level but the last, clean one. NFE: 0.

    Huberman-Spiegelglas et al. 2024, eq. 6: the noise maps are larger than a chain's, hence the name edit-friendly.
    """
    noisy = [add_noise(clean, randn_like(clean, generator), level) for level in schedule[:-1]]
    return torch.stack([*noisy, clean])


def corrections(states: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The difference of the next state from an ancestral step's mean, at each level [S, B, ...]. NFE: S.

    σ·z of Huberman-Spiegelglas et al. 2024, eq. 5: with it the steps retrace the states exactly, whatever σ is, also
    where σ is 0.
    """
    return torch.stack(
        [
            next_state
            - corrected_step(state, predict(state, level), level, next_level, torch.zeros_like(state))
            for (state, next_state), (level, next_level) in zip(
                pairwise(states), pairwise(schedule), strict=True
            )
        ]
    )


def corrected_step(
    noisy: Tensor, estimate: Estimate, level: Level, next_level: Level, correction: Tensor
) -> Tensor:
    """The states [B, ...] at `next_level`: the ancestral step's mean there plus the correction."""
    return ancestral_step(noisy, estimate, level, next_level, noise=torch.zeros_like(noisy)) + correction
