"""Tunes a model to preferences: pairs of images, scorers, Diffusion-DPO and its relatives, reward gradients.

import align

align.sample(["a dog in the snow", "a red cat"], out="samples")
run = align.train("samples")        # after `align label samples`, or `align rank samples --scorer moji`
align.compare("moji", run, prompts="heldout.txt", out="compare")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from backbone.cli.lazy import export_lazily

if TYPE_CHECKING:
    from align.api import compare, sample, train
    from backbone.io.run import Run

    __version__: str

__all__ = ["Run", "compare", "sample", "train"]
__getattr__, __dir__ = export_lazily(
    __name__,
    {"align.api": ("compare", "sample", "train"), "backbone.io.run": ("Run",)},
    flags={"resume": "align train --resume"},
)
