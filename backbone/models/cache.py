"""The disk cache of small results: one file a key, where the key hashes everything that the result depends on.

Latents and the prompts of whole data sets lie in tables (`backbone.models.encode`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from backbone.conditions.conditions import Conditions, Text
from backbone.families.components.tokenization import collect_cuts
from backbone.io.console import UserError, notify_once
from backbone.io.files import content_hash, read_tensors, write_tensors
from backbone.models.model import Backbone
from backbone.models.references import ReferenceImage

VARIABLE = "LIMNER_CACHE"
CUTS = "cuts"  # beside a prompt's encoding: warnings about its truncated end, in UTF-8
TEXT = 3  # raised when a family changes how it encodes prompts


def find_cache_folder() -> Path:
    """The folder of caches: $LIMNER_CACHE, or `limner` in the user's cache folder; nowhere for users without a home."""
    if path := os.environ.get(VARIABLE):
        return Path(os.path.expanduser(path))
    path = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    base = path if os.path.isabs(path) else os.path.expanduser("~/.cache")
    return Path(base if os.path.isabs(base) else os.devnull) / "limner"


def load_or_compute(kind: str, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Read tensors from the cache, or call `compute` and write them there.

    A damaged cache file is computed again; a cache that cannot be read or written is ignored.
    """
    path = find_cache_folder() / kind / key[:2] / f"{key}.safetensors"
    try:
        return read_tensors(path)[0]
    except OSError:
        pass  # no such file, or this user may not read it
    except UserError:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in compute().items()}
    try:
        write_tensors(path, tensors, {"kind": kind})
    except OSError:
        return tensors
    return tensors


def encode_prompts_cached(
    model: Backbone, prompts: Sequence[str], references: Sequence[ReferenceImage] = ()
) -> Conditions:
    """Encode prompts to conditions, each once: later calls read the cache and load no text encoder.

    A text encoder that reads images gets the `references` with every prompt; others do not need them.
    """
    images = [reference.picture for reference in references] if model.text_sees_images else []
    encoded = [Conditions(_encode_prompt(model, prompt, images)) for prompt in prompts]
    return Conditions.cat(encoded).to(model.device)


def _encode_prompt(model: Backbone, prompt: str, images: Sequence[Image]) -> Text:
    if model.text_learned:
        return model.encode_prompts([prompt], images).text
    facts = [model.fingerprint, prompt, model.dtype, TEXT]
    facts += [content_hash(f"{image.size}".encode() + image.tobytes()) for image in images]
    key = content_hash("\n".join(map(str, facts)).encode())

    def encode() -> Text:
        with collect_cuts() as cuts:
            text = model.encode_prompts([prompt], images).text
        return text | (
            {CUTS: torch.tensor(list("\n".join(cuts.values()).encode()), dtype=torch.uint8)} if cuts else {}
        )

    text = load_or_compute("text", key, encode)
    if CUTS in text:
        for sentence in bytes(text.pop(CUTS).tolist()).decode().split("\n"):
            notify_once(sentence)
    return text
