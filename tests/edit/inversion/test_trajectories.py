"""Trajectories up to noise, and what leads back down them: on a mixture whose score is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from backbone.diffusion.noise import (
    Estimate,
    Level,
    PredictionType,
    Schedule,
    convert,
    estimate,
    predictor,
    vp,
)
from backbone.diffusion.samplers import ddim
from backbone.diffusion.schedules import alphas_cumprod, flow_schedule, vp_schedule
from edit.inversion.trajectories import (
    corrected_step,
    corrections,
    invert_ddim,
    invert_implicit,
    invert_two_step,
    noise_independently,
    two_step,
)
from tests.backbone.mixture import THREE_MODES

ALPHAS = alphas_cumprod().double()
SCHEDULES = {
    "leading": vp_schedule(ALPHAS, 20, "leading", 0, final="one"),
    "leading offset": vp_schedule(ALPHAS, 20, "leading", 1, final="first"),
    "trailing": vp_schedule(ALPHAS, 20, "trailing", final="first"),
    "linspace": vp_schedule(ALPHAS, 20, "linspace", final="one"),
    "linspace, its last level twice": vp_schedule(ALPHAS, 20, "linspace", final="first"),
    "flow": flow_schedule(20),
    "shifted flow": flow_schedule(20, shift=3.0),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def samples(count: int = 64) -> Tensor:
    return THREE_MODES.sample(count, torch.Generator().manual_seed(0))


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt())


def replayed(states: Tensor, schedule: Schedule) -> Tensor:
    """The two-steps down again from the two noisiest states."""
    down = [states[0], states[1]]
    for before, here, there in zip(schedule, schedule[1:], schedule[2:], strict=False):
        down.append(two_step(down[-2], down[-1], THREE_MODES.predict(down[-1], here), before, here, there))
    return torch.stack(down)


@schedules
def test_every_trajectory_begins_at_the_noisy_end_and_ends_at_the_clean_latent(schedule: Schedule) -> None:
    clean, predict = samples(), THREE_MODES.predict
    noise = torch.Generator().manual_seed(1)
    for states in (
        invert_ddim(clean, predict, schedule),
        invert_implicit(clean, predict, schedule),
        invert_two_step(clean, predict, schedule),
        noise_independently(clean, schedule, generator=noise),
    ):
        assert states.shape == (21, 64, 2)
        assert torch.equal(states[-1], clean)
        assert float(states[0].std()) > 0.7


@schedules
def test_two_steps_lead_back_exactly(schedule: Schedule) -> None:
    clean = samples()
    states = invert_two_step(clean, THREE_MODES.predict, schedule)
    assert torch.allclose(replayed(states, schedule), states, rtol=0, atol=1e-9)


def test_a_two_step_undoes_itself() -> None:
    random = torch.Generator().manual_seed(0)
    before, now, clean, noise = torch.randn(4, 8, 2, generator=random, dtype=torch.float64)
    schedule = SCHEDULES["leading offset"]
    levels = schedule[3], schedule[4], schedule[5]
    after = two_step(before, now, Estimate(clean, noise), *levels)
    assert torch.allclose(two_step(after, now, Estimate(clean, noise), *levels[::-1]), before, atol=1e-12)


def test_two_steps_are_of_second_order() -> None:
    """Half the step, a quarter of the error, on a schedule as smooth as the rule asks for."""
    clean = samples(256)

    def arrival(steps: int) -> Tensor:
        tau = torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64)
        alpha_bar = (1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2)
        return invert_two_step(clean, THREE_MODES.predict, vp(alpha_bar))[0]

    exact = arrival(1280)
    coarse, fine = deviation(arrival(40), exact), deviation(arrival(80), exact)
    assert coarse / fine == pytest.approx(4, rel=0.3)


@schedules
def test_noise_maps_lead_back_exactly(schedule: Schedule) -> None:
    def predict(noisy: Tensor, level: Level) -> Estimate:
        return Estimate(*(half.float() for half in THREE_MODES.predict(noisy, level)))

    clean = samples().float()
    states = noise_independently(clean, schedule, generator=torch.Generator().manual_seed(1))
    found = corrections(states, predict, schedule)
    now = states[0]
    for number, (here, there) in enumerate(pairwise(schedule)):
        now = corrected_step(now, predict(now, here), here, there, found[number])
        assert torch.allclose(now, states[number + 1], rtol=0, atol=1e-5)


def test_states_with_noise_of_their_own_have_the_levels_variance() -> None:
    states = noise_independently(
        torch.zeros(20_000, 2), SCHEDULES["flow"], generator=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(states.flatten(1).std(1).double(), SCHEDULES["flow"].b, atol=0.02)
    assert abs(float((states[1] * states[2]).mean())) < 0.02, "drawn anew at every level"


FINE = {
    "leading": vp_schedule(ALPHAS, 50, "leading", 1, final="first"),
    "trailing": vp_schedule(ALPHAS, 50, "trailing", final="one"),
    "flow": flow_schedule(50),
}


@pytest.mark.parametrize("schedule", FINE.values(), ids=FINE)
def test_fixed_points_lead_back_far_better_than_plain_inversion(schedule: Schedule) -> None:
    clean, predict = samples(), THREE_MODES.predict
    plain = deviation(ddim(invert_ddim(clean, predict, schedule)[0], predict, schedule), clean)
    few = deviation(ddim(invert_implicit(clean, predict, schedule, rounds=4)[0], predict, schedule), clean)
    many = deviation(
        ddim(invert_implicit(clean, predict, schedule, rounds=60, tolerance=1e-9)[0], predict, schedule),
        clean,
    )
    assert few < plain / 2
    assert many < plain / 1000


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow", "sample"])
def test_what_the_network_speaks_of_does_not_matter(kind: PredictionType) -> None:
    schedule = SCHEDULES["leading offset"]
    clean = samples()

    def network(noisy: Tensor, time: Tensor) -> Tensor:
        alpha_bar = ALPHAS[time]
        level = vp(alpha_bar, time)
        return convert(THREE_MODES.predict(noisy, level).noise, noisy, level, "epsilon", kind)

    def exact(noisy: Tensor, level: Level) -> Estimate:
        assert level.time is not None
        told = vp(ALPHAS[level.time], level.time)
        return estimate(
            convert(THREE_MODES.predict(noisy, told).noise, noisy, told, "epsilon", kind), noisy, level, kind
        )

    for way in (invert_ddim, invert_implicit, invert_two_step):
        states = way(clean, predictor(network, kind), schedule)
        assert torch.allclose(states, way(clean, exact, schedule))
