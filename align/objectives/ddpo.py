"""DDPO: policy gradients over sampled trajectories (Black et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from align.collect.scorers import ImageScorer, open_scorer
from align.objectives.reward import RewardTraining
from backbone.diffusion.noise import Estimate, Level, Predict, generator, randn_like
from backbone.diffusion.samplers import ancestral_step
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.io.console import UserError, notify
from backbone.media.transforms import to_image

SAMPLED_TOGETHER = 8  # images of a round


@dataclass(frozen=True, eq=False)
class Trajectories:
    """N trajectories of S stochastic steps: states [S + 1, N, …], log-probabilities [S, N], advantages [N]."""

    states: Tensor
    log_probability: Tensor
    advantage: Tensor
    prompts: Sequence[int]


class PolicyGradients(RewardTraining):
    """DDPO: each of `rounds` samples and scores `per_prompt` images of every prompt; several steps train on them."""

    def __post_init__(self) -> None:
        self.scorer: ImageScorer = open_scorer(self.settings.online)
        self.round = -1
        super().__post_init__()

    def losses(self, step: int) -> Iterator[Tensor]:
        """The clipped loss of `batch` trajectories, one sampling step after another."""
        # A round begins: trajectories of the current policy, in a random order
        number, inner_step = self.find_round(step - 1)
        if self.round != number:
            self.trajectories, self.round = self.collect(number), number
            self.order = torch.randperm(
                len(self.trajectories.prompts), generator=generator(self.settings.seed, "order", number)
            ).tolist()

        # A loss for each stochastic step of these trajectories: their gradients make one update
        batch = self.settings.batch
        rows = [self.order[n % len(self.order)] for n in range(inner_step * batch, (inner_step + 1) * batch)]
        parts = self._list_micro_batches()
        for part in parts:
            scale = len(part) * len(parts) * processes.world_size() / batch
            for index in range(len(self.schedule) - 1):
                if is_random(self.schedule[index], self.schedule[index + 1]):
                    yield self.loss(index, [rows[row] for row in part]) * scale

    def find_round(self, done: int) -> tuple[int, int]:
        """The round of the step after so many, and that step's number in it; the last round takes the remainder."""
        steps = self.settings.steps // self.settings.rounds
        number = min(done // steps, self.settings.rounds - 1)
        return number, done - number * steps

    def loss(self, index: int, rows: Sequence[int]) -> Tensor:
        """−mean over trajectories of min(ρ·A, clip(ρ)·A), ρ the step's likelihood ratio, current to old policy."""
        trajectories = self.trajectories
        indices = send(torch.tensor(list(rows)), trajectories.states.device)
        noisy, next_states = trajectories.states[index, indices], trajectories.states[index + 1, indices]
        predict = self.predictor([trajectories.prompts[row] for row in rows])
        level, next_level = self.schedule[index], self.schedule[index + 1]

        # ρ = p_now(x' | x) / p_then(x' | x)
        current_log_probability = log_probability(
            next_states, noisy, predict(noisy, level), level, next_level
        )
        ratio = (current_log_probability - trajectories.log_probability[index, indices]).exp()
        return clipped_loss(ratio, trajectories.advantage[indices], self.settings.clip_range).mean()

    @torch.no_grad()
    def collect(self, number: int) -> Trajectories:
        """Sample and score a round's images with the current policy; `figures` gets their mean reward.

        Each process samples a share of them, and all processes get all.
        """
        # Each process fills its own rows; the sum over processes fills all
        keys = [(i, j) for i in range(len(self.prompts)) for j in range(self.settings.per_prompt)]
        device, levels = self.model.device, len(self.schedule)
        states = torch.zeros(levels, len(keys), *self.model.latent_shape, device=device)
        log_probabilities = torch.zeros(levels - 1, len(keys), device=device)
        rewards = torch.zeros(len(keys))
        for first in range(0, len(keys), SAMPLED_TOGETHER)[processes.rank() :: processes.world_size()]:
            columns = slice(first, first + SAMPLED_TOGETHER)
            batch = keys[columns]
            predict = self.predictor([i for i, _ in batch])
            randoms = [generator(self.settings.seed, "round", number, i, j) for i, j in batch]
            names = [(1 + i, number * self.settings.per_prompt + j) for i, j in batch]
            states[:, columns], log_probabilities[:, columns] = sample_trajectories(
                self.draw_start(names), predict, self.schedule, randoms
            )
            pictures = [to_image(image) for image in self.model.decode(states[-1, columns]).cpu()]
            rewards[columns] = self.scorer(pictures, [self.prompts[i].text for i, _ in batch])
        processes.sum_in_place([states, log_probabilities, rewards])

        # Advantages are relative to the other images of the same prompt
        self.figures = {"reward": float(rewards.mean())}
        advantage = advantages(rewards.view(len(self.prompts), -1)).flatten().to(self.model.device)
        self._refuse_no_advantage(advantage, number)
        return Trajectories(states, log_probabilities, advantage, [i for i, _ in keys])

    def _refuse_no_advantage(self, advantage: Tensor, number: int) -> None:
        """`UserError` where the first round's scores order no two images of a prompt; of a later one it is printed."""
        if bool(advantage.any()):
            return
        alike = f"{self.settings.online} gives all {self.settings.per_prompt} images of each prompt the same number"
        if number > 0:
            notify(f"Round {number + 1}: {alike}, so nothing is learned from them.")
            return
        raise UserError(
            f"{alike}, so nothing says which is better. Draw more of each prompt (--per-prompt), or take a scorer that "
            "tells them apart."
        )

    def save(self, run: Path) -> None:
        """Write the checkpoint at the end of a round; within a round nothing, since its trajectories are not saved."""
        if self.done == self.settings.steps or self.find_round(self.done)[1] == 0:
            super().save(run)


def sample_trajectories(
    noisy: Tensor, predict: Predict, schedule: Level, randoms: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Ancestral sampling that keeps the states [S + 1, B, …] and the steps' log-probabilities [S, B]."""
    states, log_probabilities = [noisy], []
    for level, next_level in pairwise(schedule):
        estimate = predict(noisy, level)
        next_noisy = ancestral_step(noisy, estimate, level, next_level, noise=randn_like(noisy, randoms))
        log_probabilities.append(
            log_probability(next_noisy, noisy, estimate, level, next_level)
            if is_random(level, next_level)
            else torch.zeros(len(noisy), device=noisy.device)
        )
        states.append(next_noisy)
        noisy = next_noisy
    return torch.stack(states), torch.stack(log_probabilities)


def log_probability(
    next_noisy: Tensor, noisy: Tensor, estimate: Estimate, level: Level, next_level: Level
) -> Tensor:
    """log p(next_noisy | noisy) [B] of an ancestral step, mean over C, H, W, without the constant.

    The step is N(mean, up²) with `ancestral_step`'s own mean and up. The mean over dimensions is that of the authors'
    code, for which their clip range of 1e-4 is meant.
    """
    mean = ancestral_step(noisy, estimate, level, next_level, noise=torch.zeros_like(noisy))
    return -((next_noisy.detach() - mean) ** 2).flatten(1).mean(1) / (
        2 * ancestral_std(level, next_level) ** 2
    )


def ancestral_std(level: Level, next_level: Level) -> float:
    """The standard deviation of an ancestral step: 0 for the last step, to the clean image."""
    zero = torch.zeros(1, dtype=torch.float64)
    estimate = Estimate(zero, zero)
    return float(ancestral_step(zero, estimate, level, next_level, noise=torch.ones_like(zero)))


def is_random(level: Level, next_level: Level) -> bool:
    """Whether a step adds noise, so that it has a density."""
    return ancestral_std(level, next_level) > 1e-6


def clipped_loss(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """PPO's loss [B]: −min(ρ·A, clip(ρ, 1 ± range)·A) (Schulman et al. 2017, eq. 7)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def advantages(rewards: Tensor) -> Tensor:
    """Advantages [P, J]: rewards minus their prompt's mean, divided by the standard deviation of all, within −5…5."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / centred.std(correction=0).clamp(min=1e-6)).clamp(-5, 5)
