"""Noise schedules against diffusers' schedulers, number for number, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from backbone.diffusion.schedules import (
    BetaSchedule,
    Spacing,
    alphas_cumprod,
    flow_schedule,
    karras_schedule,
    logit_normal_levels,
    spaced_timesteps,
    truncate_schedule,
    vp_schedule,
    zero_terminal_snr,
)


# DDIMScheduler has no timesteps of a distillation: `backbone/models/test_few_step.py` compares LCMScheduler's, and
# `backbone/test_noise_paths.py` those between two whole ones
@pytest.mark.parametrize("spacing", sorted({*get_args(Spacing)} - {"between", "distilled"}))
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_timesteps_are_diffusers_for_every_number_of_steps(spacing: Spacing, steps_offset: int) -> None:
    scheduler = scheduler_of(DDIMScheduler, timestep_spacing=spacing, steps_offset=steps_offset)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        ours = spaced_timesteps(steps, spacing, steps_offset=steps_offset)
        # for 62 numbers of steps, rounding makes diffusers append one more timestep, −1
        assert len(ours) == steps and torch.equal(ours, scheduler.timesteps[:steps]), steps


@pytest.mark.parametrize("beta_schedule", get_args(BetaSchedule))
@pytest.mark.parametrize("start, end", [(0.00085, 0.012), (0.0001, 0.02)])
def test_alphas_are_diffusers_bit_for_bit(beta_schedule: BetaSchedule, start: float, end: float) -> None:
    scheduler = scheduler_of(DDIMScheduler, beta_schedule=beta_schedule, beta_start=start, beta_end=end)
    assert torch.equal(alphas_cumprod(beta_schedule, start, end), scheduler.alphas_cumprod)


def test_zero_terminal_snr_is_diffusers() -> None:
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    rescaled = scheduler_of(DDIMScheduler, **settings, rescale_betas_zero_snr=True)
    ours = zero_terminal_snr(alphas_cumprod())
    torch.testing.assert_close(ours, rescaled.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert ours[-1] == 0


def test_a_vp_ladder_by_hand() -> None:
    alphas = torch.tensor([0.9, 0.8, 0.6, 0.4, 0.2, 0.1])
    schedule = vp_schedule(alphas, 3, spacing="leading", steps_offset=1, final="first")
    assert schedule.time is not None and schedule.time.tolist() == [5, 3, 1, 0]
    torch.testing.assert_close(schedule.a**2, torch.tensor([0.1, 0.4, 0.8, 0.9]).double())
    torch.testing.assert_close(schedule.a**2 + schedule.b**2, torch.ones(4).double())
    clean = vp_schedule(alphas, 3, spacing="leading", steps_offset=1)[-1]
    assert clean.a == 1 and clean.b == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_a_flow_ladder_is_diffusers(shift: float, steps: int) -> None:
    scheduler = scheduler_of(FlowMatchEulerDiscreteScheduler, shift=shift)
    scheduler.set_timesteps(steps)
    schedule = flow_schedule(steps, shift)
    assert schedule.time is not None and schedule.time[-1] == 0
    torch.testing.assert_close(schedule.b.float(), scheduler.sigmas)
    torch.testing.assert_close(schedule.time[:-1], scheduler.timesteps)
    torch.testing.assert_close(schedule.a + schedule.b, torch.ones(steps + 1).double())


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_a_dynamically_shifted_flow_ladder_is_diffusers(mu: float) -> None:
    scheduler = scheduler_of(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True)
    scheduler.set_timesteps(7, mu=mu)
    torch.testing.assert_close(flow_schedule(7, mu=mu).b.float(), scheduler.sigmas)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist(), mu=mu)  # as FLUX's pipeline calls it
    torch.testing.assert_close(flow_schedule(7, mu=mu, lowest=1 / 7).b.float(), scheduler.sigmas)


def test_flow_levels_are_quantiles_of_a_shifted_logit_normal() -> None:
    levels = logit_normal_levels(1001)
    assert float(levels.b[500]) == pytest.approx(0.5)
    assert float((levels.b < torch.tensor(1.0).sigmoid()).double().mean()) == pytest.approx(0.8413, abs=1e-3)
    torch.testing.assert_close(levels.a + levels.b, torch.ones(1001).double())
    shifted = logit_normal_levels(1001, 3.0)
    assert float(shifted.b[500]) == pytest.approx(0.75)  # 3·½ / (1 + 2·½)
    assert bool((shifted.b.diff() > 0).all()) and float(shifted.b[0]) > 0 and float(shifted.b[-1]) < 1
    assert shifted.time is not None and float(shifted.time[500]) == pytest.approx(750)


def test_a_karras_ladder_is_diffusers() -> None:
    scheduler = scheduler_of(
        EulerDiscreteScheduler,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas
    schedule = karras_schedule(12, float(sigmas[-2]), float(sigmas[0]))
    torch.testing.assert_close(schedule.b.float(), sigmas, rtol=1e-5, atol=1e-6)
    assert schedule.time is not None and torch.equal(schedule.time, schedule.b)


@pytest.mark.parametrize("steps", [50, 28, 1, 0])
def test_the_lowest_steps_of_a_schedule_are_its_last(steps: int) -> None:
    schedule = vp_schedule(alphas_cumprod(), 50, steps_offset=1, final="first")
    part = truncate_schedule(schedule, steps)
    assert len(part) == steps + 1
    assert torch.equal(part.a, schedule.a[50 - steps :])


def test_ladders_that_cannot_be_are_refused() -> None:
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: spaced_timesteps(1001), "1 to 1000 steps"),
        (lambda: spaced_timesteps(0), "1 to 1000 steps"),
        (lambda: spaced_timesteps(10, "even"), "Known are leading"),  # type: ignore[arg-type]
        (lambda: alphas_cumprod("cosine"), "Known are scaled_linear"),  # type: ignore[arg-type]
        (lambda: vp_schedule(alphas_cumprod(), 1000, steps_offset=1), "reach timestep 1000"),
        (lambda: flow_schedule(0), "at least one step"),
        (lambda: karras_schedule(10, 2.0, 1.0), "sigma_min"),
        (lambda: truncate_schedule(flow_schedule(4), 5), "of 4 steps"),
    ]
    for call, words in refused:
        with pytest.raises(ValueError, match=words):
            call()


def scheduler_of(kind: Any, **settings: Any) -> Any:
    """diffusers' scheduler of this class."""
    return kind(**settings)
