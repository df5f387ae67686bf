"""Noise schedules: the levels that a sampler visits, noisy to clean, and those that a flow is trained at.

A schedule of S steps is a `Level` with tensors [S + 1], in float64 on the CPU; each level is cast to the
state that it meets. Timesteps, betas and shifts are diffusers', number for number, so a scheduler's settings can be
read off its `scheduler_config.json`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from backbone.diffusion.noise import Level, Schedule, flow, ve, vp

Spacing = Literal["leading", "trailing", "linspace", "between", "distilled"]
DISTILLED = 50  # levels of a latent consistency model (Luo et al. 2023)
BetaSchedule = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]


def vp_schedule(
    alphas_cumprod: Tensor,
    steps: int,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    final: Literal["one", "first"] = "one",
    distilled: int = DISTILLED,
) -> Schedule:
    """S steps over a trained schedule ᾱ [train steps], to ᾱ = 1 or to the schedule's first ᾱ.

    `final` is diffusers' `set_alpha_to_one`: "one" where that is true. The network gets integer timesteps (with
    `between` fractional ones, whose σ is interpolated linearly), and the last level's is 0.
    DDIMScheduler itself steps by train steps // S whatever the spacing: the two agree for leading, and for trailing
    where S divides the train steps; elsewhere each step here begins at the level where the last one ended, and
    the scheduler's do not.
    """
    train_steps = len(alphas_cumprod)
    timesteps = spaced_timesteps(steps, spacing, train_steps, steps_offset, distilled=distilled)
    if int(timesteps[0]) >= train_steps:
        raise ValueError(
            f"{steps} steps with steps_offset {steps_offset} reach timestep {int(timesteps[0])}, and the "
            f"schedule ends at {train_steps - 1}. Take fewer steps or a smaller offset."
        )
    alphas = alphas_cumprod.double().cpu()
    last = alphas.new_ones(1) if final == "one" else alphas[:1]
    visited = _alphas_between(alphas, timesteps) if spacing == "between" else alphas[timesteps]
    return vp(torch.cat([visited, last]), time=torch.cat([timesteps, timesteps.new_zeros(1)]))


def flow_schedule(
    steps: int,
    shift: float = 1.0,
    *,
    mu: float | None = None,
    lowest: float | None = None,
    terminal: float | None = None,
    train_steps: int = 1000,
) -> Schedule:
    """S steps of a rectified flow from t = 1 to t = 0; the network gets train_steps·t.

    FlowMatchEulerDiscreteScheduler's levels. `shift` moves them towards the noisy end (Esser et al. 2024, eq.
    23); with `mu`, the dynamic shift exp(mu) takes its place. `lowest` is the last level before t = 0, before
    shifting: the scheduler's own smallest level if left out, 1/S as FLUX's pipeline asks for. `terminal` is where the
    shifted levels are stretched to, so that this is the last one before 0.
    """
    if steps < 1:
        raise ValueError(f"a schedule has at least one step, not {steps}.")

    # The shift, and the scheduler's smallest level
    if mu is not None:
        shift, smallest = math.exp(mu), 1 / train_steps
    else:  # the scheduler shifts its smallest level when it is built, and every level again here
        smallest = shift / (train_steps + shift - 1)

    # S levels from t = 1, shifted: t' = shift·t / (1 + (shift − 1)·t)
    t = torch.linspace(1, smallest if lowest is None else lowest, steps, dtype=torch.float64)
    t = shift * t / (1 + (shift - 1) * t)
    # 1 − t scaled so that the last level is `terminal`
    if terminal is not None and steps > 1:
        t = 1 - (1 - t) * (1 - terminal) / (1 - t[-1])
    t = torch.cat([t, t.new_zeros(1)])
    return flow(t, time=(train_steps * t).float())


def logit_normal_levels(
    count: int = 1000,
    shift: float = 1.0,
    *,
    mean: float = 0.0,
    deviation: float = 1.0,
    train_steps: int = 1000,
) -> Level:
    """Quantiles of the density that a rectified flow is trained with [count], clean to noisy.

    t is logit-normal (Esser et al. 2024, eq. 19) and shifted (eq. 23), so that a uniform choice among these levels
    draws from that density. The network gets train_steps·t; t = 1 itself, where sampling begins, is beyond them.
    """
    # Quantiles of the logit-normal: t = sigmoid(mean + deviation·Φ⁻¹((i + ½)/count))
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = torch.sigmoid(mean + deviation * torch.special.ndtri(share))
    t = shift * t / (1 + (shift - 1) * t)
    return flow(t, time=(train_steps * t).float())


def karras_schedule(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Schedule:
    """S steps of VE from sigma_max over sigma_min to 0 (Karras et al. 2022, eq. 5); the network gets σ."""
    if steps < 1 or not 0 < sigma_min <= sigma_max:
        raise ValueError(
            "a Karras schedule needs steps ≥ 1 and 0 < sigma_min ≤ sigma_max, "
            f"not {steps}, {sigma_min}, {sigma_max}."
        )
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    return ve(torch.cat([ramp**rho, ramp.new_zeros(1)]))


def truncate_schedule(schedule: Schedule, steps: int) -> Schedule:
    """The lowest `steps` of S steps: SDEdit noises a picture to their first level and samples down from there.

    Meng et al. 2022, algorithm 1: all S are the whole schedule, 0 its last level alone, where the picture stays as it
    is.
    """
    every = len(schedule) - 1
    if not 0 <= steps <= every:
        raise ValueError(f"of {every} steps 0 to {every} are taken, not {steps}.")
    return schedule[every - steps :]


def spaced_timesteps(
    steps: int,
    spacing: Spacing = "leading",
    train_steps: int = 1000,
    steps_offset: int = 0,
    *,
    distilled: int = DISTILLED,
) -> Tensor:
    """Integer timesteps [S], the noisiest first (Lin et al. 2024, table 2); the offset only for leading.

    `between` is linspace without rounding, float32, as diffusers' samplers in σ have it.
    Spaced as `distilled` they are those of LCMScheduler: some of the `distilled` levels that consistency distillation
    works at.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"a schedule takes 1 to {train_steps} steps, the number trained with, not {steps}.")
    levels = torch.arange(steps)
    match spacing:
        case "leading":
            return levels.flip(0) * (train_steps // steps) + steps_offset
        case "trailing":
            stride = train_steps - (train_steps - train_steps / steps)  # as numpy.arange rounds it
            return (train_steps - levels.double() * stride).round().long() - 1
        case "linspace":
            return (levels.double() * ((train_steps - 1) / max(steps - 1, 1))).round().long().flip(0)
        case "between":
            return (levels.double() * ((train_steps - 1) / max(steps - 1, 1))).flip(0).float()
        case "distilled":
            if steps > distilled:
                raise ValueError(f"a latent consistency model takes 1 to {distilled} steps, not {steps}.")
            stride = train_steps // distilled
            return stride * (distilled - levels * distilled // steps) - 1
    raise ValueError(
        f"no spacing is called {spacing!r}. Known are leading, trailing, linspace, between and distilled."
    )


def _alphas_between(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """ᾱ [S] at timesteps that need not be whole: σ is linear from one to the next."""
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    below = timesteps.floor().long()
    above, share = (below + 1).clamp(max=len(sigmas) - 1), timesteps - below
    # Without signal σ is infinite, which 0 times is no number
    sigma = torch.where(share > 0, sigmas[below].lerp(sigmas[above], share.double()), sigmas[below])
    return 1 / (1 + sigma**2)


def alphas_cumprod(
    beta_schedule: BetaSchedule = "scaled_linear",
    start: float = 0.00085,
    end: float = 0.012,
    train_steps: int = 1000,
) -> Tensor:
    """ᾱ [train steps] in float32, bit for bit what the networks were trained with in diffusers.

    `start` and `end` are the first and last β: linear (Ho et al. 2020), linear in √β (Rombach et al. 2022).
    The cosine (Nichol & Dhariwal 2021, eq. 17, β ≤ 0.999) has none.
    """
    match beta_schedule:
        case "linear":
            betas = torch.linspace(start, end, train_steps, dtype=torch.float32)
        case "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, train_steps, dtype=torch.float32) ** 2
        case "squaredcos_cap_v2":
            # β_i = 1 − f(i + 1)/f(i) with f(i) = cos²((i/T + s)/(1 + s)·π/2), s = 0.008
            cosine = [
                math.cos((i / train_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(train_steps + 1)
            ]
            ratios = [later / earlier for earlier, later in pairwise(cosine)]
            betas = torch.tensor([min(1 - ratio, 0.999) for ratio in ratios], dtype=torch.float32)
        case _:
            raise ValueError(
                f"no schedule is called {beta_schedule!r}. Known are scaled_linear, linear and squaredcos_cap_v2."
            )
    return torch.cumprod(1 - betas, 0)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ [train steps] stretched so that its last entry is 0 and its first stays (Lin et al. 2024, alg. 1)."""
    # √ᾱ shifted so that the last is 0, and scaled so that the first stays
    a = alphas_cumprod.sqrt()
    return ((a - a[-1]) * (a[0] / (a[0] - a[-1]))).square()
