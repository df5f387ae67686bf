"""Crops of pictures for a model, each picture decoded once where several ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from PIL.Image import Image

from backbone.media.sources.pictures import ImageRecord
from backbone.media.transforms import CROPS, CropPosition, crop_and_resize

ReadCrop = Callable[[ImageRecord, tuple[int, int], CropPosition], Image]


def read_crop(picture: ImageRecord, size: tuple[int, int], crop: CropPosition = CROPS["center"]) -> Image:
    """Decode a picture and crop it to `size` (W, H)."""
    return crop_and_resize(picture.open(at_least=max(size)), size, crop=crop)


class CropReader:
    """`read_crop` that remembers: the crops of the `kept` pictures, and of the others the one read last."""

    def __init__(self, kept: Iterable[ImageRecord] = ()) -> None:
        self.kept = {str(picture.path) for picture in kept}
        self.crops: dict[tuple[str, tuple[int, int], CropPosition], Image] = {}
        self.last: tuple[object, Image] | None = None

    def __call__(
        self, picture: ImageRecord, size: tuple[int, int], crop: CropPosition = CROPS["center"]
    ) -> Image:
        key = (str(picture.path), size, crop)
        if key in self.crops:
            return self.crops[key]
        if self.last is not None and self.last[0] == key:
            return self.last[1]
        image = read_crop(picture, size, crop)
        self.last = (key, image)
        if key[0] in self.kept:
            self.crops[key] = image
        return image

    def forget(self) -> None:
        """Lets go of all crops."""
        self.crops.clear()
        self.last = None
