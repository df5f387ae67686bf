"""FlowEdit: from the picture to its edit along a path that is never noise, without an inversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from backbone.diffusion.noise import Estimate, Level, broadcast_like, generator, guide
from backbone.diffusion.schedules import truncate_schedule
from backbone.media.transforms import to_tensor
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from edit import checks
from edit.inversion.inversion import ladder_of, told
from edit.masks import latent_mask, mask_of
from edit.methods.sdedit import Drawn, spaced
from edit.pictures import prepared


@torch.no_grad()
def flow_edit(
    model: Backbone,
    image: Image.Image | str | Path,
    source: str,
    targets: Sequence[str],
    *,
    strength: float = 0.66,
    steps: int = 50,
    guidance: float | None = None,
    source_guidance: float = 1.0,
    draws: int = 1,
    mask: Image.Image | str | Path | None = None,
    seed: int = 0,
    frames: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> Drawn:
    """The picture moved by what the targets' velocities have over the source's (prompts in the model's words).

    Kulikov et al. 2025, algorithm 1, for any path: with x̃ = x/(a + b) and τ = b/(a + b) every model's ODE is the
    flow's, dx̃/dτ = ε̂ − x̂0, so the variance-preserving families walk it too. `strength` is their n_max/T, `draws`
    their n_avg. S·strength·draws steps, each with one row for the source and two for each target (one more where the
    source is guided). A target equal to the source, equally guided, leaves the picture bit for bit what it was.

    Raises `UserError` as `sdedit`.
    """
    checks.prompt(source, "source prompt")
    targets = checks.prompts(targets, "target prompt")
    checks.share("strength", strength)
    guidance = (
        float(model.defaults["guidance"]) if guidance is None else checks.not_negative("guidance", guidance)
    )
    checks.not_negative("source guidance", source_guidance)
    shown, facts = prepared(model, image)
    schedule = truncate_schedule(ladder_of(model, steps, shown), strength)
    picture = to_tensor(shown)
    clean = model.encode(picture[None]).mean
    places = None
    if mask is not None:
        whole = mask_of(mask, shown=shown.size, original=facts["size"])
        places = latent_mask(whole, clean.shape[-2:]).to(clean)
    count = len(targets)
    order = list(range(1 + count))  # which state each row of a call sees: the source's, or a target's
    text = encode_prompts_cached(model, [source, *targets])
    with_guidance = told(model, text, source_guidance, guidance)
    if with_guidance is not None:
        text, source_guidance, guidance = with_guidance, 1.0, 1.0
    else:
        free = ([0] if source_guidance != 1 else []) + (order[1:] if guidance != 1 else [])
        empty = encode_prompts_cached(model, [""])
        text = {
            name: torch.cat([value, empty[name].expand(len(free), *value.shape[1:])])
            for name, value in text.items()
        }
        order += free
    predict = model.predictor(text)
    edited, found, asked = clean.repeat(count, 1, 1, 1), [], 0
    kept = spaced(0, len(schedule) - 1, frames)
    for number, (here, there) in enumerate(pairwise(schedule)):
        moved = torch.zeros_like(edited)
        for draw in range(draws):
            random = generator(seed, number, draw, "flow edit")
            noise = torch.randn(clean.shape, generator=random).to(clean)
            tau = broadcast_like(_tau(here), clean)
            noised = (1 - tau) * clean + tau * noise
            both = torch.cat([noised, noised + (edited - clean)])
            said = predict(broadcast_like(here.a + here.b, both) * both[order], here)
            asked += len(order)
            velocity = [_velocity(half) for half in _guided(said, count, source_guidance, guidance)]
            moved += (velocity[1] - velocity[0]) / draws
        edited = edited + broadcast_like(_tau(there) - _tau(here), edited) * moved
        if places is not None:
            edited = torch.where(places > 0, edited, clean)
        if number in kept:
            found.append(edited.clone())
        progress()
    estimates = torch.stack(found) if found else edited.new_zeros(0, *edited.shape)
    return Drawn(model, picture, clean[0], edited, places, estimates, asked, facts)


def _guided(said: Estimate, count: int, source_guidance: float, guidance: float) -> tuple[Estimate, Estimate]:
    """The source's and the targets' estimates, each with its own guidance."""

    def rows(*, first: int, last: int) -> Estimate:
        return Estimate(said.clean[first:last], said.noise[first:last])

    source, targets, behind = rows(first=0, last=1), rows(first=1, last=1 + count), 1 + count
    if source_guidance != 1:
        source, behind = guide(source, rows(first=behind, last=behind + 1), source_guidance), behind + 1
    if guidance != 1:
        targets = guide(targets, rows(first=behind, last=behind + count), guidance)
    return source, targets


def _velocity(estimate: Estimate) -> Tensor:
    return estimate.noise - estimate.clean


def _tau(level: Level) -> Tensor:
    return level.b / (level.a + level.b)
