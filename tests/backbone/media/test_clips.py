"""Clips as files: what a folder of frames says by its names."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.media.clips import read_film
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
