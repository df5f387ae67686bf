"""SDEdit at several strengths, and within a mask.

    python -m recipes.edit.noise_and_denoise          under a minute on two cores; build/recipes/edit/sdedit.png

Low strength keeps the image, high strength follows the prompt; outside the mask nothing changes.
"""

from __future__ import annotations

from PIL import Image, ImageDraw

import backbone
import edit
from backbone.cli.commands import run_main
from backbone.media.sheet import Cell, draw_sheet, save_png
from recipes.edit import OUT, Model, Steps, sample_picture


def main(model: Model = "moji", *, steps: Steps = 50) -> None:
    """Edits an image by SDEdit at several strengths, and within a mask."""
    # %% A picture
    opened = backbone.open(model)
    image = sample_picture(opened, "a cat in a park")
    target = "a dog in a park"

    # %% More and more noise
    cells = [Cell(image, "source")]
    for strength in (0.3, 0.5, 0.7, 0.9):
        result = edit.sdedit(opened, image, target, strength=strength, steps=steps)
        cells.append(Cell(result.images[0], f"strength {strength:g}"))

    # %% The middle alone (white: may change)
    mask = Image.new("L", image.size)
    width, height = image.size
    ImageDraw.Draw(mask).ellipse((width // 5, height // 5, width * 4 // 5, height * 19 // 20), fill=255)
    inside = edit.sdedit(opened, image, target, strength=0.9, steps=steps, mask=mask)
    cells += [Cell(mask, "mask"), Cell(inside.images[0], "inside the mask")]
    save_png(OUT / "sdedit.png", draw_sheet([cells]))


if __name__ == "__main__":
    run_main(main)
