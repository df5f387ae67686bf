"""Edits by instruction: predictions of a model that reads an image beside the prompt, and images drawn with them.

    predict = instructed_predictor(model, text, empty, [model.encode_reference(photo)], Guidances(7.5, 1.5))

A UNet reads the image's latents as further channels and is guided by the instruction and by the image, in three calls
(InstructPix2Pix, Brooks, Holynski & Efros 2023). A transformer reads them as further tokens, and its guidance is that
of any prompt (FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from backbone.cli.sampling import ALL_STEPS, Sampler
from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control
from backbone.diffusion.noise import Estimate, Level, Predict, Schedule, generator
from backbone.io.console import UserError
from backbone.models.cache import encode_prompts_cached
from backbone.models.merged import fast_draws
from backbone.models.model import Backbone, say_odd_guidance
from backbone.models.references import ReferenceImage, list_latents
from backbone.models.sample import count_guided, get_sampler, limit_guidance

IMAGE_GUIDANCE = 1.5  # Brooks et al. 2023, section 4


@dataclass(frozen=True)
class Guidances:
    """Guidance scales of the instruction and of the image (Brooks et al. 2023, eq. 3).

    `negative` is the negative prompt, which replaces the instruction in the predictions without it. `guided` is
    the guidance interval: the share of the steps, from noisy to clean, with guidance (Kynkäänniemi et al. 2024).
    """

    text: float
    image: float = IMAGE_GUIDANCE
    negative: str = ""
    guided: tuple[float, float] = ALL_STEPS


def instructed_predictor(
    model: Backbone,
    text: Conditions,
    empty: Conditions,
    references: Sequence[Tensor],
    guidances: Guidances,
) -> Predict:
    """Guided predictions of B samples, each conditioned on an instruction and images.

    text, empty  the encoded instructions, and the encoded negative prompts, B rows each
    references   latents [B, C, h, w] as the denoiser reads them

    Where the image is read as channels, e(∅, ∅) + s_I·(e(image, ∅) − e(∅, ∅)) + s_T·(e(image, text) − e(image, ∅)), for
    both halves of an estimate, in one call of three times the batch.
    """
    latents = tuple(references)
    text_and_image = replace(text, references=latents)
    unprompted = tuple(control.unprompted() for control in text.controls)
    image_alone = replace(empty, references=latents, controls=unprompted)
    if not model.reads_as_channels:
        return model.guided_predictor(text_and_image, image_alone, guidances.text)
    say_odd_guidance(guidances.text)
    neither = image_alone.drop_references(torch.ones(len(image_alone), dtype=torch.bool))
    predict = model.predictor(Conditions.cat([text_and_image, image_alone, neither]))

    def guided(noisy: Tensor, level: Level) -> Estimate:
        halves = []
        for half in predict(torch.cat([noisy] * 3), level):
            with_both, with_image, with_none = half.chunk(3)
            halves.append(
                with_none
                + guidances.image * (with_image - with_none)
                + guidances.text * (with_both - with_image)
            )
        return Estimate(*halves)

    return guided


def refuse_image_guidance(model: Backbone) -> None:
    """`UserError` for an image guidance scale where the model reads the image as a part of the sequence."""
    if not model.reads_as_channels:
        raise UserError(
            f"{model.location.name} reads the image as a part of the sequence and is not guided by it. Leave "
            "--image-guidance out."
        )


def count_evaluations(
    model: Backbone, text: Conditions, guidances: Guidances, sampler: Sampler, schedule: Schedule
) -> int:
    """Number of function evaluations of one edit."""
    inside, outside = count_guided(guidances.guided, sampler, schedule)
    if model.reads_as_channels:
        return 3 * inside + outside
    distilled = model.family.embed_guidance(model.denoiser, text, guidances.text) is not None
    return (1 if distilled or guidances.text == 1 else 2) * inside + outside


@torch.no_grad()
def draw_edit(
    model: Backbone,
    references: Sequence[ReferenceImage],
    instruction: str,
    *,
    steps: int,
    guidances: Guidances,
    key: tuple[int, int],
    sampler: Sampler | None = None,
    controls: Sequence[Control] = (),
    after_step: Callable[[int, Tensor], Any] = lambda step, clean: None,
) -> Tensor:
    """Draw an edit by an instruction; returns its latent [1, C, h, w].

    `references` begin with the image to edit, which gives the edit's size; further images follow. The noise depends on
    `key`, the seed and the edit's number. `sampler` is the model's own if None. `controls` have one row each.
    `after_step` is called with the number of each step and the clean latent estimated at its beginning.
    """
    noise = torch.randn(references[0].latents.shape, generator=generator(*key, "instruct"))
    sampler = model.choose_sampler(sampler)

    # Conditions of the instruction and of the negative prompt, both with the reference images
    prompts = (instruction, guidances.negative)
    text, empty = (encode_prompts_cached(model, [prompt], references) for prompt in prompts)
    schedule = model.schedule(steps, size=(int(noise.shape[-2]), int(noise.shape[-1])))
    text = replace(text, controls=tuple(control.during(schedule).to(model.device) for control in controls))
    latents = list_latents(references)
    predict = instructed_predictor(model, text, empty, latents, guidances)
    unguided = model.predictor(replace(text, references=tuple(latents)))
    predict = limit_guidance(guidances.guided, predict, unguided, schedule)

    # From the noisiest state, of deviation √(a² + b²); Heun's rule predicts twice a step
    state = noise.to(model.device) * float((schedule.a[0] ** 2 + schedule.b[0] ** 2).sqrt())
    calls = count()
    predictions_per_step = 2 if sampler == "heun" else 1

    def predict_and_report(noisy: Tensor, level: Level) -> Estimate:
        estimate = predict(noisy, level)
        step, later = divmod(next(calls), predictions_per_step)
        if not later:
            after_step(step, estimate.clean)
        return estimate

    with fast_draws(model):
        return get_sampler(sampler, [generator(*key, "steps")])(state, predict_and_report, schedule)
