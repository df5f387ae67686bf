"""Tables of preferences: Parquet files, webdataset shards, saved datasets, datasets of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError
from backbone.io.records import parse_json, refuse_pointer
from backbone.media.sources.splits import choose_table
from backbone.media.sources.tables import (
    ask_hub_once,
    fetched_folder,
    leave_encoded,
    load_arrow,
    load_saved,
    load_tars,
    refuse_unwritable_cache,
)


class ParquetTable:
    """Rows of local Parquet files; `table[i][column]` reads only that column of that row's row group.

    `folder` is where their rows may name files, `name` the first table's.
    """

    fetched: Path | None = None

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow
        import pyarrow.parquet

        self.folder, self.name = files[0].parent, files[0].name

        try:
            self.files = [pyarrow.parquet.ParquetFile(file) for file in files]
        except (OSError, ValueError) as error:  # pyarrow's are among these
            raise _damaged_error(files[0], error) from error
        self.column_names: list[str] = list(self.files[0].schema_arrow.names)
        self.groups = [
            (file, group, file.metadata.row_group(group).num_rows)
            for file in self.files
            for group in range(file.metadata.num_row_groups)
        ]
        self._kept: dict[str, tuple[int, Any]] = {}

    def names_files(self, column: str) -> bool:
        """Whether a column holds names of files, or lists of them."""
        return _is_text(self.files[0].schema_arrow.field(column).type)

    def class_names(self, column: str) -> list[str]:
        """The names of a column's numbered classes, as `datasets` keeps them in the schema; [] without."""
        if column not in self.column_names:
            return []
        raw = (self.files[0].schema_arrow.metadata or {}).get(b"huggingface")
        schema: Any = parse_json(raw.decode(errors="replace"), self.folder / self.name) if raw else {}
        for key in ("info", "features", column, "names"):
            schema = schema.get(key) if isinstance(schema, dict) else None
        return [str(name) for name in schema] if isinstance(schema, list) else []

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self.groups)

    def values(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Iterate over all rows, in order, with these columns alone."""
        for file, group, _ in self.groups:
            try:
                yield from file.read_row_group(group, columns=list(columns)).to_pylist()
            except (OSError, ValueError) as error:  # damaged pages, text that is no UTF-8
                raise _damaged_error(self.folder, error) from error

    def __getitem__(self, index: int) -> _TableRow:
        return _TableRow(self, index)

    def cell(self, index: int, column: str) -> Any:
        """One value; the last row group of each column is kept in memory for the rows around it."""
        row = index
        for number, (file, group, rows) in enumerate(self.groups):
            if row < rows:
                if self._kept.get(column, (-1, None))[0] != number:
                    self._kept[column] = (number, self._read_column(file, group, column))
                return self._kept[column][1][row].as_py()
            row -= rows
        raise IndexError(index)

    def _read_column(self, file: Any, group: int, column: str) -> Any:
        try:
            return file.read_row_group(group, columns=[column]).column(column)
        except (OSError, ValueError) as error:
            raise _damaged_error(self.folder, error) from error


@dataclass(frozen=True)
class _TableRow:
    table: ParquetTable
    index: int

    def __getitem__(self, column: str) -> Any:
        return self.table.cell(self.index, column)


class DatasetTable:
    """The interface of `ParquetTable` over a `datasets` table, with images left encoded.

    `fetched` is where one of the hub was downloaded to.
    """

    def __init__(self, table: Any, folder: Path, fetched: Path | None = None) -> None:
        self.folder, self.name, self.fetched = folder, "dataset", fetched
        self.table = leave_encoded(table, table.column_names)
        self.column_names: list[str] = list(table.column_names)

    def names_files(self, column: str) -> bool:
        """Whether a column holds names of files, or lists of them."""
        return _is_text(self.table.features.arrow_schema.field(column).type)

    def class_names(self, column: str) -> list[str]:
        """The names of a column's numbered classes; [] without."""
        return list(getattr(self.table.features.get(column), "names", None) or [])

    def __len__(self) -> int:
        return len(self.table)

    def values(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Iterate over all rows, in order, with these columns alone."""
        yield from self.table.select_columns(list(columns))

    def __getitem__(self, index: int) -> Any:
        return self.table[index]


def _is_text(kind: Any) -> bool:
    """Whether Arrow's type of a column is text, or lists of text; images are bytes, or records of bytes and a name."""
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _damaged_error(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if path.is_file():
        with open(path, "rb") as file:
            refuse_pointer(file.read(64), path)
    return UserError(f"{path} is not a readable Parquet file ({reason}). Save it again.")


def load_saved_table(folder: Path) -> DatasetTable:
    """The table of a folder that `datasets` saved, its split for training."""
    table = load_saved(folder)
    return DatasetTable(choose_table(table, str(folder)) if isinstance(table, dict) else table, folder)


def load_arrow_table(files: Sequence[Path]) -> DatasetTable:
    """The rows of Arrow files as `datasets` writes them."""
    return DatasetTable(load_arrow(files), files[0].parent)


def load_tar_table(files: Sequence[Path]) -> DatasetTable:
    """The samples of webdataset shards."""
    return DatasetTable(load_tars(files), files[0].parent)


def load_hub_table(source: str, split: str, limit: int | None) -> DatasetTable:
    """Load a dataset of the hub; with a limit only its first rows are downloaded."""
    fetched = fetched_folder()
    with ask_hub_once(source) as datasets:
        try:
            if limit is None:
                return DatasetTable(datasets.load_dataset(source, split=split), fetched, fetched)
            rows = datasets.load_dataset(source, split=split, streaming=True).take(limit)
            table = datasets.Dataset.from_list(list(rows), features=rows.features)
            return DatasetTable(table, fetched, fetched)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            refuse_unwritable_cache(error)
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{source} is nothing here, and no dataset of that name was loaded ({first}). Check the spelling, or "
                "give a folder, a .jsonl or a .parquet file."
            ) from error
