"""A picture led towards some prompts and away from others while it is walked down its own trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backbone.diffusion.noise import Estimate
from backbone.diffusion.samplers import deterministic_step
from backbone.models.cache import encode_prompts_cached
from edit import checks
from edit.inversion.inversion import Inversion
from edit.masks import latent_mask, mask_of
from edit.methods.sdedit import Drawn, spaced


@torch.no_grad()
def compose(
    inversion: Inversion,
    toward: Sequence[tuple[str, float]],
    *,
    strength: float = 0.7,
    mask: Any = None,
    frames: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> Drawn:
    """One picture: the inversion's, led towards each prompt (in the model's words) by its weight, away if negative.

    ε̂ = ε(source) + Σ wᵢ·(ε(promptᵢ) − ε(“”)) (Liu et al. 2022, eq. 11), in deterministic steps to which what the
    source's own step misses of its trajectory is added (Ju et al. 2024's offset): with all weights 0 the picture is
    exactly what it was. 3 + K rows a step for K prompts.

    Raises `UserError` without prompts, or for a strength outside 0…1.
    """
    checks.prompts([prompt for prompt, _ in toward], "prompt to lead to")
    checks.share("strength", strength)
    model, schedule, states = inversion.model, inversion.schedule, inversion.states.float()
    weights = torch.tensor([weight for _, weight in toward], device=states.device)[:, None, None, None]
    text = encode_prompts_cached(
        model, [inversion.prompt, inversion.prompt, "", *(prompt for prompt, _ in toward)]
    )
    predict = model.predictor(text)
    first = inversion.start(strength)
    now, asked, found, kept = states[first], 0, [], spaced(first, inversion.steps, frames)
    places = None
    if mask is not None:
        height, width = inversion.picture.shape[-2:]
        whole = mask_of(mask, shown=(width, height), original=inversion.facts.get("size"))
        places = latent_mask(whole, states.shape[-2:]).to(states)
    for number in range(first, inversion.steps):
        here, there = schedule[number], schedule[number + 1]
        rows = torch.cat([states[number][None], now.expand(2 + len(toward), *now.shape)])
        said = predict(rows, here)
        asked += len(rows)
        kept_way, own = (Estimate(said.clean[k : k + 1], said.noise[k : k + 1]) for k in (0, 1))
        led = Estimate(
            *(half[1:2] + (weights * (half[3:] - half[2:3])).sum(0, keepdim=True) for half in said)
        )
        missed = states[number + 1] - deterministic_step(rows[:1], kept_way, here, there)
        now = (deterministic_step(now[None], led if bool(weights.any()) else own, here, there) + missed)[0]
        if places is not None:
            now = torch.where(places > 0, now, states[number + 1])
        if number in kept:
            found.append(led.clean)
        progress()
    estimates: Tensor = torch.stack(found) if found else now.new_zeros(0, 1, *now.shape)
    return Drawn(
        model, inversion.picture, inversion.clean, now[None], places, estimates, asked, dict(inversion.facts)
    )
