"""The record of a run, `settings.json`: its settings and its images, and which of these have changed since."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone.adapters.concept import Concept
from backbone.io.files import content_hash, read_json, write_json
from backbone.io.run_folder import package_versions
from backbone.media.sources.record import ImageRecord
from backbone.models.model import Backbone
from backbone.training.hardware import describe_hardware
from backbone.training.settings import TrainingSettings
from customize.settings import FILE, OWN_WORDS

APART = ":"  # between an image's hash and that of what lies beside it


def write_record(
    run: Path,
    settings: TrainingSettings,
    model: Backbone,
    *,
    command: str,
    timings: Mapping[str, float] | None = None,
    images: Sequence[Mapping[str, str]] | None = None,
    class_images: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write a run's `settings.json`: resolved settings, repeating command, image hashes, versions, hardware, timings.

    `timings` are in seconds. `images` and `class_images` are the hashes of each subject's; images of None keep those in
    the file.
    """
    known = read_json(run / FILE) if images is None else {}
    record = {
        "settings": settings,
        "command": command,
        "images": known.get("images") if images is None else images,
        "class_images": known.get("class_images", []) if images is None else class_images,
        "versions": package_versions(),
        "hardware": describe_hardware(model, settings),
        "timings": {name: round(seconds, 2) for name, seconds in (timings or {}).items()},
    }
    if "survival" in known:
        record["survival"] = known["survival"]
    write_json(run / FILE, record)


def weights_metadata(concept: Concept) -> dict[str, str]:
    """What the header of a run's weights says of its tokens and its base model."""
    return {
        "limner_token": " ".join(concept.tokens),
        "limner_words": " ".join(concept.tokens.values()),
        "base_model": concept.model,
        **({"limner_learned": " ".join(concept.learned_tokens)} if concept.kind in OWN_WORDS else {}),
    }


def hash_images(pictures: Sequence[ImageRecord]) -> dict[str, str]:
    """By image name: the first 16 digits of its file's hash, and those of the hash of its caption and mask."""
    if not pictures:
        return {}
    common = os.path.commonpath([picture.path.parent for picture in pictures])
    return {
        os.path.relpath(one.path, common): f"{one.content_hash[:16]}{APART}{_hash_beside(one)}"
        for one in pictures
    }


def _hash_beside(picture: ImageRecord) -> str:
    mask = "" if picture.mask is None else content_hash(picture.mask)
    return content_hash(f"{picture.caption or ''}\n{mask}".encode())[:8]


def describe_changes(kept: Any, pictures: Sequence[list[ImageRecord]], *, what: str = "images") -> list[str]:
    """A sentence for each subject whose images differ from those that the run started with (`kept` in its record).

    `what` they are: “class images”.
    """
    sentences = []
    for before, folder in zip(kept if isinstance(kept, list) else [], pictures, strict=False):
        now = hash_images(folder)
        if not isinstance(before, dict) or before == now:
            continue
        # Of a version that kept images' own alone
        if not any(APART in str(value) for value in before.values()):
            now = {name: value.partition(APART)[0] for name, value in now.items()}
        parts = [
            ("gone", sorted(before.keys() - now.keys())),
            ("new", sorted(now.keys() - before.keys())),
            ("changed", sorted(name for name in before.keys() & now.keys() if before[name] != now[name])),
        ]
        if told := "; ".join(f"{word}: {', '.join(names[:5])}" for word, names in parts if names):
            sentences.append(
                f"The {what}, their captions or masks are not those that the run began with ({told}). It goes on with "
                "those of now."
            )
    return sentences
