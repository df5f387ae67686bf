"""The core of the suite at the lowest versions that pyproject.toml allows: what it promises, somebody has run.

    pip install uv && python -m tests.floors             options go to pytest

`uv` resolves every direct dependency to its floor and installs the result into `build/floors`, torch from PyTorch's
index of wheels without CUDA. Where that index cannot be reached, torch is this environment's own, and the last line
says so: its floor was not run.
"""

from __future__ import annotations

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
    found = resolve(uv, "--torch-backend", "cpu")
    own_torch = found is None
    if found is None:
        found = [line for line in resolve(uv) or [] if not TORCH.match(line)]
    if not found:
        print("The floors could not be resolved: no index was reached.", file=sys.stderr)
        return 2
    python = install(uv, found, own_torch=own_torch)
    print("\n".join(line for line in found if line.partition("==")[0] in direct_floors()), flush=True)
    status = subprocess.run([python, "-m", "pytest", "-q", *(pytest_options or CORE)], cwd=ROOT).returncode
    if own_torch:
        print(
            f"torch was {version('torch')}, not its floor {direct_floors()['torch']}: download.pytorch.org/whl/cpu "
            "could not be reached."
        )
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


def install(uv: str, packages: list[str], *, own_torch: bool) -> Path:
    """A fresh environment with these packages and nothing else; gives its Python."""
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, PLACE], check=True)
    python = PLACE / "bin" / "python"
    listed = PLACE / "floors.txt"
    listed.write_text("\n".join(packages), encoding="utf-8")
    backend = () if own_torch else ("--torch-backend", "cpu")
    arguments = [uv, "pip", "install", "--quiet", "--python", python, "--no-deps", *backend, "-r", listed]
    subprocess.run(arguments, check=True)
    if own_torch:  # behind all that was installed, so that only what is missing is taken from here
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(site) / "torch_of_this_environment.pth").write_text(get_path("purelib"), encoding="utf-8")
    return python


def direct_floors() -> dict[str, str]:
    """The floor of each direct dependency, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.match(r"([\w-]+)>=([\w.]+)", line) for line in project["dependencies"])
    return {match[1]: match[2] for match in found if match}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
