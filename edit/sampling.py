"""Sampling for all methods: the schedule, guidance and its cost, estimates kept along the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level, Predict, Schedule, broadcast_like
from backbone.diffusion.schedules import truncate_schedule
from backbone.io.console import UserError
from backbone.models.model import Backbone, say_odd_guidance
from edit.checks import check_not_negative, check_strength

BATCH = 8  # images in a batch


def make_noise_schedule(model: Backbone, steps: int, latent: Tensor) -> Schedule:
    """The model's schedule [S + 1] of S steps for a latent [..., H, W]; `UserError` for too many steps."""
    return model.schedule(steps, size=(latent.shape[-2], latent.shape[-1]))


def truncate_to_strength(model: Backbone, schedule: Schedule, strength: float) -> Schedule:
    """The last steps of a schedule [S + 1], from the level that SDEdit's `strength` names on.

    Raises `UserError` for a strength outside 0…1, or of less than a step; 0 is said to change nothing.
    """
    return truncate_schedule(schedule, count_noised_steps(model, len(schedule) - 1, strength))


def count_noised_steps(model: Backbone, steps: int, strength: float) -> int:
    """How many of S steps SDEdit of this strength takes; `UserError` as `truncate_to_strength`."""
    count = model.path.count_noised_steps
    return count(steps, check_strength(strength, steps, count=count))


def scale_to_level(noise: Tensor, level: Level) -> Tensor:
    """Noise [N, ...] with the standard deviation of a state at a level: the start of sampling without an image."""
    return noise * broadcast_like((level.a**2 + level.b**2).sqrt(), noise)


def split_count(model: Backbone, count: int) -> list[range]:
    """The numbers 0 … `count` − 1 of images, split into batches."""
    size = 1 if model.placement.one_by_one else BATCH
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def evenly_spaced(first: int, last: int, count: int) -> set[int]:
    """`count` of the steps from `first` to `last` − 1, evenly spaced."""
    if count < 1 or last <= first:
        return set()
    return {first + round((last - 1 - first) * k / max(count - 1, 1)) for k in range(count)}


class KeptEstimates:
    """Keeps `count` of the estimates of the steps `first` to `last` − 1, evenly spaced: the frames of a film.

    Of more than there are steps all are kept; of fewer than none, `UserError`.
    """

    def __init__(self, first: int, last: int, count: int) -> None:
        if count < 0:
            raise UserError(f"frames is {count}. Give the number of frames to keep of a film, 0 for none.")
        self.steps = evenly_spaced(first, last, count)
        self.kept: list[Tensor] = []

    def add(self, step: int, clean: Tensor) -> None:
        """Keep the estimates x̂0 [N, ...] of a step if it is one of the chosen ones."""
        if step in self.steps:
            self.kept.append(clean.float())

    def stack(self) -> Tensor | None:
        """[F, N, ...]; None if none were kept."""
        return torch.stack(self.kept) if self.kept else None


def draw_in_batches(
    model: Backbone, count: int, draw: Callable[[range, KeptEstimates], Tensor], frames: tuple[int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """The latents [N, ...] of `count` images and the estimates [F, N, ...] kept of them; None if none were.

    `draw` returns the latents of the images with these numbers; `frames` are the arguments of `KeptEstimates`.
    """
    latents, estimates = [], []
    for samples in split_count(model, count):
        kept_estimates = KeptEstimates(*frames)
        latents.append(draw(samples, kept_estimates))
        if (stacked := kept_estimates.stack()) is not None:
            estimates.append(stacked)
    return torch.cat(latents), torch.cat(estimates, dim=1) if estimates else None


# Guidance ---------------------------------------------------------------------------------------------------


def resolve_guidance(model: Backbone, guidance: float | None) -> float:
    """The guidance scale, the model's default for None. Raises `UserError` if it is negative."""
    if guidance is None:
        return float(model.defaults["guidance"])
    return check_not_negative("guidance", guidance)


def count_nfe(model: Backbone, text: Conditions, guidance: float) -> int:
    """NFE of one guided prediction of one sample: two, or one where guidance needs no unconditional call."""
    return (
        1 if guidance == 1 or model.family.embed_guidance(model.denoiser, text, guidance) is not None else 2
    )


def select(estimate: Estimate, rows: slice) -> Estimate:
    """Some rows of a prediction."""
    return Estimate(estimate.clean[rows], estimate.noise[rows])


class CountNFE:
    """A `Predict` that counts the samples that the denoiser evaluated, and calls `progress` after each."""

    def __init__(self, predict: Predict, progress: Callable[[], Any] = lambda: None) -> None:
        self.predict, self.progress = predict, progress
        self.nfe = 0

    def __call__(self, noisy: Tensor, level: Level) -> Estimate:
        self.nfe += len(noisy)
        estimate = self.predict(noisy, level)
        self.progress()
        return estimate


class SourceAndTargets:
    """Predictions of a source and N targets in one batch, the source and the targets each with their own guidance.

    The rows of a call are the source, the targets, then the unconditional rows of those whose guidance is not 1
    (Ho & Salimans 2022). There are no unconditional rows where the network is guidance-distilled.
    """

    def __init__(self, model: Backbone, text: Conditions, *, source_guidance: float, guidance: float) -> None:
        """`text` [1 + N, ...] are the encoded prompts, the source's first."""
        self.model = model
        self.text = text
        self.source_guidance = source_guidance
        self.guidance = guidance
        self.nfe = 0
        embedded = embed_guidance(model, text, source_guidance, guidance)
        if embedded is not None:
            self.text, self.source_guidance, self.guidance = embedded, 1.0, 1.0
        for scale in {self.source_guidance, self.guidance}:
            say_odd_guidance(scale)

    def count_rows(self, targets: int) -> int:
        """Rows of a call for the source and N targets, the unconditional ones counted."""
        return 1 + targets + targets * (self.guidance != 1) + (self.source_guidance != 1)

    def __call__(
        self, noisy: Tensor, level: Level, empty: Conditions, *, with_source: bool = True
    ) -> Estimate:
        """Guided predictions of states [1 + N, ...], the source's and the targets', or for the targets alone [N, ...].

        `empty` [1, ...] is the encoded prompt of the unconditional rows.
        """
        # Rows: source (unless left out), targets, then an unconditional row for each that is guided
        first = 0 if with_source else 1
        states, text = noisy[first:], self.text[first:]
        guidance = [self.source_guidance, *[self.guidance] * (len(noisy) - 1)][first:]
        guided = [row for row, scale in enumerate(guidance) if scale != 1]
        rows = states
        if guided:
            rows = torch.cat([states, states[guided]])
            unprompted = tuple(control.rows(torch.tensor(guided)).unprompted() for control in text.controls)
            text = Conditions.cat([text, replace(empty.repeat(len(guided)), controls=unprompted)])
        estimate = self.model.predictor(text)(rows, level)
        self.nfe += len(rows)
        # Rows in their order: the source, guided by its own scale, then the targets, all of them or none
        parts, unconditional = [], len(states)
        groups = ([slice(0, 1)] if with_source else []) + [slice(1 - first, len(states))]
        for group in groups:
            part = select(estimate, group)
            size, scale = len(part.clean), guidance[group.start]
            if scale != 1:
                unconditional_part = select(estimate, slice(unconditional, unconditional + size))
                part = self.model.path.guide(part, unconditional_part, scale, level)
                unconditional += size
            parts.append(part)
        return Estimate(torch.cat([part.clean for part in parts]), torch.cat([part.noise for part in parts]))


def embed_guidance(
    model: Backbone, text: Conditions, source_guidance: float, guidance: float
) -> Conditions | None:
    """Prompts [1 + N, ...], the source's first, with their guidance, for a guidance-distilled network; else None."""
    parts = []
    for rows, scale in ((slice(0, 1), source_guidance), (slice(1, None), guidance)):
        embedded = model.family.embed_guidance(model.denoiser, text[rows], scale)
        if embedded is None:
            return None
        parts.append(embedded)
    return Conditions.cat(parts)
