"""Clips as files: what a folder of frames says by its names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.io.report import film_figure
from backbone.media.clips import Film, read_film, write_film
from tests.align.conftest import picture
from tests.backbone.media.sources.test_pictures import huge


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


def test_a_header_of_more_pixels_than_any_clip_has_is_a_sentence(tmp_path: Path) -> None:
    huge(tmp_path / "huge.png", 60_000, 60_000)
    with pytest.raises(UserError, match=r"huge\.png cannot be read as a clip"):
        read_film(tmp_path / "huge.png")


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


class FilmFile:
    """What PyAV gives of a film: frames of four colours, when each is shown, how it was held, its pixels' shape."""

    FFmpegError, time_base = OSError, 1_000_000

    def __init__(
        self, times: list[float], *, rotation: int = 0, aspect: float = 1, lasts: float = 0, promised: int = 0
    ) -> None:
        cover = SimpleNamespace(average_rate=1, sample_aspect_ratio=1, frames=0)
        stream = SimpleNamespace(average_rate=30, sample_aspect_ratio=aspect, frames=promised or len(times))
        self.streams = SimpleNamespace(video=[cover, stream] if times else [])
        self.film, self.duration = stream, lasts * self.time_base
        self.frames = [SimpleNamespace(to_image=four_colours, time=one, rotation=rotation) for one in times]

    def open(self, path: str) -> FilmFile:
        return self

    def decode(self, stream: object) -> list[SimpleNamespace]:
        return self.frames if stream is self.film else self.frames[:1]

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
    assert "read as 7 frames of 100 ms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("film", "said"),
    [
        (
            FilmFile([0, 1 / 30], lasts=3),
            "declares 3.0 s and its frames end at 0.1 s: it may be truncated",
        ),
        (FilmFile([0, 1 / 30], promised=9), "declares 9 frames and holds 2: it may be truncated"),
        (FilmFile([5, 5 + 1 / 30], lasts=2 / 30), ""),
    ],
)
def test_a_film_that_ends_before_it_says_is_said_to_be_cut(
    film: FilmFile,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(read_as(film, tmp_path, monkeypatch).frames) == 2
    assert said in " ".join(capsys.readouterr().err.split()) if said else not capsys.readouterr().err


def test_a_film_of_sound_alone_and_an_empty_one_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds sound and no pictures"):
        read_as(FilmFile([]), tmp_path, monkeypatch)
    broken = FilmFile([0, 1])
    monkeypatch.setattr(broken, "open", lambda path: (tmp_path / "gone").open())
    with pytest.raises(UserError, match=r"cannot be read as a film \(it is empty\). Copy it again"):
        read_as(broken, tmp_path, monkeypatch)
