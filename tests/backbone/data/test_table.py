"""Tables of tensors: what is appended is found, whole or not at all, whatever stands on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backbone.data import table as tables
from backbone.data.table import KEY, Column, DamagedShard, Table, parse_keys
from backbone.io.files import content_hash


def keys(*names: int) -> torch.Tensor:
    return torch.from_numpy(parse_keys([content_hash(str(name).encode()) for name in names]).copy())


def filled(folder: Path, shards: int = 3, rows: int = 5) -> tuple[Table, torch.Tensor]:
    """A table of several shards, and its numbers in memory."""
    table = Table(folder)
    whole = torch.randn(shards * rows, 4, 3, generator=torch.Generator().manual_seed(0))
    for first in range(0, len(whole), rows):
        part = slice(first, first + rows)
        table.append(
            {KEY: keys(*range(first, first + rows)), "mean": whole[part], "half": whole[part].half(),
             "bits": whole[part].bfloat16(), "flag": whole[part, 0, 0] > 0,
             "name": [f"row {row}" for row in range(first, first + rows)]}
        )  # fmt: skip
    return table, whole


def test_a_column_takes_rows_as_a_tensor_does(tmp_path: Path) -> None:
    table, whole = filled(tmp_path)
    for index in (torch.tensor([14, 0, 7, 7]), [3], slice(2, 12, 3), slice(None), 5, -1):
        assert torch.equal(table.column("mean")[index], whole[index])
        assert torch.equal(table.column("half")[index], whole.half()[index])
        assert torch.equal(table.column("bits")[index], whole.bfloat16()[index])
        assert torch.equal(table.column("flag")[index], (whole[:, 0, 0] > 0)[index])
    column = Column(table, "mean", np.array([9, 2, 4]))
    assert column.shape == (3, 4, 3)
    assert torch.equal(column[torch.tensor([2, 0])], whole[[4, 9]])
    assert table.strings("name").to_pylist()[11] == "row 11"


def test_rows_are_found_by_key_in_a_table_that_is_opened_again(tmp_path: Path) -> None:
    table, whole = filled(tmp_path)
    again = Table(tmp_path)
    rows = again.find(keys(12, 99, 3).numpy())
    assert rows[1] == -1
    assert torch.equal(again.column("mean")[rows[[0, 2]]], whole[[12, 3]])
    assert (table.find(keys(12).numpy()) == 12).all()
    assert (Table(tmp_path / "none").find(keys(1).numpy()) == -1).all()


def test_what_another_process_appends_is_seen_after_a_refresh_and_known_rows_keep_their_numbers(
    tmp_path: Path,
) -> None:
    table, whole = filled(tmp_path, shards=1)
    filled(tmp_path, shards=3)
    assert len(table) == 5
    table.refresh()
    assert len(table) == 15
    assert torch.equal(table.column("mean")[:5], whole[:5])


def test_pages_are_given_back_and_rows_read_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, whole = filled(tmp_path)
    monkeypatch.setattr(tables, "MAPPED", 0)
    for _ in range(2):
        assert torch.equal(table.column("mean")[:], whole)


@pytest.mark.parametrize("end", [0, 40, -60])
def test_a_shard_that_is_cut_off_is_refused_or_where_it_is_repaired_forgotten(
    tmp_path: Path, end: int
) -> None:
    filled(tmp_path)
    shard = sorted(tmp_path.glob("*.arrow"))[0]
    os.truncate(shard, end if end >= 0 else shard.stat().st_size + end)
    with pytest.raises(DamagedShard, match=shard.name):
        Table(tmp_path)
    assert len(Table(tmp_path, repair=True)) == 10
    assert not shard.exists()


def test_shards_of_another_user_are_left_alone_where_a_cache_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    closed, damaged, *_ = sorted(tmp_path.glob("*.arrow"))
    os.truncate(damaged, 40)
    plain = Path.open

    def refused(self: Path, *words: Any, **more: Any) -> Any:
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *words, **more)

    def kept(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "unlink", kept)
    assert len(Table(tmp_path, repair=True)) == 5
    with pytest.raises(PermissionError, match=closed.name):
        Table(tmp_path)


def test_a_cache_in_a_closed_home_is_one_without_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(self: Path, pattern: str) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "glob", closed)
    assert len(Table(tmp_path, repair=True)) == 0
    with pytest.raises(PermissionError):
        Table(tmp_path)


def test_rows_that_cannot_be_written_stay_in_memory_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "write_bytes", full)
    table, columns = Table(tmp_path), {KEY: keys(1, 2), "mean": torch.ones(2, 3)}
    with pytest.raises(OSError, match="No space"):
        table.append(columns)
    table.append(columns, fallback=True)
    assert torch.equal(table.column("mean")[[1]], torch.ones(1, 3))
    assert not list(tmp_path.iterdir())
