"""Removing a thing: it stands where the prompt without it is predicted differently; what that prompt says fills it."""

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
from edit.attention.alignment import require, tokenize_prompt
from edit.inversion.inversion import Inversion
from edit.masks import difference_maps, load_latent_mask
from edit.pictures import ImageLike
from edit.result import Result
from edit.sampling import Frames, guidance_of, nfe_of, refuse_negative

ARTICLES = r"(?:(?:a|an|the|two|some|his|her|its)\s+)?"
CONNECTORS = r"^(?:\s*(?:next to|beside|near|and|with|wearing|,|;|\.))+\s*"


@torch.no_grad()
def remove(
    inversion: Inversion,
    word: str = "",
    *,
    prompt: str | None = None,
    mask: ImageLike | None = None,
    strength: float = 1.0,
    guidance: float | None = None,
    negative: str = "",
    threshold: float = 0.25,
    grow: int = 1,
    count: int = 1,
    seed: int = 0,
    frames: int = 0,
    progress: Callable[[], Any] = lambda: None,
) -> Result:
    """N = `count` images without what a word of the source prompt names, or what a mask covers (white = remove).

    Blended latent diffusion (Avrahami et al. 2023, algorithm 1) with the stored trajectory as what lies around: inside
    the mask fresh noise is denoised towards the prompt, outside it is the trajectory itself, so the rest of the image's
    latent stays exactly. `prompt` is what to see there; without it the source prompt without the word. The mask of a
    word is where that differs by more than `threshold` of the most, grown by `grow` latents. Image k depends on the
    seed and k alone. `frames` and `progress` are as in `sdedit`.

    Raises `UserError` for a word that is not in the prompt, neither a word nor a mask, or a mask of another size.
    """
    checks.share("strength", strength)
    checks.share("threshold", threshold)
    model, schedule, states = inversion.model, inversion.schedule, inversion.states.float()
    refuse_negative(model, negative)
    guidance = guidance_of(model, guidance)
    inside = load_latent_mask(mask, inversion.encoded)
    nfe = 0
    if inside is None:
        checks.prompt(word, "word to remove")
        inside, nfe = locate_word(inversion, word, threshold=threshold)
    inside = _grow(inside, grow)
    seen = without(inversion.prompt, word) if prompt is None else prompt
    text, empty = (encode_prompts_cached(model, [words] * count) for words in (seen, negative))
    predict, each = model.guided_predictor(text, empty, guidance), nfe_of(model, text, guidance)
    first = inversion.start(strength)
    noise = [torch.randn(states.shape[1:], generator=generator(seed, k, "remove")) for k in range(count)]
    filling = _begin(inversion, torch.stack(noise).to(states), first, strength)
    now, kept = torch.where(inside > 0, filling, states[first]), Frames(first, inversion.steps, frames)
    for step in range(first, inversion.steps):
        here, there = schedule[step], schedule[step + 1]
        estimate = predict(now, here)
        nfe += count * each
        now = torch.where(inside > 0, deterministic_step(now, estimate, here, there), states[step + 1])
        kept.add(step, estimate.clean)
        progress()
    return Result(
        model=model,
        prompts=(seen,) * count,
        encoded=inversion.encoded,
        latents=now,
        nfe=nfe,
        masks=inside.expand(count, -1, -1),
        estimates=kept.stack(),
        facts={"guidance": guidance},
        inversions=(inversion,),
    )


def _begin(inversion: Inversion, noise: Tensor, first: int, strength: float) -> Tensor:
    """The states [N, C, H, W] that fill the mask at step `first`: the image noised, or noise alone at strength 1."""
    level = inversion.schedule[first]
    if strength < 1:
        return add_noise(inversion.clean.expand_as(noise), noise, level)
    return noise * (level.a**2 + level.b**2).sqrt().to(noise)  # as strong as a state of this level


@torch.no_grad()
def locate_word(inversion: Inversion, word: str, *, threshold: float = 0.25) -> tuple[Tensor, int]:
    """Where a word of the source prompt stands in the image [H, W], 0 or 1, and the NFE.

    That is where leaving the word out of the prompt changes the predictions (`edit.masks`).
    """
    require([tokenize_prompt(inversion.model.text_encoder.segments, inversion.prompt)], word)
    maps, nfe = difference_maps(inversion, [(inversion.prompt, without(inversion.prompt, word))])
    return (maps[0] > threshold).float(), nfe


def without(prompt: str, phrase: str) -> str:
    """The prompt without a phrase, its article and what joined it to the rest: what may be seen in its place."""
    if not phrase.strip():
        return prompt
    left = re.sub(rf"\b{ARTICLES}{re.escape(phrase.strip())}\b", " ", prompt, flags=re.IGNORECASE)
    left = re.sub(r"\s+", " ", left).strip()
    left = re.sub(CONNECTORS, "", left, flags=re.IGNORECASE)
    return re.sub(r"(?:\s*(?:next to|beside|near|and|with|wearing|,))+\s*$", "", left, flags=re.IGNORECASE)


def _grow(mask: Tensor, by: int) -> Tensor:
    """The mask [H, W] with `by` latents around it."""
    return F.max_pool2d(mask[None, None], 2 * by + 1, stride=1, padding=by)[0, 0] if by else mask
