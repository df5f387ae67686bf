"""FlowEdit, composed guidance towards and away from prompts, removal, and interpolation between two images.

python -m recipes.edit.other_ways          one or two minutes on two cores; build/recipes/edit/other-ways.png
"""

from __future__ import annotations

import backbone
import edit
from backbone.cli.commands import run_main
from backbone.media.sheet import Cell, draw_sheet, save_png
from recipes.edit import OUT, Model, Steps, sample_picture


def main(model: Model = "moji", *, steps: Steps = 50) -> None:
    """Edits by FlowEdit, composed guidance and removal, and interpolates between two images."""
    # %% Two pictures and their inversions
    opened = backbone.open(model)
    prompts = ("a cat in a park", "a rocket in space")
    images = [sample_picture(opened, prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    first, second = (
        edit.invert(opened, image, prompt, steps=steps) for image, prompt in zip(images, prompts, strict=True)
    )

    # %% FlowEdit needs no inversion
    direct = edit.flow_edit(opened, images[0], prompts[0], ["a dog in a park"], steps=steps)

    # %% Towards one prompt, away from another
    composed = edit.compose(first, [("a watercolor of a cat", 3.0), ("a photo of a cat", -1.0)])

    # %% Without the cat
    removed = edit.remove(first, "cat")

    # %% From one picture to the other
    interpolated = edit.interpolate(first, second, count=5).images

    # %% Side by side
    results = {"FlowEdit: a dog": direct, "composed with watercolor": composed, "without the cat": removed}
    above = [Cell(images[0], "source"), *(Cell(result.images[0], name) for name, result in results.items())]
    below = [Cell(picture, f"{k}/4") for k, picture in enumerate(interpolated)]
    rows = [above, below]
    save_png(OUT / "other-ways.png", draw_sheet(rows))


if __name__ == "__main__":
    run_main(main)
