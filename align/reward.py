"""Training on a scorer's numbers themselves, without pairs: gradients through the reward, or of the policy.

`draft` (Clark et al. 2024, DRaFT-K) walks noise down with the model, keeps the gradient of the last K steps, of the
decoder and of the scorer, and climbs the reward. It needs a scorer that is a network.

`ddpo` (Black et al. 2024, eq. 6) needs numbers alone: it takes the stochastic sampler for a policy whose every step
is Gaussian, and makes the steps of pictures that scored above their prompt's mean more likely, by clipped importance
ratios as in PPO.

Both go wrong in one way: they find what the scorer likes and pictures should not have. Judge them by another scorer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from align.scoring import Judge, open_judge, open_scorer, takes_gradients
from align.settings import Settings
from align.train import ADAPTER, CHECKPOINT, new_adapter, schedule, share_of
from backbone import processes
from backbone.adapters import WEIGHTS, save_lora
from backbone.attention import quick_to_train
from backbone.cache import encoded_prompts
from backbone.concept import Concept, spoken
from backbone.families import Text
from backbone.images import to_image
from backbone.io.prompts import Prompt
from backbone.loop import Report, generator, load_checkpoint, save_checkpoint, train
from backbone.model import Backbone
from backbone.noise import Estimate, Level, Predict, normal_like
from backbone.sample import initial_noise
from backbone.scorers import Scorer
from backbone.steps import ancestral_step, walk

Reward: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]
"""(pictures [B, 3, H, W] in −1…1, their prompts) → rewards [B], differentiable in the pictures."""


@dataclass
class RewardTraining(ABC):
    """What both ways share: a LoRA, its optimiser, prompts whose `Text` is encoded once; `steps` yields the reports.

    A step's prompts and noise follow from its number, so a run goes on bit for bit where it was saved.
    """

    model: Backbone
    prompts: Sequence[Prompt]
    settings: Settings
    base: Sequence[str] = ()
    concepts: Sequence[Concept] = ()
    figures: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.share = share_of(settings)
        said = [
            spoken(prompt.text, self.concepts) if self.concepts else prompt.text for prompt in self.prompts
        ]
        with processes.writer_first():
            self.text = encoded_prompts(self.model, [*said, ""])
        self.model.free("text_encoder")
        self.parameters = new_adapter(self.model, settings, self.base)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.ladder = self.model.ladder(settings.sample_steps)
        self.done = 0

    def steps(self) -> Iterator[Report]:
        """Trains, a report each optimiser step; `figures` then holds the step's rewards."""
        with quick_to_train(self.model.denoiser):
            for report in train(
                self.losses,
                self.parameters,
                optimizer=self.optimizer,
                schedule=schedule(self.settings),
                steps=self.settings.steps,
                done=self.done,
                clip=self.settings.max_grad_norm,
                reduce=processes.averaging(),
            ):
                self.done = report.step
                yield report

    @abstractmethod
    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses of a step's micro-batches."""

    @abstractmethod
    def may_save(self, step: int) -> bool:
        """Whether a run that is saved after this step goes on exactly."""

    def save(self, run: Path) -> None:
        """Writes the checkpoint."""
        if processes.is_writer():
            save_checkpoint(
                run / CHECKPOINT, step=self.done, parameters=self.parameters, optimizer=self.optimizer
            )

    def resume(self, run: Path) -> None:
        """Goes on where `save` was called last; from the start when it never was."""
        if (run / CHECKPOINT).exists():
            self.done, _ = load_checkpoint(
                run / CHECKPOINT, parameters=self.parameters, optimizer=self.optimizer
            )

    def write(self, run: Path, header: dict[str, str]) -> dict[str, str]:
        """Writes the LoRA; gives the fields of `Concept` that name the files."""
        save_lora(run / WEIGHTS, self.model.denoiser, ADAPTER, metadata=header)
        return {"weights": WEIGHTS}

    def predictor(self, numbers: Sequence[int]) -> Predict:
        """The model's guided prediction for these prompts, one a sample."""
        empty = self._rows([len(self.prompts)] * len(numbers))
        return self.model.guided_predictor(self._rows(numbers), empty, self.settings.guidance)

    def start(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        """The noise [B, C, H, W] from which a picture is drawn, one for each key."""
        noise = torch.stack([initial_noise(self.model, self.settings.seed, *key) for key in keys])
        first = self.ladder[0]
        return noise.to(self.model.device) * float((first.a**2 + first.b**2).sqrt())

    def _rows(self, numbers: Sequence[int]) -> Text:
        rows = torch.tensor(list(numbers))
        return {name: value[rows.to(value.device)] for name, value in self.text.items()}

    def _micro(self) -> list[range]:
        """This process's share of a step's rows, in micro-batches."""
        count = self.settings.batch
        size = self.settings.micro_batch or count
        parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
        return [part[self.share.rows] for part in parts[self.share.micros]]


# Gradients of the reward ------------------------------------------------------------------------------------


class RewardGradients(RewardTraining):
    """DRaFT-K: every step draws `batch` pictures of prompts in turn and climbs their mean reward."""

    def __post_init__(self) -> None:
        self.reward = open_reward(self.settings.online)
        super().__post_init__()

    def losses(self, step: int) -> Iterator[Tensor]:
        """−mean reward of fresh pictures; micro-batches weigh as many pictures as they hold."""
        batch, count = self.settings.batch, len(self.prompts)
        places = range((step - 1) * batch, step * batch)
        rewards = []
        parts = self._micro()
        for part in parts:
            numbers = [places[row] % count for row in part]
            reward = self.rewards(numbers, [(step, row) for row in part])
            rewards.append(reward.detach())
            yield -reward.mean() * (len(part) * len(parts) * processes.world() / batch)
        self.figures = {"reward": float(processes.mean(torch.cat(rewards)))}

    def rewards(self, numbers: Sequence[int], keys: Sequence[tuple[int, int]]) -> Tensor:
        """Rewards [B] of pictures of these prompts, with the gradient of the walk's last K steps (algorithm 1)."""
        predict = self.predictor(numbers)
        here = max(0, len(self.ladder) - 1 - self.settings.reward_steps)
        with torch.no_grad():
            noisy = walk(self.start(keys), predict, self.ladder[: here + 1])
        clean = walk(noisy, predict, self.ladder[here:])
        pictures = self.model.decode_with_gradients(clean)
        return self.reward(pictures, [self.prompts[number].text for number in numbers])

    def may_save(self, step: int) -> bool:
        """Every step stands alone."""
        return True


def open_reward(name: str) -> Reward:
    """The scorer of this name as a function with gradients; `UserError` where it is none (a Python file)."""
    takes_gradients(name)
    scorer = open_scorer(name)
    texts: dict[str, Tensor] = {}

    def reward(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        for prompt in prompts:
            if prompt not in texts:
                texts[prompt] = scorer.embed_texts([prompt])[0]
        wanted = torch.stack([texts[prompt] for prompt in prompts]).to(pictures.device)
        return (embedded(scorer, pictures) * wanted).sum(-1)

    return reward


def embedded(scorer: Scorer, pictures: Tensor) -> Tensor:
    """Unit vectors [B, D] of square pictures [B, 3, H, W] in −1…1, with gradients."""
    size = (scorer.side, scorer.side)
    if pictures.shape[-2:] != size:
        pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True)
    mean, deviation = (
        torch.tensor(value, device=pictures.device)[None, :, None, None]
        for value in (scorer.mean, scorer.deviation)
    )
    network: Any = scorer.model
    features = (
        network.to(pictures.device).get_image_features(((pictures + 1) / 2 - mean) / deviation).pooler_output
    )
    return F.normalize(features.float(), dim=-1)


# Gradients of the policy ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trajectories:
    """N walks of S stochastic steps: states [S + 1, N, C, H, W], log-probabilities [S, N], advantages [N]."""

    states: Tensor
    log_probability: Tensor
    advantage: Tensor
    prompts: Sequence[int]


class PolicyGradients(RewardTraining):
    """DDPO: each of `rounds` draws `per_prompt` pictures of every prompt and scores them; then several steps learn."""

    def __post_init__(self) -> None:
        self.judge: Judge = open_judge(self.settings.online)
        self.round = -1
        super().__post_init__()

    def losses(self, step: int) -> Iterator[Tensor]:
        """The clipped loss of `batch` walks, the gradient of one rung of the ladder after another."""
        number, place = divmod(step - 1, self.settings.steps // self.settings.rounds)
        if self.round != number and number < self.settings.rounds:
            self.walks, self.round = self.collect(number), number
            self.order = torch.randperm(
                len(self.walks.prompts), generator=generator(self.settings.seed, "order", number)
            ).tolist()
        batch = self.settings.batch
        rows = [self.order[n % len(self.order)] for n in range(place * batch, (place + 1) * batch)]
        parts = self._micro()
        for part in parts:
            scale = len(part) * len(parts) * processes.world() / batch
            for rung in range(len(self.ladder) - 1):
                if is_random(self.ladder[rung], self.ladder[rung + 1]):
                    yield self.loss(rung, [rows[row] for row in part]) * scale

    def loss(self, rung: int, rows: Sequence[int]) -> Tensor:
        """−mean over walks of min(ρ·A, clip(ρ)·A), ρ the step's probability now over that when it was taken."""
        walks = self.walks
        chosen = torch.tensor(list(rows), device=walks.states.device)
        noisy, then = walks.states[rung, chosen], walks.states[rung + 1, chosen]
        predict = self.predictor([walks.prompts[row] for row in rows])
        here, there = self.ladder[rung], self.ladder[rung + 1]
        now = log_probability(then, noisy, predict(noisy, here), here, there)
        ratio = (now - walks.log_probability[rung, chosen]).exp()
        return clipped(ratio, walks.advantage[chosen], self.settings.clip_range).mean()

    @torch.no_grad()
    def collect(self, number: int) -> Trajectories:
        """Draws and scores a round's pictures with the policy as it is; `figures` holds their mean reward.

        Each process draws some of them, and all get all.
        """
        keys = [(i, j) for i in range(len(self.prompts)) for j in range(self.settings.per_prompt)]
        device, rungs = self.model.device, len(self.ladder)
        states = torch.zeros(rungs, len(keys), *self.model.latent_shape, device=device)
        chances = torch.zeros(rungs - 1, len(keys), device=device)
        rewards = torch.zeros(len(keys))
        for first in range(0, len(keys), 8)[processes.rank() :: processes.world()]:
            some, here = keys[first : first + 8], slice(first, first + 8)
            predict = self.predictor([i for i, _ in some])
            randoms = [generator(self.settings.seed, "round", number, i, j) for i, j in some]
            names = [(1 + i, number * self.settings.per_prompt + j) for i, j in some]
            states[:, here], chances[:, here] = stochastic_walk(
                self.start(names), predict, self.ladder, randoms
            )
            pictures = [to_image(one) for one in self.model.decode(states[-1, here]).cpu()]
            rewards[here] = self.judge(pictures, [self.prompts[i].text for i, _ in some])
        processes.collect([states, chances, rewards])
        self.figures = {"reward": float(rewards.mean())}
        better = advantages(rewards.view(len(self.prompts), -1)).flatten().to(self.model.device)
        return Trajectories(states, chances, better, [i for i, _ in keys])

    def may_save(self, step: int) -> bool:
        """At a round's end: its walks are not kept."""
        return step % (self.settings.steps // self.settings.rounds) == 0


def stochastic_walk(
    noisy: Tensor, predict: Predict, ladder: Level, randoms: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Ancestral sampling with its record: states [S + 1, B, C, H, W] and log-probabilities of the steps [S, B]."""
    states, chances = [noisy], []
    for here, there in pairwise(ladder):
        estimate = predict(noisy, here)
        after = ancestral_step(noisy, estimate, here, there, noise=normal_like(noisy, randoms))
        chances.append(
            log_probability(after, noisy, estimate, here, there)
            if is_random(here, there)
            else torch.zeros(len(noisy), device=noisy.device)
        )
        states.append(after)
        noisy = after
    return torch.stack(states), torch.stack(chances)


def log_probability(after: Tensor, noisy: Tensor, estimate: Estimate, here: Level, there: Level) -> Tensor:
    """log p(after | noisy) [B] of an ancestral step, mean over C, H, W, without the constant.

    The step is N(mean, up²) with `ancestral_step`'s own mean and up; the mean over dimensions, as in the authors'
    code, is what a clip range of 1e-4 goes with.
    """
    mean = ancestral_step(noisy, estimate, here, there, noise=torch.zeros_like(noisy))
    return -((after.detach() - mean) ** 2).flatten(1).mean(1) / (2 * spread(here, there) ** 2)


def spread(here: Level, there: Level) -> float:
    """The standard deviation of an ancestral step: 0 where it lands on the clean end."""
    nothing = torch.zeros(1, dtype=torch.float64)
    still = Estimate(nothing, nothing)
    return float(ancestral_step(nothing, still, here, there, noise=torch.ones_like(nothing)))


def is_random(here: Level, there: Level) -> bool:
    """Whether a step has a density."""
    return spread(here, there) > 1e-6


def clipped(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """PPO's loss [B]: −min(ρ·A, clip(ρ, 1 ± range)·A) (Schulman et al. 2017, eq. 7)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def advantages(rewards: Tensor) -> Tensor:
    """Rewards [P, J] less their prompt's mean, over the deviation of all of these, in −5…5."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / centred.std(correction=0).clamp(min=1e-6)).clamp(-5, 5)
