"""Tables of tensors on disk: rows under content keys in Arrow shards, memory-mapped, of any size.

A table is a folder of Arrow stream files, a `datasets` dataset (`datasets.load_from_disk` opens it once `describe` was
called). A row is found by its key, the hash of what it was made from; who prepares data appends shards, each written
whole or not at all, and nobody ever rewrites one: several processes may append at once, and what a killed one left is
gone on with. A `Column` takes rows out of the mapped files as an index takes rows out of a tensor.
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
STATE = "state.json"  # of `datasets`: the files of a table that is whole
FIELDS = b"limner"  # where a shard's schema says which tensors its lists of numbers are
MAPPED = 64 << 20  # bytes read from the mapped files after which their pages are given back
ARROW_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}  # Arrow's names, and numpy's
FAULT = 64 << 10  # bytes that the system maps at once around a row that is touched
Numbers: TypeAlias = np.ndarray[Any, Any]
Index: TypeAlias = Tensor | Numbers | Sequence[int] | slice | int


class DamagedShard(UserError):
    """A shard that is cut off or is no Arrow file."""


@dataclass(frozen=True)
class Field:
    """What a column holds: tensors of one dtype and shape, or text (`str`)."""

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def stored(self) -> str:
        """numpy's name of the numbers in the file; bfloat16 is kept as its bits."""
        return {"bfloat16": "uint16", "bool": "uint8"}.get(self.dtype, self.dtype)


@dataclass(frozen=True, eq=False)
class Shard:
    """A file of a table, or rows that could not be written and stay in memory."""

    name: str
    fields: dict[str, Field]
    columns: dict[str, Any]  # numbers [N, …], or an Arrow array of text
    memory: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.columns[KEY])


class Table:
    """The rows of a folder. `repair` throws damaged shards away, whose rows are then missing; else they are refused."""

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
        """Open what was appended since, by this process or another; rows that are known keep their numbers."""
        existing = {shard.name for shard in self.shards}
        for path in self._list_shards():
            if path.name in existing:
                continue
            try:
                self.shards.append(read_shard(path))
            except FileNotFoundError:
                continue  # another process has just thrown a damaged one away
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
        """The files of the folder; none where it may not be looked into and can be done without."""
        try:
            return sorted(self.folder.glob(SHARDS))
        except PermissionError:
            if not self.repair:
                raise
            return []

    def append(self, columns: Mapping[str, Tensor | Sequence[str]], *, fallback: bool = False) -> None:
        """Write rows as a new shard: `key` [N, 32] and the tensors [N, …] and texts that belong to them.

        With `fallback` rows that cannot be written (a full disk) stay in memory; else that is an `OSError`.
        """
        if not len(columns[KEY]):
            return
        fields = {name: field_of(values) for name, values in columns.items()}
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
        """The row of each key [N, 32], −1 where there is none."""
        if not len(self):
            return np.full(len(keys), -1, np.int64)
        if self._index is None:
            prefixes = np.concatenate([prefix(shard.columns[KEY]) for shard in self.shards])
            order = np.argsort(prefixes, kind="stable")
            self._index = prefixes[order], order
            self.release()
        prefixes, order = self._index
        asked = prefix(keys)
        place = np.minimum(np.searchsorted(prefixes, asked), len(order) - 1)
        return np.where(prefixes[place] == asked, order[place], -1)

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
        which = np.searchsorted(self._offsets, rows, "right") - 1
        for number in np.unique(which):
            selected = which == number
            out[selected] = self.shards[number].columns[name][rows[selected] - self._offsets[number]]
        self._touched += len(rows) * max(FAULT, out.nbytes // max(1, len(rows)))
        if self._touched > MAPPED:
            self.release()
        return from_stored(out, field)

    def field(self, name: str) -> Field:
        """What a column holds."""
        return self.shards[0].fields[name]

    def release(self) -> None:
        """Give the pages of the mapped files back, which the system keeps as long as it has memory for them."""
        self._touched = 0
        for shard in self.shards:
            if shard.memory is not None and hasattr(mmap, "MADV_DONTNEED"):
                shard.memory.madvise(mmap.MADV_DONTNEED)

    def describe(self) -> None:
        """Write what `datasets.load_from_disk` reads beside the shards, and which shards there are."""
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
        """`UserError` where a shard that `describe` has listed is gone."""
        path = self.folder / STATE
        listed = read_json(path).get("_data_files", []) if path.is_file() else []
        existing = {shard.name for shard in self.shards}
        missing = [one["filename"] for one in listed if one["filename"] not in existing]
        if missing:
            remainder = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.folder / missing[0]}{remainder} is gone. {remedy}")

    def _count(self) -> None:
        self._offsets = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self._index = None


class Column:
    """A column [N, …] of a table: an index takes rows out of it, as out of a tensor.

    With `rows` it is a choice of the table's rows.
    """

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
        chosen = np.asarray(index, np.int64)
        rows = chosen if self.rows is None else self.rows[chosen]
        values = self.table.gather(self.name, rows.reshape(-1))
        return values.reshape(*chosen.shape, *values.shape[1:])


# Keys --------------------------------------------------------------------------------------------------------


def keys_of(hashes: Sequence[str]) -> Numbers:
    """Hashes in hexadecimal digits as keys [N, 32]."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, KEY_BYTES)


def prefix(keys: Numbers) -> Numbers:
    """The first 64 bits of keys, by which they are found: of ten million rows two are alike once in 370,000 tables."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1).astype(np.uint64)


# Files -------------------------------------------------------------------------------------------------------


def field_of(values: Tensor | Sequence[str]) -> Field:
    """What a column of these values holds."""
    if not isinstance(values, Tensor):
        return Field("str")
    return Field(str(values.dtype).removeprefix("torch."), tuple(values.shape[1:]))


def to_stored(values: Tensor | Sequence[str]) -> Any:
    """Numbers as numpy has them, or text as Arrow has it."""
    if not isinstance(values, Tensor):
        import pyarrow

        return pyarrow.array(list(values), pyarrow.string())
    values = values.detach().cpu().contiguous()
    if values.dtype is torch.bfloat16:
        values = values.view(torch.uint16)
    return values.view(torch.uint8).numpy() if values.dtype is torch.bool else values.numpy()


def from_stored(values: Numbers, field: Field) -> Tensor:
    """The tensor that `to_stored` made these numbers of."""
    tensor = torch.from_numpy(values)
    return tensor.view(getattr(torch, field.dtype)) if field.stored != field.dtype else tensor


def arrow_type(field: Field) -> Any:
    """Arrow's type of a column: text, a number, or a list of as many numbers as a tensor has."""
    import pyarrow

    if field.dtype == "str":
        return pyarrow.string()
    number = pyarrow.from_numpy_dtype(np.dtype(field.stored))
    return pyarrow.list_(number, int(np.prod(field.shape))) if field.shape else number


def write_shard(path: Path, columns: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Write a shard, whole or not at all."""
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
    """Maps a shard. Raises `DamagedShard`, and an `OSError` where it is gone or may not be read."""
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
    """The numbers of an Arrow array without gaps, not copied; its own `to_numpy` would import pandas, half a second."""
    dtype = np.dtype(ARROW_FLOATS.get(str(values.type), str(values.type)))
    return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)


def to_arrow(values: Numbers) -> Any:
    """Numbers [N] as an Arrow array, not copied; without pandas, as `from_arrow`."""
    import pyarrow

    values = np.ascontiguousarray(values)
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(values)])
