"""The server of `edit paint`: one page, its image and the edits of it, for this machine alone.

Images are named by edit, never by a path. While one edit is being made a newer one ends it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from backbone.io.local_server import (
    LocalOnly,
    answer_image,
    answer_page,
    answer_post,
    read_data_url,
    serve_locally,
)
from edit.paint.board import PaintBoard, Wish, describe_board, describe_kept

PAGE = Path(__file__).with_name("page.html")
LARGEST_POST = 4 * 2**20  # bytes


def build_app(board: PaintBoard, *, token: str, port: int) -> ASGIApp:
    """The application; everything lies below /TOKEN/, and every other address is unknown."""

    async def page(request: Request) -> Response:
        return answer_page(PAGE)

    async def state(request: Request) -> Response:
        return JSONResponse(describe_board(board))

    async def done(request: Request) -> Response:
        return JSONResponse({"done": board.turns.done})

    async def source(request: Request) -> Response:
        stream = io.BytesIO()
        board.shown.save(stream, "PNG")
        return Response(stream.getvalue(), media_type="image/png")

    async def image(request: Request) -> Response:
        number, file = int(request.path_params["number"]), request.path_params["file"]
        if number >= len(board.edits) or file not in ("edit", "mask"):
            return PlainTextResponse("there is no such image", 404)
        kept = board.edits[number]
        return answer_image(board.folder / (kept.file if file == "edit" else kept.mask))

    async def edit(request: Request) -> Response:
        return await answer_post(
            request,
            lambda body: describe_kept(
                board.edit(read_data_url(body.get("painted"), "mask"), read_wish(body))
            ),
            largest=LARGEST_POST,
        )

    below = f"/{token}"
    routes = [
        Route(f"{below}/", page),
        Route(f"{below}/state", state),
        Route(f"{below}/done", done),
        Route(f"{below}/source", source),
        Route(f"{below}/image/{{number:int}}/{{file}}", image),
        Route(f"{below}/edit", edit, methods=["POST"]),
    ]
    return LocalOnly(Starlette(routes=routes), port=port)


def serve(board: PaintBoard, *, port: int = 0, token: str | None = None, browser: bool = False) -> None:
    """Serves until Ctrl-C, and says the address once it listens; `browser` opens it where there is a screen.

    Port 0 takes a free one; `UserError` when a port is taken.
    """
    serve_locally(
        lambda token, port: build_app(board, token=token, port=port),
        note=f"Ctrl-C ends; every edit is kept in {board.folder}",
        port=port,
        token=token,
        browser=browser,
    )


def read_wish(body: dict[str, Any]) -> Wish:
    """What the page wishes; `ValueError` for values that are no text."""
    given = {name: body[name] for name in ("source", "target", "negative") if name in body}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"the post's {name} is no text")
    return Wish(**{"source": "", "target": "", **given})
