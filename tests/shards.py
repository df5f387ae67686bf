"""Shards of a dataset, written here and served in the place of the hub's."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from backbone.media.sources.stream import HubDataset
from tests.align.conftest import encoded


def served(
    kind: str, files: Sequence[Path], newest: str = "commit-1"
) -> Callable[[HubDataset], tuple[Any, str]]:
    """A stand-in for `backbone.media.sources.stream.stream_from_hub`: these files, streamed as the hub's would be."""

    def stream_from_hub(origin: HubDataset) -> tuple[Any, str]:
        import datasets

        data_files = {origin.split: [str(file) for file in files]}
        table = datasets.load_dataset(kind, data_files=data_files, split=origin.split, streaming=True)
        return table, origin.revision or newest

    return stream_from_hub


def write_parquet(
    folder: Path, sizes: Sequence[int], *, bad: Collection[int] = (), image: str = "image"
) -> list[Path]:
    """Numbered images with captions, so many in each shard; `bad` ones are text."""
    rows = [
        {
            image: {"bytes": b"text" if number in bad else encoded(number), "path": None},
            "text": f"dog {number}",
        }
        for number in range(sum(sizes))
    ]
    return write_rows(folder, sizes, rows, images=[image])


def write_rows(
    folder: Path, sizes: Sequence[int], rows: Sequence[dict[str, Any]], images: Sequence[str] = ()
) -> list[Path]:
    """Rows as Parquet, so many in each shard, with columns that are marked as images, as the hub's are."""
    import datasets

    folder.mkdir()
    files = []
    for shard, size in enumerate(sizes):
        first = sum(sizes[:shard])
        table = datasets.Dataset.from_list(list(rows[first : first + size]))
        for name in images:
            table = table.cast_column(name, datasets.Image())
        files.append(folder / f"train-{shard:05d}.parquet")
        table.to_parquet(str(files[-1]))
    return files


def write_tar(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """Numbered images with captions as webdataset shards."""
    folder.mkdir()
    files = []
    for shard, size in enumerate(sizes):
        files.append(folder / f"{shard:05d}.tar")
        with tarfile.open(files[-1], "w") as tar:
            for number in range(sum(sizes[:shard]), sum(sizes[:shard]) + size):
                for ending, content in ((".png", encoded(number)), (".txt", f"dog {number}".encode())):
                    member = tarfile.TarInfo(f"{number:06d}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return files
