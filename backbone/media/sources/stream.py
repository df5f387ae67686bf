"""Datasets of the hub as a stream: rows come shard by shard as they are read, and nothing of the set is kept on disk.

A shard is one of the files that hold a split's rows (Parquet, webdataset's .tar, …). Every shard can be read by itself
and from any row on, so processes share shards, and what was stopped goes on where it was.
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
class Named:
    """A dataset of the hub as it is asked for, in the words of diffusers' scripts; "": what there is without a name."""

    dataset: str
    config: str = ""
    split: str = "train"
    revision: str = ""  # a commit, a branch or a tag


@dataclass(frozen=True)
class Stream:
    """The rows of a split. Images stay encoded; what stands in a sample's .json is columns of its own.

    named      the dataset, with the commit that is read
    table      the `datasets.IterableDataset`
    names      what its columns are called here, by what they are called there, structs in samples flattened
    pictures   those that hold images, as far as the dataset says so
    lists      those that hold lists
    names_files those that hold text, or lists of it: names of files, where an image is looked for in them
    limit      of how many rows, all together; 0: of all
    classes    the names of numbered classes, of the columns that hold such
    """

    named: Named
    table: Any
    names: Mapping[str, str]
    pictures: Sequence[str]
    lists: Sequence[str] = ()
    names_files: Sequence[str] = ()
    limit: int = 0
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The dataset's id."""
        return self.named.dataset

    @property
    def shards(self) -> int:
        """How many there are. The first rows of all are one."""
        return 1 if self.limit else int(self.table.num_shards)

    @property
    def column_names(self) -> list[str]:
        """The columns."""
        return list(self.names.values())

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of where rows came from."""
        return {**asdict(self.named), "shards": self.shards}

    def rows(self, shard: int, first: int = 0) -> Iterator[dict[str, Any]]:
        """The rows of a shard from one on, in order. Raises `UserError` where it cannot be read on."""
        table = self.table.take(self.limit) if self.limit else self.table.shard(self.shards, shard)
        at = first
        try:
            for row in table.skip(first) if first else table:
                values = {new: _value(row, old) for old, new in self.names.items()}
                yield values | {name: self._fetch(values[name]) for name in self.pictures}
                at += 1
        except unreadable() as error:
            raise UserError(
                f"{self.where(shard, at)} cannot be read ({first_line(error)}). What is prepared so far is "
                "kept; give the same command again to go on."
            ) from error

    def where(self, shard: int, row: int) -> str:
        """A row's name in messages."""
        return f"row {row} of shard {shard} of {self.source}"

    def picture(
        self, row: Mapping[str, Any], column: str, shard: int, number: int, item: int | None = None
    ) -> ImageRecord:
        """The image in a column of the row of this number, of a list the one of number `item`; it needs nothing of the
        stream any more.
        """
        path = Path(self.source) / f"{shard:05d}-{number:06d}-{column}"
        value = row[column]
        if item is not None:
            path, value = path.with_name(f"{path.name}-{item}"), value[item]
        # A path may name anything
        stored = (
            value.get("bytes") if isinstance(value, Mapping) else value if isinstance(value, bytes) else None
        )
        return ImageRecord(path, row=DatasetRow({number: {column: stored}}, column, number))

    def refuse_names(self, columns: Collection[str]) -> None:
        """`UserError` where one of these columns holds the names of images in the place of images."""
        if named := [name for name in columns if name in self.names_files]:
            raise UserError(
                f"{self.source} names its images in {named[0]} and does not hold them. Download it, and give its "
                "folder."
            )

    def _fetch(self, value: Any) -> Any:
        """An image's value with its bytes, where it names a file of the dataset's own repository instead."""
        if isinstance(value, list):
            return [self._fetch(one) for one in value]
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
        """How many images a row may have."""
        return ITEMS if self.image in self.stream.lists else 1

    def read(self, row: Mapping[str, Any], shard: int, number: int) -> list[ImageRecord]:
        """The images of a row."""
        caption, where = row[self.caption] if self.caption else None, self.stream.where(shard, number)
        count = len(row[self.image] or ()) if self.image in self.stream.lists else None
        if (count or 0) > ITEMS:
            raise UserError(f"{where} has {count} images, and {ITEMS} are the most. Give another dataset.")
        found = []
        for item in list_items(count):
            picture = self.stream.picture(row, self.image, shard, number, item and item[0])
            found.append(ImageRecord(picture.path, caption_at(caption, item, where), row=picture.row))
        return found


def stream_images(stream: Stream, *, caption_column: str | None, image_column: str | None) -> ImageStream:
    """The images of a stream; columns are chosen as `list_images` does. `UserError` where there is no such column."""
    columns = Columns(caption_column, image_column)
    image, caption = columns.choose(stream.column_names, stream.pictures, stream.source)
    stream.refuse_names([image])
    return ImageStream(stream, image, caption)


def find_stream(named: Named, *, out: Path, limit: int = 0) -> Stream | None:
    """The stream of a dataset of the hub; None for a source that is here.

    A preparation in `out` that was begun with this dataset goes on with the commit that it was begun with. Raises
    `UserError` where the dataset cannot be read, and where a config or a split is named of what has none.
    """
    if not could_be_dataset(named.dataset):
        for flag, value, usual in (
            ("dataset-config-name", named.config, ""),
            ("split", named.split, "train"),
        ):
            if value != usual and Path(named.dataset).expanduser().exists():
                raise UserError(
                    f"--{flag} has no effect: {named.dataset} is no dataset on the hub. Leave it out."
                )
        return None
    notify(f"There is no folder {named.dataset}, so it is looked for as a dataset on the hub.")
    before = read_json(out / PREPARED, _Begun).dataset if (out / PREPARED).is_file() else {}
    if before.get("dataset") == named.dataset and isinstance(before.get("revision"), str):
        named = Named(named.dataset, named.config, named.split, before["revision"])
    table, revision = from_hub(named)
    return _to_stream(table, Named(named.dataset, named.config, named.split, revision), limit)


@dataclass(frozen=True)
class _Begun:
    """`prepared.json`, as far as it says which dataset a preparation was begun with."""

    dataset: dict[str, Any] = field(default_factory=dict)


def from_hub(named: Named) -> tuple[Any, str]:
    """Where a name becomes a dataset: it, streamed, and the commit that is read."""
    if not hub_answers(named.dataset, "dataset"):
        raise UserError(
            f"{named.dataset} is no folder here, and the hub, which would stream a dataset of that name, does not "
            "answer. Connect to it, or give a folder, a .parquet or a .tar file."
        )
    datasets = import_datasets()
    try:
        revision = find_revision(named.dataset, named.revision)
        table = datasets.load_dataset(
            named.dataset, named.config or None, split=named.split, revision=revision, streaming=True
        )
    except unreadable() as error:
        raise UserError(
            f"{named.dataset} is no folder here, and no dataset of that name was opened ({_reason(error)}). Check the "
            "spelling, --dataset-config-name and --split, or give a folder."
        ) from error
    return table, revision


def _to_stream(table: Any, named: Named, limit: int) -> Stream:
    """A `datasets.IterableDataset` with its images left encoded and its columns named."""
    try:
        table = table if table.features is not None else table._resolve_features()
    except unreadable() as error:
        raise UserError(
            f"{named.dataset} cannot be read ({first_line(error)}). Give another dataset."
        ) from error
    samples = all(name in table.features for name in SAMPLE)
    columns: list[str] = []
    for name, kind in table.features.items():
        columns += [f"{name}.{inner}" for inner in kind] if samples and isinstance(kind, dict) else [name]
    names = name_tar_columns(columns) if samples else dict(zip(columns, columns, strict=True))
    pictures = [name for name, kind in table.features.items() if holds_images(kind)]
    lists: list[str] = []
    files: list[str] = []
    classes: dict[str, Sequence[str]] = {}
    for old, new in names.items():
        kind = _value(table.features, old)
        lists += [new] if is_list(kind) else []
        classes |= {new: list(kind.names)} if getattr(kind, "names", None) else {}
        files += [new] if getattr(kind.feature if is_list(kind) else kind, "dtype", "") == "string" else []
    table = leave_encoded(table, pictures)
    return Stream(named, table, names, [names[name] for name in pictures], lists, files, limit, classes)


def _value(row: Mapping[str, Any], column: str) -> Any:
    """A column of a row; `json.caption` is in the struct `json`."""
    if column in row:
        return row[column]
    outer, inner = column.split(".", 1)
    return (row[outer] or {}).get(inner)


def unreadable() -> tuple[type[Exception], ...]:
    """What reading a dataset raises: of the connection, of what there is under a name, of damaged files."""
    return (OSError, ValueError, EOFError, RuntimeError, tarfile.TarError, *connection_errors())


def _reason(error: BaseException) -> str:
    """An error's first two lines: `datasets` lists what there is on the second."""
    return " ".join(str(error).splitlines()[:2]) or type(error).__name__
