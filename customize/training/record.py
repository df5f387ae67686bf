"""The record of a run, `settings.json`: its settings, its images, and where it ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from backbone.adapters.concept import Concept
from backbone.io.files import read_json, write_json
from backbone.io.run_folder import package_versions
from backbone.models.model import Backbone
from backbone.training.hardware import describe_hardware
from backbone.training.settings import TrainingSettings
from customize.data.changes import hash_named_scorer
from customize.settings import FILE, OWN_WORDS


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
        "scorer": hash_named_scorer(settings),
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
