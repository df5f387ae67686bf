"""Tables of tensors on disk: rows under content keys in Arrow shards, memory-mapped, of any size.

A table is a folder of Arrow stream files, a `datasets` dataset (`datasets.load_from_disk` opens it after `describe`). A
row is found by its key, the hash of its source. Shards are only appended, each written whole or not at all, and never
rewritten: several processes may append at once, and a killed process leaves only whole shards. A `Column` is indexed
like a tensor and reads rows from the mapped files.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from backbone.io.console import UserError
from backbone.io.files import content_hash, read_json, write_bytes, write_json

KEY = "key"
KEY_BYTES = 32  # of SHA-256
SHARDS = "data-*.arrow"
STATE = "state.json"  # of `datasets`: the files of a complete table
FIELDS = b"limner"  # key in a shard's schema of its fields' dtypes and shapes
MAPPED = 64 << 20  # bytes read from the mapped files after which their pages are released
ARROW_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}  # Arrow's names, and numpy's
FAULT = 64 << 10  # bytes that the system maps at once around a row
Numbers: TypeAlias = np.ndarray[Any, Any]
Index: TypeAlias = Tensor | Numbers | Sequence[int] | slice | int


class DamagedShard(UserError):
    """A shard that is truncated or no Arrow file."""


@dataclass(frozen=True)
class Field:
    """The type of a column: tensors of one dtype and shape, or text (`str`)."""

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def stored(self) -> str:
        """numpy's name of the stored numbers' dtype; bfloat16 is stored as its bits."""
        return {"bfloat16": "uint16", "bool": "uint8"}.get(self.dtype, self.dtype)


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of a table, or rows in memory that could not be written."""

    name: str
    fields: dict[str, Field]
    columns: dict[str, Any]  # numbers [N, …], or an Arrow array of text
    memory: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.columns[KEY])


class Table:
    """The rows of a folder. `repair` deletes damaged shards, whose rows are then missing; else they are refused."""

    def __init__(self, folder: Path, *, repair: bool = False) -> None:
        self.folder, self.repair = folder, repair
        self.shards: list[Shard] = []
        self._offsets = np.zeros(1, np.int64)
        self._index: tuple[Numbers, Numbers] | None = None
        self._touched = 0
        self.refresh()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def refresh(self) -> None:
        """Open shards that were appended since, by this process or another; known rows keep their numbers."""
        existing = {shard.name for shard in self.shards}
        for path in self._list_shards():
            if path.name in existing:
                continue
            try:
                self.shards.append(read_shard(path))
            except FileNotFoundError:
                continue  # another process has just deleted a damaged one
            except PermissionError:
                if not self.repair:
                    raise
            except DamagedShard:
                if not self.repair:
                    raise
                with suppress(PermissionError):
                    path.unlink(missing_ok=True)
        self._count()

    def _list_shards(self) -> list[Path]:
        """The files of the folder; with `repair` none for a folder that may not be read."""
        try:
            return sorted(self.folder.glob(SHARDS))
        except PermissionError:
            if not self.repair:
                raise
            return []

    def append(self, columns: Mapping[str, Tensor | Sequence[str]], *, fallback: bool = False) -> None:
        """Write rows as a new shard: `key` [N, 32] and their tensors [N, …] and texts.

        With `fallback`, rows that cannot be written (a full disk) stay in memory; else this is an `OSError`.
        """
        if not len(columns[KEY]):
            return
        fields = {name: describe_column(values) for name, values in columns.items()}
        stored = {name: to_stored(values) for name, values in columns.items()}
        name = f"data-{content_hash(stored[KEY].tobytes())[:16]}.arrow"
        if any(shard.name == name for shard in self.shards):
            return
        try:
            write_shard(self.folder / name, stored, fields)
            self.shards.append(read_shard(self.folder / name))
        except OSError:
            if not fallback:
                raise
            self.shards.append(Shard(f"memory {name}", fields, stored))
        self._count()

    def find(self, keys: Numbers) -> Numbers:
        """The row of each key [N, 32], −1 for an unknown key."""
        if not len(self):
            return np.full(len(keys), -1, np.int64)
        if self._index is None:
            prefixes = np.concatenate([prefix(shard.columns[KEY]) for shard in self.shards])
            order = np.argsort(prefixes, kind="stable")
            self._index = prefixes[order], order
            self.release()
        prefixes, order = self._index
        requested = prefix(keys)
        positions = np.minimum(np.searchsorted(prefixes, requested), len(order) - 1)
        return np.where(prefixes[positions] == requested, order[positions], -1)

    def column(self, name: str) -> Column:
        """The column of this name."""
        return Column(self, name)

    def strings(self, name: str) -> Any:
        """A column of text, as an Arrow array over all shards."""
        import pyarrow

        return pyarrow.chunked_array([shard.columns[name] for shard in self.shards], pyarrow.string())

    def numbers(self, name: str) -> Numbers:
        """A whole column of numbers [N, …], copied into memory."""
        values = np.concatenate([shard.columns[name] for shard in self.shards])
        self.release()
        return values

    def gather(self, name: str, rows: Numbers) -> Tensor:
        """The rows [B] of a column [B, …], copied shard by shard."""
        field = self.field(name)
        out = np.empty((len(rows), *field.shape), field.stored)
        shard_numbers = np.searchsorted(self._offsets, rows, "right") - 1
        for number in np.unique(shard_numbers):
            selected = shard_numbers == number
            out[selected] = self.shards[number].columns[name][rows[selected] - self._offsets[number]]
        self._touched += len(rows) * max(FAULT, out.nbytes // max(1, len(rows)))
        if self._touched > MAPPED:
            self.release()
        return from_stored(out, field)

    def field(self, name: str) -> Field:
        """The type of a column."""
        return self.shards[0].fields[name]

    def release(self) -> None:
        """Release the pages of the mapped files, which the system otherwise keeps as long as memory lasts."""
        self._touched = 0
        for shard in self.shards:
            if shard.memory is not None and hasattr(mmap, "MADV_DONTNEED"):
                shard.memory.madvise(mmap.MADV_DONTNEED)

    def describe(self) -> None:
        """Write the files that `datasets.load_from_disk` reads besides the shards, with the list of shards."""
        import datasets
        import pyarrow

        names = [shard.name for shard in self.shards]
        if self.shards:
            schema = pyarrow.schema(
                [(name, arrow_type(field)) for name, field in self.shards[0].fields.items()]
            )
            features = datasets.Features.from_arrow_schema(schema).to_dict()
            write_json(self.folder / "dataset_info.json", {"features": features})
        write_json(
            self.folder / STATE,
            {
                "_data_files": [{"filename": name} for name in names],
                "_fingerprint": content_hash("\n".join(names).encode())[:16],
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": self.folder.name,
            },
        )

    def refuse_incomplete(self, remedy: str) -> None:
        """`UserError` if a shard that `describe` has listed is gone."""
        path = self.folder / STATE
        listed = read_json(path).get("_data_files", []) if path.is_file() else []
        existing = {shard.name for shard in self.shards}
        missing = [entry["filename"] for entry in listed if entry["filename"] not in existing]
        if missing:
            remainder = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.folder / missing[0]}{remainder} is gone. {remedy}")

    def _count(self) -> None:
        self._offsets = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self._index = None


class Column:
    """A column [N, …] of a table, indexed like a tensor; with `rows` a selection of the table's rows."""

    def __init__(self, table: Table, name: str, rows: Numbers | None = None) -> None:
        self.table, self.name, self.rows = table, name, rows

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    @property
    def shape(self) -> torch.Size:
        """[N, …], as a tensor's."""
        return torch.Size([len(self), *self.table.field(self.name).shape])

    def __getitem__(self, index: Index) -> Tensor:
        if isinstance(index, int):
            return self[[range(len(self))[index]]][0]
        if isinstance(index, slice):
            index = range(len(self))[index]
        positions = np.asarray(index, np.int64)
        rows = positions if self.rows is None else self.rows[positions]
        values = self.table.gather(self.name, rows.reshape(-1))
        return values.reshape(*positions.shape, *values.shape[1:])


# Keys --------------------------------------------------------------------------------------------------------


def parse_keys(hashes: Sequence[str]) -> Numbers:
    """Hashes in hexadecimal digits as keys [N, 32]."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, KEY_BYTES)


def prefix(keys: Numbers) -> Numbers:
    """The first 64 bits of keys, for look-up; two are equal in one of 370,000 tables of ten million rows."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


# Files -------------------------------------------------------------------------------------------------------


def describe_column(values: Tensor | Sequence[str]) -> Field:
    """The type of a column of these values."""
    if not isinstance(values, Tensor):
        return Field("str")
    return Field(str(values.dtype).removeprefix("torch."), tuple(values.shape[1:]))


def to_stored(values: Tensor | Sequence[str]) -> Any:
    """Numbers as a numpy array, or text as an Arrow array."""
    if not isinstance(values, Tensor):
        import pyarrow

        return pyarrow.array(list(values), pyarrow.string())
    values = values.detach().cpu().contiguous()
    if values.dtype is torch.bfloat16:
        values = values.view(torch.uint16)
    return values.view(torch.uint8).numpy() if values.dtype is torch.bool else values.numpy()


def from_stored(values: Numbers, field: Field) -> Tensor:
    """The tensor of stored numbers: the inverse of `to_stored`."""
    tensor = torch.from_numpy(values)
    return tensor.view(getattr(torch, field.dtype)) if field.stored != field.dtype else tensor


def arrow_type(field: Field) -> Any:
    """Arrow's type of a column: text, a number, or a list of a tensor's numbers."""
    import pyarrow

    if field.dtype == "str":
        return pyarrow.string()
    number = pyarrow.from_numpy_dtype(np.dtype(field.stored))
    return pyarrow.list_(number, int(np.prod(field.shape))) if field.shape else number


def write_shard(path: Path, columns: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Write a shard atomically."""
    import pyarrow

    arrays = []
    for name, field in fields.items():
        values = columns[name]
        if field.dtype != "str":
            values = to_arrow(values.reshape(-1))
            if field.shape:
                values = pyarrow.FixedSizeListArray.from_arrays(values, int(np.prod(field.shape)))
        arrays.append(values)
    description = json.dumps({name: [field.dtype, *field.shape] for name, field in fields.items()})
    schema = pyarrow.schema([(name, arrow_type(field)) for name, field in fields.items()]).with_metadata(
        {FIELDS: description.encode()}
    )
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
    write_bytes(path, memoryview(sink.getvalue()))


def read_shard(path: Path) -> Shard:
    """Map a shard. Raises `DamagedShard`, and an `OSError` if it is gone or may not be read."""
    import pyarrow

    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        batch = pyarrow.ipc.open_stream(pyarrow.py_buffer(memory)).read_next_batch()
        declared = json.loads(batch.schema.metadata[FIELDS])
        fields = {name: Field(dtype, tuple(shape)) for name, (dtype, *shape) in declared.items()}
        columns = {name: _map_column(batch.column(name), field) for name, field in fields.items()}
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedShard(
            f"{path} is damaged ({reason}). Remove it and prepare the data again: only what it held is done anew."
        ) from error
    return Shard(path.name, fields, columns, memory)


def _map_column(values: Any, field: Field) -> Any:
    """A column of a mapped file, not copied."""
    if field.dtype == "str":
        return values
    import pyarrow

    flat = values.flatten() if field.shape else values
    if flat.type != pyarrow.from_numpy_dtype(np.dtype(field.stored)) or flat.null_count:
        raise ValueError("its numbers are of another kind than it says")
    numbers = from_arrow(flat).reshape(-1, *field.shape)
    if len(numbers) != len(values):
        raise ValueError("it holds fewer rows than it says")
    return numbers


def from_arrow(values: Any) -> Numbers:
    """The numbers of an Arrow array without nulls, not copied. Its `to_numpy` would import pandas: half a second."""
    dtype = np.dtype(ARROW_FLOATS.get(str(values.type), str(values.type)))
    return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)


def to_arrow(values: Numbers) -> Any:
    """Numbers [N] as an Arrow array, not copied; without pandas, as in `from_arrow`."""
    import pyarrow

    values = np.ascontiguousarray(values)
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(values)])
