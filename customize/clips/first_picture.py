"""`customize clip "a dog, moving left" --image PHOTO`: clips whose first frame is a given picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from backbone.adapters.concept import Concept, resolve_placeholder_tokens
from backbone.io.console import UserError, notify
from backbone.io.progress import progress
from backbone.media.shapes import is_same_shape
from backbone.media.sheet import save_png
from backbone.media.sources.decode import named_alone, open_mask, open_named
from backbone.media.transforms import crop_and_resize
from backbone.models.model import Backbone
from customize.clips.planned.cut_out import Bools, Floats
from customize.clips.planned.in_picture import find_changed, find_named
from customize.clips.planned.plan import PlannedClip, Shot, describe_plan, plan_in_picture
from customize.clips.settings import ClipOptions
from customize.clips.sparse import find_crop


@dataclass(frozen=True, eq=False)
class FirstPicture:
    """The first frame of clips.

    thing   [H, W]: the pixels that are to move, where a mask says them
    behind  the picture without them, where there is one
    """

    picture: Image.Image
    thing: Bools | None = None
    behind: Image.Image | None = None


def open_first_picture(options: ClipOptions, picture: Image.Image, size: tuple[int, int]) -> FirstPicture:
    """The picture of `--image`, cropped to a frame's size (W, H), which is printed, with its `--mask` and `--behind`.

    Raises `UserError` for a file that is no picture or of another shape, and for a mask of nothing or of everything.
    """
    (file,) = options.images
    find_crop(file.name, picture.size, size)
    thing = behind = None
    if options.mask is not None:
        with named_alone():
            mask = open_mask(options.mask)
        refuse_other_shape(options.mask, mask, file, picture)
        thing = np.asarray(crop_and_resize(mask, size)) >= 128
        if not thing.any() or thing.all():
            extent = "all of it" if thing.all() else "nothing"
            raise UserError(
                f"{options.mask} is white at {extent}. It should be white where the thing is that moves."
            )
    if options.behind is not None:
        behind = open_named(options.behind)
        refuse_other_shape(options.behind, behind, file, picture)
        behind = crop_and_resize(behind, size)
    return FirstPicture(crop_and_resize(picture, size), thing, behind)


def refuse_other_shape(path: Path, image: Image.Image, file: Path, picture: Image.Image) -> None:
    """`UserError` for an image with another aspect ratio than the picture that it covers."""
    (wide, high), (own_wide, own_high) = picture.size, image.size
    if not is_same_shape(picture.size, image.size):
        raise UserError(
            f"{path} is {own_wide} × {own_high} and {file} {wide} × {high}: they do not lie over one another. Make it "
            "of the picture's shape."
        )


def write_masks(folder: Path, plans: Sequence[PlannedClip]) -> None:
    """Write `p00-mask.png` …: white what moves in the picture, of each prompt that moves something."""
    for number, plan in enumerate(plans):
        if plan.picture is None or plan.cut_out is None or plan.cut_out.things is None:
            continue
        left, top = (0, 0) if plan.views is None else plan.views.corner
        mask = Image.fromarray(plan.cut_out.things[0]).convert("L")
        save_png(
            folder / f"p{number:02d}-mask.png",
            mask.crop((left, top, left + plan.picture.width, top + plan.picture.height)),
        )


def plan_pictures(
    model: Backbone,
    prompts: Sequence[str],
    shots: Sequence[Shot],
    options: ClipOptions,
    concepts: Sequence[Concept],
    first: FirstPicture,
    track: Floats | None,
) -> list[PlannedClip]:
    """The clip of each shot that begins with the picture of `--image`; `UserError` if nothing is seen to move."""

    def find(phrase: str, rival: str) -> Bools:
        if first.thing is not None:
            return first.thing
        if first.behind is not None:
            return find_changed(first.picture, first.behind)
        name = model.location.name
        words = [
            resolve_placeholder_tokens(words, concepts, model=name) if words else ""
            for words in (phrase, rival)
        ]
        with progress(None, f"looking for “{phrase}”", brief=True):
            return find_named(model, first.picture, *words)

    plans = [
        plan_in_picture(shot, options.frames, first.picture, find, first.behind, track) for shot in shots
    ]
    for prompt, plan in zip(prompts, plans, strict=True):
        for sentence in describe_plan(prompt, plan):
            notify(sentence)
    if all(plan.is_drawn for plan in plans):
        notify("Nothing is drawn: --count, --seed and the settings of the sampler change nothing here.")
    elif options.shared_noise is not None:
        notify("--shared-noise is not used: every clip here is of one picture.")
    return plans
