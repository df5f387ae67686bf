"""Interpolation between two images: spherical for their noise, linear for their prompts' encodings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control, join_controls
from backbone.diffusion.noise import broadcast_like
from backbone.diffusion.samplers import deterministic_step
from backbone.io.console import UserError
from backbone.models.cache import encode_prompts_cached
from edit.checks import check_count, refuse_no_inversion
from edit.inversion.inversion import Inversion
from edit.layout import SOURCE, TARGET
from edit.result import Result
from edit.sampling import split_count


@torch.no_grad()
def interpolate(
    first: Inversion, second: Inversion, *, count: int = 7, progress: Callable[[], Any] = lambda: None
) -> Result:
    """K = `count` images from the first image to the second, both included.

    The noisiest states are interpolated by `slerp` (Song, Meng & Ermon 2021, section 5.3), the prompts' encodings
    linearly. So are the offsets of each end's deterministic steps from its trajectory, which are added to the steps in
    between, so that the ends are exactly the images' own latents. NFE: a step of a batch (`split_count`) evaluates its
    images and the two ends; `progress` is called after it.

    Raises `UserError` for inversions of different models, steps or sizes, fewer than three images, or more than can be
    meant.
    """
    for inversion in (first, second):
        refuse_no_inversion(inversion)
    if first.identity != second.identity:
        raise UserError(
            "The two inversions were made with different models. Invert both images with the same one."
        )
    if first.states.shape != second.states.shape or not torch.equal(first.schedule.a, second.schedule.a):
        raise UserError(
            "The two inversions differ in size or in steps. Invert images of the same shape with the same --steps."
        )
    if count < 3:
        raise UserError(f"{count} images leave none in between. Ask for three or more.")
    check_count(count)
    model, nfe = first.model, 0
    share = torch.linspace(0, 1, count)[1:-1]  # of the second image [K − 2]
    latents = []
    for numbers in split_count(model, len(share)):
        batch, calls = _draw_between(first, second, share[numbers.start : numbers.stop], progress)
        latents.append(batch)
        nfe += calls
    ends = [inversion.states[-1:].float() for inversion in (first, second)]
    between = torch.cat([ends[0], *latents, ends[1]])
    return Result(
        model=model,
        prompts=(first.prompt, *(f"{k}/{count - 1}" for k in range(1, count - 1)), second.prompt),
        encoded=first.encoded,
        latents=between,
        nfe=nfe,
        facts={"second_image": dict(second.facts), **first.layout.facts()},
        inversions=(first, second),
        layout=first.layout,
    )


def _draw_between(
    first: Inversion, second: Inversion, share: Tensor, progress: Callable[[], Any]
) -> tuple[Tensor, int]:
    """The latents [N, C, H, W] at these shares [N] of the second image, and the NFE."""
    model, schedule, nfe = first.model, first.schedule, 0
    ends = torch.stack([first.states, second.states]).float()  # [2, S + 1, C, H, W]
    # Rows: the two ends on their trajectories, then the images in between
    text = {
        name: torch.cat(
            [value, torch.stack([_mix(value[0], value[1], float(fraction)) for fraction in share])]
        )
        for name, value in encode_prompts_cached(model, [first.prompt, second.prompt]).text.items()
    }
    predict = model.predictor(Conditions(text, controls=mix_controls(first, second, share.tolist())))
    noisy = torch.stack([slerp(ends[0, 0], ends[1, 0], float(fraction)) for fraction in share])
    for step in range(first.steps):
        level, next_level = schedule[step], schedule[step + 1]
        # Each end's offset from its trajectory, mixed by the shares
        rows = torch.cat([ends[:, step], noisy])
        stepped = deterministic_step(rows, predict(rows, level), level, next_level)
        nfe += len(rows)
        offset = ends[:, step + 1] - stepped[:2]
        second_share = broadcast_like(share, noisy)
        noisy = stepped[2:] + (1 - second_share) * offset[:1] + second_share * offset[1:]
        progress()
    return noisy, nfe


def mix_controls(first: Inversion, second: Inversion, shares: Sequence[float]) -> tuple[Control, ...]:
    """The controls of the two ends, then of the images in between, whose maps are mixed linearly."""
    mixed = []
    for first_side, second_side in zip(first.layout.controls, second.layout.controls, strict=True):
        first_control, second_control = (
            control.during(first.schedule).to(first.model.device) for control in (first_side, second_side)
        )
        mixed_hints = tuple(
            torch.stack([torch.lerp(a[TARGET], b[TARGET], share) for share in shares])
            for a, b in zip(first_control.hints, second_control.hints, strict=True)
        )
        rows = [first_control.rows(torch.tensor([SOURCE])), second_control.rows(torch.tensor([SOURCE]))]
        rows.append(
            replace(first_control, hints=mixed_hints, scale=first_control.scale[TARGET].repeat(len(shares)))
        )
        mixed.append(join_controls([((row,), len(row)) for row in rows])[0])
    return tuple(mixed)


def _mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Encodings interpolated linearly; of attention masks, the tokens of either prompt."""
    if not first.is_floating_point():
        return torch.maximum(first, second)
    return torch.lerp(first, second, share)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The point at `share` of the great circle from `first` to `second` (Shoemake 1985), lengths interpolated too.

    Nearly parallel tensors, for which the great circle is undefined, are interpolated linearly.
    """
    lengths = first.norm(), second.norm()
    cosine = ((first * second).sum() / (lengths[0] * lengths[1]).clamp(min=1e-12)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if float(angle.sin().abs()) < 1e-4:
        return torch.lerp(first, second, share)

    # (sin((1 − s)·θ)·x̂₁ + sin(s·θ)·x̂₂) / sin θ, unit vectors x̂
    direction = (
        ((1 - share) * angle).sin() * first / lengths[0] + (share * angle).sin() * second / lengths[1]
    ) / angle.sin()
    length = torch.lerp(lengths[0], lengths[1], share)
    return cast(Tensor, direction * length)
