"""Console scripts: user errors, exit codes, messages.

All output goes to stderr, so that stdout stays free for results. The module imports only the standard library.
"""

from __future__ import annotations

import errno
import gc
import io
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
MAIN_PROCESS_GRACE_SECONDS = 5.0
LONGEST_NAME = 100  # characters of an overlong name that a message shows
GC_THRESHOLD = 200_000
LINK_LOOP = "Symlink loop from "
# Surrogates: how Python decodes bytes that are not in the encoding
BROKEN = re.compile("[\ud800-\udfff]")
# An address in a command (`sketch=https://…` too); the hub page of a model or a dataset
ADDRESS = re.compile(r"(?:[\w-]+=)?(([a-z][a-z0-9+]+)://(\S+))")
HUB_PAGE = re.compile(
    r"(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)(?:/tree/main)?/?"
)
# The import names of the packages that are installed with Limner
PACKAGES = (
    *(
        "PIL",
        "accelerate",
        "datasets",
        "diffusers",
        "numpy",
        "peft",
        "rich",
        "safetensors",
        "starlette",
        "torch",
    ),
    *("transformers", "typer", "uvicorn", "yaml"),
)
NOT_MAPPED = "failed to map segment"  # of a shared library
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",  # the system's message, which safetensors repeats
    NOT_MAPPED,
    "not enough memory",
    "could not create a primitive",
)


class UserError(Exception):
    """A mistake that the user can repair. The message says what is wrong, where, and what to do."""


def run_program(package: str) -> NoReturn:
    """`run_app` of the application in `package`.cli, which is imported inside, so that Ctrl-C is handled already."""
    run_app(lambda: import_module(f"{package}.cli").app())


def run_app(app: Callable[[], Any]) -> NoReturn:
    """Run a typer application as a console script and end the process.

    Exit codes: 0 success; 2 for a `UserError`, a lack of memory, a file that is missing, forbidden or does not fit on
    the disk, and (by typer) wrong usage; 130 after Ctrl-C. User errors print their message alone; LIMNER_TRACEBACK=1
    shows the traceback. Other exceptions are bugs and keep their traceback.

    A KeyboardInterrupt that carries a message prints it: `raise KeyboardInterrupt("Saved step 120 in …")`.

    Python collects cyclic garbage after every 700 new objects, which takes a quarter of the time of importing torch and
    diffusers, whose objects stay alive; the threshold is raised to GC_THRESHOLD.
    """
    gc.set_threshold(GC_THRESHOLD, 20, 100)
    tolerate_output_errors()
    try:
        refuse_lost_folder()
        if sys.flags.optimize > 1:
            raise UserError(
                "Python leaves out what functions say of themselves (-OO, PYTHONOPTIMIZE=2), and transformers does not "
                "load without that. Unset PYTHONOPTIMIZE."
            )
        with stop_on_termination():
            app()
    except KeyboardInterrupt as interrupt:
        _exit(str(interrupt) or "Stopped.", EXIT_INTERRUPTED)
    except SystemExit as exit_:  # typer turns Ctrl-C into exit code 130 and prints nothing
        if exit_.code == EXIT_INTERRUPTED:
            _exit(_interrupt_message(exit_) or "Stopped.", EXIT_INTERRUPTED)
        raise
    except (UserError, OSError, MemoryError, RuntimeError, ImportError) as error:
        message = format_error(error)
        if message is None or os.environ.get("LIMNER_TRACEBACK") == "1":
            raise
        _exit(f"Error: {message}", EXIT_USER_ERROR)
    sys.exit(0)


def tolerate_output_errors() -> None:
    """Print question marks for characters that the output's encoding does not have, instead of raising.

    Messages on stderr that cannot be written are dropped: a closed pipe, a terminal that is gone, a full disk.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller; no other file may get its descriptor
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    stderr = sys.stderr
    if stderr is sys.__stderr__ and isinstance(stderr, io.TextIOWrapper):
        raw = io.BufferedWriter(_TolerantFile(stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, stderr.encoding, stderr.errors, line_buffering=True)


class _TolerantFile(io.FileIO):
    """A file for messages; what cannot be written is dropped."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def end_signals() -> list[int]:
    """The signals that ask a command to end: SIGTERM, and SIGHUP of a closed terminal unless nohup ignores it."""
    # Windows has no SIGHUP
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [
        number for number in signals if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    ]


@contextmanager
def stop_on_termination() -> Iterator[None]:
    """Inside the `with`, SIGTERM and SIGHUP end the command as Ctrl-C does, so that nothing is half-written.

    Schedulers, terminals and machines that shut down send them.
    """
    process_id = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() == process_id:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a process that was forked from this one
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, stop) for number in end_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def refuse_lost_folder() -> None:
    """Raise `UserError` if the working folder was removed: relative paths and torch's kernels need it."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("The working folder is not there any more. Change into one that is.") from error


def quote(word: str | os.PathLike[str]) -> str:
    """A word for a printed command, quoted for a shell."""
    return shlex.quote(os.fspath(word))


def quote_text(text: str) -> str:
    """A text for a printed command: in double quotation marks, unless it holds what a shell expands in them."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def refuse_other_encodings(text: str, start: str = "") -> None:
    """Raise `UserError`, beginning with `start`, for a text with bytes that are not UTF-8, as in old file names."""
    if match := BROKEN.search(text):
        before = re.split('["\n]', text[: match.start()])[-1]
        after = re.split('["\n]', text[match.start() :])[0]
        raise UserError(
            f"{start}{show_text(before + after)} is no text in UTF-8. Rename what is called so, or write it in a "
            "terminal of UTF-8."
        )


def refuse_address(word: str) -> None:
    """Raise `UserError` for an address: no command takes one, and as a path it would be a folder `https:`."""
    match = ADDRESS.fullmatch(word)
    if match is None:
        return
    scheme, location = match[2], match[3]
    if scheme == "file":
        remedy = f"Name what it leads to: /{location.lstrip('/')}"
    elif hub := HUB_PAGE.fullmatch(location):
        remedy = f"What the hub has is named {hub[1]}."
    else:
        remedy = "Download what it leads to, and name the file or the folder."
    raise UserError(f"{shorten(match[1], 200)} is an address, and nothing is read from there. {remedy}")


def show_text(text: str) -> str:
    """A text with U+FFFD for each byte that is not UTF-8, cut after 80 characters."""
    return shorten(BROKEN.sub("\ufffd", text), 80)


def looks_like_prompt(word: str | os.PathLike[str]) -> bool:
    """Whether a word that is no existing path reads as a prompt: several words, no slash and no suffix."""
    text = os.fspath(word)
    return " " in text.strip() and not set(text) & set("/\\") and not os.path.splitext(text)[1][1:].isalnum()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch, its kernels or the system means that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, ImportError))
        and (
            type(error).__name__ == "OutOfMemoryError"
            or any(words in str(error).lower() for words in OUT_OF_MEMORY)
        )
    )


def format_error(error: Exception) -> str | None:
    """The message for a `UserError`, an `OSError`, a lack of memory or a missing package; None for other errors.

    None too for an `OSError` that names no file and is not a full disk.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return (
            f"{error.name} is not installed for this Python ({sys.executable}, {sys.version.split()[0]}). Start "
            "Limner where it is installed, as .venv/bin/customize, or install it, for Python 3.11 or newer: "
            "python3 -m pip install ."
        )
    if library := _find_blocked_library(error):
        return (
            f"{library} lies on a disk from which no program may run (noexec). Install Limner on another, or mount "
            "it with exec."
        )
    if is_out_of_memory(error):
        return (
            "The memory is used up. Take a smaller --batch or --resolution, --one-by-one, --precision bf16, or give "
            "--vram GIB to plan for what there is; end other programs that use the device."
        )
    if isinstance(error, RuntimeError) and str(error).startswith(LINK_LOOP):  # as Python before 3.13 puts it
        return (
            f"{str(error).removeprefix(LINK_LOOP).strip(chr(39))} is a link that leads to itself. Remove it."
        )
    if not isinstance(error, OSError):
        return None
    path = error.filename2 if error.filename2 is not None else error.filename
    name = on_one_line(os.fsdecode(path)) if isinstance(path, (str, bytes)) else None
    if name is not None and error.errno == errno.ENAMETOOLONG and len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]} … ({len(name)} characters)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {name or 'a file'} was not written. Free some space, or write elsewhere."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return (
            f"Too many files are open at once to open {name or 'another'}. Raise the limit: ulimit -n 1024."
        )
    if name is None:
        return None
    if error.errno == errno.EFBIG:
        return (
            f"{name} is larger than a file may be here and was not written. Raise the limit (ulimit -f), or write to "
            "a disk that is not FAT."
        )
    if isinstance(error, FileNotFoundError):
        start = "" if os.path.isabs(name) else f"; it was looked for from {os.getcwd()}"
        return f"{name} does not exist. Check the spelling{start}."
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        remedy = "Change its permissions, or choose another place."
        closed_folder = next(
            (folder for folder in _list_folders_above(name) if not os.access(folder, os.X_OK)), None
        )
        if closed_folder is not None:
            return f"{closed_folder} may not be entered ({_reason(error)}). {remedy}"
        return f"{name} may not be read or written ({_reason(error)}). {remedy}"
    return f"{name} cannot be used ({_reason(error)}). Choose another path."


def _find_blocked_library(error: Exception) -> str | None:
    """The library that was not loaded because its disk is mounted noexec; a lack of memory has the same message."""
    match = re.search(rf"(/[^\n]+): {NOT_MAPPED}", str(error)) if isinstance(error, ImportError) else None
    if match is None or not hasattr(os, "ST_NOEXEC") or not os.path.exists(match[1]):
        return None
    return match[1] if os.statvfs(match[1]).f_flag & os.ST_NOEXEC else None


def _list_folders_above(path_name: str) -> list[str]:
    """The existing folders that a path lies in, from the root down."""
    folders: list[str] = []
    while (above := os.path.dirname(os.path.abspath(folders[0] if folders else path_name))) not in folders:
        folders.insert(0, above)
    return [path for path in folders if os.path.isdir(path)]


def notify(text: str) -> None:
    """Print a line on stderr, above a running progress bar; only on the main process."""
    _capture(text)
    print_line(text)


def print_line(text: str) -> None:
    """Print a line as `notify` does, for progress on a terminal: `capture_messages` does not list it."""
    if is_main_rank():
        print(show_plainly(_reword.get()(text)), file=sys.stderr, flush=True)


_captured: ContextVar[list[str] | None] = ContextVar("captured", default=None)


@contextmanager
def capture_messages() -> Iterator[list[str]]:
    """Yield a list of the lines that `notify` prints inside, and of those that `notify_once` has printed before."""
    messages: list[str] = []
    token = _captured.set(messages)
    try:
        yield messages
    finally:
        _captured.reset(token)


def _capture(text: str) -> None:
    messages = _captured.get()
    if messages is not None and text not in messages:
        messages.append(text)


_reword: ContextVar[Callable[[str], str]] = ContextVar("reword", default=str)


@contextmanager
def reword_messages(reword: Callable[[str], str]) -> Iterator[None]:
    """Inside the `with`, `notify` prints `reword(text)`: Python callers see keywords in place of flags."""
    token = _reword.set(reword)
    try:
        yield
    finally:
        _reword.reset(token)


def show_plainly(text: str) -> str:
    """A text with control characters written out, and words longer than any path cut.

    Text from a file must not control the terminal, and its names may have any length.
    """
    cut = _LONG_WORD.sub(lambda match: f"{match[0][:LONGEST_NAME]}… ({len(match[0])} characters)", text)
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", cut)


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # except tabs and line feeds
# A part of a path has at most 255 bytes, a path 4,096
_LONG_WORD = re.compile(r"[^\s/\\]{400,}|\S{4200,}")


def notify_once(text: str) -> None:
    """`notify`, unless the same text was printed before in this process."""
    if text in printed_once:
        _capture(text)
    else:
        printed_once.add(text)
        notify(text)


printed_once: set[str] = set()


def suggest_value(value: float, most: float) -> str:
    """“ Was 7.5 meant?”, to follow a sentence about a number above `most`, such as 75 or 750."""
    guess = next((value / divisor for divisor in (10, 100, 1000) if abs(value / divisor) <= most), None)
    return "" if guess is None else f" Was {guess:g} meant?"


@cache
def printed_names(predicate: str) -> list[str]:
    """A cached list for the name that `notify_first` has printed with this predicate, empty before."""
    return []


def notify_first(name: str, predicate: str) -> None:
    """`notify` a sentence about a file, only for the first file with this predicate in this process."""
    names = printed_names(predicate)
    if not names:
        names.append(name)
        notify(f"{name} {predicate}")


def on_one_line(text: str) -> str:
    """A text with line breaks written out, as for a file name in a list of one line each."""
    return text.replace("\r", "\\r").replace("\n", "\\n")


def shorten(text: str, most: int = 400) -> str:
    """The text, cut after `most` characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def format_count(number: int, noun: str) -> str:
    """“1 image”, “3 images”."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_main_rank() -> bool:
    """Whether this process has rank 0 or is the only one, by the launcher's environment."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


def _interrupt_message(error: BaseException) -> str:
    """The message of the KeyboardInterrupt in an exception's chain, or ""."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause is not None else ""


def _exit(message: str, code: int) -> NoReturn:
    """Print a message and exit.

    When all processes fail, the others wait so that the main one prints first; the launcher then ends them.
    """
    if not is_main_rank() and code == EXIT_USER_ERROR:
        time.sleep(MAIN_PROCESS_GRACE_SECONDS)
        message = f"Process {os.environ.get('RANK')}: {message}"
    if is_main_rank() or code == EXIT_USER_ERROR:
        print(show_plainly(message), file=sys.stderr, flush=True)
    raise SystemExit(code) from None
