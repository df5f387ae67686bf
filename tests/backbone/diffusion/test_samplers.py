"""Samplers against a mixture whose score is known, their measured orders, and diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from backbone.diffusion.noise import (
    Estimate,
    Level,
    Predict,
    PredictionType,
    Schedule,
    add_noise,
    estimate,
    flow,
    predictor,
    randn_like,
    scale_to_unit_variance,
    to_sigma_space,
    ve,
    vp,
)
from backbone.diffusion.samplers import (
    ancestral,
    ancestral_step,
    ddim,
    deterministic_step,
    dpmpp_2m,
    heun,
    invert,
    langevin,
    langevin_step,
    predictor_corrector,
    reverse_sde,
    reverse_sde_step,
    trajectory,
    unipc,
)
from backbone.diffusion.schedules import Spacing, alphas_cumprod, flow_schedule, karras_schedule, vp_schedule
from tests.backbone.mixture import THREE_MODES, Mixture


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def circle(angles: Tensor) -> Level:
    """VP by its angle, a = cos, b = sin, exact at both ends."""
    return vp(torch.where(angles == math.pi / 2, 0.0, angles.cos() ** 2))


def evenly(first: float, last: float, steps: int) -> Tensor:
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)


# From pure noise all the way to clean samples.
WHOLE: dict[str, Callable[[int], Schedule]] = {
    "vp": lambda steps: circle(evenly(math.pi / 2, 0, steps)),
    "ve": lambda steps: karras_schedule(steps, 0.01, 80.0),
    "flow": lambda steps: flow_schedule(steps, lowest=1 / steps),
}
# For measuring orders. They stop at b = 0.3: further down, the few samples on the ridge between two modes
# that a coarse walk sends to the other mode are most of the error, and the slope needs far finer steps.
INNER: dict[str, Callable[[int], Schedule]] = {
    "vp": lambda steps: circle(evenly(1.5, 0.3, steps)),
    "ve": lambda steps: ve(evenly(10 ** (1 / 3), 0.3 ** (1 / 3), steps) ** 3),
    "flow": lambda steps: flow(evenly(1.0, 0.3, steps)),
}
whole = pytest.mark.parametrize("schedule", WHOLE.values(), ids=WHOLE.keys())
inner = pytest.mark.parametrize("schedule", INNER.values(), ids=INNER.keys())


# The mixture comes out


@whole
@pytest.mark.parametrize(
    "sampler, steps",
    [
        (ddim, 100),
        (heun, 40),
        (dpmpp_2m, 40),
        (unipc, 40),
        (lambda x, predict, schedule: ancestral(x, predict, schedule, generator=generator(1)), 100),
        (lambda x, predict, schedule: ancestral(x, predict, schedule, generator=generator(1), eta=0.5), 100),
        (lambda x, predict, schedule: reverse_sde(x, predict, schedule, generator=generator(1)), 100),
        (lambda x, predict, schedule: predictor_corrector(x, predict, schedule, generator=generator(1)), 60),
    ],
    ids=[
        "deterministic",
        "heun",
        "DPM++ 2M",
        "UniPC",
        "ancestral",
        "half ancestral",
        "reverse SDE",
        "predictor-corrector",
    ],
)
def test_a_sampler_reproduces_the_moments_and_the_mode_weights(
    sampler: Callable[[Tensor, Predict, Schedule], Tensor], steps: int, schedule: Callable[[int], Schedule]
) -> None:
    levels = schedule(steps)
    noise = torch.randn(4000, 2, generator=generator(), dtype=torch.float64)
    assert_like(THREE_MODES, sampler(levels.b[0] * noise, THREE_MODES.predict, levels))


def test_annealed_langevin_reproduces_the_moments_and_the_mode_weights() -> None:
    levels = ve(torch.logspace(0.5, -1, 16, dtype=torch.float64))
    noise = torch.randn(4000, 2, generator=generator(), dtype=torch.float64)
    found = langevin(3 * noise, THREE_MODES.predict, levels, generator=generator(1), moves=60)
    assert_like(THREE_MODES, found)


@pytest.mark.parametrize("level", [vp(0.3), ve(1.2), flow(0.5)], ids=["vp", "ve", "flow"])
def test_langevin_reaches_the_stationary_moments_of_its_level(level: Level) -> None:
    one_level = Level(level.a[None], level.b[None])
    far = torch.full((2000, 2), 3.0, dtype=torch.float64)
    found = langevin(far, THREE_MODES.predict, one_level, generator=generator(), moves=300, step_size=0.08)
    covariance = level.a**2 * THREE_MODES.covariance() + level.b**2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found.mean(0), level.a * THREE_MODES.mean(), rtol=0, atol=0.05)
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0.06, atol=0.05)


@pytest.mark.parametrize("step_size", [0.2, 0.02])
def test_langevin_s_stationary_variance_is_the_one_that_its_step_size_implies(step_size: float) -> None:
    level, wanted = ve(0.5), GAUSSIAN_VARIANCE + 0.25  # of x at this level
    step = step_size * level.b**2
    slope, shift, push = affine(
        lambda x, fresh: langevin_step(x, gaussian(x, level), level, step=step, noise=fresh)
    )
    mean, variance = shift / (1 - slope), push**2 / (1 - slope**2)
    assert mean == pytest.approx(GAUSSIAN_MEAN, rel=1e-9)
    assert variance == pytest.approx(wanted / (1 - float(step) / (4 * wanted)), rel=1e-9)
    assert variance == pytest.approx(wanted, rel=step_size / 4)


def assert_like(mixture: Mixture, found: Tensor) -> None:
    """Within more than three standard errors of 4,000 samples, and the little that the steps leave."""
    torch.testing.assert_close(found.mean(0), mixture.mean(), rtol=0, atol=0.06)
    torch.testing.assert_close(found.T.cov(), mixture.covariance(), rtol=0, atol=0.1)
    torch.testing.assert_close(mixture.shares(found).double(), mixture.weights, rtol=0, atol=0.025)


# Orders


@inner
@pytest.mark.parametrize("sampler, order", [(ddim, 1), (heun, 2)], ids=["deterministic", "heun"])
def test_the_order_of_a_deterministic_sampler(
    sampler: Callable[[Tensor, Predict, Schedule], Tensor], order: int, schedule: Callable[[int], Schedule]
) -> None:
    x, exact = sampled_finely(schedule)
    errors = [
        float((sampler(x, THREE_MODES.predict, schedule(steps)) - exact).norm(dim=1).mean())
        for steps in (32, 64, 128)
    ]
    assert measured_order(errors) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
    "schedule",
    [INNER["ve"], INNER["vp"], lambda steps: flow(evenly(0.95, 0.3, steps))],
    ids=["ve", "vp", "flow"],
)
@pytest.mark.parametrize("sampler", [dpmpp_2m, unipc])
def test_remembering_one_estimate_has_order_two(
    schedule: Callable[[int], Schedule], sampler: Callable[[Tensor, Predict, Schedule], Tensor]
) -> None:
    """Where λ is finite at the noisy end: its extrapolation in λ is worth nothing in the step that leaves −∞."""
    x, exact = sampled_finely(schedule)
    errors = [
        float((sampler(x, THREE_MODES.predict, schedule(steps)) - exact).norm(dim=1).mean())
        for steps in (64, 128, 256)
    ]
    assert measured_order(errors) == pytest.approx(2, abs=0.1)


@inner
def test_inversion_has_order_one_too(schedule: Callable[[int], Schedule]) -> None:
    x = states_at(schedule(1)[-1])
    exact = heun(x, THREE_MODES.predict, schedule(1024).flip())
    errors = [
        float((invert(x, THREE_MODES.predict, schedule(steps)) - exact).norm(dim=1).mean())
        for steps in (32, 64, 128)
    ]
    assert measured_order(errors) == pytest.approx(1, abs=0.1)


@inner
@pytest.mark.parametrize("step", [ancestral_step, reverse_sde_step], ids=["ancestral", "reverse SDE"])
def test_the_weak_order_of_a_stochastic_sampler_is_one(
    step: Callable[..., Tensor], schedule: Callable[[int], Schedule]
) -> None:
    """On Gaussian data a step is affine: the chain's mean and variance follow exactly, without sampling."""
    mean_errors, variance_errors = [], []
    for steps in (128, 256, 512):
        levels = schedule(steps)
        mean, variance = gaussian_moments(levels[0])
        for here, there in pairwise(levels):
            slope, shift, push = affine(partial(stepped, step, here, there))
            mean, variance = slope * mean + shift, slope**2 * variance + push**2
        exact_mean, exact_variance = gaussian_moments(levels[-1])
        mean_errors.append(abs(mean - exact_mean))
        variance_errors.append(abs(variance - exact_variance))
    assert measured_order(variance_errors) == pytest.approx(1, abs=0.2)
    assert mean_errors[-1] < 1e-9 or measured_order(mean_errors) == pytest.approx(1, abs=0.2)


GAUSSIAN_MEAN, GAUSSIAN_VARIANCE = 1.5, 0.36


def stepped(step: Callable[..., Tensor], here: Level, there: Level, x: Tensor, fresh: Tensor) -> Tensor:
    return step(x, gaussian(x, here), here, there, noise=fresh)


def gaussian(x: Tensor, level: Level) -> Estimate:
    """E[x0 | x] and E[ε | x] for x0 ~ N(1.5, 0.6²)."""
    mean, variance = gaussian_moments(level)
    offset = (x - mean) / variance
    return Estimate(GAUSSIAN_MEAN + level.a * GAUSSIAN_VARIANCE * offset, level.b * offset)


def gaussian_moments(level: Level) -> tuple[float, float]:
    return float(level.a * GAUSSIAN_MEAN), float(level.a**2 * GAUSSIAN_VARIANCE + level.b**2)


def affine(step: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float, float]:
    """slope, shift and push of x' = slope·x + shift + push·fresh, read off at (0, 0), (1, 0) and (0, 1)."""
    x, fresh = torch.tensor([[0.0], [1.0], [0.0]]).double(), torch.tensor([[0.0], [0.0], [1.0]]).double()
    shift, slope, push = step(x, fresh).flatten().tolist()
    return slope - shift, shift, push - shift


def states_at(level: Level) -> Tensor:
    """Samples of the mixture at this level [100, 2]."""
    clean = THREE_MODES.sample(100, generator())
    return add_noise(clean, randn_like(clean, generator(1)), level)


@cache
def sampled_finely(schedule: Callable[[int], Schedule]) -> tuple[Tensor, Tensor]:
    """States at the noisy end of the schedule, and where the ODE takes them [100, 2]."""
    x = states_at(schedule(1)[0])
    return x, heun(x, THREE_MODES.predict, schedule(1024))


def measured_order(errors: list[float]) -> float:
    """The slope of log error against log steps, for steps that double each time."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


# What must hold for any model


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_step_up_and_down_with_the_same_prediction_returns_the_latent(kind: PredictionType) -> None:
    latent, prediction = (torch.randn(2, 4, 8, 8, generator=generator(), dtype=torch.float64) for _ in "ab")
    low, high = vp(0.95), vp(0.6)
    said = estimate(prediction, latent, low, kind)
    up = deterministic_step(latent, said, low, high)
    down = deterministic_step(up, said, high, low)
    torch.testing.assert_close(down, latent, rtol=1e-10, atol=1e-10)


def test_inverting_then_sampling_returns_the_latent() -> None:
    latent = THREE_MODES.sample(500, generator())
    schedule = flow(evenly(1.0, 0.0, 400))
    noisy = invert(latent, THREE_MODES.predict, schedule)
    assert float((ddim(noisy, THREE_MODES.predict, schedule) - latent).norm(dim=1).mean()) < 0.02
    assert noisy.mean().abs() < 0.1 and noisy.std() == pytest.approx(1, abs=0.05)


def test_in_both_directions_the_network_gets_the_time_of_the_noisier_end() -> None:
    times: list[int] = []

    def network(noisy: Tensor, time: Tensor) -> Tensor:
        times.append(int(time))
        return noisy

    schedule = vp_schedule(alphas_cumprod(), 4, steps_offset=1, final="first")
    ddim(torch.ones(1, 2), predictor(network, "epsilon"), schedule)
    invert(torch.ones(1, 2), predictor(network, "epsilon"), schedule)
    assert times == [751, 501, 251, 1, 1, 251, 501, 751]


def test_a_trajectory_shows_every_state_of_the_walk() -> None:
    x = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    schedule = flow_schedule(5)
    states = list(trajectory(x, THREE_MODES.predict, schedule))
    assert len(states) == 6 and states[0] is x
    assert torch.equal(states[-1], ddim(x, THREE_MODES.predict, schedule))


@whole
def test_ancestral_steps_without_noise_are_the_deterministic_walk(
    schedule: Callable[[int], Schedule],
) -> None:
    x = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    still = ancestral(x, THREE_MODES.predict, schedule(9), generator=generator(), eta=0.0)
    torch.testing.assert_close(still, ddim(x, THREE_MODES.predict, schedule(9)))


def test_an_ancestral_step_draws_from_ddpm_s_posterior() -> None:
    alphas = alphas_cumprod().double()
    here, there = vp(alphas[500]), vp(alphas[499])
    x0, x, fresh = (torch.randn(3, 2, generator=generator(i), dtype=torch.float64) for i in range(3))
    found = ancestral_step(x, estimate(x0, x, here, "sample"), here, there, noise=fresh)
    alpha = alphas[500] / alphas[499]  # Ho et al. 2020, eq. 7
    mean = (alphas[499].sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - alphas[499]) * x) / (1 - alphas[500])
    variance = (1 - alphas[499]) / (1 - alphas[500]) * (1 - alpha)
    torch.testing.assert_close(found, mean + variance.sqrt() * fresh, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_a_small_reverse_sde_step_has_the_drift_and_the_diffusion_of_the_vp_sde(beta: float) -> None:
    """Song et al. 2021, eqs. 6 and 11: dx = −½βx dt + √β dw, so backwards x' = x + (½βx + βs)h + √(βh)·z."""
    h, time = 1e-6, torch.tensor(0.4, dtype=torch.float64)
    here, there = vp((-beta * time).exp()), vp((-beta * (time - h)).exp())
    x, said, fresh = (torch.randn(3, 2, generator=generator(i), dtype=torch.float64) for i in range(3))
    predicted = estimate(said, x, here, "score")
    drift = reverse_sde_step(x, predicted, here, there, noise=torch.zeros_like(x)) - x
    torch.testing.assert_close(drift / h, beta * x / 2 + beta * said, rtol=1e-4, atol=1e-4)
    pushed = reverse_sde_step(x, predicted, here, there, noise=fresh) - x - drift
    torch.testing.assert_close(pushed / h**0.5, beta**0.5 * fresh, rtol=1e-4, atol=1e-4)


def test_the_corrector_s_step_follows_from_the_signal_to_noise_ratio() -> None:
    """Song et al. 2021, algorithm 4: x ← x + ε·s + √(2ε)·z with ε = 2·(r‖z‖/‖s‖)²."""
    x = torch.randn(1, 16, generator=generator(), dtype=torch.float64)
    schedule = ve(torch.tensor([2.0, 1.5], dtype=torch.float64))

    def predict(noisy: Tensor, level: Level) -> Estimate:
        return estimate(-torch.tanh(noisy), noisy, level, "score")

    same = generator(1)
    fresh, again = randn_like(x, same), randn_like(x, same)
    there = ancestral_step(x, predict(x, schedule[0]), schedule[0], schedule[1], noise=fresh)
    s = -torch.tanh(there)
    step = 2 * (0.3 * again.norm() / s.norm()) ** 2
    found = predictor_corrector(x, predict, schedule, generator=generator(1), signal_to_noise=0.3)
    torch.testing.assert_close(found, there + step * s + (2 * step).sqrt() * again)


def test_a_sample_with_its_own_generator_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    schedule = flow_schedule(6)
    for sampler in (ancestral, reverse_sde, langevin):
        together = sampler(x, THREE_MODES.predict, schedule[1:], generator=[generator(i) for i in range(3)])
        alone = sampler(x[1:2], THREE_MODES.predict, schedule[1:], generator=[generator(1)])
        torch.testing.assert_close(together[1:2], alone)


def test_stochastic_samplers_refuse_rising_noise() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    for sampler in (dpmpp_2m, unipc, ancestral, reverse_sde, langevin, predictor_corrector):
        with pytest.raises(ValueError, match="falls at every level"):
            sampler(x, THREE_MODES.predict, flow_schedule(4).flip())


def test_a_state_keeps_its_dtype() -> None:
    def predict(noisy: Tensor, level: Level) -> Estimate:
        return estimate(torch.tanh(noisy), noisy, level, "flow")

    x = torch.randn(2, 4, 8, 8, generator=generator())
    for sampler in (ddim, heun, dpmpp_2m, unipc, ancestral, reverse_sde, langevin, predictor_corrector):
        assert sampler(x, predict, flow_schedule(3)).dtype is torch.float32


# Parity with diffusers

MIX = 0.6 * torch.randn(4, 4, generator=generator(5))
LATENT = torch.randn(2, 4, 8, 8, generator=generator(6))
SETTINGS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduled(scheduler: Any, **settings: Any) -> Any:
    """diffusers' scheduler of this class, set to twenty steps."""
    made = scheduler(**settings)
    made.set_timesteps(20)
    return made


def network(noisy: Tensor, time: Tensor) -> Tensor:
    """A made-up network, neither linear nor deaf to its time."""
    return torch.tanh(torch.einsum("ij,bjhw->bihw", MIX, noisy) + torch.sin(time.float() / 170))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "spacing, offset, one", [("leading", 1, False), ("leading", 0, True), ("trailing", 0, False)]
)
def test_sampling_down_is_ddim(kind: PredictionType, spacing: Spacing, offset: int, one: bool) -> None:
    scheduler = scheduled(
        DDIMScheduler,
        **SETTINGS,
        clip_sample=False,
        set_alpha_to_one=one,
        steps_offset=offset,
        timestep_spacing=spacing,
        prediction_type=kind,
    )
    theirs = LATENT
    for time in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, time), time, theirs).prev_sample
    schedule = vp_schedule(alphas_cumprod(), 20, spacing, offset, final="one" if one else "first")
    assert_parity(ddim(LATENT, predictor(network, kind), schedule), theirs)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0)])
def test_inverting_is_ddim_inversion(kind: PredictionType, spacing: Spacing, offset: int) -> None:
    scheduler = scheduled(
        DDIMInverseScheduler,
        **SETTINGS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=offset,
        timestep_spacing=spacing,
        prediction_type=kind,
    )
    theirs = LATENT
    for time in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, time), time, theirs).prev_sample
    schedule = vp_schedule(alphas_cumprod(), 20, spacing, offset, final="first")
    assert_parity(invert(LATENT, predictor(network, kind), schedule), theirs)


def test_ancestral_sampling_is_ddim_with_eta_one() -> None:
    scheduler = scheduled(
        DDIMScheduler, **SETTINGS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    theirs, same = LATENT, generator(7)
    for time in scheduler.timesteps:
        theirs = scheduler.step(
            network(theirs, time), time, theirs, eta=1.0, variance_noise=randn_like(theirs, same)
        ).prev_sample
    schedule = vp_schedule(alphas_cumprod(), 20, steps_offset=1, final="first")
    assert_parity(ancestral(LATENT, predictor(network, "epsilon"), schedule, generator=generator(7)), theirs)


multistep = pytest.mark.parametrize(
    ("scheduler_class", "sampler"),
    [(DPMSolverMultistepScheduler, dpmpp_2m), (UniPCMultistepScheduler, unipc)],
    ids=["DPM++ 2M", "UniPC"],
)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0)])
@multistep
def test_a_sampler_that_remembers_one_estimate_is_diffusers_multistep_solver(
    scheduler_class: Any, sampler: Any, kind: PredictionType, spacing: Spacing, offset: int
) -> None:
    scheduler = scheduled(
        scheduler_class,
        **SETTINGS,
        timestep_spacing=spacing,
        steps_offset=offset,
        prediction_type=kind,
    )
    theirs = LATENT
    for time in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, time), time, theirs).prev_sample
    steps = [int(time) for time in scheduler.timesteps]
    alpha_bar = alphas_cumprod()
    levels = vp(torch.cat([alpha_bar[steps], torch.ones(1)]), torch.tensor([*map(float, steps), 0.0]))
    assert_parity(sampler(LATENT, predictor(network, kind), levels), theirs)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 14, 15, 20])
@multistep
def test_a_solver_that_ends_above_no_noise_ends_as_diffusers_does(
    scheduler_class: Any, sampler: Any, steps: int
) -> None:
    """DPM-Solver++'s last step is of first order where there are fewer than 15."""
    scheduler = scheduler_class(**SETTINGS, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(steps)
    theirs = LATENT
    for time in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, time), time, theirs).prev_sample
    times, alpha_bar = scheduler.timesteps.long(), alphas_cumprod()
    levels = vp(torch.cat([alpha_bar[times], alpha_bar[:1]]), torch.cat([times.float(), torch.zeros(1)]))
    assert_parity(sampler(LATENT, predictor(network, "epsilon"), levels), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@multistep
def test_two_steps_memory_on_a_flow_are_diffusers_multistep_solver(
    scheduler_class: Any, sampler: Any, shift: float
) -> None:
    scheduler = scheduled(
        scheduler_class, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    theirs = LATENT
    for time in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, time), time, theirs).prev_sample
    sigmas = scheduler.sigmas
    levels = flow(sigmas, torch.cat([scheduler.timesteps.float(), torch.zeros(1)]))
    assert_parity(sampler(LATENT, predictor(network, "flow"), levels), theirs)


def test_a_flow_s_first_step_whose_ratio_has_no_logarithm_is_walked_by_every_multistep_solver() -> None:
    for sampler in (dpmpp_2m, unipc):
        assert sampler(LATENT, predictor(network, "flow"), flow_schedule(6)).isfinite().all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_a_flow_is_flow_match_euler(shift: float) -> None:
    scheduler = scheduled(FlowMatchEulerDiscreteScheduler, shift=shift)
    theirs = LATENT
    for time in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, time), time, theirs).prev_sample
    assert_parity(ddim(LATENT, predictor(network, "flow"), flow_schedule(20, shift)), theirs)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ancestral_sampling_is_euler_ancestral(kind: PredictionType) -> None:
    scheduler = scheduled(
        EulerAncestralDiscreteScheduler,
        **SETTINGS,
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type=kind,
    )
    theirs, same = LATENT * scheduler.init_noise_sigma, generator(7)
    for time in scheduler.timesteps:
        said = network(scheduler.scale_model_input(theirs, time), time)
        theirs = scheduler.step(said, time, theirs, generator=same).prev_sample
    schedule = vp_schedule(alphas_cumprod(), 20, steps_offset=1)
    ours = ancestral(
        LATENT * scheduler.init_noise_sigma,
        scale_to_unit_variance(predictor(network, kind)),
        to_sigma_space(schedule),
        generator=generator(7),
    )
    assert_parity(ours, theirs)
    # the step does not depend on the scale of the state, so the VP schedule itself gives the same pictures
    assert_parity(ancestral(LATENT, predictor(network, kind), schedule, generator=generator(7)), theirs)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_heun_in_sigma_space_is_heun_discrete(kind: PredictionType) -> None:
    scheduler = scheduled(
        HeunDiscreteScheduler, **SETTINGS, timestep_spacing="leading", steps_offset=1, prediction_type=kind
    )
    theirs = LATENT * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        said = network(scheduler.scale_model_input(theirs, time), time)
        theirs = scheduler.step(said, time, theirs).prev_sample
    schedule = to_sigma_space(vp_schedule(alphas_cumprod(), 20, steps_offset=1))
    ours = heun(
        LATENT * scheduler.init_noise_sigma, scale_to_unit_variance(predictor(network, kind)), schedule
    )
    assert_parity(ours, theirs)


def assert_parity(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
