"""A page's server where it ends in the middle of its work."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from backbone.io import local_server
from backbone.io.local_server import NewestOnly, answer_post, build_app, serve_locally


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_with_what_it_is_making_and_says_so(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    turns, begun, answers = NewestOnly(), threading.Event(), []

    def make(body: dict[str, Any]) -> dict[str, Any]:
        with turns.turn() as advance:
            for _ in range(2000):  # forty seconds of steps
                advance(0.0005)
                begun.set()
                time.sleep(0.02)
        return {}

    async def answer(request: Request) -> Response:
        return await answer_post(request, make)

    def build(token: str, port: int) -> ASGIApp:
        return build_app(token, port, gets={}, posts={"make": answer})

    def ask(port: int, token: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", f"/{token}/make", json.dumps({}), {"Content-Type": "application/json"})
        given = connection.getresponse()
        answers.append((given.status, given.read().decode()))

    def strike() -> None:
        begun.wait(20)
        os.kill(os.getpid(), number)

    def end(text: str) -> None:
        if text.startswith("Open"):
            port, token = text.split(":")[2].split()[0].split("/")[:2]
            threads.extend(
                threading.Thread(target=work, daemon=True)
                for work in (partial(ask, int(port), token), strike)
            )
            for thread in threads:
                thread.start()

    threads: list[threading.Thread] = []
    monkeypatch.setattr(local_server, "notify", end)
    began = time.monotonic()
    try:
        serve_locally(build, note="it ends", turns=turns)
    except KeyboardInterrupt:
        assert number == signal.SIGINT
    assert begun.is_set() and time.monotonic() - began < 30
    threads[0].join(20)
    assert answers == [(400, "The server has ended before this was made.")]
