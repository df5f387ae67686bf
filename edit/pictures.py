"""Pictures and masks in the sizes that a model works in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from backbone.io.files import content_hash
from backbone.media.decode import open_rgb
from backbone.media.transforms import working_size
from backbone.models.model import Backbone


def prepared(model: Backbone, image: Image.Image | str | Path) -> tuple[Image.Image, dict[str, Any]]:
    """The picture as the model is shown it, and facts about where it came from: name, size, content hash.

    Its shape is kept, up to 2 : 1, at about the model's own number of pixels.
    """
    if isinstance(image, Image.Image):
        opened, name, digest = image.convert("RGB"), "", content_hash(image.convert("RGB").tobytes())
    else:
        opened, name, digest = open_rgb(image), str(image), content_hash(Path(image))
    size = working_size(opened.size, area=model.resolution**2, unit=2 * model.factor)
    return fitted(opened, size), {"name": name, "size": list(opened.size), "content": digest}


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest part of this shape at the centre, resized (Lanczos)."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
