"""Datasets of the hub as a stream: rows are read shard by shard, and nothing of the dataset is kept on disk.

A shard is one of the files that hold a split's rows (Parquet, webdataset's .tar, …). Every shard can be read by itself
and from any row on, so processes share shards, and a stopped preparation resumes where it was.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, notify
from backbone.io.files import read_json
from backbone.io.hub import connection_errors, find_revision, hub_answers
from backbone.io.run_folder import PREPARED
from backbone.media.sources.columns import Columns
from backbone.media.sources.record import DatasetRow, ImageRecord, first_line
from backbone.media.sources.tables import (
    caption_at,
    could_be_dataset,
    holds_images,
    import_datasets,
    is_list,
    leave_encoded,
    list_items,
    name_tar_columns,
)

ITEMS = 1 << 10  # records that a row with a list of images may give
SAMPLE = ("__key__", "__url__")  # columns that `datasets` gives the samples of webdataset shards


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the hub, in the words of diffusers' scripts; "": the default."""

    dataset: str
    config: str = ""
    split: str = "train"
    revision: str = ""  # a commit, a branch or a tag


@dataclass(frozen=True)
class Stream:
    """The rows of a split. Images stay encoded; the keys of a sample's .json are columns.

    origin         the dataset, with the commit that is read
    table          the `datasets.IterableDataset`
    names          the columns' names here by their names in the table, structs in samples flattened
    image_columns  columns that hold images, as far as the dataset declares them
    lists          columns that hold lists
    names_files    columns that hold text, or lists of it: as an image column it would hold names of files
    limit          the number of rows in all; 0: all
    classes        the names of numbered classes, by column
    """

    origin: HubDataset
    table: Any
    names: Mapping[str, str]
    image_columns: Sequence[str]
    lists: Sequence[str] = ()
    names_files: Sequence[str] = ()
    limit: int = 0
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The dataset's id."""
        return self.origin.dataset

    @property
    def shards(self) -> int:
        """The number of shards; with a limit the first rows are one shard."""
        return 1 if self.limit else int(self.table.num_shards)

    @property
    def column_names(self) -> list[str]:
        """The columns' names here."""
        return list(self.names.values())

    @property
    def facts(self) -> dict[str, Any]:
        """The origin of the rows, for records."""
        return {**asdict(self.origin), "shards": self.shards}

    def rows(self, shard: int, first: int = 0) -> Iterator[dict[str, Any]]:
        """The rows of a shard from `first` on, in order. Raises `UserError` if reading fails."""
        table = self.table.take(self.limit) if self.limit else self.table.shard(self.shards, shard)
        number = first
        try:
            for row in table.skip(first) if first else table:
                values = {new: _read_column(row, old) for old, new in self.names.items()}
                yield values | {name: self._fetch(values[name]) for name in self.image_columns}
                number += 1
        except list_read_errors() as error:
            raise UserError(
                f"{self.describe_row(shard, number)} cannot be read ({first_line(error)}). What is prepared so far is "
                "kept; give the same command again to go on."
            ) from error

    def describe_row(self, shard: int, row: int) -> str:
        """A row's name in messages."""
        return f"row {row} of shard {shard} of {self.source}"

    def picture(
        self, row: Mapping[str, Any], column: str, shard: int, number: int, item: int | None = None
    ) -> ImageRecord:
        """The image in a column of row `number`, of a list its element `item`; it no longer needs the stream."""
        path = Path(self.source) / f"{shard:05d}-{number:06d}-{column}"
        value = row[column]
        if item is not None:
            path, value = path.with_name(f"{path.name}-{item}"), value[item]
        # Only the bytes: a path may name anything
        stored = (
            value.get("bytes") if isinstance(value, Mapping) else value if isinstance(value, bytes) else None
        )
        return ImageRecord(path, row=DatasetRow({number: {column: stored}}, column, number))

    def refuse_names(self, columns: Collection[str]) -> None:
        """`UserError` if one of these columns holds the names of images instead of images."""
        if matches := [name for name in columns if name in self.names_files]:
            raise UserError(
                f"{self.source} names its images in {matches[0]} and does not hold them. Download it, and give its "
                "folder."
            )

    def _fetch(self, value: Any) -> Any:
        """An image's value with its bytes, if it only names a file of the dataset's own repository."""
        if isinstance(value, list):
            return [self._fetch(item) for item in value]
        name = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else None
        if not isinstance(name, str) or f"hf://datasets/{self.source}@" not in name:
            return value
        from datasets.utils.file_utils import xopen

        with xopen(name, "rb") as file:
            return {"bytes": file.read()}


@dataclass(frozen=True)
class ImageStream:
    """A stream of images with captions."""

    stream: Stream
    image: str
    caption: str | None

    @property
    def per_row(self) -> int:
        """The most images that a row may have."""
        return ITEMS if self.image in self.stream.lists else 1

    def read(self, row: Mapping[str, Any], shard: int, number: int) -> list[ImageRecord]:
        """The images of a row; `UserError` for more than ITEMS."""
        caption = row[self.caption] if self.caption else None
        location = self.stream.describe_row(shard, number)
        count = len(row[self.image] or ()) if self.image in self.stream.lists else None
        if (count or 0) > ITEMS:
            raise UserError(f"{location} has {count} images, and {ITEMS} are the most. Give another dataset.")
        records = []
        for item in list_items(count):
            picture = self.stream.picture(row, self.image, shard, number, item and item[0])
            records.append(ImageRecord(picture.path, caption_at(caption, item, location), row=picture.row))
        return records


def stream_images(stream: Stream, *, caption_column: str | None, image_column: str | None) -> ImageStream:
    """The images of a stream; columns are chosen as in `list_images`. `UserError` if there is no such column."""
    columns = Columns(caption_column, image_column)
    image, caption = columns.choose(stream.column_names, stream.image_columns, stream.source)
    stream.refuse_names([image])
    return ImageStream(stream, image, caption)


def find_stream(origin: HubDataset, *, out: Path, limit: int = 0) -> Stream | None:
    """The stream of a dataset of the hub; None for a local source.

    A preparation in `out` that was begun with this dataset continues with the same commit. Raises `UserError` if the
    dataset cannot be read, and for a config or split of a source without them.
    """
    if not could_be_dataset(origin.dataset):
        for flag, value, default in (
            ("dataset-config-name", origin.config, ""),
            ("split", origin.split, "train"),
        ):
            if value != default and Path(origin.dataset).expanduser().exists():
                raise UserError(
                    f"--{flag} has no effect: {origin.dataset} is no dataset on the hub. Leave it out."
                )
        return None
    notify(f"There is no folder {origin.dataset}, so it is looked for as a dataset on the hub.")
    previous = read_json(out / PREPARED, _Preparation).dataset if (out / PREPARED).is_file() else {}
    if previous.get("dataset") == origin.dataset and isinstance(previous.get("revision"), str):
        origin = HubDataset(origin.dataset, origin.config, origin.split, previous["revision"])
    table, revision = stream_from_hub(origin)
    return _make_stream(table, HubDataset(origin.dataset, origin.config, origin.split, revision), limit)


@dataclass(frozen=True)
class _Preparation:
    """The dataset in `prepared.json` with which a preparation was begun."""

    dataset: dict[str, Any] = field(default_factory=dict)


def stream_from_hub(origin: HubDataset) -> tuple[Any, str]:
    """Open a dataset of the hub: the streamed table, and the commit that is read.

    Raises `UserError` for an unknown dataset, and without a connection.
    """
    if not hub_answers(origin.dataset, "dataset"):
        raise UserError(
            f"{origin.dataset} is no folder here, and the hub, which would stream a dataset of that name, does not "
            "answer. Connect to it, or give a folder, a .parquet or a .tar file."
        )
    datasets = import_datasets()
    try:
        revision = find_revision(origin.dataset, origin.revision)
        table = datasets.load_dataset(
            origin.dataset, origin.config or None, split=origin.split, revision=revision, streaming=True
        )
    except list_read_errors() as error:
        raise UserError(
            f"{origin.dataset} is no folder here, and no dataset of that name was opened ({_first_lines(error)}). "
            "Check the spelling, --dataset-config-name and --split, or give a folder."
        ) from error
    return table, revision


def _make_stream(table: Any, origin: HubDataset, limit: int) -> Stream:
    """The stream of a `datasets.IterableDataset`, with encoded images and named columns."""
    try:
        table = table if table.features is not None else table._resolve_features()
    except list_read_errors() as error:
        raise UserError(
            f"{origin.dataset} cannot be read ({first_line(error)}). Give another dataset."
        ) from error
    is_webdataset = all(name in table.features for name in SAMPLE)
    columns: list[str] = []
    for name, kind in table.features.items():
        if is_webdataset and isinstance(kind, dict):
            columns += [f"{name}.{inner}" for inner in kind]
        else:
            columns.append(name)
    names = name_tar_columns(columns) if is_webdataset else dict(zip(columns, columns, strict=True))
    image_columns = [name for name, kind in table.features.items() if holds_images(kind)]
    lists: list[str] = []
    names_files: list[str] = []
    classes: dict[str, Sequence[str]] = {}
    for old, new in names.items():
        kind = _read_column(table.features, old)
        if is_list(kind):
            lists.append(new)
        if getattr(kind, "names", None):
            classes[new] = list(kind.names)
        if getattr(kind.feature if is_list(kind) else kind, "dtype", "") == "string":
            names_files.append(new)
    table = leave_encoded(table, image_columns)
    return Stream(
        origin, table, names, [names[name] for name in image_columns], lists, names_files, limit, classes
    )


def _read_column(row: Mapping[str, Any], column: str) -> Any:
    """The value of a row's column; `json.caption` is in the struct `json`."""
    if column in row:
        return row[column]
    outer, inner = column.split(".", 1)
    return (row[outer] or {}).get(inner)


def list_read_errors() -> tuple[type[Exception], ...]:
    """The errors of reading a dataset: of the connection, unknown names, damaged files."""
    return (OSError, ValueError, EOFError, RuntimeError, tarfile.TarError, *connection_errors())


def _first_lines(error: BaseException) -> str:
    """An error's first two lines: `datasets` lists what there is on the second."""
    return " ".join(str(error).splitlines()[:2]) or type(error).__name__
