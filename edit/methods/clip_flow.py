"""FlowEdit on clips: all frames moved together from one prompt to another, without an inversion.

The path of `edit.methods.flow_edit` for a clip as one sample. Source and target have the same noise at every step, and
the frames may share a part of theirs: all of it where only attention links them, so that all frames are edited alike;
none with a motion adapter, which was trained on frames with independent noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from backbone.diffusion.noise import broadcast_like, generator
from backbone.media.clips import Film
from backbone.models.cache import encode_prompts_cached
from backbone.models.clips.frames import link_frames
from backbone.models.clips.motion import find_motion
from backbone.models.model import Backbone
from edit.checks import check_not_negative, check_prompt, check_prompts, check_share
from edit.layout import NO_LAYOUT, SOURCE, TARGET, Layout
from edit.methods.clip import ClipResult
from edit.methods.flow_edit import compute_velocity_difference
from edit.pictures import encode_film
from edit.sampling import SourceAndTargets, make_noise_schedule, resolve_guidance, truncate_to_strength


@dataclass(frozen=True)
class ClipFlow:
    """Settings of `flow_film`.

    strength         the share of the noise levels that is visited
    draws            noises averaged at every step
    shared           the share of the noise's variance that frames have in common; None: all, with a motion adapter none
    guidance         of the targets; None: the model's default
    source_guidance  of the source's prompt
    steps            of the whole schedule
    """

    strength: float = 0.66
    draws: int = 1
    shared: float | None = None
    guidance: float | None = None
    source_guidance: float = 1.0
    steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("strength", self.strength)
        check_share("shared noise", self.shared or 0.0)


@torch.no_grad()
def flow_film(
    model: Backbone,
    film: Film,
    source: str,
    targets: Sequence[str],
    settings: ClipFlow,
    *,
    layout: Layout = NO_LAYOUT,
    progress: Callable[[], Any] = lambda: None,
) -> ClipResult:
    """Move a clip that shows what the source's words say to what the targets' say (prompts in the model's words).

    A target equal to the source, equally guided, leaves the clip unchanged, bit for bit. `progress` is called after
    every step. Raises `UserError` as `flow_edit`.
    """
    check_prompt(source, "source prompt")
    count = len(check_prompts(tuple(targets), "target prompt"))
    check_not_negative("source guidance", settings.source_guidance)
    guidance = resolve_guidance(model, settings.guidance)
    linked = find_motion(model.denoiser) is not None
    shared = (0.0 if linked else 1.0) if settings.shared is None else settings.shared
    encoded = encode_film(model, film)
    clean = encoded.latent
    schedule = truncate_to_strength(
        model, make_noise_schedule(model, settings.steps, clean), settings.strength
    )
    sides = [SOURCE, *[TARGET] * count]
    text = layout.attach(encode_prompts_cached(model, [source, *targets]), schedule, sides)
    predict = SourceAndTargets(model, text, source_guidance=settings.source_guidance, guidance=guidance)
    empty = encode_prompts_cached(model, [""])

    # As `flow_edit`, with noise that frames may share
    edited = clean.repeat_interleave(count, 0)
    with link_frames(model, clean.shape[-3]):
        for step, (level, next_level) in enumerate(pairwise(schedule)):
            velocity = torch.zeros_like(edited)
            for draw in range(settings.draws):
                noise = noise_of_frames(clean, shared, settings.seed, step, draw)
                velocity += (
                    compute_velocity_difference(predict, clean, edited, noise, level, empty) / settings.draws
                )
            edited = edited + broadcast_like(next_level.tau - level.tau, edited) * velocity
            progress()
    facts = {"guidance": guidance, "source_guidance": settings.source_guidance, "shared_noise": shared}
    return ClipResult(
        model, tuple(targets), encoded, edited.float(), predict.nfe, facts={**facts, **layout.facts()}
    )


def noise_of_frames(clips: Tensor, shared: float, seed: int, step: int, draw: int) -> Tensor:
    """Noise of the clips' shape [1, C, F, h, w]; the frames have a share of its variance in common."""
    random = generator(seed, step, draw, "flow edit")
    common = torch.randn(clips[:, :, :1].shape, generator=random)
    independent = torch.randn(clips.shape, generator=random)
    mixed: Tensor = shared**0.5 * common + (1 - shared) ** 0.5 * independent
    return mixed.to(clips)
