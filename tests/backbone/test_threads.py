"""Threads of torch on a machine that has other work too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = "import backbone, torch; print(torch.ones(10**6).sum())"


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '20000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
def test_a_thread_that_waits_sleeps_soon_unless_somebody_has_asked_for_something_else(
    said: dict[str, str], expected: str
) -> None:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**known, "OMP_DISPLAY_ENV": "verbose", **said},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in done.stderr
    assert ("GOMP_SPINCOUNT = '20000'" in done.stderr) == (not said)
