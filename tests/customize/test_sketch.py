"""The sketch pad without a browser: what is drawn, what is kept, who is answered."""

from __future__ import annotations

import base64
import errno
import io
import os
import shlex
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from starlette.testclient import TestClient
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.local_server import LARGEST_POST, Overtaken
from customize.cli import app
from customize.sketch import pad as pads
from customize.sketch.pad import RECORD, SketchPad, SketchRequest
from customize.sketch.server import build_app
from customize.sketch.settings import SketchOptions

TOKEN, PORT = "secret-token", 4711
HOST = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def opened() -> SketchPad:
    """`moji` with its own network for sketches, in two steps."""
    return SketchPad.open(SketchOptions(device="cpu", steps=2), [], Path())


@pytest.fixture
def pad(opened: SketchPad, tmp_path: Path) -> SketchPad:
    """The same with nothing drawn yet and a folder of its own."""
    return SketchPad(opened.options, opened.model, opened.name, opened.network, [], tmp_path)


@pytest.fixture
def client(pad: SketchPad) -> TestClient:
    return TestClient(build_app(pad, token=TOKEN, port=PORT), base_url=HOST, headers={"Origin": HOST})


def circle(side: int = 512) -> Image.Image:
    """A black circle on a white page."""
    page = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(page).ellipse((120, 140, 400, 420), outline="black", width=9)
    return page


def as_sent(page: Image.Image) -> str:
    """What the page posts of its lines."""
    stream = io.BytesIO()
    page.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def draw(client: TestClient, **body: Any) -> Any:
    given = {"prompt": "an apple", "lines": as_sent(circle()), **body}
    return client.post(
        f"/{TOKEN}/draw", json={name: value for name, value in given.items() if value is not None}
    )


# What is drawn ------------------------------------------------------------------------------------------------


def test_the_command_beside_a_drawing_draws_the_same_images(pad: SketchPad, tmp_path: Path) -> None:
    drawn = pad.draw(
        circle(), SketchRequest(prompt="an apple in a park", negative="a cat", seed=5, scale=0.8, count=2)
    )
    (said,) = (one["command"] for one in read_json(tmp_path / RECORD)["drawings"])
    words = shlex.split(said)[1:]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    for j, name in enumerate(drawn.files):
        with (
            Image.open(tmp_path / name) as one,
            Image.open(tmp_path / "again" / f"p00-s{j:02d}.png") as other,
        ):
            assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()
            assert "an apple in a park" in one.info["parameters"]
    assert (tmp_path / drawn.files[0]).read_bytes() != (tmp_path / drawn.files[1]).read_bytes()


def test_the_lines_are_white_on_black_as_the_network_reads_them(pad: SketchPad, tmp_path: Path) -> None:
    drawn = pad.draw(circle(), SketchRequest(prompt="an apple"))
    with Image.open(tmp_path / drawn.sketch) as kept:
        assert kept.size == pad.size
        assert {colour for _, colour in kept.convert("RGB").getcolors() or ()} == {(0, 0, 0), (255, 255, 255)}
        assert kept.convert("RGB").getpixel((0, 0)) == (0, 0, 0)


def test_lines_of_no_strength_are_no_lines(pad: SketchPad, tmp_path: Path) -> None:
    with_lines, without, moved = (
        pad.draw(page, SketchRequest(prompt="an apple", scale=scale)).files[0]
        for page, scale in ((circle(), 1), (circle(), 0), (circle().rotate(90, translate=(60, 0)), 0))
    )
    seen = [Image.open(tmp_path / name).tobytes() for name in (with_lines, without, moved)]
    assert seen[0] != seen[1] and seen[1] == seen[2]


def test_a_newer_wish_ends_the_one_that_is_being_drawn(
    pad: SketchPad, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), []

    def endless(*_: Any, advance: Any, **how: Any) -> Iterator[Image.Image]:
        while how["seed"] == 1:
            begun.set()
            advance(0.01)
        yield circle()

    def first() -> None:
        with pytest.raises(Overtaken):
            pad.draw(circle(), SketchRequest(prompt="an apple", seed=1))
        ended.append(True)

    monkeypatch.setattr(pads, "sample", endless)
    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(20)
    assert pad.draw(circle(), SketchRequest(prompt="an apple", seed=2)).number == 0
    thread.join(20)
    assert ended and len(pad.drawings) == 1


def test_what_cannot_be_drawn_is_said_and_nothing_is_kept(pad: SketchPad, tmp_path: Path) -> None:
    for page, wish, said in (
        (Image.new("RGB", (512, 512), "white"), {"prompt": "an apple"}, "one colour everywhere"),
        (circle(), {"prompt": " "}, "Say in words"),
        (circle(), {"prompt": "a [V] dog"}, r"\[V\]"),
        (circle(), {"prompt": "a dog", "scale": 3}, "strength"),
        (circle(), {"prompt": "a dog", "count": 0}, "1 to 8"),
        (circle(), {"prompt": "a dog", "seed": 2**64}, "64 bits"),
    ):
        with pytest.raises(UserError, match=said):
            pad.draw(page, SketchRequest(**wish))
    assert not list(tmp_path.iterdir()) and not pad.drawings


# The server ---------------------------------------------------------------------------------------------------


def test_the_page_draws_and_shows_what_was_drawn_before(client: TestClient, pad: SketchPad) -> None:
    assert "{{" not in client.get(f"/{TOKEN}/").text
    answer = draw(client, seed=4, count=2)
    assert answer.status_code == 200 and answer.json()["images"] == 2
    state = client.get(f"/{TOKEN}/state").json()
    assert (state["width"], state["height"]) == pad.size and state["steps"] == 2
    assert [one["seed"] for one in state["drawings"]] == [4]
    for name in ("sketch", "0", "1"):
        with Image.open(io.BytesIO(client.get(f"/{TOKEN}/image/0/{name}").content)) as image:
            assert image.size == pad.size
    for name in ("2", "..", "d000-s00.png"):
        assert client.get(f"/{TOKEN}/image/0/{name}").status_code == 404
    for number in ("1", "-1", "9" * 5000):
        assert client.get(f"/{TOKEN}/image/{number}/0").status_code == 404


def test_a_drawing_that_cannot_be_kept_whole_is_not_kept(
    client: TestClient, pad: SketchPad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pad.folder = tmp_path / "drawings"
    answer = draw(client)
    assert answer.status_code == 400 and "is gone, so the drawing was not kept" in answer.text
    assert not pad.folder.exists(), "no other folder is made in its place"
    pad.folder.mkdir()

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(pads, "write_json", full)
        assert draw(client).status_code == 503
    assert not list(pad.folder.iterdir()) and not pad.drawings
    assert draw(client).json()["number"] == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"lines": None}, "no lines"),
        ({"lines": "data:image/png;base64,AAAA"}, "no PNG"),
        ({"lines": "data:image/png;base64,?"}, "no PNG"),
        ({"lines": as_sent(Image.new("L", (5000, 1)))}, "4096 pixels a side"),
        ({"lines": "x" * LARGEST_POST}, "too long"),
        ({"seed": "1"}, "seed is a whole number"),
        ({"seed": 1.5}, "seed is a whole number"),
        ({"count": True}, "count is a whole number"),
        ({"prompt": "a [V] dog"}, "[V]"),
    ],
)
def test_a_post_that_is_no_wish_is_refused_in_a_sentence(
    client: TestClient, pad: SketchPad, body: dict[str, Any], said: str
) -> None:
    answer = draw(client, **body)
    assert answer.status_code == 400 and said in answer.text
    assert not pad.drawings


def test_strangers_are_not_answered(client: TestClient) -> None:
    assert client.get("/").status_code == 404
    assert client.get(f"/{TOKEN}/state", headers={"Host": "evil.example"}).status_code == 421
    other = {"Origin": "http://evil.example"}
    assert client.post(f"/{TOKEN}/draw", json={}, headers=other).status_code == 403


# The command --------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = CliRunner().invoke(app, ["sketch", "--port", str(taken.getsockname()[1])])
    assert isinstance(done.exception, UserError) and "Choose another --port" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_two_few_step_models_and_a_token_without_its_concept_are_refused(tmp_path: Path) -> None:
    for words, said in (
        (["--fast", "--on", "z-image-turbo"], "Give one of them"),
        (["a [V] dog"], "owns the token"),
        (["--model", "moji-flow", "--out", str(tmp_path / "out")], "moji-flow"),
    ):
        done = CliRunner().invoke(app, ["sketch", "--no-browser", *words])
        assert isinstance(done.exception, UserError) and said in str(done.exception), done.exception
    assert not list(tmp_path.iterdir())
