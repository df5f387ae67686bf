"""Clips as files: what a folder of frames says by its names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.media.clips import Film, read_film
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


class FilmFile:
    """What PyAV gives of a film: frames of four colours, when each is shown, how it was held, its pixels' shape."""

    FFmpegError = OSError

    def __init__(self, times: list[float], *, rotation: int = 0, aspect: float = 1) -> None:
        stream = SimpleNamespace(average_rate=30, sample_aspect_ratio=aspect)
        self.streams = SimpleNamespace(video=[stream])
        self.frames = [SimpleNamespace(to_image=four_colours, time=one, rotation=rotation) for one in times]

    def open(self, path: str) -> FilmFile:
        return self

    def decode(self, stream: object) -> list[SimpleNamespace]:
        return self.frames

    def __enter__(self) -> FilmFile:
        return self

    def __exit__(self, *error: object) -> None: ...


def four_colours() -> Image.Image:
    image = Image.new("RGB", (4, 2), "red")
    image.paste("blue", (0, 1, 2, 2))
    image.paste("lime", (2, 1, 4, 2))
    return image


def read_as(film: FilmFile, place: Path, monkeypatch: pytest.MonkeyPatch) -> Film:
    (place / "film.mp4").touch()
    monkeypatch.setattr("backbone.media.clips.import_av", lambda what: film)
    return read_film(place / "film.mp4")


@pytest.mark.parametrize(
    ("rotation", "size", "blue"),
    [(0, (4, 2), (0, 1)), (-90, (2, 4), (0, 0)), (90, (2, 4), (1, 3)), (-180, (4, 2), (3, 0))],
)
def test_a_film_is_turned_as_it_was_held(
    rotation: int,
    size: tuple[int, int],
    blue: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    film = read_as(FilmFile([0, 1 / 30], rotation=rotation), tmp_path, monkeypatch)
    assert all(frame.size == size and frame.getpixel(blue) == (0, 0, 255) for frame in film.frames)


def test_a_film_s_pixels_may_be_wider_than_high(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_as(FilmFile([0, 1 / 30], aspect=1.5), tmp_path, monkeypatch).frames[0].size == (6, 2)


def test_frames_of_a_film_that_last_longer_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    even = read_as(FilmFile([0, 0.034, 0.066, 0.1]), tmp_path, monkeypatch)
    assert len(even.frames) == 4 and even.fps == 30 and not capsys.readouterr().err
    uneven = read_as(FilmFile([0, 0.1, 0.2, 0.5, 0.6]), tmp_path, monkeypatch)
    assert len(uneven.frames) == 7 and uneven.fps == 10
    assert "taken as 7 of 100 ms" in capsys.readouterr().err
