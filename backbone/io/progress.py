"""Progress on stderr: a bar on a terminal, a line every ten seconds elsewhere.

Nothing but the standard library is imported before a bar is drawn, which rich draws.
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
LINE_SECONDS = 10.0  # from one line of progress to the next, away from a terminal
BAR_WIDTH, NARROW_BAR, LEAST_BAR = 24, 12, 4  # characters: at its best, before metrics give way, at the least

_open_bars: list[ProgressBar] = []
_open_names: list[str] = []
_open_displays: list[Any] = []  # rich's display on the terminal, which inner bars share


@contextmanager
def progress(
    total: int | None, description: str, *, done: int = 0, brief: bool = False
) -> Iterator[ProgressBar]:
    """Show progress on stderr: `with progress(400, "training") as bar:`, then `bar.advance(loss=…)` after each step.

    On a terminal: bar, n/total, metrics, images/s, elapsed, time left. Elsewhere a line every ten seconds, however long
    the first step takes, and a last one. Where there is nothing to do, nothing is shown.

    total  how many steps there are; None where that is not known
    done   steps that a resumed run took earlier, which count for n/total and not for the rates
    brief  leave nothing behind unless it took longer than PATIENCE_SECONDS

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
        print_line(" · ".join(part for part in parts if part))

    def show() -> None:
        if bar.clock() - printed_at >= LINE_SECONDS:
            left = bar.seconds_left
            line(*([f"{_format_time(left)} left"] if left else []))

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
    """Call something once what goes on has taken this many seconds."""
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
