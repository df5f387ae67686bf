"""The thing of a picture that is to move: where the model sees what words name, and which pixels there belong to it.

    phrase, rival = name_thing("a cat next to a dog in a park", "dog")   # "a dog", "a cat"
    thing = find_named(model, picture, phrase, rival)                    # [H, W], True where the dog is

A thing is where its words change the model's prediction (`customize.data.masks`); with another thing beside it, where
its words predict the noise better than the other's.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.io.console import UserError
from backbone.media.transforms import to_tensor
from backbone.models.model import Backbone, Posterior
from backbone.world.words import BESIDE_WORDS
from customize.clips.planned.cut_out import Bools, Box, fill_holes, find_things, grow_within, soften
from customize.data.masks import dilate, otsu, predict_both, prediction_difference

SMALLEST, LARGEST = 0.003, 0.6  # of a picture: a smaller part is no thing, a larger one all of it
LEAST = 0.2  # share of the region where a thing is seen that its own pixels fill
COARSE = 128  # pixels a side at which one part of a mask is told from another
FLAT = 0.1  # of 1: colours that differ by less show nothing
BESIDE = re.compile(rf"\s+(?:{'|'.join(BESIDE_WORDS)})\s+", re.IGNORECASE)
PLACE = re.compile(
    r"\s+(?:in|on|at|under|over|before|behind|by|with|through|across)\b.*", re.IGNORECASE | re.DOTALL
)


def cut_thing(words: str) -> str:
    """The place in a prompt, without the thing: “a dog in a park” → “in a park”; "" for none."""
    match = PLACE.search(words)
    return match[0].strip(" ,") if match else ""


def name_thing(words: str, owner: str = "") -> tuple[str, str]:
    """The words of the thing that moves, and of the one beside it, "" for none, without their place.

    The thing that moves is the one that `owner` names, else the first one.
    """
    parts = [PLACE.sub("", part.strip(" ,")) for part in BESIDE.split(words)]
    moving = next((part for part in parts if owner and owner.lower() in part.lower()), parts[0])
    return moving, next((part for part in parts if part != moving), "")


@torch.no_grad()
def find_named(model: Backbone, picture: Image.Image, phrase: str, rival: str = "") -> Bools:
    """The pixels [H, W] of what `phrase` names, and not of what `rival` names; `UserError` for none or all pixels.

    Where the thing is seen they are what differs from their rows, as in a drawing (`cut_out.find_things`).
    """
    resized = picture.resize(scale_to_model(model, picture.size), Image.Resampling.LANCZOS)
    with model.autocast():
        posterior = model.encode(to_tensor(resized)[None])
        texts = [model.encode_prompts([words]) for words in (phrase, "", rival)]
        scores = prediction_difference(model, posterior, texts[0], texts[1])
        if rival:
            scores = compare_predictions(model, posterior, texts[0], texts[2]).clamp(min=0)
    blob = choose_blob(dilate(otsu(scores))[0].numpy() > 0, scores[0].numpy())
    region = np.asarray(Image.fromarray(blob).resize(picture.size, Image.Resampling.NEAREST))
    colours = np.asarray(picture.convert("RGB"), dtype=float) / 255
    least = LEAST * float(region.sum())
    (thing_pixels,) = find_things(colours, [find_box(region)], least=[least])
    thing: Bools = thing_pixels & region & (np.ptp(colours[region], axis=0).max() > FLAT)
    if not SMALLEST < thing.mean() < LARGEST:
        raise UserError(
            f"The model finds no “{phrase}” in the picture to cut out. Show it with --mask PICTURE, white where it is."
        )
    return thing


def find_changed(picture: Image.Image, behind: Image.Image) -> Bools:
    """The pixels [H, W] in which a picture differs from its background `behind`; `UserError` if they are alike."""
    first, second = (np.asarray(image.convert("RGB"), dtype=float) / 255 for image in (picture, behind))
    changed = soften(np.abs(first - second).max(-1), 1.0) > FLAT
    step = -(-max(changed.shape) // COARSE)
    coarse = np.asarray(Image.fromarray(changed).convert("L").reduce(step)) > 0
    blob = np.kron(choose_blob(coarse, np.ones(coarse.shape)), np.ones((step, step), dtype=bool))
    thing = fill_holes(changed & blob[: changed.shape[0], : changed.shape[1]])
    if not SMALLEST < thing.mean() < LARGEST:
        raise UserError(
            f"The picture and what --behind shows differ at {changed.mean():.0%} of their pixels, which is no thing. "
            "Show it: --mask PICTURE, white where it is."
        )
    return thing


def scale_to_model(model: Backbone, size: tuple[int, int]) -> tuple[int, int]:
    """The size (W, H) of a picture of this shape that has about as many pixels as the model draws."""
    scale = model.resolution / (size[0] * size[1]) ** 0.5
    step = 4 * model.factor
    wide, high = (max(1, round(side * scale / step)) * step for side in size)
    return wide, high


def compare_predictions(
    model: Backbone, posterior: Posterior, phrase: Conditions, other: Conditions
) -> Tensor:
    """How much smaller the prediction's error is under `phrase` than under `other`, around each position [1, H, W]."""
    better = torch.zeros(posterior.mean.shape[-2:])
    for predicted, target in predict_both(model, posterior, phrase, other):
        errors = (predicted - target).square().mean(1)
        better += ((errors[1] - errors[0]) / errors.mean()).cpu()
    return torch.nn.functional.avg_pool2d(better[None], 3, stride=1, padding=1, count_include_pad=False)


def choose_blob(places: Bools, scores: NDArray[np.floating]) -> Bools:
    """The connected part of a mask [H, W] with the largest sum of scores."""
    remaining, best = places.copy(), np.zeros_like(places)
    while remaining.any():
        seed = np.zeros_like(remaining)
        seed.flat[remaining.argmax()] = True
        blob = grow_within(seed, remaining)
        remaining &= ~blob
        if not best.any() or scores[blob].sum() > scores[best].sum():
            best = blob
    return best


def find_box(mask: Bools) -> Box:
    """The box around a mask [H, W]; the whole picture if the mask is empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
