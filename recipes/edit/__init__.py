"""One short script for each method of `edit`, in cells (`# %%`) that a notebook or an editor can run one by one.

python -m recipes.edit.prompt_to_prompt          a minute or less on two cores each; writes build/recipes/edit/NAME.png
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image

if TYPE_CHECKING:
    from backbone.models.model import Backbone

OUT = Path("build/recipes/edit")
Model = Annotated[str, typer.Option(help="The model to edit with.")]
Steps = Annotated[int, typer.Option(help="Sampler steps.", min=2)]


def sample_picture(model: Backbone, prompt: str, *, steps: int = 25, seed: int = 0) -> Image.Image:
    """Sample an image of the prompt to edit, so that the scripts need no file."""
    from backbone.models.sample import Request, sample

    requests = [Request(prompt, (seed, 0))]
    return next(sample(model, requests, steps=steps, guidance=float(model.defaults["guidance"]), seed=seed))
