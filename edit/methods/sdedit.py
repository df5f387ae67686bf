"""SDEdit: noise an image, a stroke painting or a part of either, and sample the prompt from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from backbone.cli.keywords import takes
from backbone.cli.values.build import build
from backbone.diffusion.noise import Predict, Schedule, add_noise, generator
from backbone.diffusion.samplers import deterministic_step
from backbone.diffusion.transfer import send
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from backbone.models.sample import refuse_negative, say_same_negative
from edit.checks import check_count, check_prompt, refuse_unopened
from edit.layout import NO_LAYOUT, TARGET, Layout
from edit.masks import load_latent_mask
from edit.pictures import ImageLike, encode_image
from edit.result import Result
from edit.sampling import (
    KeptEstimates,
    count_nfe,
    draw_in_batches,
    make_noise_schedule,
    resolve_guidance,
    scale_to_level,
    truncate_to_strength,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SDEditSettings:
    """Settings of `sdedit`.

    strength  as in diffusers: 0 leaves the image unchanged, 1 starts from pure noise
    guidance  None: the model's default
    negative  the negative prompt
    mask      white = may change; None: everywhere
    count     number of images; image k depends only on the seed and k
    frames    estimates kept along the way
    """

    strength: float = 0.6
    steps: int = 50
    guidance: float | None = None
    negative: str = ""
    mask: ImageLike | None = None
    count: int = 1
    seed: int = 0
    frames: int = 0


@takes(SDEditSettings)
@torch.no_grad()
def sdedit(
    model: Backbone,
    image: ImageLike,
    prompt: str,
    *,
    layout: Layout = NO_LAYOUT,
    progress: Callable[[], Any] = lambda: None,
    **settings: Any,
) -> Result:
    """N = `count` images of what the prompt says (in the model's words), sampled from a noised image.

    `settings` are the fields of `SDEditSettings`, by name. Meng et al. 2022, algorithm 1: fresh noise at the level that
    `strength` names, then deterministic steps. With a mask, algorithm 3: at every step the rest is the image at that
    level, with the noise that it began with, so in the end it is the image's own latent. At strength 1 sampling begins
    with noise alone, as diffusers' inpainting does, however noisy the first level of the schedule is. `layout` holds
    control maps; `progress` is called after every step of each batch (`draw_in_batches`).

    Raises `UserError` for an empty prompt, a strength outside 0…1, a mask of another shape, an unreadable image, and a
    count out of bounds.
    """
    options = build(SDEditSettings, settings)
    count = check_count(options.count)
    refuse_unopened(model)
    check_prompt(prompt, "prompt")
    guidance = resolve_guidance(model, options.guidance)
    refuse_negative(model, options.negative, guidance)
    say_same_negative([prompt], options.negative)

    # The image's latent, and the steps below the level that `strength` names
    encoded = encode_image(model, image)
    clean = encoded.latent
    schedule = truncate_to_strength(model, make_noise_schedule(model, options.steps, clean), options.strength)
    mask = load_latent_mask(options.mask, encoded)
    text, empty = (encode_prompts_cached(model, [words]) for words in (prompt, options.negative))
    text = layout.attach(text, schedule, [TARGET])

    def draw(samples: range, kept_estimates: KeptEstimates) -> Tensor:
        # Image k's noise depends on the seed and k alone
        random = [
            torch.randn(clean.shape[1:], generator=generator(options.seed, k, "sdedit")) for k in samples
        ]
        return sample_masked(
            clean,
            send(torch.stack(random).to(clean.dtype), clean.device),
            model.guided_predictor(text.repeat(len(samples)), empty.repeat(len(samples)), guidance),
            schedule,
            mask=mask,
            from_noise=options.strength == 1,
            frames=kept_estimates,
            progress=progress,
        )

    latents, estimates = draw_in_batches(model, count, draw, (0, len(schedule) - 1, options.frames))
    return Result(
        model=model,
        prompts=(prompt,) * count,
        encoded=encoded,
        latents=latents,
        nfe=(len(schedule) - 1) * count * count_nfe(model, text, guidance),
        masks=None if mask is None else mask.expand(count, -1, -1),
        estimates=estimates,
        facts={"guidance": guidance, **layout.facts()},
        layout=layout,
    )


def sample_masked(
    clean: Tensor,
    noise: Tensor,
    predict: Predict,
    schedule: Schedule,
    *,
    mask: Tensor | None,
    from_noise: bool,
    frames: KeptEstimates,
    progress: Callable[[], Any],
) -> Tensor:
    """Latents [N, C, H, W] sampled from a clean latent [1, C, H, W] with noise [N, C, H, W] at the first level.

    Where `mask` [H, W] is 0 the state is, at every level, the clean latent with the same noise. `from_noise` leaves the
    clean latent out of the first state, where the mask is not 0.
    """
    clean = clean.expand_as(noise)
    noisy = add_noise(clean, noise, schedule[0]) if len(schedule) > 1 else clean
    if from_noise:
        unmasked = scale_to_level(noise, schedule[0])
        noisy = unmasked if mask is None else torch.where(mask > 0, unmasked, noisy)
    for step, (level, next_level) in enumerate(pairwise(schedule)):
        estimate = predict(noisy, level)
        noisy = deterministic_step(noisy, estimate, level, next_level)
        if mask is not None:
            last = step == len(schedule) - 2
            noisy = torch.where(mask > 0, noisy, clean if last else add_noise(clean, noise, next_level))
        frames.add(step, estimate.clean)
        progress()
    return noisy
