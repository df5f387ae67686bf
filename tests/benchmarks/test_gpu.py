"""The benchmark for a GPU runs on a CPU, row by row, in small: on the day with a GPU it has to work at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from backbone.io.console import UserError
from backbone.io.files import read_json
from benchmarks import gpu
from benchmarks.gpu import ROWS, Bench, Row, format_markdown, main


def check_rows(out: Path, keys: Sequence[str]) -> None:
    """They are all measured, and what is timed is compared first."""
    for key in keys:
        facts = read_json(out / "rows" / f"{key}.json")
        assert "failed" not in facts, facts
        for side, found in facts.get("parity", {}).items():
            assert found["gradient apart"] < 1e-3, (key, side)


def test_a_row_of_a_flow_and_its_script_runs_in_small(tmp_path: Path) -> None:
    main(minutes=10.0, out=tmp_path, tiny=True, device="cpu", backend="none", only=["b2"])
    check_rows(tmp_path, ["b2-flux"])
    text = (tmp_path / "gpu.md").read_text()
    assert "| parity: script: gradient apart |" in text and text.count("Not measured yet.") == len(ROWS) - 1


@pytest.mark.slow
def test_every_row_runs_in_small(tmp_path: Path) -> None:
    """Twenty seconds of a core that is free."""
    main(minutes=10.0, out=tmp_path, tiny=True, device="cpu", backend="none", only=None)
    check_rows(tmp_path, [row.key for row in ROWS])
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {row.title}" in text for row in ROWS) and "Not measured" not in text
    assert len(text) < 2**20
    assert read_json(tmp_path / "rows" / "a1-step.json")["gradient apart"] == 0  # of one device from itself


@pytest.mark.slow
def test_steps_are_compared_and_timed_with_compiled_blocks_too(tmp_path: Path) -> None:
    main(minutes=10.0, out=tmp_path, tiny=True, device="cpu", backend="aot_eager", only=["b", "d1"])
    for key in ("b1-sd15", "b2-flux", "b3-sdxl", "d1-sd15"):
        facts = read_json(tmp_path / "rows" / f"{key}.json")
        assert "failed" not in facts and any("compiled" in name for name in facts["seconds"]), facts
        assert facts["parity"].get("compiled", {"gradient apart": 0.0})["gradient apart"] < 1e-4


@pytest.mark.slow
def test_rows_that_are_there_are_not_measured_again_and_one_that_failed_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fails(bench: Bench) -> gpu.Facts:
        asked.append("fails")
        if len(asked) < 2:
            raise RuntimeError("CUDA out of memory")
        return {"seconds": 1.0}

    monkeypatch.setattr(gpu, "ROWS", (Row("x1", "First", fails), Row("x2", "Second", lambda bench: {"n": 2})))
    monkeypatch.setattr(gpu, "describe_machine", lambda device: "a machine")
    for _ in range(3):
        main(minutes=1.0, out=tmp_path, tiny=True, device="cpu", backend="none", only=None)
        if len(asked) == 1:
            assert "Failed: RuntimeError: CUDA out of memory" in format_markdown(tmp_path)
    assert asked == ["fails", "fails"]
    main(minutes=-1.0, out=tmp_path / "other", tiny=True, device="cpu", backend="none", only=None)
    assert not (tmp_path / "other" / "rows").exists()


def test_without_a_gpu_it_says_how_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu --tiny"):
        main(minutes=1.0, out=tmp_path, tiny=True, device="cuda", backend="none", only=None)
