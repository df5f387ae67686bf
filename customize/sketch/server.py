"""The sketch pad's server: one page, its drawings and their images, for this machine alone.

Images are named by drawing and number, never by a path. A newer request ends the one in progress.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from backbone.io import local_server
from backbone.io.local_server import answer_image, answer_page, answer_post, read_data_url, serve_locally
from customize.sketch.pad import MOST_IMAGES, SketchPad, SketchRequest, describe_pad, describe_saved_drawing

PAGE = Path(__file__).with_name("page.html")
NUMBERS = [str(number) for number in range(MOST_IMAGES)]
KINDS: dict[str, tuple[Any, str]] = {
    "prompt": (str, "a text"),
    "negative": (str, "a text"),
    "seed": (int, "a whole number"),
    "scale": ((int, float), "a number"),
    "count": (int, "a whole number"),
}


def build_app(pad: SketchPad, *, token: str, port: int) -> ASGIApp:
    """The application; every route is below /TOKEN/, and all other addresses are unknown."""

    async def page(request: Request) -> Response:
        return answer_page(PAGE)

    async def state(request: Request) -> Response:
        return JSONResponse(describe_pad(pad))

    async def done(request: Request) -> Response:
        return JSONResponse({"done": pad.turns.done})

    async def image(request: Request) -> Response:
        drawn = {str(drawing.number): drawing for drawing in pad.drawings}.get(request.path_params["number"])
        files = (
            {} if drawn is None else {"sketch": drawn.sketch, **dict(zip(NUMBERS, drawn.files, strict=False))}
        )
        name = files.get(request.path_params["file"])
        if name is None:
            return PlainTextResponse("there is no such image", 404)
        return answer_image(pad.folder / name)

    async def draw(request: Request) -> Response:
        return await answer_post(
            request,
            lambda body: describe_saved_drawing(
                pad.draw(read_data_url(body.get("lines"), "lines"), read_request(body))
            ),
        )

    gets = {"": page, "state": state, "done": done, "image/{number}/{file}": image}
    return local_server.build_app(token, port, gets=gets, posts={"draw": draw})


def serve(pad: SketchPad, *, port: int, browser: bool) -> None:
    """Serve the page until Ctrl-C: `serve_locally`."""
    note = f"Ctrl-C ends; every drawing is kept in {pad.folder}"
    serve_locally(partial(build_app, pad), note=note, port=port, browser=browser, turns=pad.turns)


def read_request(body: dict[str, Any]) -> SketchRequest:
    """The request in a body; `ValueError` for values of another type, `UserError` for values out of bounds."""
    values = {name: body[name] for name in KINDS if name in body}
    for name, value in values.items():
        kind, what = KINDS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"The {name} is {what}, and what was sent is not.")
    return SketchRequest(**{"prompt": "", **values})
