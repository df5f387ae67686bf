"""Training on rewards: the policy's densities, PPO's clip, and gradients through the sampler's last steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.collect.scorers import refuse_not_differentiable
from align.objectives.ddpo import (
    PolicyGradients,
    advantages,
    ancestral_std,
    clipped_loss,
    is_random,
    log_probability,
    sample_trajectories,
)
from align.objectives.draft import RewardGradients, embed_pictures
from align.settings import Settings
from backbone.diffusion.noise import Estimate, Level, generator, ve
from backbone.diffusion.samplers import ancestral, ancestral_step
from backbone.diffusion.schedules import karras_schedule
from backbone.io.console import UserError
from backbone.io.prompts import Prompt
from backbone.io.run_folder import CHECKPOINT
from backbone.models.model import Backbone
from backbone.training.run import take_steps

PROMPTS = [Prompt("a red dog"), Prompt("a cat in the snow")]
BRIGHT = """
def score(images, prompts):
    return [sum(one.convert("L").tobytes()) / 255 / one.width / one.height for one in images]
"""


def settings(**changes: Any) -> Settings:
    base: dict[str, Any] = {
        "pairs": "", "online": "moji", "prompts": "p.txt", "loss": "draft", "reference": "live", "steps": 8,
        "batch": 2, "rounds": 2, "per_prompt": 3, "sample_steps": 3, "guidance": 2.0, "rank": 4,
        "learning_rate": 1e-2, "lr_warmup_steps": 0, "lora_layers": "all", "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    return Settings(**{**base, **changes})


def brightness(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    return pictures.mean((1, 2, 3))


@pytest.fixture
def climbing(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> RewardGradients:
    monkeypatch.setattr("align.objectives.draft.open_reward", lambda name: brightness)
    return RewardGradients(tiny, PROMPTS, settings())


@pytest.fixture
def policy(tiny: Backbone, tmp_path: Path) -> PolicyGradients:
    scorer = tmp_path / "bright.py"
    scorer.write_text(BRIGHT)
    return PolicyGradients(
        tiny, PROMPTS, settings(loss="ddpo", online=str(scorer), batch=6, learning_rate=1e-4)
    )


# The policy -------------------------------------------------------------------------------------------------


def denoise(noisy: Tensor, level: Level) -> Estimate:
    """The best answer about clean samples of unit variance."""
    a, b = level.broadcast_like(noisy)
    clean = a * noisy / (a * a + b * b)
    return Estimate(clean, (noisy - a * clean) / b)


def test_recorded_trajectories_are_the_ancestral_sampler_s() -> None:
    schedule = karras_schedule(6, sigma_min=0.02, sigma_max=8.0)
    start = torch.randn(3, 4, 2, 2, generator=generator(0)) * 8
    states, chances = sample_trajectories(start, denoise, schedule, [generator(1, row) for row in range(3)])
    plain = ancestral(start, denoise, schedule, generator=[generator(1, row) for row in range(3)])
    assert torch.equal(states[-1], plain)
    assert states.shape == (len(schedule), 3, 4, 2, 2) and chances.shape == (len(schedule) - 1, 3)
    if not is_random(schedule[-2], schedule[-1]):
        assert torch.equal(chances[-1], torch.zeros(3))


def test_the_log_probability_is_the_normal_density_s_up_to_its_constant() -> None:
    here, there = ve(torch.tensor(2.0)), ve(torch.tensor(1.0))
    noisy = torch.randn(2, 4, 3, 3, generator=generator(2))
    estimate = denoise(noisy, here)
    mean = ancestral_step(noisy, estimate, here, there, noise=torch.zeros_like(noisy))
    normal = torch.distributions.Normal(mean, ancestral_std(here, there))
    points = [torch.randn(noisy.shape, generator=generator(3, k)) for k in range(2)]
    ours = [log_probability(point, noisy, estimate, here, there) for point in points]
    theirs = [normal.log_prob(point).flatten(1).mean(1) for point in points]
    torch.testing.assert_close(ours[0] - ours[1], theirs[0] - theirs[1])


def test_the_spread_is_that_of_the_posterior() -> None:
    """On VE from σ to σ': up² = σ'²(σ² − σ'²)/σ²: from 2 to 1, √0.75."""
    assert ancestral_std(ve(torch.tensor(2.0)), ve(torch.tensor(1.0))) == pytest.approx(math.sqrt(0.75))
    assert ancestral_std(ve(torch.tensor(2.0)), ve(torch.tensor(0.0))) == 0.0


def test_hand_worked_values_of_the_clipped_loss() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    assert clipped_loss(ratio, advantage, 0.2).tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -2.0])


def test_advantages_are_within_a_prompt_and_of_unit_deviation() -> None:
    found = advantages(torch.tensor([[1.0, 3.0], [10.0, 14.0]]))
    assert found.mean(1).tolist() == pytest.approx([0.0, 0.0])
    assert float(found.std(correction=0)) == pytest.approx(1.0)
    assert advantages(torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_the_policy_that_drew_has_a_ratio_of_one(policy: PolicyGradients) -> None:
    policy.trajectories, policy.round = policy.collect(0), 0
    with torch.no_grad():
        loss = policy.loss(0, [0, 1, 4])
    assert float(loss) == pytest.approx(-float(policy.trajectories.advantage[[0, 1, 4]].mean()), abs=1e-5)


def test_a_scorer_that_tells_no_images_apart_is_refused_and_later_on_said(
    policy: PolicyGradients, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.scorer = lambda pictures, prompts: torch.ones(len(pictures))
    with pytest.raises(UserError, match="all 3 images of each prompt the same number"):
        next(take_steps(policy))
    policy.collect(1)
    assert "Round 2: " in (said := capsys.readouterr().err) and "nothing is learned from them" in said


def test_the_last_round_takes_the_steps_that_are_left_and_none_is_saved_within_it(
    tiny: Backbone, policy: PolicyGradients, tmp_path: Path
) -> None:
    policy.settings = replace(policy.settings, steps=5)
    assert [policy.find_round(done) for done in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    saved = []
    for _ in take_steps(policy):
        policy.save(tmp_path)
        saved.append((tmp_path / CHECKPOINT).exists())
        (tmp_path / CHECKPOINT).unlink(missing_ok=True)
    assert saved == [False, True, False, False, True]


def test_a_step_makes_better_pictures_more_likely(policy: PolicyGradients) -> None:
    before = [value.detach().clone() for value in policy.parameters.values()]
    next(take_steps(policy))
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters.values(), strict=True))
    walks, gain = policy.trajectories, 0.0
    with torch.no_grad():
        for rung in range(len(policy.schedule) - 1):
            here, there = policy.schedule[rung], policy.schedule[rung + 1]
            if not is_random(here, there):
                continue
            noisy, then = walks.states[rung], walks.states[rung + 1]
            now = log_probability(then, noisy, policy.predictor(walks.prompts)(noisy, here), here, there)
            gain += float(((now - walks.log_probability[rung]) * walks.advantage).sum())
    assert gain > 0


# Gradients of the reward ------------------------------------------------------------------------------------


def test_climbing_a_reward_raises_it(climbing: RewardGradients) -> None:
    rewards = [climbing.figures["reward"] for _ in take_steps(climbing)]
    assert rewards[-1] > rewards[0]


def test_only_the_last_steps_carry_a_gradient(climbing: RewardGradients) -> None:
    """A gradient of K steps differs from one of all, and no K changes the pictures."""
    from dataclasses import replace

    found = []
    for last in (1, 3):
        climbing.settings = replace(climbing.settings, reward_steps=last)
        reward = climbing.rewards([0, 1], [(1, 0), (1, 1)])
        gradient = torch.autograd.grad(reward.sum(), list(climbing.parameters.values()), allow_unused=True)
        found.append((reward.detach(), [g for g in gradient if g is not None]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert any(not torch.allclose(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_decoding_with_gradients_gives_the_same_pictures(tiny: Backbone) -> None:
    latents = torch.randn(1, *tiny.latent_shape, generator=generator(4)).requires_grad_()
    pictures = tiny.decode_with_gradients(latents)
    assert torch.equal(pictures.detach(), tiny.decode(latents))
    assert pictures.requires_grad and not tiny.decode(latents).requires_grad


def test_a_scorer_without_gradients_is_refused_for_draft(tmp_path: Path) -> None:
    for name in ("mine.py", "like:pictures"):
        with pytest.raises(UserError, match="ddpo"):
            refuse_not_differentiable(name)
    refuse_not_differentiable("moji")


def test_a_scorer_sees_tensors_as_it_sees_pictures() -> None:
    import numpy as np
    from PIL import Image

    from align.collect.scorers import load_clip_scorer
    from backbone.media.transforms import to_tensor

    scorer = load_clip_scorer("moji")
    pixels = np.random.default_rng(0).integers(
        0, 255, (scorer.crop_size, scorer.crop_size, 3), dtype=np.uint8
    )
    image = Image.fromarray(pixels)
    ours = embed_pictures(scorer, to_tensor(image)[None])
    torch.testing.assert_close(ours, scorer.embed_images([image]), atol=1e-5, rtol=1e-4)
