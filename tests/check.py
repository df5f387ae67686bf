"""Everything that must be green, in one command: format, lint, types, the site of docs/, tests.

    python -m tests.check                 what `.ci/run` runs
    python -m tests.check -m ""           options go to pytest: here the slow tests too

All run even when one fails. The linters and the site take one core in turn while pytest takes what is left, and print
what they have to say when each is done; pytest's closing line is the last. The exit status is 1 when any failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        others = (*LINTERS, (*SITE, folder))
        passed = [beside.submit(passes, command, quiet=True) for command in others]
        tests_passed = passes((*TESTS, *pytest_options))
        failed = [command for command, done in zip(others, passed, strict=True) if not done.result()]
    for command in failed:
        print(f"failed: {' '.join(command)}", flush=True)
    return 0 if tests_passed and not failed else 1


def passes(command: tuple[str, ...], *, quiet: bool = False) -> bool:
    """Runs a tool of this environment, `ruff check .` as `python -m ruff check .`; `quiet` prints only a failure."""
    environment = {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1", **os.environ}
    call = [sys.executable, "-m", *command]
    if not quiet:
        print(f"+ {' '.join(command)}", flush=True)
        return subprocess.run(call, cwd=ROOT, env=environment).returncode == 0
    done = subprocess.run(
        call, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(f"\n+ {' '.join(command)}\n{done.stdout if done.returncode else ''}", end="", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
