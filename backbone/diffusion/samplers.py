"""Samplers over a schedule of noise levels, as functions of (a, b) that know no model family.

Every sampler starts with a state at `schedule[0]` and gives the state at `schedule[-1]`, both [B, C, H, W] or any
[B, ...]. `predict` is called once a step (Heun: twice) and gives both halves. In them the
probability-flow ODE (Song et al. 2021, eq. 13) reads the same on every path: dx = x̂0·da + ε̂·db.

| sampler               | what it follows                        | order    | random |
|-----------------------|----------------------------------------|----------|--------|
| `ddim`, `invert`      | the ODE, either way (DDIM, flow Euler) | 1        | no     |
| `heun`                | the ODE                                | 2        | no     |
| `dpmpp_2m`            | the ODE, in log(a/b) (DPM-Solver++ 2M) | 2        | no     |
| `unipc`               | the same, each step then corrected     | 2        | no     |
| `ancestral`           | the posterior chain (DDPM)             | weak 1   | yes    |
| `consistency`         | jumps to x̂0, renoised each time (LCM)  | –        | yes    |
| `reverse_sde`         | the reverse SDE (Euler–Maruyama)       | weak 1   | yes    |
| `langevin`            | each level's density, one by one       | –        | yes    |
| `predictor_corrector` | ancestral steps, each then corrected   | –        | yes    |

`dpmpp_2m`, `unipc` and the stochastic ones only go from noisy to clean. `generator` is one torch.Generator, or one for
each sample; gradients are recorded unless the caller disables them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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

FEW_STEPS = 15  # with fewer, DPM-Solver++ ends at first order for stability (diffusers' `lower_order_final`)

# Deterministic --------------------------------------------------------------------------------------------------


def deterministic_step(noisy: Tensor, estimate: Estimate, level: Level, next_level: Level) -> Tensor:
    """The state at `next_level` [B, ...]: x' = a'·x̂0 + b'·ε̂. On VP it is DDIM, on a flow the Euler step.

    Song, Meng & Ermon 2021, eq. 12 with σ = 0. Only the estimate is read, so an edited one is followed;
    `noisy` and `level` are arguments so that every step has the same four.
    """
    return add_noise(estimate.clean, estimate.noise, next_level)


def trajectory(noisy: Tensor, predict: Predict, schedule: Schedule) -> Iterator[Tensor]:
    """Each state of `ddim`, S + 1 of them, from the given one to the one at `schedule[-1]`."""
    yield noisy
    for level, next_level in pairwise(schedule):
        noisy = deterministic_step(
            noisy, predict(noisy, with_noisier_time(level, next_level)), level, next_level
        )
        yield noisy


def ddim(noisy: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The state at `schedule[-1]` by deterministic steps: towards clean it samples, towards noise it inverts.

    In either direction the network is conditioned on the time of the step's noisier end, as diffusers' DDIMScheduler
    and DDIMInverseScheduler do.
    """
    (last,) = deque(trajectory(noisy, predict, schedule), maxlen=1)
    return last


def invert(clean: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The noisy state at `schedule[0]` that `ddim` brings back to about `clean` on the same schedule.

    The round trip is exact for equal predictions, not for a network that is evaluated again.
    """
    return ddim(clean, predict, schedule.flip())


def with_noisier_time(level: Level, next_level: Level) -> Level:
    """`level` with the time of the step's noisier end; on the way down that is `level` itself."""
    if level.time is None or next_level.time is None:
        return level
    return level.with_time(
        torch.where(level.b * next_level.a >= next_level.b * level.a, level.time, next_level.time)
    )


def heun(noisy: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The state at `schedule[-1]` by Heun's second-order steps along the path itself, down or up.

    x' = x + (a' − a)·mean x̂0 + (b' − b)·mean ε̂, the means over both ends of the step. On VE this is Karras
    et al. 2022, algorithm 1; on a flow it is Heun's rule for the velocity. A step onto b = 0 is
    deterministic, as there, and towards noise each end is evaluated at its own time. For a VP network in σ
    space, as HeunDiscreteScheduler works: scale the state by 1/a, and pass `scale_to_unit_variance(predict)` and
    `to_sigma_space(schedule)`.
    """
    for level, next_level in pairwise(schedule):
        first = predict(noisy, level)
        euler = deterministic_step(noisy, first, level, next_level)
        noisy = (
            euler
            if _is_clean(next_level)
            else heun_step(noisy, first, predict(euler, next_level), level, next_level)
        )
    return noisy


def heun_step(noisy: Tensor, first: Estimate, second: Estimate, level: Level, next_level: Level) -> Tensor:
    """The state at `next_level` [B, ...] from the estimates at both ends of the step."""
    (a, b), (a_next, b_next) = level.broadcast_like(noisy), next_level.broadcast_like(noisy)
    clean, noise = (first.clean + second.clean) / 2, (first.noise + second.noise) / 2
    return noisy + (a_next - a) * clean + (b_next - b) * noise


def dpmpp_2m(noisy: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The state at `schedule[-1]` by DPM-Solver++(2M), for one prediction a step (Lu et al. 2022, algorithm 2).

    A step of `ddim` with x̂0 extrapolated half way, on the line through this step's and the last one's in λ = log(a/b).
    The first step, one onto b = 0, which lies at infinite λ, and the last of fewer than FEW_STEPS use x̂0
    unchanged, as diffusers' DPMSolverMultistepScheduler does. From noisy to clean only.
    """
    _require_falling(schedule)
    steps = len(schedule) - 1
    previous: tuple[Tensor, Level] | None = None
    for step, (level, next_level) in enumerate(pairwise(schedule), start=1):
        clean = predict(noisy, level).clean
        expected = clean
        first_order = _is_clean(next_level) or (step == steps < FEW_STEPS)
        if previous is not None and not first_order:
            expected = _extrapolate(clean, level, next_level, *previous)
        noisy = _step_onto(expected, noisy, level, next_level)
        previous = clean, level
    return noisy


def unipc(noisy: Tensor, predict: Predict, schedule: Schedule) -> Tensor:
    """The state at `schedule[-1]` by UniPC of order 2, B(h) = eʰ − 1, for one prediction a step (Zhao et al. 2023).

    A step of `dpmpp_2m`, repeated from its beginning once x̂0 is also known at its end, from the prediction with which
    the next step begins. The last step uses x̂0 unchanged, as diffusers' UniPCMultistepScheduler does. From noisy to
    clean only.
    """
    _require_falling(schedule)
    history: deque[tuple[Tensor, Level]] = deque(maxlen=2)
    start = noisy
    for step, (level, next_level) in enumerate(pairwise(schedule), start=1):
        clean = predict(noisy, level).clean
        # Corrector: repeat the last step from its beginning, now that x̂0 is known at its end
        if history:
            noisy = _step_onto(_correct(clean, level, *reversed(history)), start, history[-1][1], level)
        history.append((clean, level))
        # Predictor: a step of DPM-Solver++(2M) from the corrected state
        start = noisy
        is_last = step == len(schedule) - 1
        expected = clean if step == 1 or is_last else _extrapolate(clean, level, next_level, *history[0])
        noisy = _step_onto(expected, start, level, next_level)
    return noisy


def _extrapolate(
    clean: Tensor, level: Level, next_level: Level, previous_clean: Tensor, previous_level: Level
) -> Tensor:
    """x̂0 half way to `next_level`, on the line through two estimates in λ."""
    ratio = (_log_ratio(next_level) - _log_ratio(level)) / (_log_ratio(level) - _log_ratio(previous_level))
    return clean + broadcast_like(ratio / 2, clean) * (clean - previous_clean)


def _correct(
    clean: Tensor,
    next_level: Level,
    start: tuple[Tensor, Level],
    previous: tuple[Tensor, Level] | None = None,
) -> Tensor:
    """The x̂0 with which a step that began at `start` reaches `next_level`, where x̂0 is `clean` (UniC).

    For a first step, without a `previous` one, the mean of both.
    """
    change = clean - start[0]
    if previous is None:
        return start[0] + change / 2

    # φ₁ = B(−h) = e^(−h) − 1 with h the step in λ, then φ_{k+1} = φ_k/(−h) − 1/k!
    h = (_log_ratio(next_level) - _log_ratio(start[1])).double()
    first = torch.expm1(-h)
    second = -first / h - 1
    third = -second / h - 1 / 2

    # The weights ρ of the two differences solve ρ₁ + ρ₂ = φ₂/φ₁ and r·ρ₁ + ρ₂ = 2·φ₃/φ₁, r = ratio
    ratio = (_log_ratio(previous[1]) - _log_ratio(start[1])).double() / h
    previous_weight = (2 * third - second) / first / (ratio - 1)
    weight = second / first - previous_weight
    return (
        start[0]
        + broadcast_like(previous_weight / ratio, clean) * (previous[0] - start[0])
        + broadcast_like(weight, clean) * change
    )


def _step_onto(expected: Tensor, noisy: Tensor, level: Level, next_level: Level) -> Tensor:
    """The deterministic step with this clean estimate and the noise that `noisy` then holds."""
    a, b = level.broadcast_like(noisy)
    return add_noise(expected, (noisy - a * expected) / b, next_level)


# With fresh noise -------------------------------------------------------------------------------------------


def ancestral(
    noisy: Tensor, predict: Predict, schedule: Schedule, *, generator: Randomness = None, eta: float = 1.0
) -> Tensor:
    """The state at `schedule[-1]` by ancestral steps: DDPM on VP, Euler ancestral on VE, `ddim` at eta 0."""
    _require_falling(schedule)
    for level, next_level in pairwise(schedule):
        fresh = randn_like(noisy, generator)
        noisy = ancestral_step(noisy, predict(noisy, level), level, next_level, noise=fresh, eta=eta)
    return noisy


def ancestral_step(
    noisy: Tensor, estimate: Estimate, level: Level, next_level: Level, *, noise: Tensor, eta: float = 1.0
) -> Tensor:
    """The state at `next_level` [B, ...]: x' = a'·x̂0 + √(b'² − up²)·ε̂ + up·noise, less noisy than `level`.

    up = η·b'τ/b with τ² the variance that the forward process adds from `next_level` to `level`. At η = 1, up² is
    the variance of p(x' | x, x0) (Ho et al. 2020, eq. 7; Song, Meng & Ermon 2021, eqs. 12 and 16), on any
    path.
    """
    up = (eta * next_level.b * _added_variance(level, next_level).sqrt() / level.b).minimum(next_level.b)
    down = (next_level.b**2 - up**2).clamp(min=0).sqrt()
    return (
        add_noise(estimate.clean, estimate.noise, Level(next_level.a, down))
        + broadcast_like(up, noisy) * noise
    )


def consistency(
    noisy: Tensor, predict: Predict, schedule: Schedule, *, generator: Randomness = None
) -> Tensor:
    """The state at `schedule[-1]` by jumps: x' = a'·x̂0 + b'·z, with fresh noise on each clean estimate.

    Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023), for networks whose x̂0 is a sample
    rather than a mean. diffusers' LCMScheduler, but for its c_skip, below 1e-6 at the levels of few steps.
    """
    _require_falling(schedule)
    for level, next_level in pairwise(schedule):
        clean = predict(noisy, level).clean
        noisy = clean if _is_clean(next_level) else add_noise(clean, randn_like(clean, generator), next_level)
    return noisy


def reverse_sde(
    noisy: Tensor, predict: Predict, schedule: Schedule, *, generator: Randomness = None
) -> Tensor:
    """The state at `schedule[-1]` by Euler–Maruyama steps of the reverse SDE (Song et al. 2021, eq. 6).

    A step onto b = 0 is deterministic, since noise added there would stay in the sample.
    """
    _require_falling(schedule)
    for level, next_level in pairwise(schedule):
        estimate = predict(noisy, level)
        if _is_clean(next_level):
            noisy = deterministic_step(noisy, estimate, level, next_level)
        else:
            noisy = reverse_sde_step(noisy, estimate, level, next_level, noise=randn_like(noisy, generator))
    return noisy


def reverse_sde_step(
    noisy: Tensor, estimate: Estimate, level: Level, next_level: Level, *, noise: Tensor
) -> Tensor:
    """The state at `next_level` [B, ...]: x' = x + Δa·x̂0 + Δb·ε̂ + ½τ²·s + τ·noise.

    That is dx = (f·x − g²·s)dt + g·dw̄ with the ODE's drift f·x − ½g²·s written as x̂0·da + ε̂·db, and ∫g² dt
    taken as τ², the variance that the forward process adds over the step, which stays finite where g does not
    (flow at t = 1).
    """
    ode_state = deterministic_step(noisy, estimate, level, next_level)
    return langevin_step(ode_state, estimate, level, step=_added_variance(level, next_level), noise=noise)


# Langevin ---------------------------------------------------------------------------------------------------


def langevin(
    noisy: Tensor,
    predict: Predict,
    schedule: Schedule,
    *,
    generator: Randomness = None,
    moves: int = 100,
    step_size: float = 0.2,
) -> Tensor:
    """Annealed Langevin dynamics: `moves` of x ← x + ½α·s + √α·z at every level, α = step_size·b².

    Song & Ermon 2019, algorithm 1; step_size is their ε/σ_L², without a unit. Between levels the state does
    not change, so the schedule should be VE, or finely spaced. A last level at b = 0 is reached by one
    deterministic (denoising) step. Each level is left with a bias of order step_size/4 in the variance.
    """
    _require_falling(schedule)
    levels = [level for level in schedule if not _is_clean(level)]
    for level in levels:
        for _ in range(moves):
            fresh = randn_like(noisy, generator)
            noisy = langevin_step(
                noisy, predict(noisy, level), level, step=step_size * level.b**2, noise=fresh
            )
    if _is_clean(schedule[-1]):
        noisy = deterministic_step(noisy, predict(noisy, levels[-1]), levels[-1], schedule[-1])
    return noisy


def langevin_step(noisy: Tensor, estimate: Estimate, level: Level, *, step: Tensor, noise: Tensor) -> Tensor:
    """Another state at this level [B, ...]: x + ½α·s + √α·noise, α = `step` (Song & Ermon 2019, eq. 4)."""
    return (
        noisy
        - broadcast_like(step / (2 * level.b), noisy) * estimate.noise
        + broadcast_like(step.sqrt(), noisy) * noise
    )


def predictor_corrector(
    noisy: Tensor,
    predict: Predict,
    schedule: Schedule,
    *,
    generator: Randomness = None,
    corrections: int = 1,
    signal_to_noise: float = 0.16,
) -> Tensor:
    """The state at `schedule[-1]`: an ancestral step to each level, then Langevin moves on it unless b = 0.

    Song et al. 2021, algorithm 1, with the corrector of algorithm 4: α/2 = 2·(r·‖z‖/‖s‖)², r =
    `signal_to_noise`. The norms are means over the batch, as in the authors' code, so a sample depends on its
    neighbours here. The bias of the corrections shrinks with r, not with more steps.
    """
    _require_falling(schedule)
    for level, next_level in pairwise(schedule):
        # Predictor
        fresh = randn_like(noisy, generator)
        noisy = ancestral_step(noisy, predict(noisy, level), level, next_level, noise=fresh)

        # Corrector: α = 4·(r·‖z‖/‖s‖)²
        for _ in range(0 if _is_clean(next_level) else corrections):
            estimate, fresh = predict(noisy, next_level), randn_like(noisy, generator)
            ratio = (
                next_level.b.to(noisy) * _mean_norm(fresh) / _mean_norm(estimate.noise)
            )  # ‖z‖/‖s‖, s = −ε̂/b
            noisy = langevin_step(
                noisy, estimate, next_level, step=4 * (signal_to_noise * ratio) ** 2, noise=fresh
            )
    return noisy


# Helpers ----------------------------------------------------------------------------------------------------


def _added_variance(level: Level, next_level: Level) -> Tensor:
    """τ²: variance of x at `level` given x at `next_level`; on VP 1 − ᾱ/ᾱ', on VE σ² − σ'²."""
    return (level.b**2 - (level.a / next_level.a * next_level.b) ** 2).clamp(min=0)


def _log_ratio(level: Level) -> Tensor:
    """λ = log(a/b): half of the logarithm of the signal-to-noise ratio."""
    return level.a.log() - level.b.log()


def _is_clean(level: Level) -> bool:
    return bool((level.b == 0).all())


def _require_falling(schedule: Schedule) -> None:
    a, b = schedule.a, schedule.b
    if bool((b[:-1] == 0).any()) or bool((b[1:] * a[:-1] > b[:-1] * a[1:]).any()):
        raise ValueError(
            "this sampler needs a schedule whose noise falls at every level. Flip it, or use `ddim`."
        )


def _mean_norm(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1).sqrt().mean()
