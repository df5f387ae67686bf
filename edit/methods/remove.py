"""Removing a thing: it stands where the prompt without it is seen differently; filled by what that prompt says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.diffusion.noise import add_noise, generator
from backbone.diffusion.samplers import deterministic_step
from backbone.models.cache import encode_prompts_cached
from edit import checks
from edit.attention.alignment import heard_prompt, require
from edit.inversion.inversion import Inversion, refuse_negative, rows_of
from edit.masks import differences, latent_mask, mask_of
from edit.methods.sdedit import Drawn, spaced

ARTICLES = r"(?:(?:a|an|the|two|some|his|her|its)\s+)?"
CONNECTORS = r"^(?:\s*(?:next to|beside|near|and|with|wearing|,|;|\.))+\s*"


@torch.no_grad()
def remove(
    inversion: Inversion,
    word: str = "",
    *,
    prompt: str | None = None,
    mask: Any = None,
    strength: float = 1.0,
    guidance: float | None = None,
    negative: str = "",
    threshold: float = 0.25,
    grow: int = 1,
    count: int = 1,
    seed: int = 0,
    frames: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> Drawn:
    """N = `count` pictures without what a word of the source prompt names, or what a mask covers (white = remove).

    Blended latent diffusion (Avrahami et al. 2023, algorithm 1) with the stored trajectory as what lies around: inside
    the place the walk begins with fresh noise and follows the prompt, outside it is the trajectory itself, so the
    rest of the picture's latent stays exactly. `prompt` is what to see there; without it the source prompt without
    the word. The place is where that differs by more than `threshold` of the most, grown by `grow` latents.
    Picture k depends on the seed and k alone.

    Raises `UserError` for a word that is not in the prompt, neither a word nor a mask, or a mask of another size.
    """
    checks.share("strength", strength)
    checks.share("threshold", threshold)
    model, schedule, states = inversion.model, inversion.schedule, inversion.states.float()
    refuse_negative(model, negative)
    guidance = (
        float(model.defaults["guidance"]) if guidance is None else checks.not_negative("guidance", guidance)
    )
    asked = 0
    if mask is not None:
        height, width = inversion.picture.shape[-2:]
        whole = mask_of(mask, shown=(width, height), original=inversion.facts.get("size"))
        places = latent_mask(whole, states.shape[-2:]).to(states)
    else:
        checks.prompt(word, "word to remove")
        places, asked = place_of(inversion, word, threshold=threshold)
    places = _grown(places, grow)
    said = without(inversion.prompt, word) if prompt is None else prompt
    text, empty = (encode_prompts_cached(model, [words] * count) for words in (said, negative))
    predict, each = model.guided_predictor(text, empty, guidance), rows_of(model, text, guidance)
    first = inversion.start(strength)
    shape = states.shape[1:]
    noise = torch.stack(
        [torch.randn(shape, generator=generator(seed, k, "remove")) for k in range(count)]
    ).to(states)
    inside = add_noise(inversion.clean.expand_as(noise), noise, schedule[first]) if strength < 1 else noise
    scale = (
        (schedule.a[first] ** 2 + schedule.b[first] ** 2).sqrt() if strength == 1 else schedule.a.new_ones(())
    )
    now = torch.where(places > 0, inside * scale.to(inside), states[first])
    found, kept = [], spaced(first, inversion.steps, frames)
    for number in range(first, inversion.steps):
        here, there = schedule[number], schedule[number + 1]
        estimate = predict(now, here)
        asked += count * each
        now = torch.where(places > 0, deterministic_step(now, estimate, here, there), states[number + 1])
        if number in kept:
            found.append(estimate.clean)
        progress()
    estimates = torch.stack(found) if found else now.new_zeros(0, *now.shape)
    return Drawn(
        model, inversion.picture, inversion.clean, now, places, estimates, asked, dict(inversion.facts)
    )


@torch.no_grad()
def place_of(inversion: Inversion, word: str, *, threshold: float = 0.25) -> tuple[Tensor, int]:
    """Where a word of the source prompt stands in the picture [H, W], 0 or 1, and how many samples that took.

    That is where leaving the word out of the prompt changes the predictions (`edit.masks`).
    """
    require([heard_prompt(inversion.model.text_encoder.segments, inversion.prompt)], word)
    apart, asked = differences(inversion, [(inversion.prompt, without(inversion.prompt, word))])
    return (apart[0] > threshold).float(), asked


def without(prompt: str, phrase: str) -> str:
    """The prompt without a phrase, its article and what joined it to the rest: what may be seen in its place."""
    if not phrase.strip():
        return prompt
    left = re.sub(rf"\b{ARTICLES}{re.escape(phrase.strip())}\b", " ", prompt, flags=re.IGNORECASE)
    left = re.sub(r"\s+", " ", left).strip()
    left = re.sub(CONNECTORS, "", left, flags=re.IGNORECASE)
    return re.sub(r"(?:\s*(?:next to|beside|near|and|with|wearing|,))+\s*$", "", left, flags=re.IGNORECASE)


def _grown(places: Tensor, by: int) -> Tensor:
    """The places [H, W] with `by` latents around them."""
    return F.max_pool2d(places[None, None], 2 * by + 1, stride=1, padding=by)[0, 0] if by else places
