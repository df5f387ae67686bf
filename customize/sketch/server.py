"""The sketch pad's server: one page, its drawings and their images, for this machine alone.

Images are named by drawing and number, never by a path. While one drawing is being drawn a newer one ends it.
"""

from __future__ import annotations

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
from customize.sketch.pad import MOST_IMAGES, SketchPad, Wish, describe_drawn, describe_pad

PAGE = Path(__file__).with_name("page.html")
LARGEST_POST = 4 * 2**20  # bytes
NUMBERS = [str(number) for number in range(MOST_IMAGES)]


def build_app(pad: SketchPad, *, token: str, port: int) -> ASGIApp:
    """The application; everything lies below /TOKEN/, and every other address is unknown."""

    async def page(request: Request) -> Response:
        return answer_page(PAGE)

    async def state(request: Request) -> Response:
        return JSONResponse(describe_pad(pad))

    async def done(request: Request) -> Response:
        return JSONResponse({"done": pad.turns.done})

    async def image(request: Request) -> Response:
        number, file = int(request.path_params["number"]), request.path_params["file"]
        drawn = pad.drawings[number] if number < len(pad.drawings) else None
        files = (
            {} if drawn is None else {"sketch": drawn.sketch, **dict(zip(NUMBERS, drawn.files, strict=False))}
        )
        if file not in files:
            return PlainTextResponse("there is no such image", 404)
        return answer_image(pad.folder / files[file])

    async def draw(request: Request) -> Response:
        return await answer_post(
            request,
            lambda body: describe_drawn(pad.draw(read_data_url(body.get("lines"), "lines"), read_wish(body))),
            largest=LARGEST_POST,
        )

    below = f"/{token}"
    routes = [
        Route(f"{below}/", page),
        Route(f"{below}/state", state),
        Route(f"{below}/done", done),
        Route(f"{below}/image/{{number:int}}/{{file}}", image),
        Route(f"{below}/draw", draw, methods=["POST"]),
    ]
    return LocalOnly(Starlette(routes=routes), port=port)


def serve(pad: SketchPad, *, port: int = 0, token: str | None = None, browser: bool = False) -> None:
    """Serves until Ctrl-C, and says the address once it listens; `browser` opens it where there is a screen.

    Port 0 takes a free one; `UserError` when a port is taken.
    """
    serve_locally(
        lambda token, port: build_app(pad, token=token, port=port),
        note=f"Ctrl-C ends; every drawing is kept in {pad.folder}",
        port=port,
        token=token,
        browser=browser,
    )


def read_wish(body: dict[str, Any]) -> Wish:
    """What the page wishes; `ValueError` for values of another type, `UserError` for those out of bounds."""
    kinds: dict[str, Any] = {"prompt": str, "negative": str, "seed": int, "scale": (int, float), "count": int}
    given = {name: body[name] for name in kinds if name in body}
    for name, value in given.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ValueError(f"the post's {name} is of another kind")
    return Wish(**{"prompt": "", **given})
