"""The three console scripts answer at once and say what they can do."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SCRIPTS = ("customize", "edit", "align")
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "numpy", "PIL")

scripts = pytest.mark.parametrize("script", SCRIPTS)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def path_of(script: str) -> Path:
    """Where the installation put a console script."""
    folder = Path(sysconfig.get_path("scripts"))
    found = [path for path in (folder / script, folder / f"{script}.exe") if path.is_file()]
    assert found, f'{script} is not installed in {folder}. Run pip install -e ".[test]".'
    return found[0]


@scripts
def test_help_says_what_the_command_is_for(script: str) -> None:
    done = run(path_of(script), "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: {script}" in done.stdout


@scripts
def test_help_answers_in_less_than_two_fifths_of_a_second(script: str) -> None:
    def seconds(script: Path) -> float:
        """Processor time of a run, which a busy machine stretches far less than the time on the clock."""
        before = os.times()
        subprocess.run([str(script), "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert statistics.median(seconds(path_of(script)) for _ in range(3)) < 0.4


@scripts
def test_help_imports_none_of_the_heavy_libraries(script: str) -> None:
    done = run(sys.executable, "-X", "importtime", path_of(script), "--help")
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported.isdisjoint(HEAVY)
