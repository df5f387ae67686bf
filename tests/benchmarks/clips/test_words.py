"""The clips' benchmark: known movements are read from pixels, and true clips do what their words say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.evaluation.motion import PARTS, matches_move, measure_movement, track_error
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.models.clips.camera import CAMERA_WEIGHTS, CameraAdapter, make_camera, save_camera
from backbone.models.clips.motion import attach_motion
from backbone.models.clips.sparse import build_sparsectrl
from backbone.models.model import Backbone
from backbone.world.clip import Clip, render_clip
from backbone.world.motions import CAMERAS, MOTIONS
from backbone.world.scene import sample_scene
from benchmarks.clips import words as clips
from benchmarks.clips.words import Row, format_speed, format_table, measure_slide, select_clips
from tests.tiny import tiny_motion_adapter


def moved_blobs(
    count: int, x: float = 0.0, y: float = 0.0, scale: float = 1.0, turn: float = 0.0
) -> list[Image.Image]:
    """Frames of a few soft blobs that move together about (64, 64), so much from frame to frame."""
    at = np.array([(40.0, 50.0), (90.0, 60.0), (60.0, 95.0), (75.0, 30.0), (30.0, 85.0)]) - 64
    frames = []
    for t in range(count):
        angle = np.radians(turn * t)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        places = scale**t * at @ rotation.T + 64 + np.array([x, y]) * t
        rows, columns = np.mgrid[:128, :128]
        light = sum(
            np.exp(-((columns - px) ** 2 + (rows - py) ** 2) / (2 * (9 * scale**t) ** 2)) for px, py in places
        )
        frames.append(Image.fromarray((np.clip(light, 0, 1) * 220).astype(np.uint8)).convert("RGB"))
    return frames


@pytest.mark.parametrize(
    ("given", "part", "wanted"),
    [
        ({"x": 2.0}, "x", 6.0),
        ({"y": -1.5}, "y", -4.5),
        ({"scale": 1.04}, "growth", 3 * np.log(1.04)),
        ({"turn": 4.0}, "turn", 12.0),
    ],
)
def test_a_known_movement_is_measured(given: dict[str, float], part: str, wanted: float) -> None:
    moved = measure_movement(moved_blobs(4, **given))
    assert getattr(moved, part) == pytest.approx(wanted, rel=0.15)


def test_a_still_clip_has_not_moved() -> None:
    assert measure_movement(moved_blobs(3)) == (0, 0, 0, 0)


def test_a_track_is_off_by_the_root_mean_square_of_its_distances() -> None:
    true = np.zeros((3, 4))
    assert track_error(true + np.array([[9, 9, 0, 0], [3, 4, 1, 1], [0, 0, 1, 1]]), true) == np.sqrt(25 / 2)


def test_the_clips_are_chosen_evenly() -> None:
    found = select_clips(96, 8)
    said = [clip.camera or clip.move for clip in found]
    assert said.count("") == 16 and {said.count(move) for move in PARTS} == {5}
    assert all(not clip.scene.pair and len(clip.scene.things) == 1 for clip in found)
    slides = [clip.speed for clip in select_clips(160, 8) if clip.move in ("left", "right", "up", "down")]
    assert {slides.count(speed) for speed in ("slowly", "fast")} <= {8, 9, 10, 11, 12} and len(slides) > 30


def test_speed_is_how_much_farther_goes_what_was_to_go_farther() -> None:
    row = Row("left", True, None, 1.0, None, None, 1.0, 1.0)
    half = [replace(row, asked=asked, went=3 + asked / 2) for asked in (20.0, 40.0, 60.0)]
    assert format_speed(half) == "0.50" and format_speed(half[:1]) == format_speed([row]) == "–"
    slow, fast = (measure_slide(Clip(sample_scene(7), "up", speed=speed)) for speed in ("slowly", "fast"))
    assert slow is not None and fast is not None and fast[1] < slow[1] < 0 == fast[0]
    assert measure_slide(Clip(sample_scene(7), "grow")) is None


@pytest.mark.font
def test_true_clips_do_what_their_words_say() -> None:
    chosen = [clip for clip in select_clips(58, 8) if clip.move or clip.camera]
    right = [
        matches_move(
            clip.camera or clip.move, measure_movement(render_clip(clip).frames, camera=bool(clip.camera))
        )
        for clip in chosen
    ]
    assert np.mean(right) > 0.9  # 77 of 80, which bounds what a model can reach


def test_the_table_has_shares_with_intervals() -> None:
    rows = [
        Row(
            move,
            index % 4 > 0,
            None,
            1.0,
            2.0 if move in CAMERAS else None,
            None if move in CAMERAS else 3.0,
            1.0,
            0.5,
        )
        for index, move in enumerate((*MOTIONS, *CAMERAS))
    ]
    rows.append(Row("", None, True, 1.0, None, None, 1.0, 0.5))
    table = format_table({"moji-motion": rows})
    assert "| – |" in format_table({"nothing still": rows[:1]})
    assert "of 4 | " in table and "of 2 | " in table and "of 8 |" in table and "50.0 (50.0–50.0)" in table
    assert "| 2.0 (2.0–2.0) |" in table and "| 3.0 (3.0–3.0) |" in table


@pytest.mark.parametrize("font", [False, pytest.param(True, marks=pytest.mark.font)])
def test_the_whole_benchmark_runs_and_leaves_out_what_needs_a_font(
    font: bool, tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model, its adapter and the camera beside it; the word of the second clip is the camera's."""
    tiny_motion_adapter().save_pretrained(tmp_path / "motion")
    attach_motion(tiny.denoiser, tiny_motion_adapter())
    camera = make_camera(tiny)
    module = cast(CameraAdapter, camera.module)
    save_camera(tmp_path / "motion" / CAMERA_WEIGHTS, module, camera.settings, torch.float32)
    chosen = [clip for clip in select_clips(40, 2) if clip.move][:1] + [
        clip for clip in select_clips(40, 2) if clip.camera
    ][:1]
    monkeypatch.setattr(clips, "select_clips", lambda count, frames: chosen[:count])
    monkeypatch.setattr(clips, "has_font", lambda: font)
    sparse = tmp_path / "sparse"
    cast(Any, build_sparsectrl(tiny.denoiser, motion_max_seq_length=8)).save_pretrained(sparse)
    places: dict[str, Any] = {"model": tiny.location.source, "motion": str(tmp_path / "motion")}
    if font:
        places["sparsectrl"] = str(sparse)
    else:
        with pytest.raises(UserError, match="and the emoji font"):
            clips.main(**places, sparsectrl=str(sparse), clips=2, out=tmp_path / "out")
    clips.main(**places, clips=2, frames=2, steps=1, guidance=2.0, out=tmp_path / "out")
    rows = read_json(tmp_path / "out" / "table.json")
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert len(rows) == 3 + 3 * font and all(len(found) == 2 for found in rows.values())
    for name, moves in (("corners", CAMERAS), ("track", MOTIONS)):
        assert {
            row[name] is not None for found in rows.values() for row in found if row["move"] in moves
        } == {font}
    assert {row["first"] is not None for found in rows.values() for row in found} == {font}
    bound = rows.get("true clips, decoded", [{"flicker": 0.0}])
    assert min(row["flicker"] for row in rows["without an adapter"]) > bound[0]["flicker"]
