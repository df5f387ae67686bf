"""Progress that reads well with and without a terminal, and rates that leave out what is no step."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backbone.io.console import UserError, capture_messages, notify
from backbone.io.progress import ProgressBar, fit_to_width, progress

ROOT = Path(__file__).parents[3]


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


@pytest.mark.parametrize("on_terminal", [False, True])
def test_nothing_to_do_shows_no_progress(on_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: on_terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    with progress(0, "preparing") as bar:
        assert bar.seconds_left is None
    assert shown.getvalue() == ""


def test_progress_that_fails_claims_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress(50, "training") as bar:
            bar.advance()
            raise UserError("The loss is not a number. Lower the rate.")

    with pytest.raises(UserError):
        fail()
    assert capsys.readouterr().err == ""


def test_a_first_step_that_takes_long_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backbone.io.progress.LINE_SECONDS", 0.05)
    with progress(2, "training") as bar:
        time.sleep(0.3)
        assert capsys.readouterr().err == "training 0/2 · 0:00\n"
        bar.advance(2)


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


def test_a_high_rate_is_a_whole_number() -> None:
    now = 0.0
    bar = ProgressBar(9, clock=lambda: now)
    for _ in range(3):
        now += 1
        bar.advance(images=1320)
    assert bar.metrics_text == "1,320 images/s"


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


def test_what_remains_is_told_without_the_slow_start_and_without_evaluations() -> None:
    now = 0.0
    bar = ProgressBar(10, clock=lambda: now)
    now = 40.0  # weights load, kernels warm up
    bar.advance()
    now = 42.0
    bar.advance(images=4)
    assert bar.seconds_left == pytest.approx(8 * 2.0)
    with bar.pause():
        now = 100.0
    now = 102.0
    bar.advance(images=4)
    assert bar.seconds_left == pytest.approx(7 * 2.0)
    assert bar.images_per_second == pytest.approx(2.0)


def test_images_that_come_eight_at_once_are_told_at_their_true_rate() -> None:
    now = 0.0
    bar = ProgressBar(24, clock=lambda: now)
    for batch in (1, 2):
        now = 40.0 * batch
        for _ in range(8):
            bar.advance_images(1)
            now += 0.001
        assert bar.seconds_left == pytest.approx((24 - bar.done) * 5.0, rel=0.01)


def test_a_share_of_an_image_counts_for_the_rate_and_is_not_shown() -> None:
    now = 0.0
    bar = ProgressBar(8, clock=lambda: now)
    for _ in range(5):
        now += 1.0
        bar.advance_images(8 / 25)
    assert bar.progress_text == "1/8" and bar.seconds_left == pytest.approx(20.0)
    for _ in range(20):
        now += 1.0
        bar.advance_images(8 / 25)
    assert bar.progress_text == "8/8"


def test_an_inner_bar_stops_the_clock_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(ProgressBar.__init__, "__kwdefaults__", {"done": 0, "clock": lambda: now})
    with progress(10, "training") as bar:
        for _ in range(2):
            now += 1.0
            bar.advance()
        with progress(8, "evaluating", brief=True):
            now += 60.0
        now += 1.0
        bar.advance()
        assert bar.seconds_left == pytest.approx(7.0)


def test_a_brief_phase_says_nothing_unless_it_lasts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress(3, "reading", brief=True) as bar:
        bar.advance_images(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("backbone.io.progress.PATIENCE_SECONDS", 0.02)
    with progress(3, "reading", brief=True) as bar:
        time.sleep(0.2)
        bar.advance_images(3)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "reading …" and said[1].startswith("reading 3/3 · ")
    with progress(None, "loading moji", brief=True):
        time.sleep(0.2)
    assert capsys.readouterr().err == "loading moji …\n"


@pytest.mark.parametrize("width", [34, 48, 80, 200])
@pytest.mark.parametrize("total", [8, 100_000])
def test_a_line_of_progress_fits_and_keeps_its_bar_its_count_and_its_times(width: int, total: int) -> None:
    now = 0.0
    bar = ProgressBar(total, clock=lambda: now)
    for _ in range(5):
        now += 3.4
        bar.advance(images=1, loss=0.05223, learning_rate=0.001, accuracy=0.625)
    parts = fit_to_width(bar, "training", width)
    elapsed = "0:00:17"
    shown = (
        parts["name"],
        "━" * parts["width"],
        parts["count"],
        parts["metrics"],
        elapsed,
        parts["remaining"],
    )
    assert len(" ".join(shown)) <= width or (width < 48 and total > 8)
    assert parts["count"] == f"5/{total}" and parts["remaining"].endswith("left")
    assert parts["width"] >= (12 if width >= 80 else 4)
    if width == 80 and total == 8:
        assert parts["metrics"] == "loss 0.05223 · 0.294 images/s"
    if width == 200:
        assert parts["metrics"] == bar.metrics_text and "accuracy 0.625" in bar.metrics_text


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal_progress_is_a_bar_with_figures_and_brackets_stay_as_they_are() -> None:
    import pty

    script = (
        "import time\nfrom backbone.io.console import notify\nfrom backbone.io.progress import progress\n"
        "with progress(3, 'learning [red] [V]') as bar:\n"
        "    for step in range(3):\n        time.sleep(0.06)\n"
        "        bar.advance(images=1, loss=0.25, learning_rate=0.00125)\n"
        "    with progress(8, 'evaluating step 100', brief=True) as inner:\n"
        "        for _ in range(5):\n            inner.advance_images(1)\n            time.sleep(0.06)\n"
        "        time.sleep(0.3)\n"
        "    notify('between')\n"
    )
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
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
    for part in ("learning [red] [V]", "━", "3/3", "loss 0.25", "images/s", "between", "evaluating", "5/8"):
        assert part in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    last = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("learning")][-1].rstrip()
    assert len(last) <= 80 and "━" * 12 in last and re.search(r" 0:00:0\d", last) and "rate" not in last
    pairs = re.findall(r"(learning [^\r\n]*)[\r\n]+(evaluating [^\r\n]*)", plain)
    assert pairs and all(len(line.rstrip()) <= 80 for pair in pairs for line in pair)
    assert "━" * 8 in pairs[-1][1] and "5/8" in pairs[-1][1] and pairs[-1][1].rstrip().endswith("left")
    assert "evaluating" not in plain[plain.rindex("learning") :]


def test_how_far_something_is_is_no_line_for_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("backbone.io.progress.LINE_SECONDS", 0.0)
    with capture_messages() as heard, progress(2, "drawing") as bar:
        bar.advance()
        notify("The prompt is cut.")
        bar.advance()
    assert "drawing 2/2" in capsys.readouterr().err and heard == ["The prompt is cut."]
