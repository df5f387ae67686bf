"""Crops of pictures for a model; a picture with several crops in a row is decoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from PIL.Image import Image

from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import CROPS, CropPosition, crop_and_resize

ReadCrop = Callable[[ImageRecord, tuple[int, int], CropPosition], Image]


def read_crop(picture: ImageRecord, size: tuple[int, int], crop: CropPosition = CROPS["center"]) -> Image:
    """Decode a picture and crop it to `size` (W, H)."""
    return crop_and_resize(picture.open(at_least=max(size)), size, crop=crop)


class CropReader:
    """`read_crop` with a cache: the centre crops of the `kept` pictures, and the last decoded picture."""

    def __init__(self, kept: Iterable[ImageRecord] = ()) -> None:
        self.kept = {str(picture.path) for picture in kept}
        self.centres: dict[tuple[str, tuple[int, int]], Image] = {}
        self.last: tuple[object, Image] | None = None

    def __call__(
        self, picture: ImageRecord, size: tuple[int, int], crop: CropPosition = CROPS["center"]
    ) -> Image:
        name = str(picture.path)
        if crop == CROPS["center"] and (name, size) in self.centres:
            return self.centres[name, size]
        if self.last is None or self.last[0] != (name, max(size)):
            self.last = (name, max(size)), picture.open(at_least=max(size))
        image = crop_and_resize(self.last[1], size, crop=crop)
        if crop == CROPS["center"] and name in self.kept:
            self.centres[name, size] = image
        return image

    def forget(self) -> None:
        """Drop all cached pictures."""
        self.centres.clear()
        self.last = None
