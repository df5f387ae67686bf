"""Damaged input at every door is a sentence, or right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import FAILURES, fuzz, table


@pytest.mark.parametrize(("cases", "seconds"), [(600, 5.0), pytest.param(1500, None, marks=pytest.mark.slow)])
def test_damaged_input_at_every_door_is_a_sentence_or_right(
    tmp_path: Path, cases: int, seconds: float | None
) -> None:
    counts = fuzz(tmp_path, cases=cases, seed=1, seconds=seconds)
    assert not any(count[name] for count in counts.values() for name in FAILURES), table(counts)
    assert sum(count["refused"] for count in counts.values()) > 20
