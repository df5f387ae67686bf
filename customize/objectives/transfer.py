"""Transfer of an adapter from a base to its few-step model: a short distillation at the few-step model's own levels.

Two sets of targets are sampled once. For the subject they come from the base run: noise, and the image that guided
sampling with all its steps makes of it. For the class they are the few-step model's own predictions, without the
adapter, at every state of its own trajectories, so that it keeps what it was distilled to (DreamBooth's
prior-preservation loss, with the few-step model in the base's place). The error is that of the clean estimate x̂0,
which a few-step sampler follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from backbone.adapters.lora import lora_parameters, save_lora
from backbone.cli.sampling import ALL_STEPS, EarlyScale
from backbone.conditions.conditions import Conditions
from backbone.data.prefetch import Movable, StepLoader
from backbone.diffusion.losses import squared_error
from backbone.diffusion.noise import Estimate, Level, Predict, Schedule, add_noise, generator
from backbone.models.cache import encode_prompts_cached
from backbone.models.few_step.model import SamplingDefaults
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, get_sampler, sample_latents
from backbone.training.fast import fast_steps
from backbone.training.optimizer import make_optimizer
from backbone.training.run import Objective, RunSettings

FRESH_NOISE = ("consistency", "ancestral")  # samplers that add fresh noise to their estimates
AT_ONCE = 8


class TransferFit(RunSettings, Protocol):
    """The settings that the fit reads."""

    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def prior_loss_weight(self) -> float: ...


@dataclass(frozen=True)
class SubjectAnswers:
    """Targets from the base run: noise [N, C, …], and the clean latents [N, C, …] sampled from it, by request."""

    requests: Sequence[Request]
    noise: Tensor
    clean: Tensor

    def states(self, rows: Tensor, level: Level, k: int, fresh: Tensor | None) -> Tensor:
        """A sampler's states before its step k: pure noise, or the clean latents with their own or `fresh` noise."""
        noise = self.noise[rows]
        if k == 0:
            return noise * float((level.a**2 + level.b**2).sqrt())
        return add_noise(self.clean[rows], noise if fresh is None else fresh, level)


@dataclass(frozen=True)
class ClassAnswers:
    """Targets from the few-step model: states [N, S, C, …] of its trajectories and its clean estimates at them."""

    requests: Sequence[Request]
    states: Tensor
    clean: Tensor


@torch.no_grad()
def draw_subject(
    model: Backbone, requests: Sequence[Request], drawing: SamplingDefaults, seed: int
) -> SubjectAnswers:
    """Targets of a model that carries the subject, by deterministic steps from each request's own noise."""
    clean = list(
        sample_latents(
            model,
            requests,
            steps=drawing.steps,
            guidance=drawing.guidance,
            guided=ALL_STEPS,
            early=EarlyScale(),
            sampler="ddim",
            seed=seed,
            batch=AT_ONCE,
        )
    )
    noise = torch.stack([draw_initial_noise(model, seed, *request.key) for request in requests])
    return SubjectAnswers(requests, noise, torch.cat(clean).cpu())


@torch.no_grad()
def draw_class(
    model: Backbone, requests: Sequence[Request], drawing: SamplingDefaults, seed: int
) -> ClassAnswers:
    """A few-step model's trajectories of requests, as its own sampler draws them."""
    schedule, states, estimates = model.schedule(drawing.steps), [], []
    for first in range(0, len(requests), AT_ONCE):
        chunk = requests[first : first + AT_ONCE]
        texts, empty = (
            encode_prompts_cached(model, prompts)
            for prompts in ([request.prompt for request in chunk], [request.negative for request in chunk])
        )
        # Every prediction of the sampler is recorded: (x_t, x̂0) at each of its levels
        visited: list[tuple[Tensor, Tensor]] = []
        predict = record_states(model.guided_predictor(texts, empty, drawing.guidance), visited)
        noise = torch.stack([draw_initial_noise(model, seed, *request.key) for request in chunk]).to(
            model.device
        )
        start = noise * float((schedule.a[0] ** 2 + schedule.b[0] ** 2).sqrt())
        randoms = [generator(seed, *request.key, "steps") for request in chunk]
        get_sampler(drawing.sampler, randoms)(start, predict, schedule)
        states.append(torch.stack([noisy.cpu() for noisy, _ in visited], 1))
        estimates.append(torch.stack([clean.cpu() for _, clean in visited], 1))
    return ClassAnswers(requests, torch.cat(states), torch.cat(estimates))


def record_states(predict: Predict, visited: list[tuple[Tensor, Tensor]]) -> Predict:
    """Wrap `predict`: append every state and its clean estimate to `visited`."""

    def predict_and_note(noisy: Tensor, level: Level) -> Estimate:
        estimate = predict(noisy, level)
        visited.append((noisy, estimate.clean))
        return estimate

    return predict_and_note


@dataclass(frozen=True, eq=False)
class EncodedStates(Movable):
    """States [2B, C, …] before a step of the sampler, B of the subject and B of the class, with their targets."""

    noisy: Tensor
    clean: Tensor
    conditions: Conditions


@dataclass
class TrainedPart:
    """Trainable parameters, as `make_optimizer` takes them."""

    parameters: Mapping[str, Tensor]
    learning_rate: float


class Transfer(Objective):
    """The fit of an adapter on a few-step model, where it is loaded by the name `adapter`, to both sets of answers.

    `file` is what it is written as, `with_text` whether the text encoders carry it too, unchanged. A step takes every
    level of the few-step schedule once, each with a batch of either set.
    """

    def __init__(
        self,
        model: Backbone,
        drawing: SamplingDefaults,
        adapter: str,
        answers: tuple[SubjectAnswers, ClassAnswers],
        settings: TransferFit,
        *,
        file: str,
        with_text: bool = False,
    ) -> None:
        self.model, self.drawing, (self.subject, self.prior) = model, drawing, answers
        self.settings: Any = settings
        self.adapter, self.file, self.with_text = adapter, file, with_text
        self.parameters = lora_parameters(model.denoiser, adapter)
        for value in self.parameters.values():
            value.requires_grad_(True)
        part = TrainedPart(self.parameters, settings.learning_rate or 0.0)
        self.optimizer = make_optimizer("adamw", [part], weight_decay=0.0)
        self.schedule: Schedule = model.schedule(drawing.steps)
        self.figures = {}
        prompts = [request.prompt for request in (*self.subject.requests, *self.prior.requests)]
        self.texts = encode_prompts_cached(model, prompts).to(torch.device("cpu"))
        self.empty = encode_prompts_cached(model, [""])
        self.batches = StepLoader(self.draw_step, settings.steps, model.device)

    @property
    def images(self) -> int:
        return int(self.settings.batch) * self.drawing.steps

    def learning(self) -> AbstractContextManager[None]:
        """Fast steps of the denoiser."""
        return fast_steps(self.model.denoiser)

    def close_loader(self) -> None:
        self.batches.close()

    def losses(self, step: int) -> Iterator[Tensor]:
        """One loss for each level: the mean error of x̂0 on the subject, and λ times that on the class."""
        micro_losses: list[Tensor] = []
        for k, batch in enumerate(self.batches.at(step)):
            subject, prior = self.errors(self.schedule[k], batch)
            micro_losses.append(torch.stack([subject.detach(), prior.detach()]))
            means = torch.stack(micro_losses).mean(0)
            self.figures = {"subject_error": means[0], "class_error": means[1]}
            yield subject + self.settings.prior_loss_weight * prior

    def draw_step(self, step: int) -> list[EncodedStates]:
        """A batch at each level; a function of the step alone."""
        return [self.draw(k, generator(self.settings.seed, step, k)) for k in range(self.drawing.steps)]

    def draw(self, k: int, random: torch.Generator) -> EncodedStates:
        """A batch at level k."""
        count, level = self.settings.batch, self.schedule[k]
        subject_rows = torch.randint(len(self.subject.noise), (count,), generator=random)
        class_rows = torch.randint(len(self.prior.states), (count,), generator=random)
        fresh = None
        if self.drawing.sampler in FRESH_NOISE:
            fresh = torch.randn(self.subject.noise[subject_rows].shape, generator=random)
        noisy = torch.cat(
            [self.subject.states(subject_rows, level, k, fresh), self.prior.states[class_rows, k]]
        )
        clean = torch.cat([self.subject.clean[subject_rows], self.prior.clean[class_rows, k]])
        return EncodedStates(
            noisy, clean, self.texts[torch.cat([subject_rows, len(self.subject.requests) + class_rows])]
        )

    def errors(self, level: Level, batch: EncodedStates) -> tuple[Tensor, Tensor]:
        """The mean errors [] at a level, on the subject and on the class."""
        texts, empty = batch.conditions, self.empty.repeat(len(batch.noisy))
        predicted = self.model.guided_predictor(texts, empty, self.drawing.guidance)(batch.noisy, level).clean
        subject, prior = squared_error(predicted, batch.clean).chunk(2)
        return subject.mean(), prior.mean()

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        """Write the adapter, with its part of the text encoders if it has one."""
        text = {slot.name: slot.model for slot in self.model.text_encoder.slots} if self.with_text else {}
        save_lora(run / self.file, self.model.denoiser, self.adapter, metadata=header, text_encoders=text)
        return {"weights": self.file}
