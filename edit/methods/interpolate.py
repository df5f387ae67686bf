"""Pictures between two pictures: their noise interpolated on the sphere, their prompts in a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from backbone.diffusion.noise import Estimate
from backbone.diffusion.samplers import deterministic_step
from backbone.io.console import UserError
from backbone.models.cache import encode_prompts_cached
from edit.inversion.inversion import Inversion


@torch.no_grad()
def interpolate(
    first: Inversion, second: Inversion, *, count: int = 7, progress: Callable[[], Any] = lambda: None
) -> tuple[Tensor, int]:
    """Latents [K, C, H, W] from the first picture to the second, both included, and the evaluations that they took.

    The noisiest states are interpolated by `slerp` (Song, Meng & Ermon 2021, section 5.3), the prompts' encodings
    linearly, and so is what each end's deterministic step misses of its trajectory, which is added to the steps in
    between: the ends are then the pictures' own latents exactly.

    Raises `UserError` for inversions of different models, steps or sizes, or fewer than three pictures.
    """
    if first.identity != second.identity:
        raise UserError("The two inversions are of different models. Invert both pictures with the same one.")
    if first.states.shape != second.states.shape or not torch.equal(first.schedule.a, second.schedule.a):
        raise UserError(
            "The two inversions differ in size or in steps. Invert pictures of the same shape with the same --steps."
        )
    if count < 3:
        raise UserError(f"{count} pictures leave none in between. Ask for three or more.")
    model, schedule = first.model, first.schedule
    ends = torch.stack([first.states, second.states]).float()  # [2, S + 1, C, H, W]
    weight = torch.linspace(0, 1, count, device=ends.device)[1:-1]
    texts = encode_prompts_cached(model, [first.prompt, second.prompt])
    mixed = {
        name: torch.cat([value, torch.stack([_between(value[0], value[1], float(w)) for w in weight])])
        for name, value in texts.items()
    }
    predict = model.predictor(mixed)
    now = torch.stack([slerp(ends[0, 0], ends[1, 0], float(w)) for w in weight])
    share = weight[:, None, None, None]
    asked = 0
    for number in range(first.steps):
        here, there = schedule[number], schedule[number + 1]
        rows = torch.cat([ends[:, number], now])
        said = predict(rows, here)
        asked += len(rows)
        stepped = deterministic_step(rows, Estimate(*said), here, there)
        missed = ends[:, number + 1] - stepped[:2]
        now = stepped[2:] + (1 - share) * missed[:1] + share * missed[1:]
        progress()
    return torch.cat([ends[:1, -1], now, ends[1:, -1]]), asked


def _between(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Encodings in a line; of masks, what either prompt says."""
    if not first.is_floating_point():
        return torch.maximum(first, second)
    return torch.lerp(first, second, share)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The point at `share` of the great circle from `first` to `second` (Shoemake 1985), lengths interpolated too.

    Nearly parallel tensors are interpolated in a line, where the circle says nothing.
    """
    lengths = first.norm(), second.norm()
    cosine = ((first * second).sum() / (lengths[0] * lengths[1]).clamp(min=1e-12)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if float(angle.sin().abs()) < 1e-4:
        return torch.lerp(first, second, share)
    direction = (
        ((1 - share) * angle).sin() * first / lengths[0] + (share * angle).sin() * second / lengths[1]
    ) / angle.sin()
    length = torch.lerp(lengths[0], lengths[1], share)
    return cast(Tensor, direction * length)
