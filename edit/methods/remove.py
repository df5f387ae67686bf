"""Removing a thing: it is where predictions without its word differ; the region is filled from its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.cli.keywords import takes
from backbone.cli.values.build import build
from backbone.diffusion.noise import Predict, add_noise, generator
from backbone.diffusion.samplers import deterministic_step
from backbone.diffusion.transfer import send
from backbone.io.console import UserError
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from backbone.models.sample import refuse_negative
from edit.attention.alignment import require, tokenize_prompt
from edit.attention.control import AttentionControl
from edit.attention.install import control_attention
from edit.checks import check_count, check_prompt, check_share, check_strength, refuse_no_inversion
from edit.inversion.inversion import Inversion
from edit.layout import SOURCE, TARGET
from edit.masks import (
    align_to_edges,
    compute_difference_maps,
    compute_evidence_maps,
    fill_smoothly,
    load_pixel_mask,
    weigh_by_colour,
)
from edit.phrases import find_things, names_thing, remove_thing
from edit.pictures import ImageLike
from edit.result import Result
from edit.sampling import (
    KeptEstimates,
    count_nfe,
    draw_in_batches,
    resolve_guidance,
    scale_to_level,
)

SMOOTH = "At a strength of 0 nothing is drawn: the place is filled from its surroundings, smoothly."
NO_SURROUNDINGS = (
    "What is to be removed covers all of the image, so nothing is left from which its place could be filled. Paint "
    "white what is to go alone, or draw all of it anew: edit sdedit --strength 1."
)
STRENGTH, GUIDANCE, THRESHOLD = 0.5, 1.0, 0.5
# Share of the image's shorter side by which a mask is grown around a thing, for its edge and its shadow
MARGIN = 1 / 64
# Weight of the neighbours above and below when a region is filled: where ground meets sky, it continues its rows
FROM_ABOVE = 0.03


@dataclass(frozen=True, kw_only=True, eq=False)
class RemoveSettings:
    """Settings of `remove`.

    prompt     the target prompt; None: the source prompt without the word, or "" for a mask alone
    mask       white = remove; None: the word's region (`locate_word`)
    strength   the smoothly continued surroundings are noised to this share; 1: only noise
    guidance   above 1 the prompt is drawn into the region
    negative   the negative prompt
    threshold  least probability of the thing within its region
    count      number of images; image k depends only on the seed and k
    frames     estimates kept along the way
    """

    prompt: str | None = None
    mask: ImageLike | None = None
    strength: float = STRENGTH
    guidance: float = GUIDANCE
    negative: str = ""
    threshold: float = THRESHOLD
    count: int = 1
    seed: int = 0
    frames: int = 0


@takes(RemoveSettings)
@torch.no_grad()
def remove(
    inversion: Inversion, word: str = "", *, progress: Callable[[], Any] = lambda: None, **settings: Any
) -> Result:
    """N = `count` images without what a word of the source prompt names, or what a mask covers.

    `settings` are the fields of `RemoveSettings`, by name. Blended latent diffusion (Avrahami et al. 2023, algorithm 1)
    with the stored trajectory as the background: outside the mask the state is the trajectory itself, so the rest of
    the latent is exactly preserved. Inside, the smoothly continued surroundings are noised to `strength` and denoised.
    Keys inside the mask are hidden from all queries (after Sun et al. 2025, “Attentive Eraser”), so that the region is
    filled from its surroundings, and not with a new thing. `progress` is called after every step of each batch
    (`draw_in_batches`).

    Raises `UserError` for a word that is not in the prompt or names no thing, neither a word nor a mask, a mask of
    another size or of all the image, or a count out of bounds.
    """
    refuse_no_inversion(inversion)
    options = build(RemoveSettings, settings)
    model, schedule, count = inversion.model, inversion.schedule, check_count(options.count)
    check_share("threshold", options.threshold)
    guidance = resolve_guidance(model, options.guidance)
    refuse_negative(model, options.negative, guidance)
    first = inversion.start(check_strength(options.strength, inversion.steps, unchanged=SMOOTH))
    inversion.layout.say_idle(first, inversion.steps)

    # The thing's region, in pixels and on the latent's grid; and the prompt without it
    pixels, nfe = _find_place(inversion, word, options)
    target = _choose_prompt(inversion, word) if options.prompt is None else options.prompt
    states = inversion.states.float()
    hidden = F.adaptive_max_pool2d(pixels[None, None], states.shape[-2:])[0, 0]
    if bool(hidden.all()):
        raise UserError(NO_SURROUNDINGS)
    pixels, inside = send(pixels, states.device), send(hidden, states.device)

    # Hide what is inside: its keys in self-attention, and the thing's lines in control maps
    layout = inversion.layout.blank(pixels)  # the thing's own lines would redraw it
    control = AttentionControl(targets=0, hidden=hidden)
    text, empty = (encode_prompts_cached(model, [words]) for words in (target, options.negative))
    text = layout.attach(text, schedule, [TARGET])

    def draw(samples: range, kept_estimates: KeptEstimates) -> Tensor:
        # Rows [n, …]: the filled latent inside, the trajectory outside
        rows = text.repeat(len(samples))
        predict = model.guided_predictor(rows, empty.repeat(len(samples)), guidance)
        noisy = torch.where(inside > 0, _fill(inversion, hidden, first, options, samples), states[first])
        with control_attention(model.denoiser, control, model.family.attention(model.denoiser, rows)):
            return sample_inside(inside, noisy, predict, inversion, first, kept_estimates, progress)

    latents, estimates = draw_in_batches(model, count, draw, (first, inversion.steps, options.frames))
    return Result(
        model=model,
        prompts=(target,) * count,
        encoded=inversion.encoded,
        latents=latents,
        nfe=nfe + (inversion.steps - first) * count * count_nfe(model, text, guidance),
        masks=pixels.expand(count, -1, -1),
        estimates=estimates,
        facts={"guidance": guidance, **layout.facts()},
        layout=layout,
        inversions=(inversion,),
    )


def sample_inside(
    inside: Tensor,
    noisy: Tensor,
    predict: Predict,
    inversion: Inversion,
    first: int,
    kept: KeptEstimates,
    progress: Callable[[], Any],
) -> Tensor:
    """The latents [N, C, H, W] sampled from states `noisy` at step `first`, where `inside` [H, W] is above 0.

    Elsewhere the state after every step is the inversion's own (Avrahami et al. 2023, algorithm 1). `kept` receives the
    estimates, and `progress` is called after every step.
    """
    schedule, states = inversion.schedule, inversion.states.float()
    for step in range(first, inversion.steps):
        level, next_level = schedule[step], schedule[step + 1]
        estimate = predict(noisy, level)
        noisy = deterministic_step(noisy, estimate, level, next_level)
        noisy = torch.where(inside > 0, noisy, states[step + 1])
        kept.add(step, estimate.clean)
        progress()
    return noisy


def _find_place(inversion: Inversion, word: str, settings: RemoveSettings) -> tuple[Tensor, int]:
    """The region to remove [8H, 8W], 0 or 1 in CPU memory: the mask, or the word's region; and the NFE."""
    mask = load_pixel_mask(settings.mask, inversion.encoded)
    if mask is not None:
        return mask.cpu(), 0
    check_prompt(word, "word to remove")
    return locate_word(inversion, word, threshold=settings.threshold)


def _fill(
    inversion: Inversion, hidden: Tensor, first: int, settings: RemoveSettings, numbers: range
) -> Tensor:
    """The initial states [N, C, H, W] of the hidden region at step `first`, for the images with these numbers.

    They are the smoothly continued surroundings, noised; at strength 1 noise alone.
    """
    states, level = inversion.states, inversion.schedule[first]
    random = [torch.randn(states.shape[1:], generator=generator(settings.seed, k, "remove")) for k in numbers]
    noise = send(torch.stack(random), states.device)
    if settings.strength == 1:
        return scale_to_level(noise, level)
    smooth = fill_smoothly(inversion.clean, hidden, down=FROM_ABOVE).expand_as(noise)
    return add_noise(smooth, noise, level) if settings.strength > 0 else smooth


@torch.no_grad()
def locate_word(inversion: Inversion, word: str, *, threshold: float = THRESHOLD) -> tuple[Tensor, int]:
    """The region of a thing of the source prompt in the image [8H, 8W], 0 or 1 in pixels, and the NFE.

    The mask is in CPU memory; this is the only synchronisation of a removal. The thing's likelihood is how much the
    predictions change without its word (`compute_difference_maps`), where the word explains more than those of other
    things (`compute_evidence_maps`). It is weighted by colours, the thing's against its background's
    (`weigh_by_colour`), aligned to the image's edges, thresholded at `threshold`, and grown by a margin.
    Raises `UserError` for an empty region, or a word that is not in the prompt.
    """
    source = inversion.prompt
    source_without = leave_out(inversion.model, source, word)
    other_prompts = [
        remove_thing(source, thing) for thing in find_things(source) if thing in find_things(source_without)
    ]

    # How much the predictions change without the word, [h, w] → pixels
    maps, nfe = compute_difference_maps(inversion, [(source, source_without)], sides=(SOURCE, SOURCE))
    size, latent_height = inversion.image.shape[-2:], maps.shape[-2]
    word_map = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0, 0]
    # Only where the word explains more than the prompt's other things
    if other_prompts:
        evidence, evidence_nfe = compute_evidence_maps(inversion, [source_without, *other_prompts])
        large = F.interpolate(evidence[None], size, mode="bilinear", align_corners=False)[0]
        word_map, nfe = word_map * (large[0] > large[1:].amax(0)), nfe + evidence_nfe

    # Its likelihood by position and colour, aligned to the image's edges
    image = send(inversion.image.to(word_map.dtype), word_map.device)
    likelihood = align_to_edges(
        weigh_by_colour(word_map, image), image, radius=max(1, size[0] * 3 // (8 * latent_height))
    )
    region = (likelihood > threshold).float().cpu()
    if not region.any():
        raise UserError(
            f"At threshold {threshold:g} “{word}” is found nowhere. Lower --threshold, or paint it in a --mask."
        )

    # A margin around
    margin = max(1, round(min(size) * MARGIN))
    return F.max_pool2d(region[None], 2 * margin + 1, stride=1, padding=margin)[0], nfe


def _choose_prompt(inversion: Inversion, word: str) -> str:
    """The default prompt: without the word, or "" for a mask alone, which may cover any of the prompt's things."""
    return leave_out(inversion.model, inversion.prompt, word) if word.strip() else ""


def leave_out(model: Backbone, source: str, word: str) -> str:
    """The source prompt without a word.

    `UserError` for one that is not in it, or only within other words (“cat-like”), and for one that names no thing
    (“in”).
    """
    require([tokenize_prompt(model.text_encoder.segments, source)], word)
    if not names_thing(word):
        named = " or ".join(f"“{thing}”" for thing in find_things(source))
        raise UserError(
            f"“{word}” names no thing that could be removed. Name one of the prompt{f': {named}' if named else ''}."
        )
    remaining = remove_thing(source, word)
    if remaining == source:
        raise UserError(
            f"“{word}” stands in “{source}” as a part of another word alone, so it cannot be left out. Name the thing "
            "by a whole word."
        )
    return remaining
