"""Ways from a clean latent up to noise that can be walked down again: trajectories, and their steps.

A trajectory is [S + 1, B, ...], one state for each rung of a ladder, noisiest first as the ladder. Everything asks a
`Predict` and knows no model.

| trajectory    | what its states are                                | down again                                  |
|---------------|----------------------------------------------------|---------------------------------------------|
| `inverted`    | the ODE walked up (DDIM inversion)                 | about, by `deterministic_step`              |
| `renoised`    | the states that deterministic steps lead back from | as exact as its fixed points are found      |
| `leapt`       | a two-step rule that is its own inverse            | exact but for rounding, by `leap`           |
| `independent` | the clean latent with fresh noise at every rung    | exact, by `corrected_step` with `corrections` |
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


def inverted(clean: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """DDIM inversion (Song, Meng & Ermon 2021, section 4.3); on a flow, Euler's steps upward. S evaluations."""
    return torch.stack(list(trajectory(clean, predict, schedule.flip()))).flip(0)


# Fixed points -----------------------------------------------------------------------------------------------


def renoised(
    clean: Tensor, predict: Predict, schedule: Schedule, *, rounds: int = 4, tolerance: float = 1e-4
) -> Tensor:
    """Each state the one from which a deterministic step leads back to the state before it.

    Garibi et al. 2024 (ReNoise, eq. 6), Pan et al. 2023 (AIDI): x moves by what its step misses. How far follows from
    how the miss changed with the last move (Barzilai & Borwein 1988, eq. 6); the first move believes the velocity
    u = ε̂ − x̂0 of (1 − τ)·x0 + τ·ε, which has no singular level: (a + b)/(a' + b') times the miss. A sample whose miss
    did not shrink goes back. At most `rounds` moves a step, until every sample misses by less than `tolerance` (root
    mean square); 2 to 2 + rounds evaluations a step.
    """
    states = [clean]
    for here, there in pairwise(schedule.flip()):
        reached = states[-1]

        def miss_of(x: Tensor, goal: Tensor = reached, here: Level = here, there: Level = there) -> Tensor:
            return goal - deterministic_step(x, predict(x, there), there, here)

        x = deterministic_step(reached, predict(reached, with_noisier_time(here, there)), here, there)
        miss = miss_of(x)
        far = broadcast_like((there.a + there.b) / (here.a + here.b), x) * torch.ones_like(_size(miss))
        for _ in range(rounds):
            if bool((_size(miss) < tolerance).all()):
                break
            further = x + far * miss
            left = miss_of(further)
            better = _size(left) < _size(miss)
            less = _size(miss - left).square().clamp(min=1e-30)
            secant = (far * miss * (miss - left)).mean(tuple(range(1, miss.ndim)), keepdim=True) / less
            far = torch.where(secant > 0, secant, far / 2)
            x, miss = torch.where(better, further, x), torch.where(better, left, miss)
        states.append(x)
    return torch.stack(states).flip(0)


def _size(miss: Tensor) -> Tensor:
    """Root mean square of each sample [B, 1, ...]."""
    return miss.square().mean(tuple(range(1, miss.ndim)), keepdim=True).sqrt()


# The reversible rule ----------------------------------------------------------------------------------------


def leapt(clean: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The first step up by Euler's rule, all others by `leap`: walking down with `leap` retraces it. S evaluations.

    The states should be float64, so that what rounding there is does not grow along the way.
    """
    levels = list(schedule.flip())
    first = predict(clean, with_noisier_time(levels[0], levels[1]))
    states = [clean, deterministic_step(clean, first, levels[0], levels[1])]
    for before, here, there in zip(levels, levels[1:], levels[2:], strict=False):
        now = states[-1]
        if _tau(before) == _tau(here):  # a ladder that ends with the same rung twice: the first step was none
            estimate = predict(now, with_noisier_time(here, there))
            states.append(deterministic_step(now, estimate, here, there))
        else:
            states.append(leap(states[-2], now, predict(now, here), before, here, there))
    return torch.stack(states).flip(0)


def leap(
    before: Tensor, now: Tensor, estimate: Estimate, previous: Level, here: Level, there: Level
) -> Tensor:
    """The state at `there` from those at `previous` and `here` and the prediction `here`; its own inverse.

    The bidirectional explicit two-step rule of second order (O-BELM, Wang et al. 2024, eq. 18), written for the state
    x̃ = x/(a + b) over τ = b/(a + b), where the ODE is dx̃/dτ = ε̂ − x̂0 on every path and nothing is singular:

        x̃'' = p·x̃ + (1 − p)·x̃' + h'·(h + h')/h·u,   p = (h'/h)²

    with h and h' the two steps in τ. Exchanging `before` with the result and `previous` with `there` undoes it.
    """
    first, second = _tau(here) - _tau(previous), _tau(there) - _tau(here)
    p, q = (second / first) ** 2, second * (first + second) / first
    velocity = estimate.noise - estimate.clean
    straight = (
        broadcast_like(p, now) * before / broadcast_like(previous.a + previous.b, now)
        + broadcast_like(1 - p, now) * now / broadcast_like(here.a + here.b, now)
        + broadcast_like(q, now) * velocity
    )
    return broadcast_like(there.a + there.b, now) * straight


def _tau(level: Level) -> Tensor:
    return level.b / (level.a + level.b)


# Noise maps -------------------------------------------------------------------------------------------------


def independent(clean: Tensor, schedule: Schedule, *, generator: Randomness = None) -> Tensor:
    """The clean latent with its own fresh noise at every rung but the last, which it is (Huberman-Spiegelglas et al.
    2024, eq. 6): noisier maps than a chain has, hence the name edit-friendly. No evaluation."""
    noisy = [add_noise(clean, randn_like(clean, generator), rung) for rung in schedule[:-1]]
    return torch.stack([*noisy, clean])


def corrections(states: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """What an ancestral step lacks at each rung to arrive at the next state [S, B, ...]. S evaluations.

    σ·z of Huberman-Spiegelglas et al. 2024, eq. 5: with it the steps retrace the states exactly, whatever σ is, also
    where σ is 0.
    """
    return torch.stack(
        [
            state_there - corrected_step(state, predict(state, here), here, there, torch.zeros_like(state))
            for (state, state_there), (here, there) in zip(pairwise(states), pairwise(schedule), strict=True)
        ]
    )


def corrected_step(
    noisy: Tensor, estimate: Estimate, here: Level, there: Level, correction: Tensor
) -> Tensor:
    """The ancestral step's mean at `there` plus the correction."""
    return ancestral_step(noisy, estimate, here, there, noise=torch.zeros_like(noisy)) + correction
