"""Mutual self-attention (MasaCtrl) and plug-and-play features: prompt-to-prompt's sampling loop with other settings.

    python -m recipes.edit.other_control          under a minute on two cores; build/recipes/edit/other-control.png

MasaCtrl finds the source's contents in a new layout; plug-and-play keeps the layout under a new look.
"""

from __future__ import annotations

from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.models.model import Backbone
from edit.inversion.inversion import invert
from edit.methods.prompt_to_prompt.replace import replace
from edit.methods.prompt_to_prompt.settings import PRESETS
from recipes.edit import OUT, picture_to_edit


def main(model: str = "moji", *, steps: int = 50) -> None:
    """All cells."""
    # %% A picture and its inversion
    backbone = Backbone.open(model)
    source = "a cat in a park"
    image = picture_to_edit(backbone, source)
    inversion = invert(backbone, image, source, steps=steps)

    # %% Contents kept, layout free; then layout kept, look free
    bent = replace(inversion, "two cats in a park", PRESETS["masactrl"])
    restyled = replace(inversion, "a watercolor of a cat in a park", PRESETS["plug-and-play"])

    # %% Side by side
    cells = [
        Cell(image, "source"),
        Cell(bent.images[0], "masactrl"),
        Cell(restyled.images[0], "plug-and-play"),
    ]
    save_png(OUT / "other-control.png", draw_sheet([cells]))


if __name__ == "__main__":
    main()
