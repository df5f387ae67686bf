"""The scripts of `recipes/edit` run, here on a random tiny model."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = {
    "prompt_to_prompt": "prompt-to-prompt.png",
    "other_control": "other-control.png",
    "noise_and_denoise": "sdedit.png",
    "other_ways": "other-ways.png",
    "inversions": None,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "inversions" else []) for name in SCRIPTS]
)
def test_a_script_of_a_method_runs(
    name: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    importlib.import_module(f"recipes.edit.{name}").main(str(tiny_folder), steps=4)
    picture = SCRIPTS[name]
    if picture is not None:
        assert (tmp_path / "build/recipes/edit" / picture).stat().st_size > 1000
    else:
        assert "reversible" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_a_method_shows_its_help_and_does_nothing(name: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", f"recipes.edit.{name}", "--help"], capture_output=True, text=True, check=True
    )
    assert "--steps" in said.stdout and said.stderr == ""
