"""The page of `edit paint` without a browser: what is edited, what is kept, who is answered."""

from __future__ import annotations

import base64
import errno
import io
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from starlette.testclient import TestClient
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.io.examples import EXAMPLES, SCENE
from backbone.io.files import read_json
from backbone.io.local_server import NewestOnly, Overtaken
from edit.cli import app
from edit.paint.board import RECORD, EditRequest, PaintBoard, make_mask
from edit.paint.server import build_app
from edit.pictures import read_image
from edit.settings import PaintOptions
from tests.backbone.media.sources.test_pictures import huge
from tests.tiny import tiny_moji

TOKEN, PORT = "secret-token", 4711
HOST = f"http://127.0.0.1:{PORT}"
IMAGE = EXAMPLES / SCENE[0]
CAT = EditRequest(source="a cat in a park", target="a dog in a park")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> PaintBoard:
    """The example's cat and the small model with the words of `moji`, in two steps."""
    model = str(tiny_moji(tmp_path_factory.mktemp("models") / "moji"))
    asked = PaintOptions(image=str(IMAGE), model=model, device="cpu", steps=2)
    return PaintBoard.open(asked, read_image(IMAGE), {"model": model, "device": "cpu"}, Path())


@pytest.fixture
def board(opened: PaintBoard, tmp_path: Path) -> PaintBoard:
    """The same with nothing edited yet and a folder of its own."""
    return PaintBoard(opened.args, opened.image, opened.loaded, tmp_path)


@pytest.fixture
def client(board: PaintBoard) -> TestClient:
    return TestClient(build_app(board, token=TOKEN, port=PORT), base_url=HOST, headers={"Origin": HOST})


def nothing() -> Image.Image:
    """A page on which nothing is painted."""
    return Image.new("RGB", (512, 512))


def left_half() -> Image.Image:
    """The page's red on its left half."""
    page = nothing()
    ImageDraw.Draw(page).rectangle((0, 0, 255, 511), fill="#ff2d55")
    return page


def post(client: TestClient, page: Image.Image, **words: Any) -> Any:
    stream = io.BytesIO()
    page.save(stream, "PNG")
    painted = as_data_url(stream.getvalue())
    return client.post(
        f"/{TOKEN}/edit", json={"source": CAT.source, "target": CAT.target, "painted": painted, **words}
    )


def as_data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# What is edited -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [nothing(), left_half()], ids=["found", "painted"])
def test_the_command_beside_an_edit_makes_the_same_image(
    board: PaintBoard, tmp_path: Path, page: Image.Image
) -> None:
    kept = board.edit(page, CAT)
    (said,) = (one["command"] for one in read_json(tmp_path / RECORD)["edits"])
    words = [*shlex.split(said)[1:], "--no-metrics", "--out", str(tmp_path / "again")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for one, other in ((kept.file, "edit_0.png"), (kept.mask, "mask_0.png")):
        with Image.open(tmp_path / one) as first, Image.open(tmp_path / "again" / other) as second:
            assert first.tobytes() == second.tobytes()


def test_outside_of_what_is_painted_nothing_changes(board: PaintBoard, tmp_path: Path) -> None:
    painted, cats = (
        board.edit(left_half(), EditRequest(source=CAT.source, target=text))
        for text in (CAT.target, CAT.source)
    )
    one, other = (np.asarray(Image.open(tmp_path / kept.file)) for kept in (painted, cats))
    beyond = 72  # the edge of a mask is soft over a latent
    assert np.array_equal(one[:, beyond:], other[:, beyond:]) and not np.array_equal(
        one[:, :64], other[:, :64]
    )


def test_an_image_is_inverted_once_for_what_it_shows(
    board: PaintBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverted: list[str] = []
    own = board._invert

    def count(source: str, *rest: Any) -> Any:
        inverted.append(source)
        return own(source, *rest)

    monkeypatch.setattr(board, "_invert", count)
    for source in (CAT.source, CAT.source, "a red cat in a park", CAT.source):
        board.edit(nothing(), EditRequest(source=source, target=CAT.target))
    assert inverted == [CAT.source, "a red cat in a park"]


def test_a_mask_is_white_where_half_of_a_pixel_is_painted() -> None:
    assert make_mask(nothing(), (128, 128)) is None
    mask = make_mask(left_half(), (128, 128))
    assert mask is not None and mask.getbbox() == (0, 0, 64, 128) and set(mask.tobytes()) == {0, 255}


def test_a_newer_request_ends_an_older_one() -> None:
    turns, reached = NewestOnly(), []
    with turns.turn() as advance:
        advance(0.25)
        reached.append(turns.done)
        turns._newest += 1  # as another thread's call does
        with pytest.raises(Overtaken):
            advance(0.25)
    with turns.turn() as advance:
        assert turns.done == 0
        advance(2)
        reached.append(turns.done)
    assert reached == [0.25, 1]


def test_what_cannot_be_edited_is_said_and_nothing_is_kept(board: PaintBoard, tmp_path: Path) -> None:
    for source, target, said in (
        ("", "a dog", "source prompt"),
        ("a cat", " ", "target prompt"),
        ("a cat", "a [V] dog", r"\[V\]"),
        ("cats", "公园", "share no words"),
    ):
        with pytest.raises(UserError, match=said):
            board.edit(nothing(), EditRequest(source=source, target=target))
    assert not list(tmp_path.iterdir()) and not board.edits


def test_an_edit_that_cannot_be_kept_whole_is_not_kept(
    board: PaintBoard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.folder = tmp_path / "edits"
    with pytest.raises(UserError, match="is gone, so the edit was not kept"):
        board.edit(nothing(), CAT)
    assert not board.folder.exists(), "no other folder is made in its place"
    board.folder.mkdir()

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr("edit.paint.board.write_json", full)
        with pytest.raises(OSError, match="No space"):
            board.edit(nothing(), CAT)
    assert not list(board.folder.iterdir()) and not board.edits
    assert board.edit(nothing(), CAT).number == 0


# The server and the command ---------------------------------------------------------------------------------------


def test_the_page_shows_the_image_its_edits_and_their_masks(client: TestClient, board: PaintBoard) -> None:
    assert "{{" not in client.get(f"/{TOKEN}/").text
    assert post(client, left_half()).json()["painted"] is True
    state = client.get(f"/{TOKEN}/state").json()
    assert (state["width"], state["height"]) == board.shown.size
    assert [(one["source"], one["target"]) for one in state["edits"]] == [(CAT.source, CAT.target)]
    for where in ("source", "image/0/edit", "image/0/mask"):
        with Image.open(io.BytesIO(client.get(f"/{TOKEN}/{where}").content)) as image:
            assert image.size == board.shown.size
    for where in ("image/1/edit", "image/0/e000.png", "image/0/..", f"image/{'9' * 5000}/edit"):
        assert client.get(f"/{TOKEN}/{where}").status_code == 404


def test_what_a_model_does_not_see_of_a_prompt_is_said_on_the_page_each_time(client: TestClient) -> None:
    longer = f"a dog {'very ' * 90}far away in a park"
    for _ in range(2):
        (said,) = post(client, nothing(), target=longer).json()["said"]
        assert "will not see" in said and "far away in a park" in said
    assert post(client, nothing()).json()["said"] == []


def test_posts_that_are_no_wish_and_strangers_are_refused(
    client: TestClient, board: PaintBoard, tmp_path: Path
) -> None:
    for words, said in (
        ({"painted": "AAAA"}, "holds no mask"),
        ({"painted": "data:image/png;base64,AAAA"}, "no PNG"),
        ({"painted": as_data_url(huge(tmp_path / "huge.png", 60_000, 60_000).read_bytes())}, "pixels a side"),
        ({"target": 3}, "target is no text"),
        ({"target": ""}, "target prompt"),
    ):
        answer = post(client, nothing(), **words)
        assert answer.status_code == 400 and said in answer.text
    assert client.get("/").status_code == 404
    assert client.get(f"/{TOKEN}/source", headers={"Host": "evil.example"}).status_code == 421
    assert not board.edits


def test_bad_input_is_answered_before_the_page_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["nope.png"], "nope.png"),
        ([str(IMAGE), "--target", "a [V] dog"], "owns the token"),
        ([str(IMAGE), "--iterations", "3"], "null-text"),
        ([str(IMAGE), "--steps", "1"], "too few to invert"),
        ([str(IMAGE), "--steps", "2000"], "cannot take 2000 steps"),
        ([str(IMAGE), "--negative", "red", "--guidance", "1"], "negative prompt “red” has no effect"),
        ([str(IMAGE), "--negative", "red", "--method", "null-text"], "in the place of a negative prompt"),
    ):
        done = CliRunner().invoke(app, ["paint", "--no-browser", *words])
        assert isinstance(done.exception, UserError) and said in str(done.exception), done.exception
    assert not list(tmp_path.iterdir())
