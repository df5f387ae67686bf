"""One sentence on stderr and the right exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from backbone.cli.commands import print_json
from backbone.io import console, run_folder
from backbone.io.console import UserError, format_error, notify, run_app

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


def test_what_a_file_says_is_shown_to_a_terminal_and_not_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        notify("\x1b]0;title\x07 and a\ttab")
        raise UserError("the layer \x1b[31mred\nis\x9b not there")

    code, said = ending(command(body, monkeypatch), capsys)
    assert code == 2
    assert said == "\\x1b]0;title\\x07 and a\ttab\nError: the layer \\x1b[31mred\nis\\x9b not there\n"


def test_a_name_of_any_length_is_cut_and_a_path_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["a" * 255] * 12)
    notify(f"{path} has no layer {'down.' * 1000} of its own")
    assert capsys.readouterr().err == (
        f"{path} has no layer {('down.' * 20)}… (5000 characters) of its own\n"
    )


def test_a_user_error_is_its_sentence_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> None:
        raise UserError("The step count is 0. Give at least 1.")

    code, said = ending(command(body, monkeypatch), capsys)
    assert (code, said) == (2, "Error: The step count is 0. Give at least 1.\n")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_what_a_terminal_s_encoding_has_not_ends_no_command(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))

    def body() -> None:
        typer.echo("── Hübsch 🐶")
        print_json({"prompt": "a dög 🐶", "title": "── plain"})

    with pytest.raises(SystemExit) as leaving:
        run_app(body)
    sys.stdout.flush()
    line, _, record = written.getvalue().decode(encoding).partition("\n")
    assert leaving.value.code == 0 and line.startswith("?? H")
    assert json.loads(record) == {"prompt": "a dög 🐶", "title": "── plain"}


def test_a_working_folder_that_was_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, said = ending(lambda: None, capsys)
    assert code == 2 and "The working folder is not there any more. Change into" in said


@pytest.mark.parametrize(
    ("error", "beginning"),
    [
        (FileNotFoundError(2, "No such file", "photos/dog"), "Error: photos/dog does not exist."),
        (PermissionError(13, "Permission denied", "/root/x"), "Error: /root/x may not be read or written"),
        (OSError(28, "No space left on device", "a.png"), "Error: The disk is full: a.png was not written."),
        (OSError(28, "No space left on device"), "Error: The disk is full: a file was not written."),
        (NotADirectoryError(20, "Not a directory", "x/y"), "Error: x/y cannot be used (not a directory)."),
        (OSError(18, "Cross-device link", "a", None, "b"), "Error: b cannot be used"),
        (
            OSError(36, "File name too long", "iVBOR" * 1000),
            "Error: " + "iVBOR" * 20 + " … (5000 characters) cannot",
        ),
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
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_real_ctrl_c_a_scheduler_s_end_and_a_terminal_s_print_no_traceback(name: str) -> None:
    script = (
        "import signal, time, typer\nfrom backbone.io.console import run_app\napp = typer.Typer()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "signal.signal(getattr(signal, 'SIGHUP', signal.SIGTERM), signal.SIG_DFL)\n"  # and this under nohup
        "@app.command()\ndef wait() -> None:\n    print('ready', flush=True)\n    time.sleep(30)\nrun_app(app)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "Stopped.\n")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("to", ["2>/dev/full", "2>&-", ">&- 2>&-"])
def test_messages_that_nobody_can_read_end_no_command(to: str, tmp_path: Path) -> None:
    if "full" in to and not Path("/dev/full").exists():
        pytest.skip("there is no full disk")
    script = (
        "import sys\nfrom backbone.io.console import notify, run_app\nfrom backbone.io.progress import progress\n"
        "def command():\n    with progress(1, 'drawing') as bar:\n        bar.advance_images(1)\n"
        "    notify('done')\n    open(sys.argv[1], 'w').close()\nrun_app(command)\n"
    )
    done = ["sh", "-c", f'"$0" -c "$1" "$2" {to}', sys.executable, script, str(tmp_path / "done")]
    assert subprocess.run(done, cwd=ROOT, check=True).returncode == 0 and (tmp_path / "done").exists()


@pytest.mark.parametrize(("number", "remedy"), [(errno.EMFILE, "ulimit -n"), (errno.EFBIG, "ulimit -f")])
def test_a_limit_of_the_system_is_named_with_how_it_is_raised(number: int, remedy: str) -> None:
    said = console.format_error(OSError(number, os.strerror(number), "x"))
    assert said is not None and remedy in said and "x" in said and "path" not in said


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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Cannot allocate memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("could not create a primitive"),
        RuntimeError("unable to mmap 52 bytes from file </m.safetensors>: Cannot allocate memory (12)"),
        OSError(12, "Cannot allocate memory", "/m.safetensors"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
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


def test_a_link_that_leads_to_itself_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "me").symlink_to("me")
    with pytest.raises(SystemExit) as ended:
        run_app(lambda: console.notify(run_folder.run_name(str(tmp_path / "me"))))
    assert (
        ended.value.code == 2
        and f"{tmp_path / 'me'} is a link that leads to itself" in capsys.readouterr().err
    )


def test_a_library_on_a_disk_that_runs_no_programs_is_no_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "x.so"
    library.touch()
    error = ImportError(f"{library}: failed to map segment from shared object")
    assert "The memory is used up" in str(format_error(error))
    flags = os.statvfs(tmp_path)
    monkeypatch.setattr("os.statvfs", lambda place: SimpleNamespace(f_flag=flags.f_flag | os.ST_NOEXEC))
    assert f"{library} lies on a disk from which no program may run" in str(format_error(error))


def test_a_python_without_limner_s_packages_is_told_and_no_other_missing_module(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(missing: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    assert ending(lambda: start("typer"), capsys)[0] == 2
    with pytest.raises(ModuleNotFoundError):
        run_app(lambda: start("backbone.nowhere"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split("[^a-z]", line)[0] for line in project["dependencies"]}
    assert {{"PIL": "pillow", "yaml": "pyyaml"}.get(name, name) for name in console.PACKAGES} == declared
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in str(
        format_error(ModuleNotFoundError(name="torch"))
    )


def test_python_without_docstrings_is_refused_before_a_library_stumbles() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "customize", "info", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Unset PYTHONOPTIMIZE." in done.stderr


def test_other_runtime_errors_keep_their_traceback() -> None:
    def command() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_app(command)
