"""The sketch pad in a real Chromium. Its own command: `python -m pytest -m browser tests/customize`.

CHROMIUM names the browser; SCREENSHOTS a folder that keeps what was seen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from backbone.io.files import read_json
from customize.sketch.pad import RECORD
from tests.browser import Browser, Tab, served_page

pytestmark = pytest.mark.browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "drawings"


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    steps = os.environ.get("SKETCH_STEPS", "4")
    words = ("an apple in a park", "--steps", steps, "--out", str(folder))
    with served_page("customize", "sketch", *words) as found:
        yield found


def open_pad(browser: Browser, address: str) -> Tab:
    tab = browser.open("about:blank#")
    tab.size(1200, 900)
    tab.open_canvas(address)
    return tab


def draw_apple(tab: Tab) -> None:
    """A round thing with a stalk, by the mouse."""
    turns = [turn / 20 * math.tau for turn in range(21)]
    apple = [(0.5 + 0.26 * math.cos(turn), 0.58 + 0.26 * math.sin(turn)) for turn in turns]
    tab.draw(apple, [(0.5, 0.32), (0.53, 0.24), (0.58, 0.18)])


def ink(tab: Tab) -> int:
    """How many pixels of the page are black."""
    data = "pen.context.getImageData(0, 0, pen.canvas.width, pen.canvas.height).data"
    black = "k % 4 === 3 && value > 127 && all[k - 1] < 128"
    return int(tab.run(f"{data}.reduce((n, value, k, all) => n + ({black}), 0)"))


def test_what_is_drawn_with_the_mouse_is_drawn_by_the_model_and_kept(
    browser: Browser, folder: Path, address: str
) -> None:
    tab = open_pad(browser, address)
    draw_apple(tab)
    if not tab.run("document.getElementById('live').checked"):
        tab.click("draw")
    tab.until("document.querySelectorAll('.kept').length && !asking.running")
    tab.keep("sketch")
    (*_, last) = read_json(folder / RECORD)["drawings"]
    assert last["wish"]["prompt"] == "an apple in a park"
    with Image.open(folder / last["sketch"]) as lines:
        left, top, right, bottom = lines.convert("L").getbbox() or (0, 0, 0, 0)
    assert abs((left + right) / 2 - 64) < 4 and 50 < bottom - top < 110
    before, black = tab.run("document.querySelectorAll('.kept').length"), ink(tab)
    tab.open_canvas(address)  # as after a reload
    tab.await_kept(before)
    assert tab.run("document.querySelectorAll('#images img').length") == 1
    assert abs(ink(tab) - black) < 0.5 * black, "the lines are there again"


def test_the_newest_drawing_is_asked_for_again_where_an_older_one_overtook_it(
    browser: Browser, address: str
) -> None:
    tab = open_pad(browser, address)
    tab.run(
        """(() => {
          const others = window.fetch, answers = [[300, 200, 1], [0, 409, null], [0, 200, 3]];
          window.fetch = (where, how) => {
            if (where !== "draw") return others(where, how);
            const [wait, status, value] = answers.shift();
            const answer = new Response(JSON.stringify(value), { status });
            return new Promise(done => setTimeout(() => done(answer), wait));
          };
        })()"""
    )
    assert tab.run("Promise.all([asking.ask('draw', {}), asking.ask('draw', {})])") == [None, 3]
    assert tab.run("asking.running") == 0


def test_what_another_window_or_server_put_an_end_to_is_said(
    browser: Browser, folder: Path, address: str
) -> None:
    tab = open_pad(browser, address)
    message = "document.getElementById('message').textContent"
    for status, said in ((409, "Another window"), (404, "open its new address"), (503, "No space left")):
        answered = f"() => Promise.resolve(new Response('{said}', {{ status: {status} }}))"
        tab.run(f"(window.others ??= window.fetch, window.fetch = {answered}, asking.ask('draw', {{}}))")
        assert said in tab.run(message)
    tab.run("window.fetch = window.others, true")
    draw_apple(tab)
    tab.click("draw")
    tab.until("document.querySelectorAll('.kept').length && !asking.running")
    for path in folder.glob("*-sketch.png"):
        path.unlink()
    tab.open_canvas(address)  # as after a reload: the page works without them
    assert "image is gone" in tab.run(message)


def test_lines_are_taken_back_erased_and_cleared(browser: Browser, address: str) -> None:
    tab = open_pad(browser, address)
    tab.run("document.getElementById('live').checked = false")
    draw_apple(tab)
    whole = ink(tab)
    tab.click("undo")
    assert 0 < ink(tab) < whole
    tab.click("eraser")
    some = ink(tab)
    draw_apple(tab)
    assert ink(tab) < some / 2
    tab.click("clear")
    assert ink(tab) == 0
    tab.click("draw")
    tab.until("document.getElementById('message').textContent.includes('one colour everywhere')")


def test_a_phone_shows_both_pages_without_scrolling_sideways(browser: Browser, address: str) -> None:
    tab = open_pad(browser, address)
    tab.size(390, 844)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.keep("sketch-phone")
