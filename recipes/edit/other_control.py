"""Mutual self-attention (MasaCtrl) and plug-and-play features: prompt-to-prompt's sampling loop with other settings.

    python -m recipes.edit.other_control          under a minute on two cores; build/recipes/edit/other-control.png

MasaCtrl finds the source's contents in a new layout; plug-and-play keeps the layout under a new look.
"""

from __future__ import annotations

import backbone
import edit
from backbone.cli.commands import run_main
from backbone.media.sheet import Cell, draw_sheet, save_png
from recipes.edit import OUT, Model, Steps, sample_picture


def main(model: Model = "moji", *, steps: Steps = 50) -> None:
    """Edits an image by MasaCtrl and by plug-and-play features."""
    # %% A picture and its inversion
    opened = backbone.open(model)
    source = "a cat in a park"
    image = sample_picture(opened, source)
    inversion = edit.invert(opened, image, source, steps=steps)

    # %% Contents kept, layout free; then layout kept, look free
    bent = edit.replace(inversion, "two cats in a park", edit.PRESETS["masactrl"])
    restyled = edit.replace(inversion, "a watercolor of a cat in a park", edit.PRESETS["plug-and-play"])

    # %% Side by side
    cells = [
        Cell(image, "source"),
        Cell(bent.images[0], "masactrl"),
        Cell(restyled.images[0], "plug-and-play"),
    ]
    save_png(OUT / "other-control.png", draw_sheet([cells]))


if __name__ == "__main__":
    run_main(main)
