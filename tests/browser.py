"""A real Chromium, driven through the DevTools protocol over a pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOREIGN = "evil.example"  # a name that the browser of the tests finds on this machine
NAMES = ("chromium", "chromium-browser", "google-chrome")
KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Tab": 9,
    "Enter": 13,
    "s": 83,
    "u": 85,
}


def chromium() -> str:
    """The browser that $CHROMIUM names, or the system's."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert found, "no Chromium here: install one, or name it in CHROMIUM"
    return found


class Browser:
    """A running browser; `open` gives tabs."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write, self.number, self.rest = read, write, 0, b""

    def ask(self, method: str, session: str | None = None, *, seconds: float = 90, **parameters: Any) -> Any:
        """The result of a command; AssertionError when it fails or does not answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, address: str) -> Tab:
        """A new tab at an address."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        tab.go(address)
        return tab

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer {method}"
            self.rest += os.read(self.read, 1 << 16)
        line, self.rest = self.rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message


class Tab:
    """A page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def go(self, address: str) -> None:
        """Loads an address and waits until its document is there."""
        self.browser.ask("Page.navigate", self.session, url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression, a promise awaited."""
        said = self.browser.ask(
            "Runtime.evaluate", self.session, expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in said, (script, said.get("exceptionDetails"))
        return said["result"].get("value")

    def until(self, script: str, *, seconds: float = 90) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.1)

    def press(self, key: str) -> None:
        """A key, down and up."""
        typed = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = key if len(key) > 1 else f"Key{key.upper()}"
        for kind, text in (("keyDown" if typed else "rawKeyDown", typed), ("keyUp", "")):
            self.browser.ask(
                "Input.dispatchKeyEvent", self.session, type=kind, key=key, code=code, text=text,
                windowsVirtualKeyCode=KEYS[key],
            )  # fmt: skip

    def drag(self, points: Sequence[tuple[float, float]]) -> None:
        """The mouse, pressed at the first point of the window, moved along the others, and released."""
        for kind, (x, y) in (
            ("mousePressed", points[0]), *(("mouseMoved", point) for point in points[1:]), ("mouseReleased", points[-1])
        ):  # fmt: skip
            self.browser.ask(
                "Input.dispatchMouseEvent",
                self.session,
                type=kind,
                x=x,
                y=y,
                button="left",
                buttons=1,
                clickCount=1,
            )

    def size(self, width: int, height: int) -> None:
        """The window's size in CSS pixels."""
        self.browser.ask(
            "Emulation.setDeviceMetricsOverride", self.session, width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip

    def keep(self, name: str) -> None:
        """What is seen, as a PNG of this name in the folder that $SCREENSHOTS names, where it names one."""
        if "SCREENSHOTS" in os.environ:
            path = Path(os.environ["SCREENSHOTS"]) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                base64.b64decode(self.browser.ask("Page.captureScreenshot", self.session)["data"])
            )

    # The pages to draw on: `customize sketch` and `edit paint`

    def open_canvas(self, address: str) -> None:
        """Loads such a page and waits until one can draw on it."""
        self.go(address)
        self.until("document.body.dataset.ready === 'yes'")

    def click(self, name: str) -> None:
        """A click on the element of this id."""
        self.run(f"document.getElementById('{name}').click()")

    def draw(self, *lines: Sequence[tuple[float, float]]) -> None:
        """Lines on the canvas with the mouse; points are shares of its width."""
        left, top, side = self.run(
            "(({x, y, width}) => [x, y, width])(document.getElementById('canvas').getBoundingClientRect())"
        )
        for line in lines:
            self.drag([(left + x * side, top + y * side) for x, y in line])

    def await_kept(self, count: int) -> None:
        """Waits until nothing is under way, and so many results are kept and shown."""
        self.until(f"document.querySelectorAll('.kept').length === {count} && !asking.running")
        self.until("[...document.images].every(image => image.naturalWidth)")


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in `folder`; ended afterwards."""
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    command = [
        chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
        "--disable-dev-shm-usage", f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1", f"--user-data-dir={folder}",
    ]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$0" "$@" 3<&{their_read} 4>&{their_write}', *command],
        pass_fds=(their_read, their_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_read)
    os.close(their_write)
    try:
        yield Browser(our_read, our_write)
    finally:
        process.terminate()
        process.wait(timeout=60)
        os.close(our_read)
        os.close(our_write)


@contextmanager
def served_page(program: str, *words: str) -> Iterator[str]:
    """The address of the page that a command serves, which is killed afterwards."""
    process, address = serve_page(program, *words)
    try:
        yield address
    finally:
        process.kill()
        process.wait()


def serve_page(program: str, *words: str, cwd: Path | None = None) -> tuple[subprocess.Popen[str], str]:
    """A command that serves a page, in a process of its own, and the page's address once it is answered."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"{program}.cli", *words, "--no-browser"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "http://" in line:
            address = line.split()[line.split().index("Open") + 1]
            break
    else:
        raise AssertionError("the server said no address")
    host, port = address.removeprefix("http://").split("/")[0].split(":")
    deadline = time.time() + 30
    while True:
        with socket.socket() as knock:
            if knock.connect_ex((host, int(port))) == 0:
                return process, address
        assert time.time() < deadline
        time.sleep(0.05)
