"""The labelling page in a real Chromium. Its own command: `python -m pytest -m browser tests/align/test_browser.py`.

CHROMIUM names the browser; SCREENSHOTS a folder that keeps what was seen.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from align.pairs.choices import CHOICES, read_choices, standing_choices
from backbone.io.files import read_json, write_json
from backbone.io.report import image_figure, line_plot, write_report
from tests.align.test_label import folder_of, started
from tests.browser import FOREIGN, Browser, Tab, served_page

pytestmark = pytest.mark.browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path, prompts=6)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    with served_page("align", "label", str(folder)) as found:
        yield found


def verdicts(folder: Path) -> list[str]:
    return [choice.verdict for choice in standing_choices(read_choices(folder / CHOICES))]


def ready(tab: Tab) -> None:
    tab.until("state && !busy && [...document.images].every(image => image.naturalWidth)")


def answer(tab: Tab, key: str) -> None:
    before = tab.run("state.number")
    tab.press(key)
    tab.until(f"state.number !== {before} && !busy")


def test_keys_choose_and_undo_and_a_reload_goes_on(browser: Browser, folder: Path, address: str) -> None:
    tab = browser.open(address)
    tab.size(1200, 800)
    ready(tab)
    tab.keep("wide")
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp", "s"):
        answer(tab, key)
    assert verdicts(folder) == ["left", "right", "tie", "both_bad", "skip"]
    prompt = tab.run("document.getElementById('prompt').textContent")
    answer(tab, "u")
    assert verdicts(folder) == ["left", "right", "tie", "both_bad"]
    tab.go(address)
    ready(tab)
    assert tab.run("document.getElementById('count').textContent") == "4 of 6"
    assert prompt != tab.run("document.getElementById('prompt').textContent")
    answer(tab, "ArrowLeft")
    answer(tab, "ArrowLeft")
    tab.until("state.done")
    tab.keep("done")
    assert tab.run("document.querySelector('#done').checkVisibility()")


def test_a_click_chooses_the_picture_that_was_clicked(browser: Browser, folder: Path, address: str) -> None:
    tab = browser.open(address)
    ready(tab)
    tab.run("document.getElementById('right').click()")
    tab.until("state.number === 1 && !busy")
    assert verdicts(folder) == ["right"]


def test_a_killed_server_loses_nothing(browser: Browser, folder: Path) -> None:
    process, where = started(folder)
    tab = browser.open(where)
    ready(tab)
    answer(tab, "ArrowLeft")
    process.kill()
    process.wait()
    tab.press("ArrowRight")
    tab.until("document.getElementById('message').textContent.includes('does not answer')")
    assert verdicts(folder) == ["left"]
    with served_page("align", "label", str(folder)) as where:
        tab.go(where)
        ready(tab)
        assert tab.run("document.getElementById('count').textContent") == "1 of 6"
        answer(tab, "ArrowDown")
    assert verdicts(folder) == ["left", "tie"]


def test_a_server_that_ends_between_an_answer_and_its_pictures_is_said(
    browser: Browser, folder: Path
) -> None:
    process, where = started(folder)
    tab = browser.open(where)
    ready(tab)
    tab.run(
        """(() => {
          const others = window.fetch;
          window.fetch = (where, how) => where === "state" ? Promise.reject(new TypeError()) : others(where, how);
          window.picture = () => Promise.resolve(false);
        })()"""
    )
    tab.press("ArrowLeft")
    tab.until("document.getElementById('message').textContent.includes('does not answer')")
    assert not tab.run("document.getElementById('reload').hidden")
    process.kill()
    process.wait()


def test_a_choice_that_could_not_be_kept_says_why(browser: Browser, folder: Path, address: str) -> None:
    tab = browser.open(address)
    ready(tab)
    folder.rename(folder.with_name("elsewhere"))
    tab.press("ArrowLeft")
    message = "document.getElementById('message').textContent"
    tab.until(f"{message}.includes('is gone, so the choice was not kept')")
    folder.with_name("elsewhere").rename(folder)
    tab.click("reload")
    ready(tab)
    answer(tab, "ArrowRight")
    assert verdicts(folder) == ["right"]


def test_two_tabs_never_answer_one_question_twice(browser: Browser, folder: Path, address: str) -> None:
    one, other = browser.open(address), browser.open(address)
    ready(one)
    ready(other)
    answer(one, "ArrowLeft")
    other.press("ArrowRight")
    other.until("document.getElementById('message').textContent.includes('Another window')")
    assert verdicts(folder) == ["left"]
    ready(other)
    answer(other, "ArrowRight")
    assert verdicts(folder) == ["left", "right"]


def test_a_wrong_token_or_a_foreign_name_reaches_nothing(
    browser: Browser, folder: Path, address: str
) -> None:
    token = address.rstrip("/").split("/")[-1]
    wrong = browser.open(address.replace(token, "x" * len(token)))
    assert "Which is better" not in wrong.run("document.documentElement.outerHTML")
    rebound = browser.open(address.replace("127.0.0.1", FOREIGN))
    assert "alone" in rebound.run("document.body.textContent")
    asked = rebound.run("fetch('state').then(() => 'asked', () => 'forbidden')")
    assert asked == "forbidden", "the answer's own policy lets that page ask for nothing"
    state = browser.open(address.replace("127.0.0.1", FOREIGN) + "state")
    assert "alone" in state.run("document.body.textContent")


def test_no_path_leads_out(browser: Browser, address: str) -> None:
    tab = browser.open(address)
    ready(tab)
    for path in ("picture/0/..%2f..%2fsamples.json", "picture/..%2fsamples.json/left", "../samples.json"):
        assert tab.run(f"fetch('{path}').then(answer => answer.status)") == 404


def test_another_site_cannot_post(browser: Browser, folder: Path, address: str, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<!doctype html><title>elsewhere</title>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def translate_path(self, path: str) -> str:
            return str(tmp_path / "site" / "index.html")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        tab = browser.open(f"http://{FOREIGN}:{server.server_port}/")
        body = "JSON.stringify({number: 0, verdict: 'left'})"
        for flags in ("mode: 'no-cors'", "mode: 'cors', headers: {'Content-Type': 'application/json'}"):
            tab.run(
                f"fetch('{address}choose', {{method: 'POST', body: {body}, {flags}}}).catch(() => 0).then(() => 1)"
            )
        assert tab.run(f"fetch('{address}state').then(() => 'read', () => 'refused')") == "refused"
    finally:
        server.shutdown()
    assert not (folder / CHOICES).exists()


def test_the_keyboard_alone_suffices_and_focus_is_seen(browser: Browser, folder: Path, address: str) -> None:
    tab = browser.open(address)
    ready(tab)
    widths = []
    for _ in range(5):
        tab.press("Tab")
        widths.append(tab.run("parseFloat(getComputedStyle(document.activeElement).outlineWidth)"))
    assert all(width >= 2 for width in widths)
    tab.keep("focus")
    tab.run("document.querySelector('[data-verdict=tie]').focus()")
    answer(tab, "Enter")
    assert verdicts(folder) == ["tie"]


def test_it_fits_a_phone(browser: Browser, address: str) -> None:
    tab = browser.open(address)
    tab.size(390, 760)
    ready(tab)
    tab.keep("phone")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    shown = "[...document.querySelectorAll('button')].filter(b => b.checkVisibility())"
    assert min(tab.run(f"{shown}.map(b => b.offsetHeight)")) >= 40  # big enough for a thumb


def test_both_pictures_are_seen_on_a_phone_however_long_the_prompt(browser: Browser, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, prompts=1)
    record = read_json(folder / "samples.json")
    record["prompts"][0]["prompt"] = "חתול אדום בפארק (2). " + "a very long prompt " * 47
    write_json(folder / "samples.json", record)
    with served_page("align", "label", str(folder)) as where:
        tab = browser.open(where)
        for width, height in ((390, 844), (360, 640), (844, 390), (1200, 800)):
            tab.size(width, height)
            ready(tab)
            bottoms = "[...document.images].map(image => image.getBoundingClientRect().bottom)"
            assert max(tab.run(bottoms)) <= height
        assert tab.run("getComputedStyle(document.getElementById('prompt')).direction") == "rtl"
        tab.keep("long")


def test_what_cannot_be_shown_is_said_until_it_is_skipped(
    browser: Browser, folder: Path, address: str
) -> None:
    tab = browser.open(address)
    ready(tab)
    for path in folder.glob("pictures/*-s00.png"):
        path.unlink()
    tab.press("ArrowLeft")  # this pair is there still
    message = "document.getElementById('message').textContent"
    for number in (1, 2):
        tab.until(f"state.number === {number} && {message}.includes('cannot be shown; skip it') && !busy")
        tab.run("document.getElementById('reload').click()")
        tab.until(f"{message}.includes('cannot be shown; skip it') && !busy")
        tab.press("ArrowLeft")  # which is no answer now
        tab.press("s")
    tab.until("state.number === 3")
    assert verdicts(folder) == ["left", "skip", "skip"]


def test_nothing_is_fetched_from_elsewhere(browser: Browser, address: str) -> None:
    tab = browser.open(address)
    ready(tab)
    own = address.split("/")[2]
    names = tab.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and all(name.split("/")[2] == own for name in names)


def test_a_report_shows_its_own_and_loads_and_runs_nothing_else(browser: Browser, tmp_path: Path) -> None:
    """Whatever came into a page: no script runs, and nothing is asked for; its images and styles are there."""
    asked: list[str] = []

    class Remembers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Remembers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{server.server_port}"
    hostile = (
        f"<script>document.title = 'ran'</script><script src='{there}/a.js'></script><img src='{there}/b.png' "
        f"onerror='document.title = 1'><link rel=stylesheet href='{there}/c.css'><iframe src='{there}/d'></iframe>"
    )
    curve = line_plot("loss", {"one": [(0, 1), (1, 0)], "two": [(0, 0), (1, 1)]})
    try:
        write_report(
            tmp_path / "r.html", "whole", [image_figure(Image.new("RGB", (8, 8), "red")), curve, hostile]
        )
        tab = browser.open((tmp_path / "r.html").as_uri())
        tab.until("document.readyState === 'complete'")
        assert tab.run("document.title") == "whole"
        assert tab.run("document.images[0].naturalWidth") == 8
        assert tab.run("getComputedStyle(document.images[0]).imageRendering") == "pixelated"
        assert tab.run("getComputedStyle(document.querySelector('.legend span')).color") == "rgb(37, 99, 235)"
    finally:
        server.shutdown()
    assert asked == []
