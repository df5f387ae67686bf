"""Teaches a model a new concept from a handful of images.

import customize

run = customize.train("dog/", token="[V]", class_noun="dog")
customize.sample("a [V] dog in the snow", concept=run)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from backbone.cli.lazy import export_lazily

if TYPE_CHECKING:
    from backbone.io.run import Run
    from customize.api import evaluate, sample, train

    __version__: str

__all__ = ["Run", "evaluate", "sample", "train"]
__getattr__, __dir__ = export_lazily(
    __name__,
    {"customize.api": ("evaluate", "sample", "train"), "backbone.io.run": ("Run",)},
    flags={"resume": "customize train --resume"},
)
