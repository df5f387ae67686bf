"""FlowEdit: from the image to its edit along a path that is never noise, without an inversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from backbone.cli.keywords import takes
from backbone.cli.values.build import build
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level, broadcast_like, generator, randn_like
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from edit.checks import check_not_negative, check_prompt, check_prompts, refuse_unopened
from edit.layout import NO_LAYOUT, SOURCE, TARGET, Layout
from edit.masks import load_latent_mask
from edit.pictures import ImageLike, encode_image
from edit.result import Result
from edit.sampling import (
    KeptEstimates,
    SourceAndTargets,
    make_noise_schedule,
    resolve_guidance,
    truncate_to_strength,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowEditSettings:
    """Settings of `flow_edit`.

    strength         share of the noise levels that are visited: the authors' n_max/T
    guidance         of the targets; None: the model's default
    source_guidance  of the source's prompt
    draws            noises averaged at every step: the authors' n_avg
    mask             white = may change; None: everywhere
    frames           estimates kept along the way
    """

    strength: float = 0.66
    steps: int = 50
    guidance: float | None = None
    source_guidance: float = 1.0
    draws: int = 1
    mask: ImageLike | None = None
    seed: int = 0
    frames: int = 0


@takes(FlowEditSettings)
@torch.no_grad()
def flow_edit(
    model: Backbone,
    image: ImageLike,
    source: str,
    targets: str | Sequence[str],
    *,
    layout: Layout = NO_LAYOUT,
    progress: Callable[[], Any] = lambda: None,
    **settings: Any,
) -> Result:
    """The image moved along the difference of the targets' velocities and the source's (prompts in the model's words).

    `settings` are the fields of `FlowEditSettings`, by name. Kulikov et al. 2025, algorithm 1, for any path: with
    x̃ = x/(a + b) and τ = b/(a + b) every model's ODE is the flow's, dx̃/dτ = ε̂ − x̂0, so it holds on the
    variance-preserving families too. NFE: S·strength·draws times one for the source and two for each target (one more
    where the source is guided). A target equal to the source, equally guided, leaves the image unchanged, bit for bit.
    `layout` and `progress` are as in `sdedit`.

    Raises `UserError` as `sdedit`.
    """
    options = build(FlowEditSettings, settings)
    refuse_unopened(model)
    check_prompt(source, "source prompt")
    targets = check_prompts(targets, "target prompt")
    check_not_negative("source guidance", options.source_guidance)
    guidance = resolve_guidance(model, options.guidance)

    # The image's latent, and the steps below the level that `strength` names
    encoded = encode_image(model, image)
    clean = encoded.latent
    schedule = truncate_to_strength(model, make_noise_schedule(model, options.steps, clean), options.strength)
    mask = load_latent_mask(options.mask, encoded)
    sides = [SOURCE, *[TARGET] * len(targets)]
    text = layout.attach(encode_prompts_cached(model, [source, *targets]), schedule, sides)
    predict = SourceAndTargets(model, text, source_guidance=options.source_guidance, guidance=guidance)
    empty = encode_prompts_cached(model, [""])

    # dx̃/dτ = u(target) − u(source), under the same noise, mean over draws
    edited, kept_estimates = (
        clean.repeat_interleave(len(targets), 0),
        KeptEstimates(0, len(schedule) - 1, options.frames),
    )
    for step, (level, next_level) in enumerate(pairwise(schedule)):
        velocity = torch.zeros_like(edited)  # of the edit: the targets' minus the source's, mean over draws
        for draw in range(options.draws):
            noise = randn_like(clean, generator(options.seed, step, draw, "flow edit"))
            difference = compute_velocity_difference(predict, clean, edited, noise, level, empty)
            velocity += difference / options.draws
        edited = edited + broadcast_like(next_level.tau - level.tau, edited) * velocity
        if mask is not None:
            edited = torch.where(mask > 0, edited, clean)
        kept_estimates.add(step, edited)
        progress()
    return Result(
        model=model,
        prompts=targets,
        encoded=encoded,
        latents=edited,
        nfe=predict.nfe,
        masks=None if mask is None else mask.expand(len(targets), -1, -1),
        estimates=kept_estimates.stack(),
        facts={"guidance": guidance, "source_guidance": options.source_guidance, **layout.facts()},
        layout=layout,
    )


def compute_velocity_difference(
    predict: SourceAndTargets, clean: Tensor, edited: Tensor, noise: Tensor, level: Level, empty: Conditions
) -> Tensor:
    """The targets' velocities minus the source's [N, C, H, W], under one noise [1, C, H, W]."""
    share = broadcast_like(level.tau, clean)
    noised = (1 - share) * clean + share * noise
    # The source noised, and each edit displaced from it as the edit is from the image
    both = torch.cat([noised, noised + (edited - clean)])
    velocities = _velocity(predict(broadcast_like(level.a + level.b, both) * both, level, empty))
    return velocities[1:] - velocities[:1]


def _velocity(estimate: Estimate) -> Tensor:
    return estimate.noise - estimate.clean
