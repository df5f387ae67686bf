"""A way that no words name: a clip is drawn, or a picture moves, along the track of another clip or a written one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from backbone.evaluation.motion import SIDE, trace_movement, track_correlation
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.media.clips import read_film, write_film
from backbone.world.rendering.render import SIZE
from customize.cli import app
from customize.clips.planned.plan import plan_motion
from customize.clips.planned.track import as_json, read_track

ZIGZAG = {"x": [0, 12, 24, 36], "y": [0, 10, 0, 10]}


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["clip", *map(str, words), "--device", "cpu"])


def disc(x: float, y: float) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (150, 190, 240))
    ImageDraw.Draw(image).ellipse((x - 14, y - 14, x + 14, y + 14), fill="red", outline="black", width=3)
    return image


@pytest.fixture
def zigzag(tmp_path: Path) -> Path:
    """A clip of seven frames in which a disc goes to the right, down and up."""
    way = [(40 + 6 * k, 60 + 10 * (k % 2)) for k in range(7)]
    write_film(tmp_path / "zigzag", [disc(*at) for at in way], 8.0)
    return tmp_path / "zigzag.webp"


def test_a_clip_s_track_is_how_what_moves_in_it_goes(zigzag: Path) -> None:
    track = read_track(zigzag, 7)
    assert track[:, 0] == pytest.approx([6 * k for k in range(7)], abs=2)
    assert track[:, 1] == pytest.approx([10 * (k % 2) for k in range(7)], abs=2.5)
    assert track[:, 2:] == pytest.approx(np.broadcast_to([1.0, 0.0], (7, 2)), abs=3)
    assert len(read_track(zigzag, 13)) == 13


def test_a_track_that_is_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({**ZIGZAG, "turn": [0, 30, 60, 90]}))
    track = read_track(tmp_path / "a.json", 4)
    assert track.tolist() == [[0, 0, 1, 0], [12, 10, 1, 30], [24, 0, 1, 60], [36, 10, 1, 90]]
    (tmp_path / "b.json").write_text(json.dumps(as_json(track)))
    assert np.array_equal(read_track(tmp_path / "b.json", 4), track)


def test_a_drawn_thing_goes_the_way_about_where_it_would_stand(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ZIGZAG))
    still, moved = (
        plan_motion("a small dog in a park", 4, track=track)
        for track in (None, read_track(tmp_path / "a.json", 4))
    )
    way = moved.tracks[:, 0, :2] - still.tracks[:, 0, :2]
    assert way[:, 0] == pytest.approx([-18, -6, 6, 18]) and np.ptp(way[:, 1]) == pytest.approx(10)
    assert still.move == "" and moved.move and moved.still_prompt == "a small dog in a park"
    assert (moved.tracks[:, 0, :2] < SIZE).all()


def test_a_picture_s_thing_moves_as_what_moves_in_a_clip(zigzag: Path, tmp_path: Path) -> None:
    picture, mask = disc(50, 64), Image.new("L", (SIDE, SIDE))
    picture.save(tmp_path / "picture.png")
    ImageDraw.Draw(mask).ellipse((36, 50, 64, 78), fill=255)
    mask.save(tmp_path / "mask.png")
    given = ("--image", tmp_path / "picture.png", "--mask", tmp_path / "mask.png", "--track", zigzag)
    done = call("a ball", *given, "--frames", "7", "--out", tmp_path / "clip")
    assert done.exit_code == 0, done.output or repr(done.exception)
    wanted, drawn = (list(read_film(path).frames) for path in (zigzag, tmp_path / "clip" / "p00-s00.webp"))
    assert np.array_equal(np.asarray(drawn[0]), np.asarray(picture))
    assert track_correlation(trace_movement(drawn), trace_movement(wanted), SIDE) > 0.95
    kept = tmp_path / "clip" / "track.json"
    assert np.allclose(read_track(kept, 7), read_track(zigzag, 7), atol=1e-3)
    assert read_json(tmp_path / "clip" / "run.json")["track"] == str(zigzag)


def test_moji_draws_along_a_track(zigzag: Path, tmp_path: Path) -> None:
    done = call(
        "a dog in the snow", "--track", zigzag, "--frames", "4", "--steps", "2", "--out", tmp_path / "clip"
    )
    assert done.exit_code == 0 and "moving along the track, cut out of one drawing" in done.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("a dog, moving left", "--track", "{}/a.json"), "says left, and --track"),
        (("a dog", "--track", "{}/a.json", "--motion", "somewhere"), "here is --motion"),
        (("--image", "a.png", "--track", "{}/a.json"), "here is no prompt"),
        (("a dog", "--track", "{}/still.webp"), "Nothing moves in"),
        (("a dog", "--track", "{}/none.webp"), "none.webp"),
        (("a dog", "--track", "{}/odd.json"), "lists of two numbers or more"),
        (("a dog", "--track", "{}/text.json"), "x, y and turn are numbers"),
        (("a dog", "--track", "{}/small.json"), "growth is above 0"),
    ],
)
def test_what_is_no_track_is_refused(words: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    write_film(tmp_path / "still", [disc(60, 60)] * 3, 8.0)
    for name, written in {
        "a": ZIGZAG,
        "odd": {"x": [0, 1], "y": [0, 1, 2]},
        "text": {"x": ["left", "right"]},
        "small": {"growth": [1, 0]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(written))
    done = call(*(word.replace("{}", str(tmp_path)) for word in words), "--out", tmp_path / "clip")
    assert done.exit_code != 0 and sentence in str(done.exception) + done.output
    assert not (tmp_path / "clip").exists()


def test_of_a_model_without_poses_only_pictures_move(tiny_folder: Path, zigzag: Path, tmp_path: Path) -> None:
    done = call("a dog", "--track", zigzag, "--model", tiny_folder, "--out", tmp_path / "clip")
    assert isinstance(done.exception, UserError) and "no network that reads poses" in str(done.exception)
