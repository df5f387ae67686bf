"""Edits by instruction: predictions of a model that reads an image beside the prompt, and images drawn with them.

    predict = instructed_predictor(model, text, empty, [model.encode_reference(photo)], Guidances(7.5, 1.5))

A UNet reads the image's latents as further channels and is guided by the instruction and by the image, in three calls
(InstructPix2Pix, Brooks, Holynski & Efros 2023). A transformer reads them as further tokens, and its guidance is that
of any prompt (FLUX.1 Kontext, FLUX.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control
from backbone.diffusion.noise import Estimate, Level, Predict
from backbone.diffusion.samplers import deterministic_step
from backbone.io.console import UserError, count_of
from backbone.media.transforms import crop_and_resize, to_tensor, working_size
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone

IMAGE_GUIDANCE = 1.5  # Brooks et al. 2023, section 4


@dataclass(frozen=True)
class Guidances:
    """How closely the instruction is followed, and how closely the image (eq. 3 of Brooks et al. 2023).

    `negative` is what stands in the instruction's place where there is none: what to stay away from.
    """

    text: float
    image: float = IMAGE_GUIDANCE
    negative: str = ""


def instructed_predictor(
    model: Backbone,
    text: Conditions,
    empty: Conditions,
    references: Sequence[Tensor],
    guidances: Guidances,
) -> Predict:
    """Guided predictions of B samples, each told an instruction and shown images.

    text, empty  instructions and what stands in their place without one, B rows each
    references   latents [B, C, h, w] as the denoiser reads them

    Of an image as channels: e(∅, ∅) + s_I·(e(image, ∅) − e(∅, ∅)) + s_T·(e(image, text) − e(image, ∅)), of both halves
    of an estimate, in one call of three times the batch.
    """
    shown = tuple(references)
    told = replace(text, references=shown)
    unprompted = tuple(control.unprompted() for control in text.controls)
    untold = replace(empty, references=shown, controls=unprompted)
    if not model.reads_as_channels:
        return model.guided_predictor(told, untold, guidances.text)
    blind = untold.drop_references(torch.ones(len(untold), dtype=torch.bool))
    predict = model.predictor(Conditions.cat([told, untold, blind]))

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


def refuse_too_many(model: Backbone, images: int) -> None:
    """`UserError` for more images beside a prompt than the model reads."""
    most, name = model.most_references, model.location.name
    if images and not most:
        raise UserError(
            f"{name} reads no image beside the prompt. Leave the references out, or name a model that does."
        )
    if images > most:
        raise UserError(
            f"{name} reads {count_of(most, 'image')} beside the prompt, and {images} are given. Leave out "
            f"{images - most} of them."
        )


def refuse_image_guidance(model: Backbone) -> None:
    """`UserError` for a guidance by the image where the model reads it as a part of the sequence."""
    if not model.reads_as_channels:
        raise UserError(
            f"{model.location.name} reads the image as a part of the sequence and is not guided by it. Leave "
            "--image-guidance out."
        )


def encode_references(model: Backbone, images: Sequence[Image]) -> list[Tensor]:
    """Images as the denoiser reads them beside a prompt, latents [1, C, h, w], each in its own shape.

    Every one is brought to about the model's own number of pixels. Raises `UserError` for more than the model reads.
    """
    refuse_too_many(model, len(images))
    found = []
    for image in images:
        size = working_size(image.size, area=model.resolution**2, unit=2 * model.factor)
        found.append(model.encode_reference(to_tensor(crop_and_resize(image, size))[None]))
    return found


def evaluations_of(model: Backbone, text: Conditions, guidance: float) -> int:
    """Number of function evaluations of one guided prediction of one sample."""
    if model.reads_as_channels:
        return 3
    distilled = model.family.embed_guidance(model.denoiser, text, guidance) is not None
    return 1 if distilled or guidance == 1 else 2


@torch.no_grad()
def draw_edit(
    model: Backbone,
    references: Sequence[Tensor],
    instruction: str,
    *,
    steps: int,
    guidances: Guidances,
    noise: Tensor,
    controls: Sequence[Control] = (),
    after_step: Callable[[int, Tensor], Any] = lambda step, clean: None,
) -> Tensor:
    """The latent [1, C, h, w] of an edit by an instruction.

    `references` are latents [1, C, h, w] as the denoiser reads them, the image that is edited first; `noise` is of the
    size of what is drawn; `controls` are of one row each. `after_step` is told of each step and of the clean latent
    that was estimated in it.
    """
    text, empty = (encode_prompts_cached(model, [words]) for words in (instruction, guidances.negative))
    schedule = model.schedule(steps, size=(int(noise.shape[-2]), int(noise.shape[-1])))
    text = replace(text, controls=tuple(one.during(schedule).to(model.device) for one in controls))
    predict = instructed_predictor(model, text, empty, references, guidances)
    state = noise.to(model.device) * float((schedule.a[0] ** 2 + schedule.b[0] ** 2).sqrt())
    for step, (here, there) in enumerate(pairwise(schedule)):
        estimate = predict(state, here)
        state = deterministic_step(state, estimate, here, there)
        after_step(step, estimate.clean)
    return state
