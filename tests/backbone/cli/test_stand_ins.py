"""The help of benchmarks and recipes comes without torch, and is the same as with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backbone.cli.stand_ins import asks_for_help

ROOT = Path(__file__).parents[3]
STARTED = ("run_main(main)", "run_app(app)")  # how a script that has typer's help begins
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("benchmarks", "recipes")
    for path in (ROOT / package).rglob("*.py")
    if any(f"    {call}\n" in path.read_text(encoding="utf-8") for call in STARTED)
)
ASK_EACH = """
import contextlib, io, json, runpy, sys

first, *scripts = sys.argv[1:]
pages = {}
for script in scripts:
    sys.argv = [first, "--help"]  # which begins with -m where Python runs a module
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    pages[script] = page.getvalue().partition("Usage:")[2].split(maxsplit=1)[1]
libraries = {"torch", "diffusers", "transformers", "peft", "accelerate", "scipy"} & set(sys.modules)
print(json.dumps([pages, [name for name in libraries if hasattr(sys.modules[name], "__file__")]]))
"""


def pages_of_help(first: str) -> tuple[dict[str, str], list[str]]:
    """What `--help` of each script prints behind the program's name, and the heavy libraries that were imported."""
    words = [sys.executable, "-W", "ignore", "-c", ASK_EACH, first, *SCRIPTS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pages, imported = json.loads(done.stdout)
    return pages, imported


def test_every_script_answers_help_without_the_heavy_libraries() -> None:
    pages, imported = pages_of_help("-m")
    assert len(pages) == len(SCRIPTS) > 50
    assert all("--help" in page for page in pages.values())
    assert imported == []


@pytest.mark.slow
def test_help_without_the_heavy_libraries_is_help_with_them() -> None:
    pages, imported = pages_of_help("script")
    assert "torch" in imported
    assert pages == pages_of_help("-m")[0]


def test_a_process_that_runs_a_script_s_help_imports_no_torch() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "recipes.moji.adapters.control", "train", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--learning-rate" in done.stdout, done.stderr[-2000:]
    assert "torch._C" not in done.stderr


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("--help", True),
        ("-h", True),
        ("train --help", True),
        ("", False),
        ("train", False),
        ("--out --help", False),
        ("--help --steps 3", False),
    ],
)
def test_help_is_asked_for_where_no_other_flag_stands(words: str, asked: bool) -> None:
    assert asks_for_help(words.split()) is asked
