"""The page of `edit paint` in a real Chromium. Its own command: `python -m pytest -m browser tests/edit`.

CHROMIUM names the browser; SCREENSHOTS a folder that keeps what was seen.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbone.io.examples import EXAMPLES, SCENE
from backbone.io.files import read_json
from edit.paint.board import RECORD
from tests.browser import Browser, Tab, serve_page
from tests.browser import started as browser_started

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser_started(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "edits"


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    steps = os.environ.get("PAINT_STEPS", "4")
    words = ("--source", "a cat in a park", "--target", "a cat wearing a hat in a park", "--steps", steps)
    process, where = serve_page("edit", "paint", str(EXAMPLES / SCENE[0]), *words, "--out", str(folder))
    try:
        yield where
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def paint_upper_left(tab: Tab) -> None:
    """A broad stroke over the upper left quarter."""
    box = tab.run(
        "(({x, y, width}) => [x, y, width])(document.getElementById('canvas').getBoundingClientRect())"
    )
    left, top, side = box
    tab.run("document.getElementById('width').value = document.getElementById('width').max")
    tab.drag(
        [(left + x * side, top + y * side) for x, y in ((0.15, 0.15), (0.3, 0.2), (0.3, 0.3), (0.15, 0.3))]
    )


def wait_for(tab: Tab, count: int) -> None:
    tab.until(f"document.querySelectorAll('.kept').length === {count} && !asking.running")
    tab.until("[...document.images].every(image => image.naturalWidth)")


def test_what_is_painted_changes_and_is_painted_again_after_a_reload(
    browser: Browser, folder: Path, address: str
) -> None:
    tab = browser.open("about:blank#")
    tab.size(1200, 900)
    tab.go(address)
    tab.until("document.body.dataset.ready === 'yes'")
    assert tab.run("document.getElementById('target').value") == "a cat wearing a hat in a park"
    tab.run("document.getElementById('edit').click()")
    wait_for(tab, 1)
    paint_upper_left(tab)
    tab.run("document.getElementById('edit').click()")
    wait_for(tab, 2)
    if "SCREENSHOTS" in os.environ:
        tab.screenshot(Path(os.environ["SCREENSHOTS"]) / "paint.png")
    found, painted = read_json(folder / RECORD)["edits"]
    assert not found["painted"] and painted["painted"]
    with Image.open(folder / painted["mask"]) as mask:
        left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
        white = np.asarray(mask.convert("L")) > 127
    assert left < 25 and top < 25 and right < 80 and bottom < 80 and white.any()
    tab.go(address)
    tab.until("document.body.dataset.ready === 'yes'")
    wait_for(tab, 2)
    share = tab.run(
        "pen.context.getImageData(0, 0, pen.canvas.width, pen.canvas.height).data"
        ".reduce((n, value, k) => n + (k % 4 === 3 && value > 127), 0) / pen.canvas.width / pen.canvas.height"
    )
    assert abs(share - white.mean()) < 0.02
