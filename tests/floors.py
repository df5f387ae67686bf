"""The core of the suite at the lowest versions that pyproject.toml allows: what it promises, somebody has run.

    pip install uv && python -m tests.floors             options go to pytest

`uv` resolves every direct dependency to its floor and installs the result into `build/floors`, torch from PyTorch's
index of wheels without CUDA, or where that cannot be reached from PyPI, with CUDA (7 GB on the disk). Where neither
gives it, torch is this environment's own, and the last line says so: its floor was not run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "floors"
RESOLUTION = ("--resolution", "lowest-direct", "--extra", "test", "--no-annotate", "--no-header", "--quiet")
PYTHON = PLACE / "bin" / "python"
CPU = ("--torch-backend", "cpu")
TORCH = re.compile(r"(torch|triton|nvidia|cuda)\b")  # what comes with torch, gigabytes of it
CORE = (
    *("tests/backbone/io", "tests/backbone/media", "tests/backbone/diffusion", "tests/backbone/adapters"),
    *("tests/backbone/models", "tests/backbone/training", "tests/backbone/evaluation"),
    *("tests/backbone/test_families.py", "tests/customize/test_methods.py", "tests/customize/formats"),
    *("tests/edit/inversion", "tests/align/pairs", "tests/align/objectives", "tests/align/test_label.py"),
)


def main(pytest_options: list[str]) -> int:
    """Makes the environment, runs the core there, and gives pytest's exit status."""
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    if uv is None:
        print("uv is not here. Run: pip install uv", file=sys.stderr)
        return 2
    backend: tuple[str, ...] = CPU
    found = resolve(uv, *CPU)
    if found is None:  # that index cannot be reached: torch with its libraries for CUDA, gigabytes, is PyPI's
        backend, found = (), resolve(uv)
    if found is None:
        print("The floors could not be resolved: no index was reached.", file=sys.stderr)
        return 2
    own_torch = not install(uv, found, backend)
    if own_torch:
        found = [line for line in found if not TORCH.match(line)]
        if not install(uv, found, ()):
            return 2
        add_own_torch()
    print("\n".join(line for line in found if line.partition("==")[0] in direct_floors()), flush=True)
    status = subprocess.run([PYTHON, "-m", "pytest", "-q", *(pytest_options or CORE)], cwd=ROOT).returncode
    if own_torch:
        print(f"torch was {version('torch')}, not its floor {direct_floors()['torch']}: no index gave that.")
    return status


def resolve(uv: str, *options: str) -> list[str] | None:
    """Every package at its floor as `name==version`; None where an index cannot be reached."""
    done = subprocess.run(
        [uv, "pip", "compile", *RESOLUTION, *options, "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.split("\n") if done.returncode == 0 else None


def install(uv: str, packages: list[str], backend: tuple[str, ...]) -> bool:
    """A fresh environment with these packages and nothing else; whether all could be had."""
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, PLACE], check=True)
    listed = PLACE / "floors.txt"
    listed.write_text("\n".join(packages), encoding="utf-8")
    words: list[str | Path] = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        PYTHON,
        "--no-deps",
        *backend,
        "-r",
        listed,
    ]
    return subprocess.run(words, env={**os.environ, "UV_HTTP_TIMEOUT": "600"}).returncode == 0


def add_own_torch() -> None:
    """Puts this environment behind the packages that were installed, so that what they lack is taken from it."""
    asked: list[str | Path] = [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "torch_of_this_environment.pth").write_text(get_path("purelib"), encoding="utf-8")


def direct_floors() -> dict[str, str]:
    """The floor of each direct dependency, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.match(r"([\w-]+)>=([\w.]+)", line) for line in project["dependencies"])
    return {match[1]: match[2] for match in found if match}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
