"""SDEdit: a picture, a stroke painting or a part of either is noised, and what the words say grows out of the noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from backbone.diffusion.noise import Estimate, Predict, Schedule, add_noise, generator
from backbone.diffusion.samplers import deterministic_step
from backbone.diffusion.schedules import truncate_schedule
from backbone.media.transforms import to_image, to_tensor
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from edit import checks
from edit.inversion.inversion import ladder_of, refuse_negative, rows_of
from edit.masks import composed, latent_mask, mask_of
from edit.pictures import prepared


@dataclass(frozen=True, eq=False)
class Drawn:
    """What an edit without attention control gives back.

    picture      [3, 8H, 8W] in −1…1, as the autoencoder was shown it
    clean        its latent [C, H, W]
    latents      [N, C, H, W]
    mask         [H, W], 1 where the edits were let differ; None if everywhere
    estimates    [F, N, C, H, W], what the edits were thought to become, along the way
    evaluations  samples that the denoiser was asked about
    facts        of the picture: name, size, content hash
    """

    model: Backbone
    picture: Tensor
    clean: Tensor
    latents: Tensor
    mask: Tensor | None
    estimates: Tensor
    evaluations: int
    facts: dict[str, Any]

    @cached_property
    def decoded(self) -> Tensor:
        """What the autoencoder alone makes of the picture, and the edits [1 + N, 3, 8H, 8W]."""
        source, *edits = self.model.decode(torch.cat([self.clean[None], self.latents]))
        masks = None if self.mask is None else self.mask.expand(len(edits), *self.mask.shape)
        return torch.cat([source[None], composed(torch.stack(edits), source, masks)])

    @property
    def pictures(self) -> list[Image.Image]:
        """The edits."""
        return [to_image(picture) for picture in self.decoded[1:]]


@torch.no_grad()
def sdedit(
    model: Backbone,
    image: Image.Image | str | Path,
    prompt: str,
    *,
    strength: float = 0.6,
    steps: int = 50,
    guidance: float | None = None,
    negative: str = "",
    mask: Image.Image | str | Path | None = None,
    count: int = 1,
    seed: int = 0,
    frames: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> Drawn:
    """N = `count` pictures of what the prompt says (in the model's words), begun from a noised picture.

    Meng et al. 2022, algorithm 1: fresh noise at the level that `strength` names, then deterministic steps down.
    With a mask (white = may change), algorithm 3: at every rung the rest is the picture at that level, with the noise
    that it began with, so in the end it is the picture's own latent. `strength` is diffusers': 0 leaves the picture
    as it is, 1 walks the whole ladder. Picture k depends on the seed and k alone.

    Raises `UserError` for an empty prompt, a strength outside 0…1, a mask of another size, an unreadable picture.
    """
    checks.prompt(prompt, "prompt")
    checks.share("strength", strength)
    refuse_negative(model, negative)
    guidance = (
        float(model.defaults["guidance"]) if guidance is None else checks.not_negative("guidance", guidance)
    )
    shown, facts = prepared(model, image)
    schedule = truncate_schedule(ladder_of(model, steps, shown), strength)
    picture = to_tensor(shown)
    clean = model.encode(picture[None]).mean
    places = None
    if mask is not None:
        whole = mask_of(mask, shown=shown.size, original=facts["size"])
        places = latent_mask(whole, clean.shape[-2:]).to(clean)
    noise = torch.stack(
        [torch.randn(clean.shape[1:], generator=generator(seed, k, "sdedit")) for k in range(count)]
    )
    text, empty = (encode_prompts_cached(model, [words] * count) for words in (prompt, negative))
    predict = model.guided_predictor(text, empty, guidance)
    latents, estimates = filled(
        clean, noise.to(clean), predict, schedule, places=places, frames=frames, progress=progress
    )
    asked = (len(schedule) - 1) * count * rows_of(model, text, guidance)
    return Drawn(model, picture, clean[0], latents, places, estimates, asked, facts)


def filled(
    clean: Tensor,
    noise: Tensor,
    predict: Predict,
    schedule: Schedule,
    *,
    places: Tensor | None = None,
    frames: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Latents [N, C, H, W] walked down from a noised clean latent [1, C, H, W], and estimates along the way.

    Where `places` [H, W] is 0 the state is, at every rung, the clean latent with the same noise [N, C, H, W].
    """
    clean = clean.expand_as(noise)
    now, kept, found = clean, spaced(0, len(schedule) - 1, frames), []
    if len(schedule) > 1:
        now = add_noise(clean, noise, schedule[0])
    for number, (here, there) in enumerate(pairwise(schedule)):
        estimate: Estimate = predict(now, here)
        now = deterministic_step(now, estimate, here, there)
        if places is not None:
            last = number == len(schedule) - 2
            now = torch.where(places > 0, now, clean if last else add_noise(clean, noise, there))
        if number in kept:
            found.append(estimate.clean.float())
        progress()
    return now, torch.stack(found) if found else now.new_zeros(0, *now.shape)


def spaced(first: int, last: int, count: int) -> set[int]:
    """`count` step numbers from `first` to the last one, evenly spaced."""
    if count < 1 or last <= first:
        return set()
    return {first + round((last - 1 - first) * k / max(count - 1, 1)) for k in range(count)}
