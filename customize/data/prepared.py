"""Reading a folder of `customize prepare`: the posteriors of all images of a source.

prepared.json         its source, its encoder, its size; whether it is finished
images-64x64/         means and deviations of the images of one size in pixels, by the hashes of their contents
mirrored-64x64/       the same of the mirror images, with --flip
records/              every image with its caption, its size, its key; or the reason why it cannot be used
pictures/             the first images as they were stored, for sheets and evaluations
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from backbone.data.table import Table, parse_keys
from backbone.io.console import UserError, format_count
from backbone.io.run_folder import is_prepared
from backbone.media.sources.pictures import list_images
from backbone.media.sources.record import DatasetRow, ImageRecord
from backbone.models.encode import Encoded, View
from backbone.training.prepared import PreparedFolder

IMAGES, MIRRORED, PICTURES = "images", "mirrored", "pictures"
KEPT = 64  # images that are kept as they were stored


def read_stored_images(source: str) -> list[ImageRecord]:
    """The original images of a source; of a prepared folder those that it keeps."""
    if is_prepared(source):
        return PreparedImages(Path(source)).pictures[:KEPT]
    return list_images(source)


def table_name(size: tuple[int, int], *, flip: bool) -> str:
    """The name of the folder of the images of this size (W, H), original or mirrored."""
    return f"{MIRRORED if flip else IMAGES}-{size[0]}x{size[1]}"


class PreparedImages(PreparedFolder):
    """A finished folder of images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "images", "customize")

    def describe_left_out(self) -> str:
        """A sentence on the images that could not be used when the folder was made; "" if all could."""
        bad = self.facts.bad
        return f"Left out of {self.folder}: {format_count(bad, 'image')} that cannot be used." if bad else ""

    @cached_property
    def pictures(self) -> list[ImageRecord]:
        """The images: the first ones are stored here, the others are read from their own files."""
        records = self.records
        paths, captions, hashes = (
            records.strings(name).take(self.order).to_pylist() for name in ("path", "caption", "hash")
        )
        stored = _Kept(self.folder, paths)
        return [
            ImageRecord(Path(path), caption or None, row=DatasetRow(stored, "image", row), known_hash=known)
            for row, (path, caption, known) in enumerate(zip(paths, captions, hashes, strict=True))
        ]

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """The size (W, H) in pixels at which each image was encoded."""
        return [(int(width), int(height)) for width, height in self.numbers("size")]

    def encoded(self, flip: bool) -> tuple[list[Encoded], list[tuple[int, int]]]:
        """The images' posteriors as parts of one size each, and each image's (part, row)."""
        parts: dict[tuple[int, int], int] = {}
        rows: list[list[str]] = []
        places = []
        for picture, size in zip(self.pictures, self.sizes, strict=True):
            part = parts.setdefault(size, len(parts))
            if part == len(rows):
                rows.append([])
            places.append((part, len(rows[part])))
            rows[part].append(View(picture, size).key)
        return [self._part(size, keys, flip) for size, keys in zip(parts, rows, strict=True)], places

    def _part(self, size: tuple[int, int], keys: list[str], flip: bool) -> Encoded:
        table: Table = self.table(table_name(size, flip=flip))
        rows = table.find(parse_keys(keys))
        self.refuse_missing(rows, table)
        return Encoded(table, rows)


@dataclass(frozen=True)
class _Kept:
    """The images' bytes, as a table: the first from the folder, the others from their own files."""

    folder: Path
    paths: list[str]

    def __getitem__(self, row: int) -> dict[str, Any]:
        for path in (self.folder / PICTURES / f"{row:06d}", Path(self.paths[row])):
            if path.is_file():
                return {"image": path.read_bytes()}
        raise UserError(
            f"{self.paths[row]} is not there any more, and {self.folder} keeps the first {KEPT} images alone. Put it "
            "back."
        )
