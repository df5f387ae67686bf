"""Serve a page to a browser on this machine, and to nobody else.

The server listens on 127.0.0.1, and its address holds a secret token. A request with another Host is refused, so that
a foreign name that points at 127.0.0.1 (DNS rebinding) reaches nothing; a post from another origin is refused too.
"""

from __future__ import annotations

import base64
import binascii
import io
import mimetypes
import os
import secrets
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backbone.io.console import UserError, capture_messages, format_error, notify
from backbone.io.records import parse_json

SHARED = sorted(Path(__file__).with_name("pages").iterdir())  # parts that pages share, by file name
PNG, LARGEST_SIDE = "data:image/png;base64,", 4096
LARGEST_POST = 4 * 2**20  # bytes of a post with an image
HOSTS = ("127.0.0.1", "localhost")
REQUEST_SECONDS = 10.0  # in which a request has to be complete
SHUTDOWN_SECONDS = 2  # for answers in progress at the end; a machine that shuts down kills after ten
DENY_ALL = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def answer_page(path: Path) -> Response:
    """A page on which only its own script and style run, by a `{{nonce}}` that is new each time.

    `{{head.html}}`, `{{base.css}}` … are replaced by the files of `pages/`, which pages share.
    """
    nonce = secrets.token_urlsafe(12)
    policy = f"{DENY_ALL}; img-src 'self'; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
    text = path.read_text(encoding="utf-8").replace("{{nonce}}", nonce)
    for shared in SHARED:
        text = text.replace(f"{{{{{shared.name}}}}}", shared.read_text(encoding="utf-8").strip("\n"))
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def answer_image(path: Path) -> Response:
    """An image from the disk; 404 with the reason if it cannot be read."""
    try:
        kind = mimetypes.guess_type(path.name)[0] or "image/png"
        return Response(path.read_bytes(), media_type=kind)
    except OSError as error:
        return PlainTextResponse(format_error(error) or "the image cannot be read", 404)


async def answer_post(request: Request, act: Callable[[dict[str, Any]], dict[str, Any]]) -> Response:
    """Answer a post with the result of `act` on its JSON object, computed in a thread, as JSON.

    The lines that were printed meanwhile are added as `said`. Errors: 400 with the message for a bad post
    (`ValueError`, `UserError`), 409 if a newer one has come (`Overtaken`), 503 if the result could not be written.
    """
    try:
        with capture_messages() as messages:
            answer = await run_in_threadpool(act, await read_post(request, LARGEST_POST))
        return JSONResponse({**answer, "said": messages})
    except Overtaken:
        return PlainTextResponse("Another window asked for something newer, so this was not made.", 409)
    except (ValueError, UserError) as error:
        return PlainTextResponse(str(error), 400)
    except OSError as error:
        reason = format_error(error) or str(error)
        notify(f"Error: {reason}")
        return PlainTextResponse(reason, 503)


def read_data_url(data_url: object, noun: str) -> Image.Image:
    """The RGB image of a PNG data URL; `ValueError` for anything else, and above LARGEST_SIDE pixels a side."""
    if not isinstance(data_url, str) or not data_url.startswith(PNG):
        raise ValueError(f"the post holds no {noun}")
    try:
        image = Image.open(
            io.BytesIO(base64.b64decode(data_url[len(PNG) :], validate=True)), formats=("PNG",)
        )
        if max(image.size) > LARGEST_SIDE:
            raise ValueError(f"the {noun} has more than {LARGEST_SIDE} pixels a side")
        return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"the {noun} has more than {LARGEST_SIDE} pixels a side") from error
    except (binascii.Error, OSError, SyntaxError) as error:
        raise ValueError(f"the {noun} is no PNG") from error


class Overtaken(Exception):
    """A newer request has come, so nobody waits for this one."""


class NewestOnly:
    """Runs one call at a time; an older call ends when a newer one comes."""

    def __init__(self) -> None:
        self.done = 0.0  # finished share of the current call
        self._turn, self._newest, self._ended = threading.Lock(), 0, False

    @contextmanager
    def turn(self) -> Iterator[Callable[[float], None]]:
        """A call's turn. Yields a function that takes each finished share of the work.

        That function raises `Overtaken` when a newer call has come, and `UserError` after `end`.
        """
        self._newest += 1
        number = self._newest
        with self._turn:
            self.done = 0.0

            def advance(share: float) -> None:
                if self._ended:
                    raise UserError("The server has ended before this was made.")
                if self._newest != number:
                    raise Overtaken
                self.done = min(1.0, self.done + share)

            advance(0)
            yield advance

    def end(self) -> None:
        """Let no call begin, and the current one end after its next share; safe in a signal handler."""
        self._ended = True

    def wait(self) -> None:
        """Wait until no call runs, so that its files are complete."""
        with self._turn:
            pass


async def read_post(request: Request, largest: int) -> dict[str, Any]:
    """The JSON object of a post of at most this many bytes; `ValueError` for anything else."""
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise ValueError("a post is JSON")
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > largest:
            raise ValueError("the post is too long")
    try:
        body = parse_json(content, "the post")
    except UserError:
        raise ValueError("the post is not JSON") from None
    if not isinstance(body, dict):
        raise ValueError("the post is not a JSON object")
    return body


Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(
    token: str, port: int, *, gets: Mapping[str, Endpoint], posts: Mapping[str, Endpoint]
) -> ASGIApp:
    """An application with these endpoints by path, all below /TOKEN/; any other address is unknown."""
    routes = [Route(f"/{token}/{path}", endpoint) for path, endpoint in gets.items()]
    routes += [Route(f"/{token}/{path}", endpoint, methods=["POST"]) for path, endpoint in posts.items()]
    return LocalOnly(Starlette(routes=routes), port=port)


class LocalOnly:
    """Refuses requests that do not come from this server's page, and adds headers against caching and sharing.

    It wraps the whole application, so that every answer has these headers, even one to an internal error.
    """

    def __init__(self, app: ASGIApp, *, port: int) -> None:
        self.app = app
        self.hosts = {f"{host}:{port}" for host in HOSTS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Content-Security-Policy", DENY_ALL)
            await send(message)

        try:
            answer: ASGIApp = self._refusal(Request(scope)) or self.app
            await answer(scope, receive, send_guarded)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 (a server goes on; the answer has been sent)
            notify(f"Error: {type(error).__name__}: {error}")
            if not started:
                await PlainTextResponse("the server made a mistake", 500)(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if host not in self.hosts:
            return PlainTextResponse("this server answers to 127.0.0.1 and localhost alone", 421)
        if request.method not in ("GET", "HEAD"):
            origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
            if (origin is not None and origin != f"http://{host}") or site not in ("same-origin", "none"):
                return PlainTextResponse("posts come from this server's own page", 403)
        return None


def serve_locally(
    build: Callable[..., ASGIApp],
    *,
    note: str,
    port: int = 0,
    token: str | None = None,
    browser: bool = False,
    turns: NewestOnly | None = None,
) -> None:
    """Serve until Ctrl-C, and print the address; `browser` opens it if there is a screen.

    build   makes the application, from the keywords token and port
    note    printed behind the address, in brackets
    port    0 takes a free one; `UserError` for one that is taken
    turns   the calls of its answers, which end with the server
    """
    turns = turns or NewestOnly()
    token = token or secrets.token_urlsafe(16)
    with _bind_port(port) as listener:
        port = listener.getsockname()[1]
        app = build(token=token, port=port)
        listener.listen()
        address = f"http://127.0.0.1:{port}/{token}/"
        notify(f"Open {address} ({note}).")
        if os.environ.get("SSH_CONNECTION") or not has_screen():
            notify(
                f"From another machine: ssh -L {port}:127.0.0.1:{port} and this one's name; then open the same "
                "address there. The port must be the same (--port chooses it)."
            )
        if browser and has_screen():
            # In a thread: a browser in the terminal returns only when it is left, and needs the server
            threading.Thread(target=_open_browser, args=(address,), daemon=True).start()
        # uvicorn raises SIGTERM again once it has stopped; here that is a normal end.
        handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        try:
            _make_server(app, turns).run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, handler)
            turns.end()
            turns.wait()


def _make_server(app: ASGIApp, turns: NewestOnly) -> Any:
    """A uvicorn server without log that ends the calls of its answers, since a process waits for its threads."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            turns.end()
            super().handle_exit(sig, frame)

    quiet: dict[str, Any] = {"log_level": "critical", "access_log": False, "server_header": False}
    impatient: dict[str, Any] = {
        "http": _make_protocol(),
        "timeout_graceful_shutdown": SHUTDOWN_SECONDS,
    }
    return Server(uvicorn.Config(app, lifespan="off", **impatient, **quiet))


def _open_browser(address: str) -> None:
    with suppress(webbrowser.Error):  # there is no browser; the address has been printed
        webbrowser.open(address)


def check_port(port: int) -> None:
    """Raise `UserError` for a port that is taken, before any work is done."""
    _bind_port(port).close()


def _bind_port(port: int) -> socket.socket:
    """A socket at this port of 127.0.0.1; `UserError` if it is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "it is not between 0 and 65535"
        raise UserError(f"Port {port} cannot be used ({reason}). Choose another --port.") from error
    return listener


def _make_protocol() -> Any:
    """uvicorn's HTTP/1.1 protocol, which closes connections without a complete request in REQUEST_SECONDS."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ImpatientProtocol(H11Protocol):
        waiting: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def _wait(self) -> None:
            complete = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
            if self.waiting is not None and complete:
                self.waiting.cancel()
                self.waiting = None
            elif self.waiting is None and not complete:
                self.waiting = self.loop.call_later(REQUEST_SECONDS, self._give_up)

        def _give_up(self) -> None:
            self.waiting = None
            if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
                self.transport.close()

    return ImpatientProtocol


def has_screen() -> bool:
    """Whether a browser can show a window here; `webbrowser` would also take one in the terminal."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
