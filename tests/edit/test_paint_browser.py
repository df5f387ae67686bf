"""The page of `edit paint` in a real Chromium. Its own command: `python -m pytest -m browser tests/edit`.

CHROMIUM names the browser; SCREENSHOTS a folder that keeps what was seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbone.io.examples import EXAMPLES, SCENE
from backbone.io.files import read_json
from edit.paint.board import RECORD
from tests.browser import Browser, Tab, served_page

pytestmark = pytest.mark.browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "edits"


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    steps = os.environ.get("PAINT_STEPS", "4")
    words = ("--source", "a cat in a park", "--target", "a cat wearing a hat in a park", "--steps", steps)
    with served_page("edit", "paint", str(EXAMPLES / SCENE[0]), *words, "--out", str(folder)) as found:
        yield found


def paint_upper_left(tab: Tab) -> None:
    """A broad stroke over the upper left quarter."""
    tab.run("document.getElementById('width').value = document.getElementById('width').max")
    tab.draw([(0.15, 0.15), (0.3, 0.2), (0.3, 0.3), (0.15, 0.3)])


def test_what_is_painted_changes_and_is_painted_again_after_a_reload(
    browser: Browser, folder: Path, address: str
) -> None:
    tab = browser.open("about:blank#")
    tab.size(1200, 900)
    tab.open_canvas(address)
    assert tab.run("document.getElementById('target').value") == "a cat wearing a hat in a park"
    tab.click("edit")
    tab.await_kept(1)
    paint_upper_left(tab)
    tab.click("edit")
    tab.await_kept(2)
    tab.keep("paint")
    found, painted = read_json(folder / RECORD)["edits"]
    assert not found["painted"] and painted["painted"]
    with Image.open(folder / painted["mask"]) as mask:
        left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
        white = np.asarray(mask.convert("L")) > 127
    assert left < 25 and top < 25 and right < 80 and bottom < 80 and white.any()
    tab.open_canvas(address)
    tab.await_kept(2)
    share = tab.run(
        "pen.context.getImageData(0, 0, pen.canvas.width, pen.canvas.height).data"
        ".reduce((n, value, k) => n + (k % 4 === 3 && value > 127), 0) / pen.canvas.width / pen.canvas.height"
    )
    assert abs(share - white.mean()) < 0.02
