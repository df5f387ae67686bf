"""Everything that must be green, in one command: format, lint, types, the site of docs/, tests.

    python -m tests.check                 what `.ci/run` runs
    python -m tests.check -m ""           options go to pytest: here the slow tests too

All run even when one fails, pytest last. The exit status is 1 when any failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
LINTERS = (
    ("ruff", "format", "--check", "--quiet", "."),
    ("ruff", "check", "--quiet", "."),
    ("mypy",),
)
SITE = ("mkdocs", "build", "--strict", "--site-dir")  # warnings, of links without a target say, are errors


TESTS = ("pytest", "-n", "auto", "--dist", "worksteal")  # a process for every core, a thread each


def main(pytest_options: list[str]) -> int:
    """Runs all checks in the project's root and gives the exit status."""
    with TemporaryDirectory() as folder:
        commands = (*LINTERS, (*SITE, folder), (*TESTS, *pytest_options))
        failed = [command for command in commands if not passes(command)]
    for command in failed:
        if command[0] != "pytest":  # its own closing line says so
            print(f"failed: {' '.join(command)}", flush=True)
    return 1 if failed else 0


def passes(command: tuple[str, ...]) -> bool:
    """Runs a tool of this environment: `ruff check .` as `python -m ruff check .`."""
    print(f"+ {' '.join(command)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1", **os.environ}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
