"""Console scripts: user errors, exit codes, messages, the progress bar.

All output goes to stderr, so that stdout stays free for results. The module imports only the standard library; rich is
imported when a progress bar is drawn.
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
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, NoReturn, TypeAlias

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
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",  # the system's own words, as safetensors repeats them
    "failed to map segment",  # of a library that is loaded
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


def _folders_above(where: str) -> list[str]:
    """The folders that a path lies in and that are there, from the root on."""
    found: list[str] = []
    while (above := os.path.dirname(os.path.abspath(found[0] if found else where))) not in found:
        found.insert(0, above)
    return [path for path in found if os.path.isdir(path)]


def notify(text: str) -> None:
    """Print a line on stderr, above a running progress bar; only on the main process."""
    _hear(text)
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
    """A text's beginning, where it has more than so many characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def count_of(number: int, noun: str) -> str:
    """“1 image”, “3 images”."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_main_rank() -> bool:
    """Whether this process has rank 0 or is alone, by the launcher's environment."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def progress(
    total: int | None, description: str, *, done: int = 0, brief: bool = False
) -> Iterator[ProgressBar]:
    """A progress display on stderr: `with progress(400, "training") as bar:`, then `bar.advance(loss=…)`.

    On a terminal: bar, n/total, metrics, images/s, elapsed, time left. Elsewhere a line every ten seconds, however long
    the first step takes, and a last one. `total` None: length unknown. `done`: steps that a resumed run took earlier,
    which count for n/total and not for the rates. A `brief` one leaves nothing behind unless it took longer than
    PATIENCE_SECONDS. Where there is nothing to do, nothing is shown.

    Inside another one it stands below it while it lasts, and the outer one's clock stands still (`pause`).
    """
    bar = ProgressBar(total, done=done)
    if total == 0:
        yield bar
        return
    with _open_bars[-1].pause() if _open_bars else nullcontext():
        _open_bars.append(bar)
        try:
            with _choose_display()(bar, description, brief) as show:
                bar.show = show
                show()
                yield bar
        finally:
            _open_bars.pop()


class ProgressBar:
    """Counts steps and images, keeps the latest metrics, and measures rates over the last WINDOW_SECONDS.

    The rates leave out what is no step: the time before the first one ends, in which a program warms up, once another
    one has been measured, and what `pause` covers.
    """

    WINDOW_SECONDS, BURST_SECONDS = 30.0, 0.05

    def __init__(
        self, total: int | None, *, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.done: float = done
        self.images: float = 0
        self.metrics: dict[str, float | str] = {}
        self.clock = clock
        self.start = clock()
        self.show: Callable[[], None] = lambda: None
        self._paused = 0.0  # seconds
        self._marks: deque[tuple[float, float, float]] = deque([(self.start, done, 0)])
        # (time of work, steps, images), oldest first
        self._warm = False  # whether the first mark is the end of a step rather than the start

    def advance(self, steps: float = 1, *, images: float = 0, **metrics: float | str) -> None:
        """Count `steps` steps in which `images` images were processed, and update the metrics shown.

        Shares of a step and of an image count for the rates; shown is what is whole.
        """
        self.done += steps
        self.images += images
        self.metrics.update(metrics)
        now = self.clock() - self._paused
        if len(self._marks) > 1 and now - self._marks[-1][0] < self.BURST_SECONDS:
            now = self._marks.pop()[0]  # one of several that came together
        self._marks.append((now, self.done, self.images))
        if not self._warm and len(self._marks) > 2:
            self._marks.popleft()
            self._warm = True
        while len(self._marks) > 2 and now - self._marks[1][0] >= self.WINDOW_SECONDS:
            self._marks.popleft()
        self.show()

    def advance_images(self, images: float) -> None:
        """Count images, or shares of them, each of which is a step."""
        self.advance(images, images=images)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block (an evaluation, a preview) out of the rates."""
        began, before = self.clock(), self._paused
        try:
            yield
        finally:
            self._paused = before + self.clock() - began

    @property
    def images_per_second(self) -> float | None:
        """The recent rate; None before the first image."""
        (then, _, before), (now, _, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - then) if after > before and now > then else None

    @property
    def seconds_left(self) -> float | None:
        """At the recent rate; None while nothing has been measured or the total is unknown."""
        (then, before, _), (now, after, _) = self._marks[0], self._marks[-1]
        if self.total is None or after <= before or now <= then:
            return None
        return max(0, self.total - self.done) * (now - then) / (after - before)

    @property
    def progress_text(self) -> str:
        whole = int(self.done + 1e-6)
        if self.total is None:
            return f"{whole}" if whole else ""
        return f"{whole}/{self.total}"

    @property
    def metrics_text(self) -> str:
        """The metrics and the rate, e.g. `loss 0.0813 · 5.2 images/s`."""
        return self.metrics_within(None)

    def metrics_within(self, width: int | None) -> str:
        """As many of the metrics as fit `width` characters: the first one, the rate, then the others in their order."""
        parts = [f"{name.replace('_', ' ')} {_format_metric(value)}" for name, value in self.metrics.items()]
        rate = self.images_per_second
        if rate is not None:
            parts.append(f"{rate:.3g} images/s")
        first, others = parts[:1], parts[1:]
        by_weight = [*first, *others[-1:], *others[:-1]] if rate is not None else parts
        chosen: list[str] = []
        for part in by_weight:
            text = " · ".join(one for one in parts if one in chosen or one == part)
            if width is not None and len(text) > width:
                break
            chosen.append(part)
        return " · ".join(part for part in parts if part in chosen)


PATIENCE_SECONDS = 2.0
LINE_SECONDS = 10.0  # from one line of progress to the next, away from a terminal
BAR_WIDTH, NARROW_BAR, LEAST_BAR = 24, 12, 4  # characters: at its best, before metrics give way, at the least
_open_bars: list[ProgressBar] = []
_open_names: list[str] = []
_open_displays: list[Any] = []  # rich's display on the terminal, which inner bars share

_Display: TypeAlias = Callable[[ProgressBar, str, bool], AbstractContextManager[Callable[[], None]]]


def _choose_display() -> _Display:
    if not is_main_rank():
        return _display_nothing
    # Rich stands in for stderr then, and before version 15 did not say that it is a terminal
    if _open_displays:
        return _display_bar
    drawable = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return _display_bar if drawable else _display_lines


@contextmanager
def _display_nothing(bar: ProgressBar, description: str, brief: bool) -> Iterator[Callable[[], None]]:
    yield lambda: None


@contextmanager
def _display_bar(bar: ProgressBar, description: str, brief: bool) -> Iterator[Callable[[], None]]:
    with _shared_display() as display:
        outer = list(zip(display.task_ids, _open_names, _open_bars, strict=False))  # one below the other
        nested = len(_open_bars) > 1

        def fields() -> dict[str, Any]:
            """What the line shows; the lines share their columns, and those above keep name, bar and count alone."""
            margin = max([0, *(len(name) - len(description) for _, name, _ in outer)])
            margin += max([0, *(len(one.progress_text) - len(bar.progress_text) for *_, one in outer)])
            shown = fit_to_width(bar, description, display.console.width - margin)
            for task, _, _ in outer:
                display.update(task, reading="", left="", width=shown["width"])
            return shown

        task = display.add_task("", total=bar.total, completed=bar.done, **fields())
        _open_names.append(description)
        try:
            yield lambda: display.update(task, completed=bar.done, **fields())
            if bar.total is None:
                display.update(task, total=1, completed=1)
        finally:
            _open_names.pop()
            if nested or (brief and bar.clock() - bar.start < PATIENCE_SECONDS):
                display.remove_task(task)
            if nested:
                _open_bars[-2].show()


@contextmanager
def _shared_display() -> Iterator[Any]:
    """Rich's display: the one that is open, or a new one."""
    if _open_displays:
        yield _open_displays[-1]
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress_bar import ProgressBar as Bar

    class FittedBar(BarColumn):
        def render(self, task: Any) -> Bar:
            bar = super().render(task)
            bar.width = task.fields["width"]
            return bar

    columns = (
        TextColumn("{task.fields[name]}", markup=False),
        FittedBar(),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[reading]}", style="cyan", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", style="dim", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        _open_displays.append(display)
        try:
            yield display
        finally:
            _open_displays.pop()


def fit_to_width(bar: ProgressBar, description: str, width: int) -> dict[str, Any]:
    """The parts of a line of `width` characters: metrics give way first, then the bar, then the description.

    The count and the times are always whole.
    """
    left = bar.seconds_left
    count, remaining = bar.progress_text, f"{_format_time(left)} left" if left else ""
    elapsed = len("0:00:00")
    free = width - len(count) - elapsed - len(remaining) - 5  # spaces between six columns
    reading = bar.metrics_within(max(0, free - len(description) - NARROW_BAR))
    across = free - len(description) - len(reading)
    if across < LEAST_BAR:
        kept = max(1, len(description) + across - LEAST_BAR)
        description, across = description[: kept - 1] + "…", LEAST_BAR
    return {
        "name": description,
        "width": min(BAR_WIDTH, across),
        "count": count,
        "reading": reading,
        "left": remaining,
    }


@contextmanager
def _display_lines(bar: ProgressBar, description: str, brief: bool) -> Iterator[Callable[[], None]]:
    printed_at, printed_count = bar.start, ""

    def line(*ending: str) -> None:
        nonlocal printed_at, printed_count
        printed_at, printed_count = bar.clock(), bar.progress_text
        parts = [
            f"{description} {bar.progress_text}".rstrip(),
            bar.metrics_text,
            _format_time(printed_at - bar.start),
            *ending,
        ]
        notify(" · ".join(part for part in parts if part))

    def show() -> None:
        if bar.clock() - printed_at >= LINE_SECONDS:
            left = bar.seconds_left
            line(*([f"{_format_time(left)} left"] if left else []))

    def begin() -> None:
        if not printed_count:
            line()

    later = _call_later(PATIENCE_SECONDS, lambda: notify(f"{description} …"))
    with later if brief else _call_later(LINE_SECONDS, begin):
        yield show
    if bar.progress_text != printed_count and not (brief and bar.clock() - bar.start < PATIENCE_SECONDS):
        line()


@contextmanager
def _call_later(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call something once what goes on has taken so many seconds."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _format_metric(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _format_time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


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
