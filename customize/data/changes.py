"""Hashes of a subject's images, captions and masks, and what of them has changed since a run recorded them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from backbone.evaluation.clip import hash_scorer_folder
from backbone.io.files import content_hash
from backbone.media.sources.record import ImageRecord
from backbone.training.settings import TrainingSettings

APART = ":"  # between an image's hash and that of its caption and mask


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
    recorded: Any,
    pictures: Sequence[list[ImageRecord]],
    *,
    noun: str = "images",
    outcome: str = "It goes on with those of now.",
) -> list[str]:
    """A sentence for each subject whose images differ from those that the run started with (`recorded` in its record).

    `noun` names them in the sentence, “class images”, and `outcome` says what becomes of it.
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
                f"The {noun}, their captions or masks are not those that the run began with ({changes}). {outcome}"
            )
    return sentences


def hash_named_scorer(settings: TrainingSettings) -> str:
    """The hash of the scorer that `--scorer` names; "" for the model's own."""
    folder = getattr(settings, "scorer", "")
    return hash_scorer_folder(folder) if folder else ""


def describe_changed_scorer(recorded: Mapping[str, Any], settings: TrainingSettings) -> list[str]:
    """A sentence if the scorer that `settings.json` (`recorded`) names has changed under its name since."""
    folder, before = getattr(settings, "scorer", ""), recorded.get("scorer")
    if not before or folder != recorded["settings"].get("scorer") or before == hash_named_scorer(settings):
        return []
    return [f"{folder} has changed since the run began, so figures before and after are not comparable."]
