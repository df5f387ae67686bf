"""The table of what families ask of memory: published shapes open without weights, and a row says what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.memory.planner import GIB
from benchmarks.memory import SHAPES, Plan, Row, format_table, main, open_shape


@pytest.mark.parametrize("name", SHAPES)
def test_every_published_shape_opens_without_weights(name: str, tmp_path: Path) -> None:
    model = open_shape(name, tmp_path)
    assert model.resolution in (512, 768, 1024) and model.latent_shape[-1] * model.factor == model.resolution
    assert {"steps", "guidance"} <= model.defaults.keys()


def test_a_row_says_what_a_smaller_device_takes() -> None:
    phases = {"training": 14 * GIB, "previews": 30 * GIB}
    rows = [
        Row("a model", 2_500_000_000, phases, [Plan(8, ("base in NF4",), 6 * GIB), Plan(48, (), 30 * GIB)]),
        Row("huge", 20_000_000_000, {"training": 90 * GIB}, []),
    ]
    table = format_table(rows, (8, 48))
    assert "| a model, 2.50 billion | – | nothing: training 14.0, previews 30.0 | 30.0 |" in table
    assert "| | 8 | base in NF4 | 6.0 |\n| | 48 | nothing | 30.0 |" in table
    assert "| `huge`, 20.00 billion |" in table and "| | 8 | does not fit | – |" in table


@pytest.mark.slow
def test_the_table_is_counted_and_written(tmp_path: Path) -> None:
    main(["sd15"], vram=[4.0], out=tmp_path)
    (row,) = read_json(tmp_path / "memory.json")["rows"]
    assert row["parameters"] == 859_520_964 and 3 < row["phases"]["training"] / GIB < 5
    assert [plan["vram"] for plan in row["plans"]] == [4.0] and row["plans"][0]["most"] < 4 * GIB
    with pytest.raises(UserError, match="no published shape sd16"):
        main(["sd16"], vram=[4.0], out=tmp_path)
