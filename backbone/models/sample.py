"""Text-to-image sampling. Image (i, j) depends on the seed, i and j alone, not on its batch.

Only its rounding may: many processors' libraries sum in another order in a batch of another size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, TypeVar, cast, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL.Image import Image
from torch import Tensor

from backbone.cli.keywords import takes
from backbone.cli.sampling import (
    ALL_STEPS,
    MODELS_OWN,
    MOST_PIXELS,
    SAMPLER,
    EarlyScale,
    Sampler,
    SamplingSettings,
    Size,
    default_early_scale,
    default_guidance_interval,
    default_sampler,
    default_sampler_of_clips,
)
from backbone.cli.values.build import check_values
from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control, repeat_controls
from backbone.diffusion.noise import Estimate, Level, Predict, Schedule, add_noise, generator, keep
from backbone.diffusion.samplers import ancestral, consistency, ddim, dpmpp_2m, heun, unipc
from backbone.diffusion.transfer import send
from backbone.io.console import UserError, notify_once
from backbone.media.transforms import to_image
from backbone.models.cache import encode_prompts_cached
from backbone.models.clips.windows import Windows, attention_in_windows, predict_in_windows
from backbone.models.defaults import say_few_step_name
from backbone.models.merged import fast_draws
from backbone.models.model import Backbone
from backbone.models.references import ReferenceImage, list_latents

Settings = TypeVar("Settings", bound=SamplingSettings)


@dataclass(frozen=True)
class Request:
    """An image to sample: the prompt with its placeholder tokens resolved, and its noise key (prompt, sample)."""

    prompt: str
    key: tuple[int, int]
    negative: str = ""


@dataclass(frozen=True)
class Frames:
    """The frames of a clip.

    count    number of frames
    window   number that go through the network together; 0: all
    stride   frames between the beginnings of two windows
    by       what goes by windows: the network, or attention over time alone (FreeNoise)
    shared   the share of the starting noise's variance that the frames have in common
    """

    count: int
    window: int = 0
    stride: int = 4
    shared: float = 0.0
    by: Windows = "network"

    def __post_init__(self) -> None:
        if not self.window:
            object.__setattr__(self, "window", self.count)

    def windows(self, by: Windows) -> bool:
        """Whether `by` is what goes through windows."""
        return self.by == by and self.window < self.count


@dataclass(frozen=True, kw_only=True)
class SamplerArguments:
    """How samples are drawn.

    sampler  None: the model's own, from its `limner.json`; for clips one without fresh noise
    batch    number sampled together, which does not change the samples
    guided   the share of the steps, from noisy to clean, that follow the guidance; the others follow the prompt alone,
             at half the price (Kynkäänniemi et al. 2024); None: the model's own, which its `limner.json` names
    early    the strength of subjects' adapters in the first steps; None: the model's own, of clips all of it
    size     (width, height) in pixels
    """

    steps: int
    guidance: float
    seed: int
    sampler: Annotated[Sampler | None, SAMPLER] = None
    batch: int = 8
    guided: tuple[float, float] | None = None
    early: EarlyScale | None = None
    size: Size = MODELS_OWN

    def __post_init__(self) -> None:
        check_values(self)

    def resolve_guided(self, model: Backbone) -> tuple[float, float]:
        """The share of the steps that are guided."""
        return self.guided or default_guidance_interval(model.defaults)

    def resolve_early(self, model: Backbone, frames: Frames | None = None) -> EarlyScale:
        """The strength of subjects' adapters in the first steps."""
        default = default_early_scale(model.defaults) if frames is None or frames.count == 1 else EarlyScale()
        return self.early or default


@dataclass(frozen=True, eq=False)
class GivenLatents:
    """Latents with which sampling begins, noised with the noise of each sample's key.

    latents  [R, C, H, W], one a request, or of clips [R, C, F, H, W]
    share    the share of the steps taken, the last ones: SDEdit (Meng et al. 2022, algorithm 1). A smaller one keeps
             more of the layout
    kept     bool [H, W]: where the latents are known and do not change
    """

    latents: Tensor
    share: float = 1.0
    kept: Tensor | None = None


@takes(SamplerArguments)
@torch.no_grad()
def sample(
    model: Backbone,
    requests: Sequence[Request],
    *,
    references: Sequence[ReferenceImage] = (),
    controls: Sequence[Control] = (),
    advance: Callable[[float], Any] | None = None,
    **settings: Any,
) -> Iterator[Image]:
    """Sample the requested images, in order; `settings` are the fields of `SamplerArguments`.

    `controls`, of one row each, apply to all images. `advance` is called after each step with the work done, in images.
    """
    for latents in sample_latents(
        model, requests, references=references, controls=controls, advance=advance, **settings
    ):
        for picture in model.decode(latents).cpu():
            yield to_image(picture)


@takes(SamplerArguments)
@torch.no_grad()
def sample_latents(
    model: Backbone,
    requests: Sequence[Request],
    *,
    references: Sequence[ReferenceImage] = (),
    controls: Sequence[Control] = (),
    given: GivenLatents | None = None,
    frames: Frames | None = None,
    advance: Callable[[float], Any] | None = None,
    **settings: Any,
) -> Iterator[Tensor]:
    """Sample latents, a batch [B, C, H, W] at a time, or with `frames` a batch of clips [B, C, F, H, W].

    `settings` are the fields of `SamplerArguments`. `references` are images beside every prompt. Sampling begins
    with the latents `given`, if any.
    """
    arguments = SamplerArguments(**settings)
    default = default_sampler if frames is None or frames.count == 1 else default_sampler_of_clips
    # The levels; with given latents only those from their share of noise on
    sampler = model.choose_sampler(arguments.sampler, default)
    size = find_latent_size(model, arguments.size)
    schedule = model.schedule(arguments.steps, size=size)
    levels = schedule if given is None else schedule[count_skipped_steps(given.share, arguments.steps) :]
    controls = tuple(control.during(levels).to(model.device) for control in controls)
    for request in requests:
        say_same_negative([request.prompt], request.negative)
    batch = 1 if model.placement.one_by_one else arguments.batch
    for first in range(0, len(requests), batch):
        group = requests[first : first + batch]
        predict = _make_predictor(model, group, arguments, schedule, references, controls, frames)

        # The noisy latents to begin with
        noise = torch.stack(
            [
                draw_initial_noise(model, arguments.seed, *request.key, size, frames=frames)
                for request in group
            ]
        )
        noise = send(noise, model.device)
        if given is None:
            start = noise * float((schedule.a[0] ** 2 + schedule.b[0] ** 2).sqrt())
        else:
            clean = given.latents[first : first + batch].to(model.device)
            start = add_noise(clean, noise, levels[0])

        if given is not None and given.kept is not None:
            predict = keep(predict, clean, given.kept.to(model.device))
        if advance is not None:
            predict = report_steps(predict, advance, len(group) / count_predictions(sampler, levels))

        randoms = [generator(arguments.seed, *request.key, "steps") for request in group]
        early = weaken_early(model, predict, arguments.resolve_early(model, frames), schedule)
        with _attend_in_windows(model, frames), early as predict:
            latents = get_sampler(sampler, randoms)(start, predict, levels)
        yield latents


def _make_predictor(
    model: Backbone,
    requests: Sequence[Request],
    arguments: SamplerArguments,
    schedule: Schedule,
    references: Sequence[ReferenceImage],
    controls: Sequence[Control],
    frames: Frames | None,
) -> Predict:
    """The guided predictor for a batch of requests, by windows where `frames` says so."""
    text, empty = (
        add_references(encode_prompts_cached(model, prompts, references), references)
        for prompts in ([request.prompt for request in requests], [request.negative for request in requests])
    )
    text = replace(text, controls=repeat_controls(controls, len(requests)))
    guide = partial(
        guide_steps,
        model,
        empty=empty,
        guidance=arguments.guidance,
        guided=arguments.resolve_guided(model),
        schedule=schedule,
    )
    if frames is not None and frames.windows("network"):
        return predict_in_windows(partial(_cut_to_window, guide, text), frames.window, frames.stride)
    return guide(text)


def guide_steps(
    model: Backbone,
    text: Conditions,
    *,
    empty: Conditions,
    guidance: float,
    guided: tuple[float, float],
    schedule: Schedule,
) -> Predict:
    """Guided predictions in the share `guided` of a schedule's steps, those of the prompt alone in the others."""
    predict, unguided = (model.guided_predictor(text, empty, scale) for scale in (guidance, 1.0))
    return limit_guidance(guided, predict, unguided, schedule)


@contextmanager
def weaken_early(
    model: Backbone, predict: Predict, early: EarlyScale, schedule: Schedule
) -> Iterator[Predict]:
    """The same predictions, for fast sampling inside the `with`, where subjects' adapters have `early.scale` of their
    strength in the first steps of a schedule, and all of it in the others.

    The first steps decide the layout, the number of objects and what they wear: a smaller strength there leaves more of
    that to the base. Afterwards the earlier strengths are restored.
    """
    layers = [cast(Any, layer) for layer in model.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    strengths: list[tuple[dict[str, float], str, float]] = [
        (layer.scaling, name, layer.scaling[name])
        for layer in layers
        for name in model.subject_adapters
        if name in getattr(layer, "scaling", {})
    ]
    if early.scale == 1 or not strengths:
        with fast_draws(model):
            yield predict
        return

    factor = early.scale

    def scale_by(factor: float) -> None:
        for scaling, name, strength in strengths:
            scaling[name] = strength * factor

    def weakened(noisy: Tensor, level: Level) -> Estimate:
        nonlocal factor
        target = early.scale if is_in_share((0.0, early.share), level, schedule) else 1.0
        if target != factor:
            factor = target
            scale_by(factor)
            merge()
        return predict(noisy, level)

    # Sampling begins with the first steps, so LoRAs are merged at their strength; after them they are merged again
    scale_by(factor)
    try:
        with fast_draws(model) as merge:
            yield weakened
    finally:
        scale_by(1.0)


def _attend_in_windows(model: Backbone, frames: Frames | None) -> AbstractContextManager[None]:
    """A context with attention over time by windows, where the frames ask for it."""
    if frames is None or not frames.windows("attention"):
        return nullcontext()
    return attention_in_windows(model.denoiser, frames.window, frames.stride)


def _cut_to_window(guide: Callable[[Conditions], Predict], text: Conditions, window: slice) -> Predict:
    return guide(text.in_window(window))


def add_references(text: Conditions, references: Sequence[ReferenceImage]) -> Conditions:
    """The conditions with the reference images added to each row."""
    expanded = tuple(latents.expand(len(text), *latents.shape[1:]) for latents in list_latents(references))
    return replace(text, references=expanded)


def report_steps(predict: Predict, advance: Callable[[float], Any], work: float) -> Predict:
    """The same predictions; `advance` is called with `work` after each."""

    def reporting(noisy: Tensor, level: Level) -> Estimate:
        estimate = predict(noisy, level)
        advance(work)
        return estimate

    return reporting


def count_predictions(sampler: Sampler, schedule: Schedule) -> int:
    """The number of predictions a sampler makes: one a step; heun two, unless the step ends without noise."""
    steps = len(schedule) - 1
    return 2 * steps - int(float(schedule.b[-1]) == 0) if sampler == "heun" else steps


def count_skipped_steps(share: float, steps: int) -> int:
    """Count the steps that SDEdit with this share skips; `UserError` where no step would be left."""
    if not 0 < share <= 1:
        raise UserError(f"{share:g} is no share of the steps to draw anew. Give one above 0, at most 1.")
    skipped = steps - round(share * steps)
    if skipped == steps:
        raise UserError(
            f"{share:g} of {steps} steps is less than one step, so no image would change. Draw a larger share anew."
        )
    return skipped


def limit_guidance(
    share: tuple[float, float], inside: Predict, outside: Predict, schedule: Schedule
) -> Predict:
    """`inside` at the levels of this share of a schedule's steps, from its noisy end, `outside` at the others."""
    if share == ALL_STEPS:
        return inside

    def predict(noisy: Tensor, level: Level) -> Estimate:
        return (inside if is_in_share(share, level, schedule) else outside)(noisy, level)

    return predict


def is_in_share(share: tuple[float, float], level: Level, schedule: Schedule) -> bool:
    """Whether a level is in this share of a schedule's steps, counted from the noisy end."""
    start, stop = share
    steps = len(schedule) - 1
    noisiest = schedule.b[round(start * steps)]
    cleanest = schedule.b[round(stop * steps)] if stop < 1 else -1.0
    return bool(cleanest < level.b.max() <= noisiest)


def count_guided(share: tuple[float, float], sampler: Sampler, schedule: Schedule) -> tuple[int, int]:
    """The numbers of a sampler's predictions inside and outside this share of the steps."""
    steps = [*range(len(schedule) - 1)]
    if sampler == "heun":  # it also predicts at the end of a step
        steps += range(1, count_predictions(sampler, schedule) - len(steps) + 1)
    inside = sum(is_in_share(share, schedule[step], schedule) for step in steps)
    return inside, len(steps) - inside


def get_sampler(
    sampler: Sampler, randoms: Sequence[torch.Generator]
) -> Callable[[Tensor, Predict, Schedule], Tensor]:
    """The sampler of this name: (noisy [B, …], predictor, schedule) → clean [B, …].

    Fresh noise comes from one generator for each sample. Raises `UserError` for an unknown name.
    """
    match sampler:
        case "ddim":
            return ddim
        case "heun":
            return heun
        case "dpmpp-2m":
            return dpmpp_2m
        case "unipc":
            return unipc
        case "ancestral":
            return lambda noisy, predict, schedule: ancestral(noisy, predict, schedule, generator=randoms)
        case "consistency":
            return lambda noisy, predict, schedule: consistency(noisy, predict, schedule, generator=randoms)
    raise UserError(f"There is no sampler {sampler}. Choose one of {', '.join(get_args(Sampler))}.")


def draw_initial_noise(
    model: Backbone,
    seed: int,
    i: int,
    j: int,
    size: tuple[int, int] | None = None,
    *,
    frames: Frames | None = None,
) -> Tensor:
    """ε [C, …] of image (i, j), with latents of `size` (H, W), the model's own if None.

    For a clip with `frames` it is [C, F, H, W]: frame 0's independent noise is the image's, and frame f's depends on
    the key and f alone. `frames.shared` is the share of the variance that all frames have in common (Ge et al. 2023,
    PYoCo, section 4.2, mixed noise). Where attention goes by windows, frames after the first window reuse the noise of
    earlier ones in another order (`reuse_frames`).
    """
    channels, *_, height, width = model.latent_shape  # a model of clips has its frames in between
    shape = (channels, *(size or (height, width)))

    def draw(*key: int | str) -> Tensor:
        return torch.randn(shape, generator=generator(seed, i, j, *key))

    if frames is None:
        return draw()

    # Independent noise of each frame
    independent = torch.stack([draw(), *(draw("frame", frame) for frame in range(1, frames.count))], dim=-3)
    if frames.windows("attention"):
        independent = independent[..., reuse_frames(frames, generator(seed, i, j, "windows")), :, :]
    if not frames.shared:
        return independent

    # ε_f = √shared·ε + √(1 − shared)·ε_f: again N(0, I)
    return (
        math.sqrt(frames.shared) * draw("shared").unsqueeze(-3) + math.sqrt(1 - frames.shared) * independent
    )


def reuse_frames(frames: Frames, random: torch.Generator) -> list[int]:
    """The frame whose noise each frame has: after the first window an earlier one, shuffled within each stride.

    So distant frames share noise (Qiu et al. 2023, FreeNoise, section 3.2).
    """
    sources = list(range(frames.count))
    for first in range(frames.window, frames.count, frames.stride):
        portion = sources[first - frames.window : first - frames.window + frames.stride]
        order = torch.randperm(len(portion), generator=random).tolist()
        sources[first : first + frames.stride] = [portion[k] for k in order][: frames.count - first]
    return sources


def is_guidance_distilled(model: Backbone) -> bool:
    """Whether guidance is part of the network's conditioning, without an unconditional prediction."""
    return model.family.embed_guidance(model.denoiser, encode_prompts_cached(model, [""]), 1.0) is not None


def refuse_negative(model: Backbone, negative: str, guidance: float | None) -> None:
    """`UserError` for a negative prompt without guidance, and where the network is guidance-distilled."""
    if negative and is_guidance_distilled(model):
        raise UserError(
            f"{model.location.name} is guidance-distilled and has no prediction for a negative prompt "
            f"(“{negative}”). Leave --negative out."
        )
    if negative and guidance == 1:
        raise UserError(
            f"At guidance 1 the negative prompt “{negative}” has no effect. Raise --guidance, or leave --negative out."
        )


def say_same_negative(prompts: Iterable[str], negative: str) -> None:
    """Say where a prompt is also the negative prompt: guidance between equal prompts has no effect."""
    normalized = " ".join(negative.lower().split())
    if normalized and any(" ".join(prompt.lower().split()) == normalized for prompt in prompts):
        notify_once(
            f"“{negative}” is the prompt and the negative prompt, so guidance changes nothing. Leave --negative out, "
            "or say there what is not to be seen."
        )


def resolve_sampling(settings: Settings, model: Backbone, *, resolution: int = 0) -> Settings:
    """The settings with the model's defaults in place of None.

    `resolution` replaces a width and a height of None; 0: the model's own. Raises `UserError` for a size that
    the model cannot sample, and for more steps than it was trained with.
    """
    if settings.guidance is None:
        say_few_step_name(model.location.source, model.defaults)
    requested, settings = settings.sampler, settings.at_resolution(resolution).with_defaults(model.defaults)
    if requested is None and settings.sampler is not None:
        model.say_own_sampler(settings.sampler)
    find_latent_size(model, settings.size)
    model.schedule(settings.for_sampler()["steps"])
    return settings


def find_latent_size(model: Backbone, size: Size) -> tuple[int, int]:
    """The latents' size (H, W) of pictures of `size` (width, height) in pixels.

    Raises `UserError` for sides that are no multiples of two latents, or longer than the network has places for, and
    for more than MOST_PIXELS.
    """
    native = model.latent_shape[-2:]
    unit, longest = 2 * model.factor, model.family.longest_side(model.location)
    sides = []
    for name, pixels, latents in zip(("height", "width"), reversed(size), native, strict=True):
        default = latents * model.factor
        side = default if pixels is None else pixels
        if side != default and side % unit:
            below = max(unit, side // unit * unit)
            raise UserError(
                f"{model.location.name} draws sides of multiples of {unit} pixels, and the {name} is {side}. "
                f"Give {below} or {below + unit}."
            )
        if longest is not None and side > longest * model.factor:
            raise UserError(
                f"{model.location.name} has places for {longest * model.factor} pixels a side at most, and the {name} "
                f"is {side}. Give less."
            )
        sides.append(side // model.factor)
    high, wide = (side * model.factor for side in sides)
    if high * wide > MOST_PIXELS:
        raise UserError(
            f"{wide} × {high} are {high * wide / 1e6:.0f} million pixels, and {MOST_PIXELS / 1e6:.0f} million "
            "are drawn at most. Give a smaller --width or --height."
        )
    return sides[0], sides[1]
