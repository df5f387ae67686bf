"""The labelling page's server: one page, its pictures and its answers, for this machine alone.

Pictures are named by question and side, never by a path, and neither the page nor an address reveals a picture's model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from align.collect.label.session import Session, StaleAnswer
from backbone.io import local_server
from backbone.io.console import UserError, format_error, notify
from backbone.io.local_server import answer_image, answer_page, read_post, serve_locally

PAGE = Path(__file__).with_name("page.html")
LARGEST_POST = 4096  # bytes


def build_app(session: Session, *, token: str, port: int) -> ASGIApp:
    """The application; every route is below /TOKEN/, and all other addresses are unknown."""

    async def page(request: Request) -> Response:
        return answer_page(PAGE)

    async def state(request: Request) -> Response:
        return JSONResponse(_describe_state(session))

    async def picture(request: Request) -> Response:
        question = session.question
        if question is None or request.path_params["number"] != str(question.number):
            return PlainTextResponse("gone", 410)
        name = {"left": question.left, "right": question.right}.get(request.path_params["side"])
        if name is None:
            return PlainTextResponse("not found", 404)
        return answer_image(session.folder / name)

    async def choose(request: Request) -> Response:
        return await _post(request, lambda body: session.answer(_read_number(body), _read_verdict(body)))

    async def undo(request: Request) -> Response:
        return await _post(request, lambda body: session.undo(_read_number(body)))

    async def _post(request: Request, act: Callable[[dict[str, Any]], None]) -> Response:
        try:
            act(await read_post(request, LARGEST_POST))
        except StaleAnswer:
            return JSONResponse(_describe_state(session), 409)
        except ValueError as error:
            return PlainTextResponse(str(error), 400)
        except (UserError, OSError) as error:  # the choice could not be saved
            notify(f"Error: {format_error(error) or error}")
            return PlainTextResponse(format_error(error) or "the choice could not be kept", 503)
        return JSONResponse(_describe_state(session))

    gets = {"": page, "state": state, "picture/{number}/{side}": picture}
    return local_server.build_app(token, port, gets=gets, posts={"choose": choose, "undo": undo})


def serve(session: Session, *, port: int = 0, token: str | None = None, browser: bool = False) -> None:
    """Serve until Ctrl-C, and say the address once it listens; `browser` opens it where there is a screen.

    Port 0 takes a free one; `UserError` when a port is taken.
    """
    serve_locally(
        partial(build_app, session),
        note="Ctrl-C ends; every choice is kept as it is made",
        port=port,
        token=token,
        browser=browser,
    )


def _describe_state(session: Session) -> dict[str, Any]:
    """The page's state; nothing in it distinguishes a repeat from a new pair, or one model from another."""
    question = session.question
    agreement, repeats = session.agreement
    is_done = question is None
    return {
        "number": session.next_number,
        "prompt": question.pair.prompt if question else "",
        "done": is_done,
        "answered": session.answered,
        "total": len(session.pairs),
        "can_undo": bool(session.choices),
        "agreement": {"repeats": repeats, **agreement._asdict()} if is_done and repeats else None,
    }


def _read_number(body: dict[str, Any]) -> int:
    number = body.get("number")
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError("the post names no question")
    return number


def _read_verdict(body: dict[str, Any]) -> str:
    verdict = body.get("verdict")
    if not isinstance(verdict, str):
        raise ValueError("the post says nothing")
    return verdict
