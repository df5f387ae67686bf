"""Prompt-to-prompt: replace, refine and reweight words in one batch over one inversion, and a word's attention map.

    python -m recipes.edit.prompt_to_prompt          half a minute on two cores; build/recipes/edit/prompt-to-prompt.png

It should show the source, its reconstruction, three edits that keep the layout, and the attention map of "cat".
"""

from __future__ import annotations

import backbone
import edit
from backbone.cli.commands import run_main
from backbone.media.sheet import Cell, draw_sheet, save_png
from recipes.edit import OUT, Model, Steps, sample_picture


def main(model: Model = "moji", *, steps: Steps = 50) -> None:
    """Replaces, refines and reweights words over one inversion."""
    from edit.run.report import overlay_heatmap

    # %% A picture and what it shows
    opened = backbone.open(model)
    source = "a cat in a park"
    image = sample_picture(opened, source)

    # %% Its inversion: any number of edits begin here
    inversion = edit.invert(opened, image, source, steps=steps)
    print(inversion.nfe, "NFE")

    # %% Three targets at once; the alignment says what became of the words
    targets = ["a dog in a park", "a red cat in a park", "a cat in the snow"]
    edited = edit.replace(inversion, targets, edit.ReplaceSettings(heatmaps=["cat"]))
    for alignment in edited.alignments:
        print(alignment, end="\n\n")

    # %% The same words, one of them stronger
    stronger = edit.replace(inversion, source, edit.ReplaceSettings(weights={"park": 3.0}, cross=1.0))

    # %% Everything side by side
    heatmap = edited.heatmaps["cat"][0]
    source_image = edited.source
    cells = [Cell(source_image, "source"), Cell(edited.reconstruction, "reconstruction")]
    cells += [Cell(picture, target) for picture, target in zip(edited.images, targets, strict=True)]
    cells += [Cell(stronger.images[0], "park × 3"), Cell(overlay_heatmap(heatmap, source_image), "cat")]
    save_png(OUT / "prompt-to-prompt.png", draw_sheet([cells]))


if __name__ == "__main__":
    run_main(main)
