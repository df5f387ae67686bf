"""Where the records of a preparation come from: a list of them, or a dataset of the hub that comes as a stream.

Both hand out chunks of numbered records, to be decoded and encoded together, and each process gets its own share: of
what was listed every so many chunks, of a stream whole shards. How far a shard was read is written down behind its
rows (`shards/`), so what was stopped goes on there, and a finished shard is not read again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from backbone.data.table import Numbers
from backbone.distributed import processes
from backbone.io.console import notify
from backbone.io.files import read_json, write_json
from backbone.media.sources.stream import Stream
from backbone.models.encode import ShardWriter
from backbone.training.prepared import chunks_left

Found = TypeVar("Found", covariant=True)
# A shard's records have numbers from `shard · ROWS` on, those of a row from `row · per_row` on
ROWS = 1 << 32
SHARDS = "shards"


class Rows(Protocol[Found]):
    """What makes records of the rows of a stream: none where a row is to be passed over, `per_row` at most."""

    @property
    def stream(self) -> Stream: ...
    @property
    def per_row(self) -> int: ...
    def read(self, row: Mapping[str, Any], shard: int, number: int) -> Sequence[Found]: ...


class Source(Protocol[Found]):
    """Numbered records in chunks.

    count        how many there are; 0: not known before all were read
    facts        which dataset they are of, if it is streamed
    passed_over  how many rows of what was read so far gave no record
    """

    @property
    def count(self) -> int: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def passed_over(self) -> int: ...
    def chunks(self, done: Numbers, length: int, out: Path) -> Iterable[Any]:
        """This process's share of the chunks of `length` records in which something is left to do."""

    def open(self, chunk: Any) -> Sequence[tuple[int, Found]]:
        """A chunk's records with their numbers; also in a process that works ahead."""

    def find(self, numbers: Sequence[int]) -> Iterator[Found]:
        """The records of these numbers, which ascend."""

    def took(self) -> None:
        """One more chunk, in their order, is with the writers."""

    def wrote(self) -> None:
        """All chunks that were with the writers are on disk."""


class Listed(Generic[Found]):
    """Records that are all known. A chunk is their numbers: who works ahead has the records too."""

    def __init__(self, records: Sequence[Found], passed_over: int = 0) -> None:
        self.records, self.passed_over = records, passed_over
        self.count, self.facts = len(records), dict[str, Any]()

    def chunks(self, done: Numbers, length: int, out: Path) -> list[list[int]]:
        return chunks_left(done, self.count, length, out)

    def open(self, chunk: Sequence[int]) -> list[tuple[int, Found]]:
        return [(number, self.records[number]) for number in chunk]

    def find(self, numbers: Sequence[int]) -> Iterator[Found]:
        return (self.records[number] for number in numbers)

    def took(self) -> None: ...
    def wrote(self) -> None: ...


@dataclass(frozen=True)
class Read:
    """How far a shard was read: `rows` of it, which gave `records`; whether that is all; how many gave none."""

    rows: int = 0
    records: int = 0
    finished: bool = False
    empty: int = 0


class Streamed(Generic[Found]):
    """Records that are made of a dataset's rows as they come. A chunk is the records themselves."""

    count = 0

    def __init__(self, rows: Rows[Found], out: Path) -> None:
        self.rows, self.folder = rows, out / SHARDS
        self.facts = rows.stream.facts
        self._handed: deque[tuple[int, Read]] = deque()
        self._taken: dict[int, Read] = {}

    def chunks(self, done: Numbers, length: int, out: Path) -> Iterator[list[tuple[int, Found]]]:
        shards = self.rows.stream.shards
        read = [self.read(shard) for shard in range(shards)]
        starts = np.arange(shards) * ROWS
        ends = np.searchsorted(done, starts + [one.rows * self.rows.per_row for one in read])
        is_intact = ends - np.searchsorted(done, starts) == [
            one.records for one in read
        ]  # nothing has vanished since
        remaining = [shard for shard in range(shards) if not (is_intact[shard] and read[shard].finished)]
        if processes.is_main_process():
            if any(one.rows for one in read) and remaining:
                notify(f"{shards - len(remaining)} of {shards} shards are prepared in {out}.")
            if len(remaining) < processes.world_size():
                notify(
                    f"A shard is one process's, and {len(remaining)} are left for {processes.world_size()}."
                )
        processes.barrier()  # now all know the same to be left
        share = remaining[processes.rank() :: processes.world_size()]
        return self._chunks_of(
            {shard: read[shard] if is_intact[shard] else Read() for shard in share}, done, length
        )

    def open(self, chunk: Sequence[tuple[int, Found]]) -> Sequence[tuple[int, Found]]:
        return chunk

    def find(self, numbers: Sequence[int]) -> Iterator[Found]:
        per_row = self.rows.per_row
        for shard in sorted({number // ROWS for number in numbers}):
            positions = [divmod(number % ROWS, per_row) for number in numbers if number // ROWS == shard]
            first, last = positions[0][0], positions[-1][0]
            rows = self.rows.stream.rows(shard, first)
            for number, row in enumerate(islice(rows, last + 1 - first), first):
                if places := [place for one, place in positions if one == number]:
                    records = self.rows.read(row, shard, number)
                    yield from (records[place] for place in places)

    def took(self) -> None:
        shard, read = self._handed.popleft()
        self._taken[shard] = read

    def wrote(self) -> None:
        for shard, read in self._taken.items():
            write_json(self._path(shard), asdict(read))
        self._taken.clear()

    def read(self, shard: int) -> Read:
        """How far a shard was read."""
        path = self._path(shard)
        return read_json(path, Read) if path.is_file() else Read()

    @property
    def passed_over(self) -> int:
        """How many rows of the shards gave no record, as far as they were read."""
        return sum(self.read(shard).empty for shard in range(self.rows.stream.shards))

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.json"

    def _chunks_of(
        self, shards: Mapping[int, Read], done: Numbers, length: int
    ) -> Iterator[list[tuple[int, Found]]]:
        """The chunks of shards from where they were left; the last of a shard may be empty."""
        for shard, read in shards.items():
            first, last = np.searchsorted(done, [shard * ROWS, (shard + 1) * ROWS])
            prepared = set(done[first:last].tolist())
            rows = enumerate(self.rows.stream.rows(shard, read.rows), read.rows)
            while not read.finished:
                chunk: list[tuple[int, Found]] = []
                number, finished, empty = read.rows - 1, True, read.empty
                for number, row in rows:
                    records = self.rows.read(row, shard, number)
                    chunk += enumerate(records, shard * ROWS + number * self.rows.per_row)
                    empty += not records
                    if len(chunk) >= length:
                        finished = False
                        break
                read = Read(number + 1, read.records + len(chunk), finished, empty)
                self._handed.append((shard, read))
                yield [one for one in chunk if one[0] not in prepared]


def write_shards(
    images: Sequence[ShardWriter], records: ShardWriter, source: Source[Any], *, due: bool = False
) -> None:
    """Write what was collected; with `due` only if one has enough.

    Images first: a record has its images. How far the source was read is noted last.
    """
    if not due or any(one.due for one in (*images, records)):
        for writer in (*images, records):
            writer.close()
        source.wrote()
