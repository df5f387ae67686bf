"""The disk cache of latents and text embeddings, keyed by content hash, never by position."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from backbone.conditions.conditions import Conditions, Text
from backbone.io.console import UserError
from backbone.io.files import content_hash, read_tensors, write_tensors
from backbone.media.crops import ReadCrop, read_crop
from backbone.media.pictures import ImageRecord
from backbone.media.transforms import CROPS, CropPosition, to_tensor
from backbone.models.model import Backbone, Posterior

VARIABLE = "LIMNER_CACHE"
TEXT = 2  # counts up when a family makes something else of a prompt


def cache_folder() -> Path:
    """Where caches lie: $LIMNER_CACHE, or `limner` in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "limner"


def load_or_compute(kind: str, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Read tensors from the cache, or call `compute` and write them there.

    A damaged cache file is computed anew; a cache that cannot be written is done without.
    """
    path = cache_folder() / kind / key[:2] / f"{key}.safetensors"
    if path.exists():
        try:
            return read_tensors(path)[0]
        except FileNotFoundError:
            pass  # another process has just thrown a damaged one away
        except UserError:
            path.unlink(missing_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in compute().items()}
    try:
        write_tensors(path, tensors, {"kind": kind})
    except OSError:
        return tensors
    return tensors


def encode_images_cached(
    model: Backbone,
    pictures: Sequence[ImageRecord],
    *,
    flip: bool = False,
    sizes: Sequence[tuple[int, int]] | None = None,
    crop: CropPosition = CROPS["center"],
    read: ReadCrop = read_crop,
) -> list[Posterior]:
    """Encode images to posteriors [1, C, H, W], each once: later calls read the cache.

    Pictures are cropped to squares of the model's resolution, or to `sizes` (W, H), one for each, at `crop`; `read`
    does it, and is not asked for what the cache holds.
    """
    side = model.resolution
    each = sizes or [(side, side)] * len(pictures)
    return [
        _encoded_one(model, picture, flip, size, crop, read)
        for picture, size in zip(pictures, each, strict=True)
    ]


def encode_prompts_cached(model: Backbone, prompts: Sequence[str]) -> Conditions:
    """Encode prompts to conditions, each once: later calls read the cache and load no text encoder."""
    return Conditions.cat([Conditions(_encoded_prompt(model, prompt)) for prompt in prompts]).to(model.device)


def _encoded_prompt(model: Backbone, prompt: str) -> Text:
    if model.text_learned:
        return model.encode_prompts([prompt]).text
    key = content_hash(f"{model.fingerprint}\n{prompt}\n{model.dtype}\n{TEXT}".encode())
    return load_or_compute("text", key, lambda: model.encode_prompts([prompt]).text)


def _encoded_one(
    model: Backbone,
    picture: ImageRecord,
    flip: bool,
    size: tuple[int, int],
    crop: CropPosition,
    read: ReadCrop,
) -> Posterior:
    cut = () if crop == CROPS["center"] else (crop,)
    tiles = ("tiles",) if model.placement.tiling else ()  # which change an encoding a little
    facts = (model.fingerprint, picture.content_hash, size, flip, model.dtype, *cut, *tiles)
    key = content_hash("\n".join(map(str, facts)).encode())

    def compute() -> dict[str, Tensor]:
        image = to_tensor(read(picture, size, crop))
        found = model.encode((image.flip(-1) if flip else image)[None])
        return {"mean": found.mean, "std": found.std}

    tensors = load_or_compute("latents", key, compute)
    return Posterior(tensors["mean"].to(model.device), tensors["std"].to(model.device))
