"""The server of `edit paint`: one page, its image and the edits of it, for this machine alone.

Images are named by edit, never by a path. A newer request ends the edit in progress.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from backbone.io import local_server
from backbone.io.local_server import answer_image, answer_page, answer_post, read_data_url, serve_locally
from edit.paint.board import EditRequest, PaintBoard, describe_board, describe_kept

PAGE = Path(__file__).with_name("page.html")


def build_app(board: PaintBoard, *, token: str, port: int) -> ASGIApp:
    """The application; every route is below /TOKEN/, and all other addresses are unknown."""

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
        files = {str(edit.number): {"edit": edit.file, "mask": edit.mask} for edit in board.edits}
        name = files.get(request.path_params["number"], {}).get(request.path_params["file"])
        if name is None:
            return PlainTextResponse("there is no such image", 404)
        return answer_image(board.folder / name)

    async def edit(request: Request) -> Response:
        return await answer_post(
            request,
            lambda body: describe_kept(
                board.edit(read_data_url(body.get("painted"), "mask"), read_wish(body))
            ),
        )

    gets = {"": page, "state": state, "done": done, "source": source, "image/{number}/{file}": image}
    return local_server.build_app(token, port, gets=gets, posts={"edit": edit})


def serve(board: PaintBoard, *, port: int, browser: bool) -> None:
    """Serve the page until Ctrl-C: `serve_locally`."""
    note = f"Ctrl-C ends; every edit is kept in {board.folder}"
    serve_locally(partial(build_app, board), note=note, port=port, browser=browser, turns=board.turns)


def read_wish(body: dict[str, Any]) -> EditRequest:
    """The request in a body; `ValueError` for values that are no text."""
    values = {name: body[name] for name in ("source", "target", "negative") if name in body}
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"the post's {name} is no text")
    return EditRequest(**{"source": "", "target": "", **values})
