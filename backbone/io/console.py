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
LONGEST_NAME = 100  # characters of a name that is too long for a file
GC_THRESHOLD = 200_000
LINK_LOOP = "Symlink loop from "
# As Python reads bytes that are none of the encoding, and halves of characters
BROKEN = re.compile("[\ud800-\udfff]")
# A word of a command that is an address, or ends in one (`sketch=https://…`); a page of a model or dataset on the hub
ADDRESS = re.compile(r"(?:[\w-]+=)?(([a-z][a-z0-9+]+)://(\S+))")
HUB_PAGE = re.compile(
    r"(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)(?:/tree/main)?/?"
)
# What is installed with Limner, as it is imported
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
NOT_MAPPED = "failed to map segment"  # of a library that is loaded
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",  # the system's own words, as safetensors repeats them
    NOT_MAPPED,
    "not enough memory",
    "could not create a primitive",
)


class UserError(Exception):
    """A mistake that the user can repair: the message says what is wrong, where, and the nearest remedy."""


def run_program(package: str) -> NoReturn:
    """`run_app` of the application in `package`.cli, whose options are imported where Ctrl-C is heard already."""
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
    write_what_the_terminal_can()
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
        message = error_message(error)
        if message is None or os.environ.get("LIMNER_TRACEBACK") == "1":
            raise
        _exit(f"Error: {message}", EXIT_USER_ERROR)
    sys.exit(0)


def write_what_the_terminal_can() -> None:
    """Let characters that a terminal's or a pipe's encoding has not come out as question marks, and end nothing.

    Nor does a message that nobody can read: of a pipe that was closed, a terminal that is gone, a full disk.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before; the number of its file shall be no other file's
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    said = sys.stderr
    if said is sys.__stderr__ and isinstance(said, io.TextIOWrapper):
        raw = io.BufferedWriter(_Unheard(said.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, said.encoding, said.errors, line_buffering=True)


class _Unheard(io.FileIO):
    """A file of messages: what cannot be written is dropped."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def end_signals() -> list[int]:
    """The signals that ask a command to end: SIGTERM, and a closed terminal's SIGHUP, which nohup keeps away."""
    known = [
        getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]  # one on Windows
    return [
        number for number in known if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    ]


@contextmanager
def stop_on_termination() -> Iterator[None]:
    """Let SIGTERM and SIGHUP, by which machines, schedulers and terminals stop a command, end it as Ctrl-C does.

    So nothing is half-written.
    """
    own = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() == own:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a process that was forked from this one
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in end_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_lost_folder() -> None:
    """`UserError` where the working folder was removed: paths mean nothing there, and torch's kernels do not load."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("The working folder is not there any more. Change into one that is.") from error


def quote(word: str | os.PathLike[str]) -> str:
    """A word of a command that is printed to be copied, as a shell reads it: a path with spaces in quotation marks."""
    return shlex.quote(os.fspath(word))


def quote_text(text: str) -> str:
    """A text of a command that is printed to be copied: in double quotation marks, unless a shell reads in them."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def refuse_other_encodings(text: str, where: str = "") -> None:
    """`UserError`, which begins with `where`, for a text with bytes that are no UTF-8, as old names of files have."""
    if odd := BROKEN.search(text):
        before, after = re.split('["\n]', text[: odd.start()])[-1], re.split('["\n]', text[odd.start() :])[0]
        raise UserError(
            f"{where}{show_text(before + after)} is no text in UTF-8. Rename what is called so, or write it in a "
            "terminal of UTF-8."
        )


def refuse_address(word: str) -> None:
    """`UserError` for a word that is an address: no command takes one, and as a path it would lead to `https:/`."""
    found = ADDRESS.fullmatch(word)
    if found is None:
        return
    scheme, rest = found[2], found[3]
    if scheme == "file":
        remedy = f"Name what it leads to: /{rest.lstrip('/')}"
    elif hub := HUB_PAGE.fullmatch(rest):
        remedy = f"What the hub has is named {hub[1]}."
    else:
        remedy = "Download what it leads to, and name the file or the folder."
    raise UserError(f"{shorten(found[1], 200)} is an address, and nothing is read from there. {remedy}")


def show_text(text: str) -> str:
    """A text with a mark for each byte that is no UTF-8, cut after 80 characters."""
    return shorten(BROKEN.sub("\ufffd", text), 80)


def looks_like_prompt(said: str | os.PathLike[str]) -> bool:
    """Whether a word that names nothing on the disk reads as a prompt: several words, and no path's signs."""
    text = os.fspath(said)
    return " " in text.strip() and not set(text) & set("/\\") and not os.path.splitext(text)[1][1:].isalnum()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch or its kernels, or the system says that the memory is used up."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, ImportError))
        and (
            type(error).__name__ == "OutOfMemoryError"
            or any(words in str(error).lower() for words in OUT_OF_MEMORY)
        )
    )


def error_message(error: Exception) -> str | None:
    """The message of a user error, an OSError or a lack of memory; None for what is none of these.

    An OSError that names no file and is not a full disk is none either.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return (
            f"{error.name} is not installed for this Python ({sys.executable}, {sys.version.split()[0]}). Start "
            "Limner where it is installed, as .venv/bin/customize, or install it, for Python 3.11 or newer: "
            "python3 -m pip install ."
        )
    if closed := _library_of_closed_disk(error):
        return (
            f"{closed} lies on a disk from which no program may run (noexec). Install Limner on another, or mount it "
            "with exec."
        )
    if is_out_of_memory(error):
        return (
            "The memory is used up. Take a smaller --batch or --resolution, --one-by-one, --precision bf16, or give "
            "--vram GIB to plan for what there is; end other programs that use the device."
        )
    if isinstance(error, RuntimeError) and str(error).startswith(LINK_LOOP):  # Python before 3.13 says it so
        return (
            f"{str(error).removeprefix(LINK_LOOP).strip(chr(39))} is a link that leads to itself. Remove it."
        )
    if not isinstance(error, OSError):
        return None
    path = error.filename2 if error.filename2 is not None else error.filename
    where = on_one_line(os.fsdecode(path)) if isinstance(path, (str, bytes)) else None
    if where is not None and error.errno == errno.ENAMETOOLONG and len(where) > LONGEST_NAME:
        where = f"{where[:LONGEST_NAME]} … ({len(where)} characters)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {where or 'a file'} was not written. Free some space, or write elsewhere."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return (
            f"Too many files are open at once to open {where or 'another'}. Raise the limit: ulimit -n 1024."
        )
    if where is None:
        return None
    if error.errno == errno.EFBIG:
        return (
            f"{where} is larger than a file may be here and was not written. Raise the limit (ulimit -f), or write to "
            "a disk that is not FAT."
        )
    if isinstance(error, FileNotFoundError):
        start = "" if os.path.isabs(where) else f"; it was looked for from {os.getcwd()}"
        return f"{where} does not exist. Check the spelling{start}."
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        remedy = "Change its permissions, or choose another place."
        closed = next((path for path in _folders_above(where) if not os.access(path, os.X_OK)), None)
        if closed is not None:
            return f"{closed} may not be entered ({_reason(error)}). {remedy}"
        return f"{where} may not be read or written ({_reason(error)}). {remedy}"
    return f"{where} cannot be used ({_reason(error)}). Choose another path."


def _library_of_closed_disk(error: Exception) -> str | None:
    """The library that could not be loaded since its disk is mounted so; a lack of memory is said in the same words."""
    found = re.search(rf"(/[^\n]+): {NOT_MAPPED}", str(error)) if isinstance(error, ImportError) else None
    if found is None or not hasattr(os, "ST_NOEXEC") or not os.path.exists(found[1]):
        return None
    return found[1] if os.statvfs(found[1]).f_flag & os.ST_NOEXEC else None


def _folders_above(where: str) -> list[str]:
    """The folders that a path lies in and that are there, from the root on."""
    found: list[str] = []
    while (above := os.path.dirname(os.path.abspath(found[0] if found else where))) not in found:
        found.insert(0, above)
    return [path for path in found if os.path.isdir(path)]


def notify(text: str) -> None:
    """Print a line on stderr, above a running progress bar; only on the main process."""
    _hear(text)
    print_line(text)


def print_line(text: str) -> None:
    """`notify` of what only a terminal shows, as how far something is: `hearing` does not list it."""
    if is_main_rank():
        print(show_plainly(_reword.get()(text)), file=sys.stderr, flush=True)


_heard: ContextVar[list[str] | None] = ContextVar("heard", default=None)


@contextmanager
def hearing() -> Iterator[list[str]]:
    """Inside, what `notify` prints is listed too, and what `notify_once` said before, for who sees no terminal."""
    heard: list[str] = []
    before = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(before)


def _hear(text: str) -> None:
    heard = _heard.get()
    if heard is not None and text not in heard:
        heard.append(text)


_reword: ContextVar[Callable[[str], str]] = ContextVar("reword", default=str)


@contextmanager
def rewording(reword: Callable[[str], str]) -> Iterator[None]:
    """Inside the `with`, `notify` prints `reword(text)`: Python callers read keywords in the place of flags."""
    before = _reword.set(reword)
    try:
        yield
    finally:
        _reword.reset(before)


def show_plainly(text: str) -> str:
    """A text in which control characters are written out, and words that are longer than any name are cut.

    What a file says is nothing for a terminal to obey, and its names, as of layers, may have any length.
    """
    cut = _ENDLESS.sub(lambda found: f"{found[0][:LONGEST_NAME]}… ({len(found[0])} characters)", text)
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", cut)


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines
# A part of a path has 255 bytes at most, and a path 4,096
_ENDLESS = re.compile(r"[^\s/\\]{400,}|\S{4200,}")


def notify_once(text: str) -> None:
    """`notify`, unless this very text was said before in this process."""
    if text in said_once:
        _hear(text)
    else:
        said_once.add(text)
        notify(text)


said_once: set[str] = set()


def guess_meant(value: float, most: float) -> str:
    """“ Was 7.5 meant?”, to follow a sentence about a number that is above what it may be, as 750 and 75 are."""
    meant = next((value / part for part in (10, 100, 1000) if abs(value / part) <= most), None)
    return "" if meant is None else f" Was {meant:g} meant?"


@cache
def said_of(predicate: str) -> list[str]:
    """The file of which it was said, once it was."""
    return []


def notify_first(name: str, predicate: str) -> None:
    """`notify` what is so of a file, of the first one alone of which it is said in this process."""
    names = said_of(predicate)
    if not names:
        names.append(name)
        notify(f"{name} {predicate}")


def on_one_line(text: str) -> str:
    """A text with its ends of lines written out, as a file's name may have some in a list of one line each."""
    return text.replace("\r", "\\r").replace("\n", "\\n")


def shorten(text: str, most: int = 400) -> str:
    """A text's beginning, where it has more than this many characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def count_of(number: int, noun: str) -> str:
    """“1 image”, “3 images”."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_main_rank() -> bool:
    """Whether this process has rank 0 or is alone, by the launcher's environment."""
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

    When several processes fail alike, the others wait for the main one to print: the launcher then ends them.
    """
    if not is_main_rank() and code == EXIT_USER_ERROR:
        time.sleep(MAIN_PROCESS_GRACE_SECONDS)
        message = f"Process {os.environ.get('RANK')}: {message}"
    if is_main_rank() or code == EXIT_USER_ERROR:
        print(show_plainly(message), file=sys.stderr, flush=True)
    raise SystemExit(code) from None
