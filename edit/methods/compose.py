"""Composition: guide an image towards some prompts and away from others along its own trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backbone.diffusion.noise import Estimate, broadcast_like
from backbone.diffusion.samplers import deterministic_step
from backbone.models.cache import encode_prompts_cached
from edit.checks import check_strength, check_weighted, refuse_no_inversion
from edit.inversion.inversion import Inversion
from edit.layout import SOURCE, TARGET
from edit.masks import load_latent_mask
from edit.pictures import ImageLike
from edit.result import Result
from edit.sampling import KeptEstimates, select


@torch.no_grad()
def compose(
    inversion: Inversion,
    toward: Sequence[tuple[str, float]] | Mapping[str, float],
    *,
    strength: float = 0.7,
    mask: ImageLike | None = None,
    frames: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> Result:
    """One image: the inversion's, composed towards each prompt (in the model's words) by its weight, away if negative.

    ε̂ = ε(source) + Σ wᵢ·(ε(promptᵢ) − ε(“”)) (Liu et al. 2022, eq. 11), in deterministic steps to which the offset of
    the source's own step from its trajectory is added (Ju et al. 2024): with all weights 0 the image is exactly what it
    was. NFE: 3 + K a step for K prompts. `frames` and `progress` are as in `sdedit`.

    Raises `UserError` without prompts, or for a strength outside 0…1.
    """
    refuse_no_inversion(inversion)
    toward = check_weighted(toward, "prompt to compose with")
    check_strength(strength, inversion.steps)
    model, schedule, states = inversion.model, inversion.schedule, inversion.states.float()

    # Conditions: the source twice (on its trajectory, at the edit's state), no prompt, then each prompt
    weights = torch.tensor([weight for _, weight in toward])
    text = encode_prompts_cached(
        model, [inversion.prompt, inversion.prompt, "", *(prompt for prompt, _ in toward)]
    )
    sides = [SOURCE, *[TARGET] * (2 + len(toward))]
    predict = model.predictor(inversion.layout.attach(text, schedule, sides, unprompted=[2]))
    first = inversion.start(strength)
    inversion.layout.say_idle(first, inversion.steps)
    noisy, nfe, kept_estimates = states[first], 0, KeptEstimates(first, inversion.steps, frames)
    mask_latent = load_latent_mask(mask, inversion.encoded)
    for step in range(first, inversion.steps):
        level, next_level = schedule[step], schedule[step + 1]
        # Rows: the source on its trajectory; at the edit's state the source, no prompt, and each prompt
        rows = torch.cat([states[step][None], noisy.expand(2 + len(toward), *noisy.shape)])
        prediction = predict(rows, level)
        nfe += len(rows)
        on_trajectory, source = select(prediction, slice(0, 1)), select(prediction, slice(1, 2))
        composed = Estimate(*(_compose(half, weights) for half in prediction))
        # Direct Inversion's offset: of the source's own step from its trajectory
        offset = states[step + 1] - deterministic_step(rows[:1], on_trajectory, level, next_level)
        # With all weights 0 only rounding would differ
        estimate = composed if bool(weights.any()) else source
        noisy = (deterministic_step(noisy[None], estimate, level, next_level) + offset)[0]
        if mask_latent is not None:
            noisy = torch.where(mask_latent > 0, noisy, states[step + 1])
        kept_estimates.add(step, composed.clean)
        progress()
    caption = ", ".join(f"{prompt} × {weight:g}" for prompt, weight in toward)
    return Result(
        model=model,
        prompts=(caption,),
        encoded=inversion.encoded,
        latents=noisy[None],
        nfe=nfe,
        masks=None if mask_latent is None else mask_latent[None],
        estimates=kept_estimates.stack(),
        facts=inversion.layout.facts(),
        inversions=(inversion,),
        layout=inversion.layout,
    )


def _compose(rows: Tensor, weights: Tensor) -> Tensor:
    """ε(source) + Σ wᵢ·(ε(promptᵢ) − ε(“”)) of predictions at one state: rows 1, 2 and the others."""
    source, empty, prompts = rows[1:2], rows[2:3], rows[3:]
    return source + (broadcast_like(weights, prompts) * (prompts - empty)).sum(0, keepdim=True)
