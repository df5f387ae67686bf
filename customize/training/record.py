"""The record of a run, `settings.json`: its settings and its images; and which images have changed since."""

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

APART = ":"  # between an image's hash and that of its caption and mask


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

    `timings` are in seconds. `images` and `class_images` are each subject's hashes; if `images` is None, those in the
    file are kept.
    """
    existing = read_json(run / FILE) if images is None else {}
    record = {
        "settings": settings,
        "command": command,
        "images": existing.get("images") if images is None else images,
        "class_images": existing.get("class_images", []) if images is None else class_images,
        "versions": package_versions(),
        "hardware": describe_hardware(model, settings),
        "timings": {name: round(seconds, 2) for name, seconds in (timings or {}).items()},
    }
    if "survival" in existing:
        record["survival"] = existing["survival"]
    write_json(run / FILE, record)


def make_weights_metadata(concept: Concept) -> dict[str, str]:
    """The header of a run's weights: its tokens and its base model."""
    return {
        "limner_token": " ".join(concept.tokens),
        "limner_words": " ".join(concept.tokens.values()),
        "base_model": concept.model,
        **({"limner_learned": " ".join(concept.learned_tokens)} if concept.kind in OWN_WORDS else {}),
    }


def hash_images(pictures: Sequence[ImageRecord]) -> dict[str, str]:
    """By image name: the first 16 digits of its file's hash, and the first 8 of the hash of its caption and mask."""
    if not pictures:
        return {}
    common = os.path.commonpath([picture.path.parent for picture in pictures])
    return {
        os.path.relpath(picture.path, common): f"{picture.content_hash[:16]}{APART}{_hash_beside(picture)}"
        for picture in pictures
    }


def _hash_beside(picture: ImageRecord) -> str:
    mask = "" if picture.mask is None else content_hash(picture.mask)
    return content_hash(f"{picture.caption or ''}\n{mask}".encode())[:8]


def describe_changes(
    recorded: Any, pictures: Sequence[list[ImageRecord]], *, noun: str = "images"
) -> list[str]:
    """A sentence for each subject whose images differ from those that the run started with (`recorded` in its record).

    `noun` names them in the sentence: “class images”.
    """
    sentences = []
    for earlier, folder in zip(recorded if isinstance(recorded, list) else [], pictures, strict=False):
        current = hash_images(folder)
        if not isinstance(earlier, dict) or earlier == current:
            continue
        # Records of older versions hold only the images' own hashes
        if not any(APART in str(value) for value in earlier.values()):
            current = {name: value.partition(APART)[0] for name, value in current.items()}
        parts = [
            ("gone", sorted(earlier.keys() - current.keys())),
            ("new", sorted(current.keys() - earlier.keys())),
            (
                "changed",
                sorted(name for name in earlier.keys() & current.keys() if earlier[name] != current[name]),
            ),
        ]
        if changes := "; ".join(f"{word}: {', '.join(names[:5])}" for word, names in parts if names):
            sentences.append(
                f"The {noun}, their captions or masks are not those that the run began with ({changes}). It goes on "
                "with those of now."
            )
    return sentences
