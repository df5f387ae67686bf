"""`customize evaluate-clip`: figures that are known beforehand, where the clips come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from backbone.evaluation.motion import draw_track, trace_movement, track_correlation
from backbone.io.console import UserError
from backbone.media.clips import Film, encode_webp
from backbone.media.control.camera import as_lines, read_camera
from customize.cli import app
from customize.clips.evaluate import DIRECTED, ExpectedClip, ScoredWords, gather, measure
from customize.clips.settings import EvaluateClipOptions
from tests.tiny import tiny_motion_adapter


def walking(step: int, count: int = 5, side: int = 128) -> list[Image.Image]:
    """A soft square that walks so many pixels a frame to the right."""
    frames = []
    for number in range(count):
        frame = Image.new("RGB", (side, side), "white")
        frame.paste((60, 40, 200), (50 + step * number, 44, 82 + step * number, 76))
        frames.append(frame)
    return frames


def row(frames: list[Image.Image], words: str, **more: Any) -> Any:
    return measure(ExpectedClip(Film(tuple(frames), 8.0, "it.webp"), words, **more), ScoredWords(None))


def test_a_clip_does_what_its_words_say_or_not() -> None:
    right = walking(3)
    assert row(right, "a car, moving right").direction and not row(right, "a car, moving left").direction
    assert row(right, "a car").stillness is False and row(walking(0), "a car").stillness is True
    assert row(right, "").stillness is None and row(right, "").direction is None
    assert row(right, "").moved.x == pytest.approx(12, rel=0.15)
    assert row(right, "a car", camera="zoom-in").stillness is None
    assert row([*reversed(right)], "a car, moving right", camera="pan-right").direction is not None
    small = [frame.resize((64, 64)) for frame in right]
    assert row(small, "").moved.x == pytest.approx(12, rel=0.15)  # whatever the clip's size


def test_flicker_is_the_mean_change_of_a_pixel_and_jitter_that_of_the_change() -> None:
    grey = [Image.new("RGB", (16, 16), (level,) * 3) for level in (100, 110, 120, 130)]
    assert (row(grey, "").flicker, row(grey, "").jitter) == (10, 0)
    blinking = [Image.new("RGB", (16, 16), (level,) * 3) for level in (100, 110, 100, 110)]
    found = row(blinking, "")
    assert (found.flicker, found.jitter, found.along) == (10, 20, 10)


def test_a_track_is_drawn_from_where_the_thing_was_to_where_it_is() -> None:
    page = np.asarray(draw_track(walking(5)), dtype=int)
    red = (page[..., 0] > 200) & (page[..., 1] < 80)
    rows, columns = red.nonzero()
    assert rows.min() > 52 and rows.max() < 68 and columns.max() - columns.min() == pytest.approx(20, abs=7)
    assert np.array_equal(np.asarray(draw_track(walking(0))).max(), 255)


def across_a_texture(step: int, count: int = 5, flicker: int = 0) -> list[Image.Image]:
    """Frames of a blotchy plane over which the camera pans to the right, every other one so much lighter."""
    noise = np.random.default_rng(0).integers(60, 190, (40, 40, 3), dtype=np.uint8)
    plane = Image.fromarray(noise).resize((240, 240), Image.Resampling.BICUBIC)
    frames = [plane.crop((50 + step * t, 56, 178 + step * t, 184)) for t in range(count)]
    return [one if t % 2 == 0 else Image.eval(one, flicker.__add__) for t, one in enumerate(frames)]


def test_flicker_along_the_flow_is_none_of_a_pan_and_all_of_what_blinks() -> None:
    moving, blinking = (row(across_a_texture(6, flicker=more), "") for more in (0, 12))
    assert moving.flicker > 10 and moving.along < 1.5
    assert 9 < blinking.along < 13  # a little of which is taken for movement


def test_a_camera_is_compared_with_its_path_where_the_corners_are() -> None:
    frames = across_a_texture(5)
    right, left, far = (
        row(frames, "", camera=said, path=read_camera(said, 5, (128, 128))).corners
        for said in ("pan-right=20px", "pan-left=20px", "pan-right=40px")
    )
    assert right < 0.5 and row(frames, "").corners is None
    assert left == pytest.approx(
        25, abs=0.5
    )  # 10, 20, 30, 40 pixels apart in the four frames behind the first
    assert far == pytest.approx(12.5, abs=0.5)


def test_clips_are_compared_with_the_path_of_their_record_or_the_one_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "p00-s00.webp").write_bytes(encode_webp(across_a_texture(5), 8))
    record = {"clips": [{"file": "p00-s00.webp", "prompt": ""}], "camera": "of-then.json"}
    (tmp_path / "drawn" / "run.json").write_text(json.dumps(record))
    path = read_camera("pan-right=20px", 5, (128, 128))
    (tmp_path / "drawn" / "camera.txt").write_text(as_lines(path))

    def corners(camera: str = "") -> float:
        asked = EvaluateClipOptions(what=str(tmp_path / "drawn"), camera=camera)
        (shown,) = gather(tmp_path / "drawn", asked)
        return float(measure(shown, ScoredWords(None)).corners or 0)

    assert 0 < corners() < 0.5 and corners("pan-left=20px") == pytest.approx(25, abs=0.5)
    answer = call(tmp_path / "drawn", "--camera", "pan-nowhere", "--out", tmp_path / "none")
    assert isinstance(answer.exception, UserError) and "there is no pan-nowhere" in str(answer.exception)
    assert not (tmp_path / "none").exists()


def test_the_first_frame_is_compared_with_the_picture_that_it_was_to_be() -> None:
    frames = walking(3)
    assert row(frames, "", picture=frames[0]).first_frame_db == 100
    other = Image.eval(frames[0], lambda value: min(255, value + 10))
    assert 20 < row(frames, "", picture=other).first_frame_db < 60
    assert row(frames, "").first_frame_db is None


def test_a_track_is_like_itself_and_unlike_its_reverse_whatever_its_length() -> None:
    there, slower, back = (trace_movement(walking(step, count)) for step, count in ((3, 5), (1, 13), (-3, 5)))
    assert track_correlation(there, slower, 128) > 0.95
    assert track_correlation(there, back, 128) < -0.95
    assert track_correlation(there, trace_movement(walking(0)), 128) == 0


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["evaluate-clip", *map(str, words)])


def test_a_folder_of_clips_is_measured_with_its_captions_and_moji_names_what_it_sees(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for name, step in (("one", 3), ("two", -3)):
        (clips / f"{name}.webp").write_bytes(encode_webp(walking(step), 8))
        (clips / f"{name}.txt").write_text("a car in the snow, moving right")
    answer = call(clips, "--json")
    assert answer.exit_code == 0, answer.exception
    found = json.loads(answer.stdout)
    figures = found["figures"]
    assert figures["direction"]["value"] == 0.5 and figures["direction"]["clips"] == 2
    assert figures["direction"]["low"] < 0.5 < figures["direction"]["high"]
    assert 0 <= figures["nouns"]["value"] <= 1 and 0.5 < figures["identity"]["value"] <= 1
    assert "stillness" not in figures and "track" not in figures
    folder = Path(found["folder"])
    assert folder == tmp_path / "clips-evaluation" and (folder / "sheet.png").is_file()
    assert (folder / "report.html").read_text().count("data:image/webp;base64,") == 2
    shown = call(clips / "one.webp", "--caption", "a car, moving left", "--out", tmp_path / "one")
    assert shown.exit_code == 0 and "direction right                      0 %" in shown.output


@pytest.mark.slow
def test_an_adapter_draws_the_words_of_motion_that_are_measured(tiny_folder: Path, tmp_path: Path) -> None:
    tiny_motion_adapter().save_pretrained(tmp_path / "adapter")
    usual = (
        "--model",
        tiny_folder,
        "--frames",
        "2",
        "--steps",
        "1",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    )
    answer = call(tmp_path / "adapter", *usual, "--json")
    assert answer.exit_code == 0, answer.exception
    figures = json.loads(answer.stdout)["figures"]
    assert figures["direction"]["clips"] == len(DIRECTED) and figures["stillness"]["clips"] == 1
    assert "words" not in figures  # the tiny model has no scorer
    assert (tmp_path / "adapter-evaluation" / "clips" / "run.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{clips}", "--steps", "3"), "--steps is for clips that are drawn"),
        (("{clips}", "--prompts", "a dog"), "--prompts is for clips that are drawn"),
        (("{empty}",), "holds no clips"),
        (("{adapter}", "--caption", "a dog"), "--caption says what clips without one show"),
        (("nowhere.safetensors",), "There is no file nowhere.safetensors"),
        (("mm.ckpt",), "is a pickle"),
        (("{clips}", "--scorer", "{empty}"), "empty"),
        (("{clips}", "--image", "no.png"), "no.png"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(
    words: tuple[str, ...], said: str, tiny_folder: Path, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("clips", "empty", "adapter")}
    for place in places.values():
        place.mkdir()
    (places["clips"] / "one.webp").write_bytes(encode_webp(walking(3, 2), 8))
    (places["adapter"] / "config.json").write_text('{"_class_name": "MotionAdapter"}')
    answer = call(*(word.format(**places) for word in words), "--out", tmp_path / "out")
    message = str(answer.exception) if isinstance(answer.exception, UserError) else answer.output
    assert answer.exit_code != 0 and said in message and not (tmp_path / "out").exists()
