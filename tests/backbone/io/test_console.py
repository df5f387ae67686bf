"""One sentence on stderr, the right exit code, and progress that reads well with and without a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from backbone.io.console import ProgressBar, UserError, notify, progress, run_app

ROOT = Path(__file__).parents[3]


def ending(app: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit code and stderr of a run."""
    with pytest.raises(SystemExit) as leaving:
        run_app(app)
    return leaving.value.code, capsys.readouterr().err


def command(body: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> typer.Typer:
    monkeypatch.setattr(sys, "argv", ["limner", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
    app = typer.Typer()
    app.command()(body)
    return app


def test_a_command_that_succeeds_ends_with_zero_and_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ending(command(lambda: None, monkeypatch), capsys) == (0, "")


def test_a_user_error_is_its_sentence_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> None:
        raise UserError("The step count is 0. Give at least 1.")

    code, said = ending(command(body, monkeypatch), capsys)
    assert (code, said) == (2, "Error: The step count is 0. Give at least 1.\n")


@pytest.mark.parametrize(
    ("error", "beginning"),
    [
        (FileNotFoundError(2, "No such file", "photos/dog"), "Error: photos/dog does not exist."),
        (PermissionError(13, "Permission denied", "/root/x"), "Error: /root/x may not be read or written"),
        (OSError(28, "No space left on device", "a.png"), "Error: The disk is full: a.png was not written."),
        (OSError(28, "No space left on device"), "Error: The disk is full: a file was not written."),
        (NotADirectoryError(20, "Not a directory", "x/y"), "Error: x/y cannot be used (not a directory)."),
        (OSError(18, "Cross-device link", "a", None, "b"), "Error: b cannot be used"),
    ],
)
def test_a_file_error_is_one_line_with_its_path(
    error: OSError, beginning: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> None:
        raise error

    code, said = ending(command(body, monkeypatch), capsys)
    assert code == 2
    assert said.startswith(beginning)
    assert said.count("\n") == 1


def test_wrong_usage_ends_with_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = ending(command(lambda: None, monkeypatch, "--no-such-option"), capsys)
    assert code == 2
    assert "--no-such-option" in said


def test_an_interrupt_ends_with_130_and_its_own_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> None:
        raise KeyboardInterrupt

    def telling() -> None:
        raise KeyboardInterrupt("Saved step 120 in runs/dog.")

    assert ending(command(silent, monkeypatch), capsys) == (130, "Stopped.\n")
    assert ending(command(telling, monkeypatch), capsys) == (130, "Saved step 120 in runs/dog.\n")
    assert ending(telling, capsys) == (130, "Saved step 120 in runs/dog.\n")


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_app(command(faulty, monkeypatch))
    with pytest.raises(OSError, match="something else"):
        run_app(lambda: (_ for _ in ()).throw(OSError("something else")).__next__())


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        raise UserError("Wrong. Do right.")

    monkeypatch.setenv("LIMNER_TRACEBACK", "1")
    with pytest.raises(UserError):
        run_app(command(body, monkeypatch))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_real_ctrl_c_prints_no_traceback() -> None:
    script = (
        "import signal, time, typer\nfrom backbone.io.console import run_app\napp = typer.Typer()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "@app.command()\ndef wait() -> None:\n    print('ready', flush=True)\n    time.sleep(30)\nrun_app(app)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "Stopped.\n")


def test_importing_the_console_imports_neither_rich_nor_torch() -> None:
    script = (
        "import sys, time\nstart = time.process_time()\nimport backbone.io.console\n"
        "seconds = time.process_time() - start\n"
        "assert not {'rich', 'torch', 'numpy', 'PIL', 'typer'} & set(sys.modules)\nprint(seconds)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.08


def test_away_from_a_terminal_progress_is_sparse_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(50, "training") as bar:
        for step in range(50):
            bar.advance(images=4, loss=1 / (step + 1))
            if step == 20:
                notify("a word in between")
    between, final = capsys.readouterr().err.splitlines()
    assert between == "a word in between"
    assert final.startswith("training 50/50 · loss 0.02 · ")
    assert "images/s" in final


def test_progress_that_fails_claims_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress(50, "training") as bar:
            bar.advance()
            raise UserError("The loss is not a number. Lower the rate.")

    with pytest.raises(UserError):
        fail()
    assert capsys.readouterr().err == ""


def test_long_progress_speaks_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(ProgressBar.__init__, "__kwdefaults__", {"done": 0, "clock": lambda: now})
    with progress(100, "training") as bar:
        for _ in range(100):
            now += 0.5
            bar.advance(images=2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training 20/100 · 4 images/s · 0:10 · 0:40 left"
    assert [line.split(" ")[1] for line in lines] == ["20/100", "40/100", "60/100", "80/100", "100/100"]


def test_rates_forget_a_slow_start_and_a_resumed_run_does_not_count_what_lies_behind() -> None:
    now = 0.0
    bar = ProgressBar(1000, done=400, clock=lambda: now)
    assert bar.images_per_second is None
    assert bar.seconds_left is None
    now = 100.0  # a slow first step
    bar.advance(images=1)
    for _ in range(99):
        now += 1.0
        bar.advance(images=5)
    assert bar.progress_text == "500/1000"
    assert bar.images_per_second == pytest.approx(5.0)
    assert bar.seconds_left == pytest.approx(500.0)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal_progress_is_a_bar_with_figures_and_brackets_stay_as_they_are() -> None:
    import pty

    script = (
        "import time\nfrom backbone.io.console import notify, progress\n"
        "with progress(3, 'learning [red] [V]') as bar:\n"
        "    for step in range(3):\n        time.sleep(0.01)\n        bar.advance(images=1, loss=0.25)\n"
        "    notify('between')\n"
    )
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=child) as process:
        os.close(child)
        shown = b""
        start = time.monotonic()
        while time.monotonic() - start < 20:
            try:
                block = os.read(parent, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not block:
                break
            shown += block
    os.close(parent)
    text = shown.decode()
    assert process.returncode == 0
    for part in ("learning [red] [V]", "━", "3/3", "loss 0.25", "images/s", "between"):
        assert part in text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Cannot allocate memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("could not create a primitive"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_out_of_memory_is_one_sentence_with_a_remedy(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_app(command)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--vram" in said and "--batch" in said


def test_other_runtime_errors_keep_their_traceback() -> None:
    def command() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_app(command)
