"""The table of what families ask of memory: published shapes open without weights, and a row says what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.memory.planner import GIB
from benchmarks.memory import SHAPES, Row, main, open_shape, table_of


@pytest.mark.parametrize("name", SHAPES)
def test_every_published_shape_opens_without_weights(name: str, tmp_path: Path) -> None:
    model = open_shape(name, tmp_path)
    assert model.resolution in (512, 768, 1024) and model.latent_shape[-1] * model.factor == model.resolution
    assert {"steps", "guidance"} <= model.defaults.keys()


def test_a_row_says_what_a_smaller_device_takes() -> None:
    rows = [
        Row("a model", 2_500_000_000, 14 * GIB, ("base in NF4",), 6 * GIB),
        Row("small", 860_000_000, GIB, (), GIB),
        Row("huge", 20_000_000_000, 90 * GIB, None, 0),
    ]
    table = table_of(rows, 8)
    assert "| a model | 2.50 | 14.0 | base in NF4: 6.0 |" in table
    assert "| `small` | 0.86 | 1.0 | as it comes: 1.0 |" in table and "| does not fit |" in table


@pytest.mark.slow
def test_the_table_is_counted_and_written(tmp_path: Path) -> None:
    main(["sd15"], vram=4.0, out=tmp_path)
    (row,) = read_json(tmp_path / "memory.json")["rows"]
    assert row["parameters"] == 859_520_964 and 1 < row["training"] / GIB < 3
    with pytest.raises(UserError, match="no published shape sd16"):
        main(["sd16"], vram=4.0, out=tmp_path)
