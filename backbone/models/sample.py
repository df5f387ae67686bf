"""Pictures from prompts. Picture (i, j) depends on the seed, i and j, not on the batch that it was drawn in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from PIL.Image import Image
from torch import Tensor

from backbone.diffusion.noise import Estimate, Ladder, Level, Predict, add_noise, generator
from backbone.diffusion.samplers import ancestral, heun, walk
from backbone.io.console import UserError
from backbone.media.transforms import to_image
from backbone.models.cache import encoded_prompts
from backbone.models.model import Backbone

Sampler = Literal["ddim", "heun", "ancestral"]
ALL_STEPS = (0.0, 1.0)


@dataclass(frozen=True)
class Request:
    """A picture to draw: the prompt in the model's words, and the key of its noise (prompt number, sample number)."""

    prompt: str
    key: tuple[int, int]
    negative: str = ""


@torch.no_grad()
def sample(
    model: Backbone,
    requests: Sequence[Request],
    *,
    steps: int,
    guidance: float,
    seed: int,
    sampler: Sampler = "ddim",
    batch: int = 8,
    guided: tuple[float, float] = ALL_STEPS,
) -> Iterator[Image]:
    """Draws the requested pictures, in order.

    `guided` is the share of the steps, from noisy to clean, that follow the guidance; the others follow the prompt
    alone, at half the price (Kynkäänniemi et al. 2024).
    """
    for latents in sample_latents(
        model,
        requests,
        steps=steps,
        guidance=guidance,
        seed=seed,
        sampler=sampler,
        batch=batch,
        guided=guided,
    ):
        for picture in model.decode(latents).cpu():
            yield to_image(picture)


@torch.no_grad()
def sample_latents(
    model: Backbone,
    requests: Sequence[Request],
    *,
    steps: int,
    guidance: float,
    seed: int,
    sampler: Sampler = "ddim",
    batch: int = 8,
    guided: tuple[float, float] = ALL_STEPS,
    clean: Tensor | None = None,
    share: float = 1.0,
) -> Iterator[Tensor]:
    """The same as latents, a batch [B, C, H, W] at a time.

    With `clean`, latents [R, C, H, W], one a request, each picture begins with these, noised with the noise of its own
    key, and takes the last `share` of the steps alone, as SDEdit does (Meng et al. 2022, algorithm 1, with a fresh
    prompt): another picture with their layout, of which a smaller share keeps more.
    """
    ladder, batch = model.ladder(steps), 1 if model.measures.one_by_one else batch
    rest = ladder if clean is None else ladder[steps_before(share, steps) :]
    for first in range(0, len(requests), batch):
        some = requests[first : first + batch]
        text = encoded_prompts(model, [request.prompt for request in some])
        empty = encoded_prompts(model, [request.negative for request in some])
        noise = torch.stack([initial_noise(model, seed, *request.key) for request in some]).to(model.device)
        if clean is None:
            start = noise * float((ladder.a[0] ** 2 + ladder.b[0] ** 2).sqrt())
        else:
            start = add_noise(clean[first : first + batch].to(model.device), noise, rest[0])
        predict = model.guided_predictor(text, empty, guidance)
        if guided != ALL_STEPS:
            predict = within(guided, predict, model.predictor(text), ladder)
        randoms = [generator(seed, *request.key, "steps") for request in some]
        yield walker(sampler, randoms)(start, predict, rest)


def steps_before(share: float, steps: int) -> int:
    """How many of a ladder's steps a redrawing by this share leaves out; `UserError` where none would be left."""
    if not 0 < share <= 1:
        raise UserError(f"{share:g} is no share of the steps to draw anew. Give one above 0, at most 1.")
    skipped = steps - round(share * steps)
    if skipped == steps:
        raise UserError(
            f"{share:g} of {steps} steps is none, so every picture would stay as it is. Draw a larger share anew."
        )
    return skipped


def within(share: tuple[float, float], inside: Predict, outside: Predict, ladder: Ladder) -> Predict:
    """`inside` at the levels of this share of a ladder's steps, counted from its noisy end, `outside` at the others."""
    start, stop = share
    steps = len(ladder) - 1
    noisiest = ladder.b[round(start * steps)]
    cleanest = ladder.b[round(stop * steps)] if stop < 1 else -1.0

    def predict(noisy: Tensor, level: Level) -> Estimate:
        chosen = inside if cleanest < level.b.max() <= noisiest else outside
        return chosen(noisy, level)

    return predict


def share_said(share: tuple[float, float]) -> str:
    """The share in words, to stand behind the guidance; nothing for all steps."""
    start, stop = share
    return "" if share == ALL_STEPS else f" from {start:.0%} to {stop:.0%} of the steps"


def refuse_no_share(share: tuple[float, float]) -> None:
    """`UserError` for what is no share of the steps."""
    start, stop = share
    if not 0 <= start < stop <= 1:
        raise UserError(
            f"Guidance from {start:g} to {stop:g} of the steps is no share of them. Let it begin at 0 or later, and "
            "end behind that, at 1 or earlier."
        )


def walker(
    sampler: Sampler, randoms: Sequence[torch.Generator]
) -> Callable[[Tensor, Predict, Ladder], Tensor]:
    """The sampler of this name; fresh noise, where it needs some, comes from one generator for each picture."""
    match sampler:
        case "ddim":
            return walk
        case "heun":
            return heun
        case "ancestral":
            return lambda noisy, predict, ladder: ancestral(noisy, predict, ladder, generator=randoms)
    raise UserError(f"There is no sampler {sampler}. Choose one of {', '.join(get_args(Sampler))}.")


def initial_noise(model: Backbone, seed: int, i: int, j: int) -> Tensor:
    """ε [C, …] of image (i, j), in the shape of a latent of the model."""
    return torch.randn(model.latent_shape, generator=generator(seed, i, j))
