"""An edit by an instruction: "make it snow", by a model that reads the image beside the prompt.

    result = instruct(Backbone.open("timbrooks/instruct-pix2pix", by_instruction=True), "photo.png", ["make it snow"])

The model redraws the whole image, and so it drifts. What was not meant to change is the source's again in the end
(`edit.methods.keep_background`), so instructions can follow one another without wearing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level, Predict, generator
from backbone.diffusion.samplers import deterministic_step
from backbone.io.console import UserError
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from edit import checks
from edit.layout import NO_LAYOUT, TARGET, Layout
from edit.masks import load_pixel_mask
from edit.methods.keep_background import KeptBackground, keep_background
from edit.pictures import EncodedImage, ImageLike, encode_image
from edit.result import Result
from edit.sampling import Frames, as_strong_as_state, guidance_of, schedule_of

Keep = Literal["pixels", "latents", "none"]
IMAGE_GUIDANCE = 1.5  # Brooks et al. 2023, section 4


@torch.no_grad()
def instruct(
    model: Backbone,
    image: ImageLike,
    instructions: Sequence[str],
    *,
    keep: Keep = "pixels",
    steps: int = 50,
    guidance: float | None = None,
    image_guidance: float = IMAGE_GUIDANCE,
    negative: str = "",
    mask: ImageLike | None = None,
    seed: int = 0,
    frames: int = 0,
    layout: Layout = NO_LAYOUT,
    progress: Callable[[], Any] = lambda: None,
) -> Result:
    """N edits of an image, one for each instruction, each of what the one before it made.

    Brooks, Holynski & Efros 2023. `guidance` is how closely the instruction is followed, `image_guidance` the image
    (eq. 3). `keep` says what becomes of the background: the image's own pixels, its autoencoder's copy, or what the
    model draws. `mask` (white = may change) says where the edits stand; without one each place is found by itself.

    Raises `UserError` for an empty instruction, a model that reads no image, and where an edit leaves no background.
    """
    instructions = checks.prompts(instructions, "instruction")
    if not model.edits_by_instruction:
        model.refuse_other_task(by_instruction=True)
    guidance = guidance_of(model, guidance)
    checks.not_negative("image guidance", image_guidance)
    encoded = encode_image(model, image)
    changed = load_pixel_mask(mask, encoded)
    schedule = schedule_of(model, steps, encoded.latent)
    kept_frames = Frames(0, steps, frames)
    now, latents, finished, backgrounds, nfe = encoded, [], [], [], 0
    for number, instruction in enumerate(instructions):
        text = layout.under(
            encode_prompts_cached(model, [instruction, negative, negative]),
            schedule,
            [TARGET] * 3,
            unprompted=[1, 2],
        )
        predict = guide_by_image(model, now, text, guidance, image_guidance)
        noise = torch.randn(encoded.latent.shape, generator=generator(seed, number, "instruct"))
        state = as_strong_as_state(noise.to(encoded.latent), schedule[0])
        for step, (here, there) in enumerate(pairwise(schedule)):
            estimate = predict(state, here)
            state = deterministic_step(state, estimate, here, there)
            if number == len(instructions) - 1:
                kept_frames.add(step, estimate.clean)
            progress()
        nfe += 3 * steps
        drawn = model.decode(state)[0].cpu()
        if keep != "none":
            found = keep_drawn(drawn, now, keep=keep, changed=changed, model=model, instruction=instruction)
            drawn = found.image
            backgrounds.append(found)
        latents.append(state[0])
        finished.append(drawn)
        now = EncodedImage(drawn, model.encode(drawn[None]).mean, encoded.facts)
    return Result(
        model=model,
        prompts=instructions,
        encoded=encoded,
        latents=torch.stack(latents),
        nfe=nfe,
        finished=torch.stack(finished),
        masks=torch.stack([(one.place > 0).float() for one in backgrounds]) if backgrounds else None,
        estimates=kept_frames.stack(),
        facts={
            "guidance": guidance,
            "image_guidance": image_guidance,
            "drift": [one.figures for one in backgrounds],
            **layout.facts(),
        },
        layout=layout,
    )


def guide_by_image(
    model: Backbone, image: EncodedImage, text: Conditions, guidance: float, image_guidance: float
) -> Predict:
    """Predictions guided by the instruction and by the image (Brooks et al. 2023, eq. 3), three rows in one call.

    `text` are the instruction, and twice what stands for none.

    e(∅, ∅) + s_I·(e(image, ∅) − e(∅, ∅)) + s_T·(e(image, text) − e(image, ∅)), of both halves of an estimate.
    """
    reference = model.encode_reference(image.pixels[None])
    beside = torch.cat([reference, reference, torch.zeros_like(reference)])
    predict = model.predictor(replace(text, reference=beside))

    def guided(noisy: Tensor, level: Level) -> Estimate:
        estimate = predict(torch.cat([noisy] * 3), level)
        halves = []
        for half in estimate:
            told, seen, alone = half.chunk(3)
            halves.append(alone + image_guidance * (seen - alone) + guidance * (told - seen))
        return Estimate(*halves)

    return guided


def keep_drawn(
    drawn: Tensor,
    before: EncodedImage,
    *,
    keep: Keep,
    changed: Tensor | None,
    model: Backbone,
    instruction: str,
) -> KeptBackground:
    """What was drawn [3, 8H, 8W], on the background of the image before."""
    source = before.pixels.cpu()
    copy = model.decode(before.latent)[0].cpu() if keep == "latents" else None
    try:
        return keep_background(
            drawn, source, changed=None if changed is None else changed.cpu(), background=copy
        )
    except UserError as error:
        raise UserError(
            f"“{instruction}”: {error} To take all that the model draws, say --keep none."
        ) from error
