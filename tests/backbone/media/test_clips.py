"""Clips as files: what a folder of frames says by its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.io.report import film_figure
from backbone.media.clips import read_film, write_film
from tests.align.conftest import picture


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0.png", "1.png", "5.png", "6.png"], "has no frame 2, 3, 4:"),
        (["a_008.png", "a_010.png", "a_014.png"], "has no frame 12:"),
        (["7.png", "8.png", "99999999999999999999.png"], "has no frame 9, 10, 11, 12, 13 …:"),
        (["0.png", "2.png", "4.png"], ""),  # every other frame
        (["9.png", "10.png", "11.png"], ""),
        (["a.png", "b.png"], ""),
        (["cover.png", "1.png", "7.png"], ""),
    ],
)
def test_frames_that_are_missing_by_their_numbers_are_said(
    names: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(names):
        picture(number, (8, 8)).save(tmp_path / name)
    assert len(read_film(tmp_path).frames) == len(names)
    err = capsys.readouterr().err
    assert said in err if said else not err


@pytest.mark.parametrize(("one", "other"), [("a.png", "a.jpg"), ("f-1.png", "f-01.png")])
def test_two_files_of_one_frame_are_refused(one: str, other: str, tmp_path: Path) -> None:
    for number, name in enumerate((one, other)):
        picture(number, (8, 8)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"are one frame by their names\. Keep one"):
        read_film(tmp_path)


def test_see_through_frames_are_said_to_be_white(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        picture(number, (8, 8)).convert("RGBA").save(tmp_path / f"{number}.png")
    read_film(tmp_path)
    assert not capsys.readouterr().err
    Image.new("RGBA", (8, 8)).save(tmp_path / "2.png")
    assert read_film(tmp_path).frames[2].getpixel((0, 0)) == (255, 255, 255)
    assert "its transparent parts are white" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(4, 8, 6, 3), (4, 8, 6)])
def test_a_stack_of_frames_is_a_clip(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "walk.npy", values)
    film = read_film(tmp_path / "walk.npy")
    assert (len(film.frames), film.size) == (4, (6, 8))
    grey = np.broadcast_to(values[..., None], (4, 8, 6, 3)) if len(shape) == 3 else values
    assert (np.asarray(film.frames[2]) == grey[2]).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((4, 8, 6, 3)), "holds float64"),
        (np.zeros((4, 3, 8, 6), np.uint8), "and a clip is uint8"),
        (np.zeros((1, 8, 6, 3), np.uint8), "has one frame"),
        (np.zeros((3, 0, 6, 3), np.uint8), "of 6 × 0 pixels"),
        (np.array([{}]), "cannot be read as an array"),
        (None, "cannot be read as an array"),
    ],
)
def test_an_array_that_is_no_clip_is_said(
    values: np.ndarray[Any, Any] | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "walk.npy"
    path.write_text("no array")
    if values is not None:
        np.save(path, values, allow_pickle=True)
    with pytest.raises(UserError, match=said):
        read_film(path)


def test_a_report_plays_the_film_where_there_is_one(tmp_path: Path) -> None:
    write_film(tmp_path / "walk", [picture(number, (8, 8)) for number in range(2)], 8)
    assert "<img" in film_figure(tmp_path / "walk") and "<video" not in film_figure(tmp_path / "walk")
    (tmp_path / "walk.mp4").write_bytes(b"film")
    page = film_figure(tmp_path / "walk", "a dog, walking")
    assert "<video controls" in page and "data:video/mp4;base64,ZmlsbQ==" in page and "a dog, walking" in page
