"""A drawing that continues a picture on all sides (outpainting): its latents are known in the middle.

given = give_picture(model, views, picture, count=2)      # for `sample_latents`
drawing = lay_into(decoded, views, picture)               # whose middle is the picture's own pixels
"""

from __future__ import annotations

import torch
from PIL import Image, ImageFilter

from backbone.media.control.views import Views
from backbone.media.transforms import to_tensor
from backbone.models.model import Backbone
from backbone.models.sample import GivenLatents


def give_picture(model: Backbone, views: Views, picture: Image.Image, *, count: int) -> GivenLatents:
    """Latents [count, C, 1, H, W] of a drawing, known where the picture stands in it, and a mask of that region."""
    with torch.no_grad():
        latents = model.encode(to_tensor(picture)[None]).mean[0].float().cpu()

    # In latents: the drawing's size, and the picture's place in it
    factor = model.factor
    width, height = (side // factor for side in views.canvas)
    left, top = (side // factor for side in views.corner)
    place = (slice(top, top + latents.shape[-2]), slice(left, left + latents.shape[-1]))
    drawing, known = torch.zeros(len(latents), height, width), torch.zeros(height, width, dtype=torch.bool)
    drawing[:, *place], known[place] = latents, True
    return GivenLatents(drawing[:, None].expand(count, -1, 1, -1, -1), kept=known)


def lay_into(drawing: Image.Image, views: Views, picture: Image.Image, *, border: int = 8) -> Image.Image:
    """The drawing with the picture's own pixels where it stands, blended into the surroundings along a border."""
    left, top = views.corner
    right, bottom = left + picture.width, top + picture.height
    inside = (
        left + border // 2 * (left > 0),
        top + border // 2 * (top > 0),
        right - border // 2 * (right < drawing.width),
        bottom - border // 2 * (bottom < drawing.height),
    )
    mask, pasted = Image.new("L", drawing.size), drawing.copy()
    mask.paste(255, inside)
    pasted.paste(picture, views.corner)
    return Image.composite(pasted, drawing, mask.filter(ImageFilter.BoxBlur(border // 2)))
