"""DRaFT: the gradient of a differentiable reward through the last sampling steps (Clark et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from align.collect.scorers import load_clip_scorer, refuse_not_differentiable
from align.objectives.reward import RewardTraining
from backbone.diffusion.samplers import ddim
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.evaluation.clip import Scorer

Reward: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]
"""(pictures [B, 3, H, W] in −1…1, their prompts) → rewards [B], differentiable in the pictures."""


class RewardGradients(RewardTraining):
    """DRaFT-K: every step samples `batch` pictures of prompts in turn and ascends their mean reward."""

    def __post_init__(self) -> None:
        self.reward = open_reward(self.settings.online)
        super().__post_init__()

    def losses(self, step: int) -> Iterator[Tensor]:
        """−mean reward of new samples; micro-batches are weighted by their number of pictures."""
        batch, count = self.settings.batch, len(self.prompts)
        positions = range((step - 1) * batch, step * batch)
        rewards = []
        parts = self._list_micro_batches()
        for part in parts:
            numbers = [positions[row] % count for row in part]
            reward = self.rewards(numbers, [(step, row) for row in part])
            rewards.append(reward.detach())
            yield -reward.mean() * (len(part) * len(parts) * processes.world_size() / batch)
        self.figures = {"reward": processes.reduce_mean(torch.cat(rewards))}

    def rewards(self, numbers: Sequence[int], keys: Sequence[tuple[int, int]]) -> Tensor:
        """Rewards [B] of pictures of these prompts, with the gradient of the last K sampling steps (algorithm 1)."""
        predict = self.predictor(numbers)
        first_trained = max(0, len(self.schedule) - 1 - self.settings.reward_steps)

        # S − K steps without gradients, then K with, through the decoder too
        with torch.no_grad():
            noisy = ddim(self.draw_start(keys), predict, self.schedule[: first_trained + 1])
        clean = ddim(noisy, predict, self.schedule[first_trained:])
        pictures = self.model.decode_with_gradients(clean)
        return self.reward(pictures, [self.prompts[number].text for number in numbers])


def open_reward(name: str) -> Reward:
    """The scorer of this name as a differentiable function; `UserError` if it is none (a Python file)."""
    refuse_not_differentiable(name)
    scorer = load_clip_scorer(name)
    texts: dict[str, Tensor] = {}

    def reward(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        for prompt in prompts:
            if prompt not in texts:
                texts[prompt] = scorer.embed_texts([prompt])[0]
        targets = send(torch.stack([texts[prompt] for prompt in prompts]), pictures.device)
        return (embed_pictures(scorer, pictures) * targets).sum(-1)

    return reward


def embed_pictures(scorer: Scorer, pictures: Tensor) -> Tensor:
    """Unit vectors [B, D] of square pictures [B, 3, H, W] in −1…1, with gradients."""
    size = (scorer.crop_size, scorer.crop_size)
    if pictures.shape[-2:] != size:
        pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True)
    mean, deviation = (
        send(torch.tensor(value), pictures.device)[None, :, None, None] for value in (scorer.mean, scorer.std)
    )
    network: Any = scorer.model
    features = (
        network.to(pictures.device).get_image_features(((pictures + 1) / 2 - mean) / deviation).pooler_output
    )
    return F.normalize(features.float(), dim=-1)
