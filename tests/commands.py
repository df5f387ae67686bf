"""The real commands in processes of their own, started by forking one that has the heavy imports behind it.

A fresh interpreter takes ten seconds of a slow core to import torch, diffusers and peft, which is most of what a test
of a command would cost. `multiprocessing`'s fork server imports them once a session; every command is a fork of it,
with its own arguments, folder, environment, signals and exit status, that ends as its console script ends.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from backbone.distributed.spawn import PRELOADED

# What a command imports when it runs, so that none of them pays for it
OWN = [
    *("customize.cli", "edit.cli", "align.cli", "typer._adapters", "backbone.adapters.apply"),
    *("customize.training.run", "customize.sampling", "align.collect.sample", "pyarrow.compute"),
    "tests.preloaded",
]
TIMEOUT = 300  # seconds

_context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if sys.platform != "win32":
    _context.set_forkserver_preload([*PRELOADED, *OWN])


class Started:
    """A running command, with the part of `subprocess.Popen` that tests of commands use."""

    def __init__(self, program: str, *arguments: object, cwd: Path, **environment: str) -> None:
        self._streams = [Path(tempfile.mkstemp(prefix=f"{program}-")[1]) for _ in range(2)]
        self.args = [program, *map(str, arguments)]
        call = (self.args, str(cwd), {**os.environ, **environment}, *map(str, self._streams))
        self._process: BaseProcess = _context.Process(target=_run, args=call)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As `subprocess` has it: negative is the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """Sends a signal to the command."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def said(self) -> str:
        """What was written on stderr so far."""
        return self._read()[1]

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """Waits for the end, or kills it then; what was written on stdout and stderr."""
        self._process.join(timeout)
        late = self._process.exitcode is None
        if late:
            self._process.kill()
            self._process.join()
        stdout, stderr = self._read()
        for stream in self._streams:
            stream.unlink(missing_ok=True)
        if late:
            raise subprocess.TimeoutExpired(self.args, timeout, stdout, stderr)
        return stdout, stderr

    def _read(self) -> list[str]:
        return [stream.read_text(encoding="utf-8", errors="replace") for stream in self._streams]


def run_command(
    program: str, *arguments: object, cwd: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `program arguments…` in the folder `cwd`; without `check` it may fail."""
    started = Started(program, *arguments, cwd=cwd, **environment)
    stdout, stderr = started.communicate()
    assert started.returncode is not None
    assert not check or started.returncode == 0, stderr
    return subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)


def run_here(
    program: str, *arguments: object, cwd: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """The same in this process, by the console script's function: it costs a part of what a process does."""
    words, stdout, stderr = [program, *map(str, arguments)], io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        patch.object(sys, "argv", words),
    ):
        try:
            importlib.import_module(f"{program}.cli").main()
        except SystemExit as end:
            status = end.code or 0
    assert isinstance(status, int)
    assert not check or status == 0, stderr.getvalue()
    return subprocess.CompletedProcess(words, status, stdout.getvalue(), stderr.getvalue())


def _run(words: list[str], folder: str, environment: Mapping[str, str], out: str, error: str) -> None:
    """The forked process: becomes the command, on files in place of the terminal."""
    for number, path in ((1, out), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    sys.argv = words
    importlib.import_module(f"{words[0]}.cli").main()
