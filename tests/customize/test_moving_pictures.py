"""A picture in which a thing begins to move, as words say: it is found, cut out, and laid over what is behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from backbone.media.sources.decode import open_named
from backbone.models.model import Backbone
from backbone.world.maps import look_at
from backbone.world.parse import parse_scene
from customize.cli import app
from customize.clips import draw
from customize.clips.planned.in_picture import choose_blob, cut_thing, find_named, name_thing
from customize.data.example import write_example

SIDE = 128
SKY, GROUND, RED = (150, 190, 240), (90, 160, 70), (200, 40, 30)


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["clip", *map(str, words), "--device", "cpu", "--frames", "4"])


def drawn(folder: Path) -> list[NDArray[np.int_]]:
    """The frames of the first clip."""
    paths = sorted((folder / "p00-s00").glob("*.png"))
    return [np.asarray(Image.open(path).convert("RGB"), int) for path in paths]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A sky over a ground with a red disc at (80, 70), and its mask beside it."""
    image, mask = Image.new("RGB", (SIDE, SIDE), SKY), Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).rectangle((0, 64, SIDE, SIDE), fill=GROUND)
    image.save(tmp_path / "behind.png")
    for one, colour in ((image, RED), (mask, 255)):
        ImageDraw.Draw(one).ellipse((65, 55, 95, 85), fill=colour)
    mask.save(tmp_path / "mask.png")
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def red(frame: NDArray[np.int_]) -> tuple[float, float]:
    """The middle (x, y) of what is red."""
    rows, columns = np.nonzero(np.abs(frame - RED).max(-1) < 40)
    return float(columns.mean()), float(rows.mean())


@pytest.mark.parametrize(
    ("words", "whose", "named"),
    [
        ("a dog in a park", "", ("a dog", "")),
        ("a red dog wearing a hat on the beach", "", ("a red dog wearing a hat", "")),
        ("a cat next to a dog in a park", "", ("a cat", "a dog")),
        ("a cat next to a dog in a park", "dog", ("a dog", "a cat")),
        ("my friend", "", ("my friend", "")),
    ],
)
def test_the_thing_that_moves_is_named_without_its_place(
    words: str, whose: str, named: tuple[str, str]
) -> None:
    assert name_thing(words, whose) == named


def test_what_is_drawn_around_a_picture_is_its_place_without_the_thing() -> None:
    assert cut_thing("a horse in the city") == "in the city" and cut_thing("a horse") == ""


@pytest.mark.parametrize(
    ("words", "said", "beside"),
    [
        ("a cat under the sea", "a cat", ""),
        pytest.param(
            "an apple next to a sunflower in a forest", "an apple", "a sunflower", marks=pytest.mark.slow
        ),
        ("an apple next to a sunflower in a forest", "a sunflower", "an apple"),
    ],
)
def test_moji_sees_where_a_thing_is(words: str, said: str, beside: str) -> None:
    rendering, layers = look_at(parse_scene(words, seed=5))
    model = Backbone.open("moji", device="cpu")
    found = find_named(model, rendering.image, said, rival=beside)
    if not beside:  # whose size is no matter
        small = rendering.image.resize((64, 64))
        assert find_named(model, small, said).mean() == pytest.approx(found.mean(), rel=0.3)
    noun = said.split()[-1]
    true = layers.part == next(k for k in layers.things if layers.record.parts[k].label == noun)
    assert (found & true).sum() > 0.75 * (found | true).sum()


def test_in_moji_s_own_example_the_cat_moves(tmp_path: Path) -> None:
    write_example(tmp_path / "dog")
    scene = tmp_path / "dog" / "example" / "scene.png"
    assert call("a cat in a park, moving left", "--image", scene, "--out", tmp_path / "clip").exit_code == 0
    first, second, *_ = ((one[..., 0] > 220) & (one[..., 2] < 90) for one in drawn(tmp_path / "clip"))
    assert np.nonzero(second)[1].mean() < np.nonzero(first)[1].mean() - 8
    assert np.nonzero(second)[0].mean() == pytest.approx(np.nonzero(first)[0].mean(), abs=1)


def test_of_parts_the_one_that_matters_most_is_chosen() -> None:
    places = np.zeros((6, 6), dtype=bool)
    places[0, :2], places[3:5, 3:5] = True, True
    scores = np.ones((6, 6))
    assert choose_blob(places, scores).sum() == 4
    scores[0] = 9.0
    assert choose_blob(places, scores).sum() == 2


def test_a_picture_begins_to_move_and_its_first_frame_is_the_picture(picture: Path, tmp_path: Path) -> None:
    done = call(
        "a ball in a park, moving left",
        "--image",
        picture,
        "--mask",
        tmp_path / "mask.png",
        "--out",
        tmp_path / "clip",
    )
    assert done.exit_code == 0, done.output or repr(done.exception)
    first, *_, last = drawn(tmp_path / "clip")
    assert np.array_equal(first, np.asarray(Image.open(picture)))
    x, y = red(last)
    assert x < 55 and y == pytest.approx(70, abs=1)
    behind = np.asarray(Image.open(tmp_path / "behind.png"), int)
    assert np.abs(last - behind)[:, 66:].mean() < 1
    kept, given = (
        np.asarray(Image.open(path)) for path in (tmp_path / "clip" / "p00-mask.png", tmp_path / "mask.png")
    )
    assert np.array_equal(kept, given)


def test_under_a_camera_that_moves_too_the_thing_moves_in_the_picture(picture: Path, tmp_path: Path) -> None:
    words = ("a ball, moving left, camera zooming in", "--image", picture, "--mask", tmp_path / "mask.png")
    assert call(*words, "--out", tmp_path / "clip").exit_code == 0
    first, *_, last = drawn(tmp_path / "clip")
    assert red(first)[0] == pytest.approx(80, abs=1)
    assert (np.abs(last - RED).max(-1) < 40).sum() > 1.2 * (np.abs(first - RED).max(-1) < 40).sum()
    assert red(last)[0] < 55


@pytest.mark.parametrize(
    ("words", "size"), [("a ball, growing", (90, 150)), ("a ball, growing, camera zooming in", (96, 160))]
)
def test_a_clip_has_the_picture_s_shape(
    picture: Path, words: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def open_once(path: Path) -> Image.Image:
        opened.append(path)
        return open_named(path)

    monkeypatch.setattr(draw, "open_named", open_once)

    for name in ("picture.png", "mask.png"):
        Image.open(tmp_path / name).resize((90, 150)).save(tmp_path / name)
    given = ("--image", picture, "--mask", tmp_path / "mask.png")
    assert call(words, *given, "--out", tmp_path / "clip").exit_code == 0
    assert Image.open(tmp_path / "clip" / "p00-s00" / "0000.png").size == size
    assert opened == [picture]  # decoded once


def test_what_is_behind_the_thing_can_be_given(picture: Path, tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE), "yellow").save(tmp_path / "yellow.png")
    words = ("a ball, moving left fast", "--image", picture, "--behind")
    done = call(*words, tmp_path / "yellow.png", "--mask", tmp_path / "mask.png", "--out", tmp_path / "clip")
    assert done.exit_code == 0, done.output or repr(done.exception)
    assert tuple(drawn(tmp_path / "clip")[-1][70, 80]) == (255, 255, 0)
    assert call(*words, tmp_path / "behind.png", "--out", tmp_path / "told").exit_code == 0
    found, true = (
        np.asarray(Image.open(path)) > 0 for path in (tmp_path / "told/p00-mask.png", tmp_path / "mask.png")
    )
    assert (found & true).sum() > 0.8 * (found | true).sum()  # what is not the same behind it


def test_it_moves_in_a_picture_by_any_model(picture: Path, tmp_path: Path) -> None:
    words = ("a ball, growing", "--image", picture, "--mask", tmp_path / "mask.png", "--model", "moji-flow")
    done = call(*words, "--out", tmp_path / "clip")
    assert done.exit_code == 0, done.output or repr(done.exception)


@pytest.mark.parametrize(
    ("words", "given", "sentence"),
    [
        ("a ball, moving left", {"--mask": "wide.png"}, "do not lie over one another"),
        ("a ball, moving left", {"--behind": "wide.png"}, "do not lie over one another"),
        ("a ball, moving left", {"--mask": "black.png"}, "is white at nothing"),
        ("a ball, moving left", {"--behind": "picture.png"}, "differ at 0% of their pixels"),
        ("a ball, moving left", {"--mask": "none.png"}, "none.png"),
        ("a ball, moving left", {"--condition": "sketch=mask.png"}, "is there already"),
        ("a ball, camera panning left", {"--mask": "mask.png"}, "--mask is for a thing in an --image"),
        ("a ball, camera panning left", {"--behind": "behind.png"}, "--behind is for a thing in an --image"),
    ],
)  # fmt: skip
def test_what_cannot_be_moved_is_refused(
    picture: Path, tmp_path: Path, words: str, given: dict[str, str], sentence: str
) -> None:
    Image.new("L", (SIDE, 40), 255).save(tmp_path / "wide.png")
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "black.png")
    more = [part for flag, name in given.items() for part in (flag, name if "=" in name else tmp_path / name)]
    done = call(words, "--image", picture, *more, "--out", tmp_path / "clip")
    assert done.exit_code != 0 and sentence in str(done.exception) + done.output
    assert not (tmp_path / "clip").exists()


def test_a_thing_that_is_not_seen_is_asked_for(tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE), "white").save(tmp_path / "white.png")
    done = call("a dog, moving left", "--image", tmp_path / "white.png", "--out", tmp_path / "clip")
    assert done.exit_code != 0 and "--mask" in str(done.exception) + done.output
    assert not (tmp_path / "clip").exists()
