"""Progress on stderr: a bar on a terminal, a line every ten seconds elsewhere.

Only the standard library is imported before a bar is drawn, by rich.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

from backbone.io.console import is_main_rank, print_line

PATIENCE_SECONDS = 2.0
LINE_SECONDS = 10.0  # between lines of progress if stderr is not a terminal
# Characters of a bar: the usual width, the least beside metrics, the least
BAR_WIDTH, NARROW_BAR, LEAST_BAR = 24, 12, 4

_open_bars: list[ProgressBar] = []
_open_names: list[str] = []
_open_displays: list[Any] = []  # rich's display, which nested bars share


@contextmanager
def progress(
    total: int | None, description: str, *, done: int = 0, brief: bool = False
) -> Iterator[ProgressBar]:
    """Show progress on stderr: `with progress(400, "training") as bar:`, then `bar.advance(loss=…)` after each step.

    On a terminal: bar, n/total, metrics, images/s, elapsed, time left. Elsewhere a line every ten seconds, even during
    the first step, and a last one. For a total of 0 nothing is shown.

    total  the number of steps; None if unknown
    done   steps that a resumed run took earlier, which count for n/total and not for the rates
    brief  leave no line behind unless it took longer than PATIENCE_SECONDS

    A nested bar is shown below the outer one, whose clock stands still meanwhile (`pause`).
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

    The rates leave out the first step, in which a program warms up, once another one has been measured, and the time
    inside `pause`.
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
        # (time of work, steps, images), oldest first
        self._marks: deque[tuple[float, float, float]] = deque([(self.start, done, 0)])
        self._warm = False  # whether the first mark is the end of a step rather than the start

    def advance(self, steps: float = 1, *, images: float = 0, **metrics: float | str) -> None:
        """Count `steps` steps in which `images` images were processed, and update the metrics shown.

        Fractions of steps and images count for the rates; only whole ones are shown.
        """
        self.done += steps
        self.images += images
        self.metrics.update(metrics)
        now = self.clock() - self._paused
        if len(self._marks) > 1 and now - self._marks[-1][0] < self.BURST_SECONDS:
            now = self._marks.pop()[0]  # several steps that came together count as one mark
        self._marks.append((now, self.done, self.images))
        if not self._warm and len(self._marks) > 2:
            self._marks.popleft()
            self._warm = True
        while len(self._marks) > 2 and now - self._marks[1][0] >= self.WINDOW_SECONDS:
            self._marks.popleft()
        self.show()

    def advance_images(self, images: float) -> None:
        """Count images, or fractions of them, as steps."""
        self.advance(images, images=images)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside the `with` (an evaluation, a preview) out of the rates."""
        start, paused = self.clock(), self._paused
        try:
            yield
        finally:
            self._paused = paused + self.clock() - start

    @property
    def images_per_second(self) -> float | None:
        """The recent rate; None before the first image."""
        (start, _, first), (end, _, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if last > first and end > start else None

    @property
    def seconds_left(self) -> float | None:
        """The time left at the recent rate, in seconds; None before the first step or for an unknown total."""
        (start, first, _), (end, last, _) = self._marks[0], self._marks[-1]
        if self.total is None or last <= first or end <= start:
            return None
        return max(0, self.total - self.done) * (end - start) / (last - first)

    @property
    def progress_text(self) -> str:
        count = int(self.done + 1e-6)
        if self.total is None:
            return f"{count}" if count else ""
        return f"{count}/{self.total}"

    @property
    def metrics_text(self) -> str:
        """The metrics and the rate, e.g. `loss 0.0813 · 5.2 images/s`."""
        return self.metrics_within(None)

    def metrics_within(self, width: int | None) -> str:
        """The metrics that fit `width` characters, chosen in this order: the first one, the rate, the others."""
        parts = [f"{name.replace('_', ' ')} {_format_metric(value)}" for name, value in self.metrics.items()]
        rate = self.images_per_second
        if rate is not None:
            parts.append(f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s")
        first, other_parts = parts[:1], parts[1:]
        by_priority = [*first, *other_parts[-1:], *other_parts[:-1]] if rate is not None else parts
        shown_parts: list[str] = []
        for part in by_priority:
            text = " · ".join(other for other in parts if other in shown_parts or other == part)
            if width is not None and len(text) > width:
                break
            shown_parts.append(part)
        return " · ".join(part for part in parts if part in shown_parts)


_Display: TypeAlias = Callable[[ProgressBar, str, bool], AbstractContextManager[Callable[[], None]]]


def _choose_display() -> _Display:
    if not is_main_rank():
        return _display_nothing
    # Rich replaces stderr then, and before version 15 its isatty() was False
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
        outer_lines = list(zip(display.task_ids, _open_names, _open_bars, strict=False))  # from top to bottom
        nested = len(_open_bars) > 1

        def fields() -> dict[str, Any]:
            """The fields of the line; lines share columns, and those above show only name, bar and count."""
            margin = max([0, *(len(name) - len(description) for _, name, _ in outer_lines)])
            margin += max(
                [0, *(len(other.progress_text) - len(bar.progress_text) for *_, other in outer_lines)]
            )
            line = fit_to_width(bar, description, display.console.width - margin)
            for task, _, _ in outer_lines:
                display.update(task, metrics="", remaining="", width=line["width"])
            return line

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
    """Rich's open display, or a new one."""
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
        TextColumn("{task.fields[metrics]}", style="cyan", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remaining]}", style="dim", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        _open_displays.append(display)
        try:
            yield display
        finally:
            _open_displays.pop()


def fit_to_width(bar: ProgressBar, description: str, width: int) -> dict[str, Any]:
    """The parts of a line of `width` characters: metrics are dropped first, then the bar and the description shrink.

    The count and the times are never cut.
    """
    seconds = bar.seconds_left
    count, remaining = bar.progress_text, f"{_format_time(seconds)} left" if seconds else ""
    elapsed = len("0:00:00")
    free = width - len(count) - elapsed - len(remaining) - 5  # spaces between six columns
    metrics = bar.metrics_within(max(0, free - len(description) - NARROW_BAR))
    bar_width = free - len(description) - len(metrics)
    if bar_width < LEAST_BAR:
        length = max(1, len(description) + bar_width - LEAST_BAR)
        description, bar_width = description[: length - 1] + "…", LEAST_BAR
    return {
        "name": description,
        "width": min(BAR_WIDTH, bar_width),
        "count": count,
        "metrics": metrics,
        "remaining": remaining,
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
        print_line(" · ".join(part for part in parts if part))

    def show() -> None:
        if bar.clock() - printed_at >= LINE_SECONDS:
            seconds = bar.seconds_left
            line(*([f"{_format_time(seconds)} left"] if seconds else []))

    def begin() -> None:
        if not printed_count:
            line()

    later = _call_later(PATIENCE_SECONDS, lambda: print_line(f"{description} …"))
    with later if brief else _call_later(LINE_SECONDS, begin):
        yield show
    if bar.progress_text != printed_count and not (brief and bar.clock() - bar.start < PATIENCE_SECONDS):
        line()


@contextmanager
def _call_later(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function if the `with` lasts longer than this many seconds."""
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
