"""Tables of the `datasets` library: Parquet, Arrow, webdataset shards, saved folders, the hub. Images stay encoded."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, notify
from backbone.io.files import content_hash, read_json
from backbone.io.hub import hub_answers
from backbone.io.records import check_parsed, refuse_pointer, resolve_inside
from backbone.io.run_folder import is_prepared
from backbone.io.written import written_path
from backbone.media.sources.columns import Columns, join_lines
from backbone.media.sources.names import IMAGE_SUFFIXES, list_visible
from backbone.media.sources.record import DatasetRow, ImageRecord, first_line
from backbone.media.sources.splits import choose_table, drop_evaluation_splits
from backbone.media.sources.tars import TAR_COLUMNS, StoredFile, name_column, read_tars, refuse_dots

# Suffixes of file names, which no dataset's name has
FILES = IMAGE_SUFFIXES | {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".txt", ".zip"}


def find_tables(folder: Path, suffix: str) -> list[Path]:
    """A folder's tables of a kind without evaluation splits, in natural order."""
    files = list_visible(folder) if folder.is_dir() else []
    return drop_evaluation_splits([file for file in files if file.suffix.lower() == suffix], folder)


def is_dataset_folder(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def could_be_dataset(source: str) -> bool:
    """Whether a source is `org/name`; it is a path if it or `org` exists here, or if it has a file's suffix."""
    path = written_path(source)
    if path.exists() or path.parent.exists() or path.suffix.lower() in FILES:
        return False
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", source) is not None


def load_saved(path: Path) -> Any:
    """A dataset that `save_to_disk` wrote; `UserError` if it is damaged or names files outside of its folder."""
    if is_prepared(path):
        raise UserError(
            f"{path} holds prepared data, which only training reads. Name what it was prepared from."
        )
    for name in ("dataset_dict.json", "dataset_info.json", "state.json"):
        for record in path.rglob(name):
            for file in read_json(record, SavedTable)._data_files:
                resolve_inside(record.parent, file.filename, record)
            if name == "dataset_dict.json":
                for split in read_json(record, SavedSplits).splits:
                    resolve_inside(record.parent, split, record)
    datasets = import_datasets()
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole saved dataset ({error}). Save it again.") from error


@dataclass(frozen=True)
class SavedFile:
    """An Arrow file of a saved dataset."""

    filename: str


@dataclass(frozen=True)
class SavedTable:
    """The file names in `state.json` of a saved dataset."""

    _data_files: list[SavedFile] = field(default_factory=list)


@dataclass(frozen=True)
class SavedSplits:
    """`dataset_dict.json` of a saved dataset: the folders of its splits."""

    splits: list[str] = field(default_factory=list)


TAR_TABLE_VERSION = 1  # version of the tables that tars are unpacked into


def load_tars(files: Sequence[Path]) -> Any:
    """The samples of webdataset shards, or of packed folders (.tar), as a table; images stay encoded.

    The ending behind a sample's name is a column: `0001.chosen.jpg` is `chosen`, `0001.jpg` is `image`, `0001.txt` is
    `text`, and the keys of `0001.json` are columns themselves. `UserError`: see `read_tars`.
    """
    import pyarrow

    datasets = import_datasets()
    tars = read_tars(files)
    features = {}
    for name, holds_image in tars.columns.items():
        values = tars.values(name)
        try:
            stored = pyarrow.binary() if _has_files(values) else pyarrow.infer_type(values)
        except pyarrow.ArrowException as error:
            raise UserError(
                f"{files[0]} has values of several kinds in {name} ({first_line(error)}). Write one kind."
            ) from error
        features[name] = (
            datasets.Image(decode=False)
            if holds_image
            else datasets.features.features.generate_from_arrow_type(stored)
        )
    # The same files are unpacked once
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return datasets.Dataset.from_generator(
            tars.rows,
            features=datasets.Features(features),
            fingerprint=content_hash(json.dumps([TAR_TABLE_VERSION, facts, list(features)]).encode()),
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        refuse_unwritable_cache(error)
        raise UserError(
            f"{files[0]} is no readable tar file of samples ({first_line(error)}). Pack it again."
        ) from error


def _has_files(values: Sequence[Any]) -> bool:
    return any(isinstance(value, StoredFile) for value in values)


def name_tar_columns(columns: Sequence[str]) -> dict[str, str]:
    """The names of samples' columns here, by their names in `datasets`, structs flattened."""
    names: dict[str, str] = {}
    refuse_dots(columns)
    for name in columns:
        key = name.removeprefix("json.")
        new = name_column(name) if key == name else TAR_COLUMNS.get(key.lower(), key)
        names[name] = name if new in names.values() else new
    return names


def load_parquet(files: Sequence[Path]) -> Any:
    """Parquet files as one table; `UserError` for a damaged one."""
    datasets = import_datasets()
    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        refuse_unwritable_cache(error)
        for file in files:
            with open(file, "rb") as opened:
                refuse_pointer(opened.read(64), file)
        raise UserError(
            f"{files[0]} is not a readable Parquet file ({first_line(error)}). Save it again."
        ) from error


def refuse_unwritable_cache(error: BaseException | None) -> None:
    """`UserError` if the cause of an error is the cache of `datasets`, and not the table."""
    while error is not None:
        closed = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        name = getattr(error, "filename", None) if closed else None
        if name is not None and Path(name).is_relative_to(fetched_folder().parent):
            raise UserError(
                f"Tables are unpacked in {name}, which is not writable. Change its permissions, or set HF_HOME to "
                "another folder."
            ) from error
        error = error.__cause__ or error.__context__


def load_arrow(files: Sequence[Path]) -> Any:
    """Arrow files as `datasets` writes them, as one table; `UserError` for a damaged one."""
    datasets = import_datasets()
    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{files[0]} is not a readable Arrow file ({first_line(error)}). Save it again."
        ) from error


TABLES = {".parquet": load_parquet, ".arrow": load_arrow, ".tar": load_tars}


@contextmanager
def ask_hub_once(source: str) -> Iterator[Any]:
    """The `datasets` library; inside the body it uses its cache alone if the hub, asked once, does not answer."""
    datasets = import_datasets()
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not hub_answers(source, "dataset")
    try:
        yield datasets
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def load_from_hub(source: str) -> Any:
    """Load a dataset of the hub, without a connection from the cache alone; `UserError` for an unknown one."""
    notify(f"There is no folder {source}, so it is looked for as a dataset on the hub.")
    with ask_hub_once(source) as datasets:
        try:
            return datasets.load_dataset(source)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            refuse_unwritable_cache(error)
            raise UserError(
                f"{source} is no folder here, and no dataset of that name was loaded ({first_line(error)}). "
                "Check the spelling, or give a folder of images."
            ) from error


def fetched_folder() -> Path:
    """The folder of `datasets` for downloads."""
    return Path(import_datasets().config.HF_CACHE_HOME)


def list_table(
    table: Any, source: str, columns: Columns, *, folder: Path, fetched: Path | None = None
) -> list[ImageRecord]:
    """The images of a table, or of its training split; a name in a row is of a file in `folder`.

    `fetched`: the folder of a dataset that was downloaded from the hub. Raises `UserError` for a table without images
    or rows.
    """
    if isinstance(table, dict):
        table = choose_table(table, source)
    image_columns = [name for name, kind in table.features.items() if holds_images(kind)]
    image_column, caption_column = columns.choose(list(table.column_names), image_columns, source)
    texts = [
        name
        for name, kind in table.features.items()
        if getattr(kind, "dtype", "") == "string" or name == caption_column
    ]
    columns.say_caption_column(texts, source)
    table = leave_encoded(table, [image_column])
    try:
        captions = list(table[caption_column]) if caption_column else [None] * len(table)
        counts = _count_items(table, image_column)
    except ValueError as error:  # bytes that are no UTF-8
        raise UserError(
            f"{source} has captions that cannot be read ({first_line(error)}). Save it again."
        ) from error
    if not captions:
        raise UserError(f"{source} has no rows. Give another dataset or a folder of images.")
    return [
        ImageRecord(
            Path(source) / (f"{index:06d}" if item is None else f"{index:06d}-{item[0]}"),
            caption_at(caption, item, f"Row {index} of {source}"),
            row=DatasetRow(table, image_column, index, folder, fetched, item),
        )
        for index, (caption, count) in enumerate(zip(captions, counts, strict=True))
        for item in list_items(count)
    ]


def holds_images(kind: Any) -> bool:
    """Whether a feature is an image, by its type or its keys, or a list of images."""
    datasets = import_datasets()
    return (
        isinstance(kind, datasets.Image)
        or (isinstance(kind, Mapping) and set(kind) == {"bytes", "path"})
        or (is_list(kind) and holds_images(kind.feature))
    )


def is_list(kind: Any) -> bool:
    """Whether a feature is a list."""
    datasets = import_datasets()
    return isinstance(kind, (datasets.List, datasets.LargeList))


def leave_encoded(table: Any, names: Iterable[str]) -> Any:
    """The table with the images of these columns not decoded, in lists too."""
    datasets = import_datasets()
    encoded = datasets.Image(decode=False)
    for name in names:
        kind = table.features[name]
        if isinstance(kind, datasets.Image):
            table = table.cast_column(name, encoded)
        elif is_list(kind) and isinstance(kind.feature, datasets.Image):
            table = table.cast_column(name, type(kind)(encoded))
    return table


def list_items(count: int | None) -> list[tuple[int, int] | None]:
    """(index, count) of each image in a row's list; [None] for a row with one image (count None)."""
    return [None] if count is None else [(number, count) for number in range(count)]


def caption_at(caption: Any, item: tuple[int, int] | None, location: str) -> str | None:
    """The caption of one of a row's images; the row has one for all images or one for each."""
    if isinstance(caption, list) and item is not None and len(caption) == item[1]:
        caption = caption[item[0]]
    if isinstance(caption, bytes):  # of a tar's .caption, which `datasets` does not know
        try:
            caption = check_parsed(caption.decode("utf-8"), f"The caption of {location} is not UTF-8 text")
        except UnicodeDecodeError as error:
            raise UserError(f"The caption of {location} is not UTF-8 text. Save it as UTF-8.") from error
    if caption is not None and not isinstance(caption, str):
        raise UserError(
            f"{location} has a caption that is not text ({str(caption)[:60]!r}). Write one text for each image."
        )
    return join_lines(caption, location)


def _count_items(table: Any, column: str) -> list[int | None]:
    """The number of images in each row's list; None for each row of a column without lists. No image is read."""
    if not is_list(table.features[column]):
        return [None] * len(table)
    import pyarrow.compute

    stored = table.select_columns([column]).with_format("arrow")[:][column]
    lengths: list[int | None] = pyarrow.compute.list_value_length(stored).to_pylist()
    return [length or 0 for length in lengths]


def import_datasets() -> Any:
    """The library, which takes a second to import."""
    import datasets

    return datasets
