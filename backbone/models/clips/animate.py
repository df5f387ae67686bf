"""A picture that begins to move: clips of a model that reads a picture and no words (Stable Video Diffusion).

    keys = [(0, 0)]
    conditions = condition_on_stills(model, [Still(pixels, fps=7, motion_bucket=127, noise=0.02)], keys, seed=0)
    (latents,) = animate(model, conditions, keys, steps=25, guidance=3.0, seed=0, frames=Frames(14))
    frames = model.decode_clip(latents[0])

Clip (i, j) depends on the seed, i and j alone. Guidance grows over the frames, from the first to the last: the first
is the picture anyway, and frames further from it need more (Blattmann et al. 2023, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbone.cli.keywords import takes
from backbone.cli.sampling import default_sampler_of_clips
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level, Predict, generator
from backbone.diffusion.transfer import send
from backbone.models.merged import fast_draws
from backbone.models.model import Backbone
from backbone.models.sample import (
    Frames,
    SamplerArguments,
    count_predictions,
    draw_initial_noise,
    get_sampler,
    limit_guidance,
    report_steps,
)


@dataclass(frozen=True, eq=False)
class Still:
    """The picture that begins to move, and the motion that the model is conditioned on.

    pixels         [3, 8H, 8W] in −1…1, at the size of the clip
    fps            frames a second; the network was trained to read one less
    motion_bucket  how much moves, 0…255 as trained
    noise          deviation of the noise on the picture: with more of it the clip keeps less of it, and moves more
    original       the picture before it was scaled down to that size, for its embedding; None: `pixels`
    """

    pixels: Tensor
    fps: float = 7.0
    motion_bucket: float = 127.0
    noise: float = 0.02
    original: Tensor | None = None


def condition_on_stills(
    model: Backbone, stills: Sequence[Still], keys: Sequence[tuple[int, int]], seed: int
) -> list[Conditions]:
    """The conditions of a clip for each noise key (i, j): of still i, with noise from that key.

    Frees the image encoder, which is not needed again.
    """
    hidden = [encode_still(model, still) for still in stills]
    model.free("image_encoder")
    return [condition_on(model, stills[i], hidden[i], generator(seed, i, j, "picture")) for i, j in keys]


def encode_still(model: Backbone, still: Still) -> Tensor:
    """The image embedding [1, T, D] that the model is conditioned on."""
    picture = still.pixels if still.original is None else still.original
    return send(model.image_encoder(send(picture[None], model.device)), model.device)


def condition_on(model: Backbone, still: Still, hidden: Tensor, random: torch.Generator) -> Conditions:
    """The conditions of one clip: the picture's embedding, its latents under noise, and the ids."""
    noise = torch.randn(still.pixels.shape, generator=random)
    pixels = still.pixels + still.noise * noise
    latents = model.encode(pixels[None]).mean / model.latent_space.scale
    ids = torch.tensor([[still.fps - 1, still.motion_bucket, still.noise]], device=model.device)
    return Conditions({"hidden": hidden, "ids": ids}, references=(latents,))


@takes(SamplerArguments, without=("size",))
@torch.no_grad()
def animate(
    model: Backbone,
    conditions: Sequence[Conditions],
    keys: Sequence[tuple[int, int]],
    *,
    frames: Frames,
    min_guidance: float = 1.0,
    advance: Callable[[float], Any] | None = None,
    **arguments: Any,
) -> Iterator[Tensor]:
    """Sample latents [B, C, F, H, W] of a clip for each noise key (i, j) under its conditions, a batch at a time.

    The guidance rises from `min_guidance` at the first frame to `guidance` at the last. `arguments` are the fields of
    `SamplerArguments`; the size is the still's. `advance` is called after each step with the work done, in clips.
    """
    sampling = SamplerArguments(**arguments)
    sampler = model.choose_sampler(sampling.sampler, default_sampler_of_clips)
    size = (int(conditions[0].references[0].shape[-2]), int(conditions[0].references[0].shape[-1]))

    # [F] guidance scales, rising over the frames
    schedule = model.schedule(sampling.steps, size=size)
    scales = torch.linspace(min_guidance, sampling.guidance, frames.count)
    for first in range(0, len(keys), sampling.batch):
        batch_keys = keys[first : first + sampling.batch]
        # The noisiest state: noise of deviation √(a² + b²)
        noise = torch.stack(
            [draw_initial_noise(model, sampling.seed, *key, size, frames=frames) for key in batch_keys]
        )
        start = send(noise, model.device) * float((schedule.a[0] ** 2 + schedule.b[0] ** 2).sqrt())
        batch_conditions = Conditions.cat(conditions[first : first + sampling.batch])
        predict = guide_over_frames(model, batch_conditions, scales)
        predict = limit_guidance(
            sampling.resolve_guided(model), predict, model.predictor(batch_conditions), schedule
        )
        if advance is not None:
            predict = report_steps(predict, advance, len(batch_keys) / count_predictions(sampler, schedule))
        randoms = [generator(sampling.seed, *key, "steps") for key in batch_keys]
        with fast_draws(model):
            latents = get_sampler(sampler, randoms)(start, predict, schedule)
        yield latents


def drop_picture(conditions: Conditions) -> Conditions:
    """The conditions with zeros in place of the picture, and the ids unchanged."""
    text = {
        name: value if name == "ids" else torch.zeros_like(value) for name, value in conditions.text.items()
    }
    return Conditions(text, references=tuple(map(torch.zeros_like, conditions.references)))


def guide_over_frames(model: Backbone, conditions: Conditions, scales: Tensor) -> Predict:
    """Classifier-free guidance with a scale for each frame [F]; no second call where all scales are 1."""
    if bool((scales == 1).all()):
        return model.predictor(conditions)
    empty = drop_picture(conditions)
    with_picture, without_picture = model.predictor(conditions), model.predictor(empty)
    predict_both = model.predictor(Conditions.cat([conditions, empty]))

    def predict(noisy: Tensor, level: Level) -> Estimate:
        scale = send(scales, noisy.device)[:, None, None]
        if model.placement.one_by_one:
            halves = list(zip(with_picture(noisy, level), without_picture(noisy, level), strict=True))
        else:
            estimates = predict_both(torch.cat([noisy, noisy]), level)
            halves = [(part[: len(noisy)], part[len(noisy) :]) for part in estimates]
        return Estimate(
            *(unconditional + scale * (conditional - unconditional) for conditional, unconditional in halves)
        )

    return predict
