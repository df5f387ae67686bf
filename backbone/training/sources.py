"""Sources of the records of a preparation: a list, or a streamed dataset of the hub.

Both give chunks of numbered records, which are decoded and encoded together, and each process gets its share: every
n-th chunk of a list, whole shards of a stream. The progress in a shard is written after its rows (`shards/`), so a
preparation resumes there, and a finished shard is not read again.
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
from backbone.training.prepared import list_remaining_chunks

Record = TypeVar("Record", covariant=True)
# The numbers of a shard's records begin at `shard · ROWS`, those of a row at `row · per_row` in it
ROWS = 1 << 32
SHARDS = "shards"


class Rows(Protocol[Record]):
    """Makes records of the rows of a stream, at most `per_row` of each, and none of a row to skip."""

    @property
    def stream(self) -> Stream: ...
    @property
    def per_row(self) -> int: ...
    def read(self, row: Mapping[str, Any], shard: int, number: int) -> Sequence[Record]: ...


class Source(Protocol[Record]):
    """Numbered records in chunks.

    count        number of records; 0: unknown until all are read
    facts        the dataset, if it is streamed
    passed_over  number of rows read so far that gave no record
    """

    @property
    def count(self) -> int: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def passed_over(self) -> int: ...
    def chunks(self, done: Numbers, length: int, out: Path) -> Iterable[Any]:
        """This process's share of the chunks of `length` records that are not all done."""

    def open(self, chunk: Any) -> Sequence[tuple[int, Record]]:
        """A chunk's records with their numbers; also called in worker processes."""

    def find(self, numbers: Sequence[int]) -> Iterator[Record]:
        """The records of these ascending numbers."""

    def mark_collected(self) -> None:
        """Note that the writers hold the next chunk; called in the order of the chunks."""

    def mark_written(self) -> None:
        """Note that all chunks of the writers are on disk."""


class Listed(Generic[Record]):
    """Records in memory. A chunk is their numbers: worker processes have the records too."""

    def __init__(self, records: Sequence[Record], passed_over: int = 0) -> None:
        self.records, self.passed_over = records, passed_over
        self.count, self.facts = len(records), dict[str, Any]()

    def chunks(self, done: Numbers, length: int, out: Path) -> list[list[int]]:
        return list_remaining_chunks(done, self.count, length, out)

    def open(self, chunk: Sequence[int]) -> list[tuple[int, Record]]:
        return [(number, self.records[number]) for number in chunk]

    def find(self, numbers: Sequence[int]) -> Iterator[Record]:
        return (self.records[number] for number in numbers)

    def mark_collected(self) -> None: ...
    def mark_written(self) -> None: ...


@dataclass(frozen=True)
class ShardProgress:
    """The progress in a shard: `rows` read, their number of `records`, whether it is finished, and its `empty` rows."""

    rows: int = 0
    records: int = 0
    finished: bool = False
    empty: int = 0


class Streamed(Generic[Record]):
    """Records made of the rows of a streamed dataset. A chunk is the records themselves."""

    count = 0

    def __init__(self, rows: Rows[Record], out: Path) -> None:
        self.rows, self.folder = rows, out / SHARDS
        self.facts = rows.stream.facts
        self._pending: deque[tuple[int, ShardProgress]] = deque()
        self._collected: dict[int, ShardProgress] = {}

    def chunks(self, done: Numbers, length: int, out: Path) -> Iterator[list[tuple[int, Record]]]:
        shards = self.rows.stream.shards
        states = [self.read_progress(shard) for shard in range(shards)]
        starts = np.arange(shards) * ROWS
        ends = np.searchsorted(done, starts + [state.rows * self.rows.per_row for state in states])
        # Whether all records of a shard are still there
        is_intact = ends - np.searchsorted(done, starts) == [state.records for state in states]
        remaining = [shard for shard in range(shards) if not (is_intact[shard] and states[shard].finished)]
        if processes.is_main_process():
            if any(state.rows for state in states) and remaining:
                notify(f"{shards - len(remaining)} of {shards} shards are prepared in {out}.")
            if len(remaining) < processes.world_size():
                notify(
                    f"A shard is one process's, and {len(remaining)} are left for {processes.world_size()}."
                )
        processes.barrier()  # all processes have seen the same shards left
        share = remaining[processes.rank() :: processes.world_size()]
        return self._read_chunks(
            {shard: states[shard] if is_intact[shard] else ShardProgress() for shard in share}, done, length
        )

    def open(self, chunk: Sequence[tuple[int, Record]]) -> Sequence[tuple[int, Record]]:
        return chunk

    def find(self, numbers: Sequence[int]) -> Iterator[Record]:
        per_row = self.rows.per_row
        for shard in sorted({number // ROWS for number in numbers}):
            positions = [divmod(number % ROWS, per_row) for number in numbers if number // ROWS == shard]
            first, last = positions[0][0], positions[-1][0]
            rows = self.rows.stream.rows(shard, first)
            for number, row in enumerate(islice(rows, last + 1 - first), first):
                if matching := [position for row_number, position in positions if row_number == number]:
                    records = self.rows.read(row, shard, number)
                    yield from (records[position] for position in matching)

    def mark_collected(self) -> None:
        shard, progress = self._pending.popleft()
        self._collected[shard] = progress

    def mark_written(self) -> None:
        for shard, progress in self._collected.items():
            write_json(self._path(shard), asdict(progress))
        self._collected.clear()

    def read_progress(self, shard: int) -> ShardProgress:
        """The progress in a shard."""
        path = self._path(shard)
        return read_json(path, ShardProgress) if path.is_file() else ShardProgress()

    @property
    def passed_over(self) -> int:
        """The number of rows read so far that gave no record."""
        return sum(self.read_progress(shard).empty for shard in range(self.rows.stream.shards))

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.json"

    def _read_chunks(
        self, shards: Mapping[int, ShardProgress], done: Numbers, length: int
    ) -> Iterator[list[tuple[int, Record]]]:
        """The remaining chunks of shards; the last one of a shard may be empty."""
        for shard, progress in shards.items():
            first, last = np.searchsorted(done, [shard * ROWS, (shard + 1) * ROWS])
            prepared = set(done[first:last].tolist())
            rows = enumerate(self.rows.stream.rows(shard, progress.rows), progress.rows)
            while not progress.finished:
                chunk: list[tuple[int, Record]] = []
                number, finished, empty = progress.rows - 1, True, progress.empty
                for number, row in rows:
                    records = self.rows.read(row, shard, number)
                    chunk += enumerate(records, shard * ROWS + number * self.rows.per_row)
                    empty += not records
                    if len(chunk) >= length:
                        finished = False
                        break
                progress = ShardProgress(number + 1, progress.records + len(chunk), finished, empty)
                self._pending.append((shard, progress))
                yield [record for record in chunk if record[0] not in prepared]


def write_shards(
    images: Sequence[ShardWriter], records: ShardWriter, source: Source[Any], *, due: bool = False
) -> None:
    """Write the collected rows; with `due` only if a writer is due.

    Images come first, so that every record has its images. The source's progress is noted last.
    """
    if not due or any(writer.due for writer in (*images, records)):
        for writer in (*images, records):
            writer.close()
        source.mark_written()
