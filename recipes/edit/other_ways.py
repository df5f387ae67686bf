"""FlowEdit, composed guidance towards and away from prompts, removal, and interpolation between two images.

python -m recipes.edit.other_ways          one or two minutes on two cores; build/recipes/edit/other-ways.png
"""

from __future__ import annotations

from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.models.model import Backbone
from edit.inversion.inversion import invert
from edit.methods.compose import compose
from edit.methods.flow_edit import flow_edit
from edit.methods.interpolate import interpolate
from edit.methods.remove import remove
from recipes.edit import OUT, picture_to_edit


def main(model: str = "moji", *, steps: int = 50) -> None:
    """All cells."""
    # %% Two pictures and their inversions
    backbone = Backbone.open(model)
    prompts = ("a cat in a park", "a rocket in space")
    images = [picture_to_edit(backbone, prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    first, second = (invert(backbone, i, p, steps=steps) for i, p in zip(images, prompts, strict=True))

    # %% FlowEdit needs no inversion
    direct = flow_edit(backbone, images[0], prompts[0], ["a dog in a park"], steps=steps)

    # %% Towards one prompt, away from another
    composed = compose(first, [("a watercolor of a cat", 3.0), ("a photo of a cat", -1.0)])

    # %% Without the cat
    removed = remove(first, "cat")

    # %% From one picture to the other
    way = interpolate(first, second, count=5).images

    # %% Side by side
    named = {"FlowEdit: a dog": direct, "composed with watercolor": composed, "without the cat": removed}
    above = [Cell(images[0], "source"), *(Cell(drawn.images[0], name) for name, drawn in named.items())]
    below = [Cell(picture, f"{k}/4") for k, picture in enumerate(way)]
    rows = [above, below]
    save_png(OUT / "other-ways.png", draw_sheet(rows))


if __name__ == "__main__":
    main()
