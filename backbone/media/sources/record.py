"""An image that has not been decoded yet: a file, or a row of a table, with its caption and its mask."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from backbone.io.console import UserError, format_count, notify_first, notify_once
from backbone.io.files import content_hash
from backbone.io.records import resolve_inside
from backbone.media.sources.decode import (
    Convert,
    decode,
    describe_unused_range,
    flatten_on_white,
    is_see_through,
    open_as,
    open_bytes,
    open_mask,
    read_size,
)


@dataclass(frozen=True)
class ImageRecord:
    """An image that has not been decoded yet: its path, caption and mask."""

    path: Path  # for a dataset's row an invented name: `org/name/000012`
    caption: str | None = None
    mask: Path | None = None  # white = train
    row: DatasetRow | None = None  # holds the bytes instead of `path`
    caption_file: Path | None = field(default=None, compare=False)
    known_hash: str = field(default="", compare=False)  # if it was computed before

    @property
    def caption_source(self) -> str:
        """The file that a message about the caption names."""
        return str(self.caption_file or self.path)

    def read(self) -> bytes:
        """The encoded bytes as stored."""
        return self.path.read_bytes() if self.row is None else self.row.read()

    @cached_property
    def content_hash(self) -> str:
        """The hash of these bytes, the image's key in caches and records; read once."""
        return self.known_hash or content_hash(self.read())

    def open(
        self,
        *,
        at_least: int | None = None,
        convert: Convert = flatten_on_white,
    ) -> Image.Image:
        """Decode as `open_rgb` does, or with another `convert`.

        A line says of the first image with see-through parts that they are white.
        """
        if convert is flatten_on_white:
            convert = self._flatten
        if self.row is None:
            return open_as(self.path, convert, at_least=at_least)
        return decode(io.BytesIO(self.read()), str(self.path), convert, at_least=at_least)

    def _flatten(self, image: Image.Image) -> Image.Image:
        if dark := describe_unused_range(image):
            notify_once(f"{self.path} {dark}")
        if is_see_through(image):
            notify_first(
                str(self.path),
                "is see-through: its transparent parts are white, and those of others like it.",
            )
        return flatten_on_white(image)

    def read_size(self) -> tuple[int, int]:
        """(width, height) as the file's header says, for an image that can be decoded."""
        return read_size(io.BytesIO(self.read()))

    def open_mask(self) -> Image.Image | None:
        """The mask as `open_mask` reads it (mode L, white = train); None without one."""
        return None if self.mask is None else open_mask(self.mask)


@dataclass(frozen=True)
class DatasetRow:
    """A row of a `datasets` table whose image column holds encoded bytes, the name of a file, or a list of them.

    folder    the table's folder, which contains the files that it names
    fetched   the folder of a dataset that was downloaded from the hub; None for a local table
    item      (index, count) of the image among the row's; None if the row holds one
    """

    table: Any
    column: str
    index: int
    folder: Path = Path()
    fetched: Path | None = None
    item: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The encoded bytes of the image; `UserError` if the row cannot be read or has none."""
        location = f"Row {self.index}"
        try:
            value = self.table[self.index][self.column]
        except ValueError as error:  # a damaged page of a Parquet file
            raise UserError(
                f"{location} cannot be read ({first_line(error)}). Save the table again."
            ) from error
        if isinstance(value, list):
            value = self._choose_item(value, location)
        if isinstance(value, Mapping):
            stored, name = value.get("bytes"), value.get("path")
            value = name if stored is None and isinstance(name, str) and name else stored
        if isinstance(value, str) and value:
            value = open_bytes(self._find_file(value, location))
        if not isinstance(value, bytes):
            raise UserError(f"{location} has no image in its column {self.column!r}. Remove the row.")
        return value

    def _choose_item(self, values: Sequence[Any], location: str) -> Any:
        """The image `item` of a row's list; `UserError` if the list has another length than `item` says."""
        number, count = self.item or (0, 1)
        if len(values) != count:
            raise UserError(
                f"{location} has {format_count(len(values), 'image')} in its column {self.column!r}, and {count} "
                f"{'is' if count == 1 else 'are'} expected. Mend the row, or remove it."
            )
        return values[number]

    def _find_file(self, name: str, location: str) -> Path:
        """A file that a row names: beside the table, or downloaded by `datasets`."""
        path = Path(os.path.normpath(name))
        if self.fetched is not None and "\0" not in name and path.is_relative_to(self.fetched):
            return path
        return resolve_inside(self.folder, name, location)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
