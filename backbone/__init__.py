"""What every method shares: the noise algebra and its samplers, model families, adapters, training.

import backbone

model = backbone.open("moji")
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from backbone.cli.lazy import export_lazily

if TYPE_CHECKING:
    from backbone.io.console import UserError
    from backbone.models.model import Backbone, open

    __version__: str

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
# Read when torch loads libgomp. A thread that waits for another looks for it 300,000 times before it sleeps, also where
# other programs have the core that the other one needs: on two busy cores a training step took a hundred times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# diffusers' pipelines name image processors that transformers has two of, and it warns of choosing Pillow's
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

__all__ = ["Backbone", "UserError", "open"]
__getattr__, __dir__ = export_lazily(
    __name__, {"backbone.models.model": ("Backbone", "open"), "backbone.io.console": ("UserError",)}
)
