"""What moves over one drawing is cut out of it whole, and nothing of it stays behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from backbone.io.files import read_json
from backbone.media.clips import read_film
from backbone.world.clip import SLIDE
from customize.cli import app
from customize.clips.planned.cut_out import CutOut, fill_holes, find_things, grow_within
from customize.clips.planned.plan import plan_motion

SIDE = 96
SKY, GROUND, RED = (150, 190, 240), (90, 160, 70), (200, 40, 30)


def place(*discs: tuple[float, float, float]) -> NDArray[np.uint8]:
    """A sky over a ground, and red discs (x, y, radius) before them, each with a blue spot to the right."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    pixels = np.where((y < 50)[..., None], SKY, GROUND).astype(np.uint8)
    for left, top, radius in discs:
        pixels[np.hypot(x - left, y - top) < radius] = RED
        pixels[np.hypot(x - left - radius / 2, y - top) < radius / 4] = (20, 30, 200)
    return pixels


def box_of(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def move(pixels: NDArray[np.uint8], *shifts: tuple[float, float, float, float]) -> list[NDArray[np.int_]]:
    """The frames of one disc of radius 15 in the middle of the picture."""
    cut = CutOut([box_of(48, 48, 15)], np.array(shifts)[:, None], room=6)
    return [np.asarray(frame, int) for frame in cut.move(Image.fromarray(pixels))]


def test_what_does_not_move_is_the_drawing() -> None:
    drawn = place((48, 48, 15))
    (frame,) = move(drawn, (0, 0, 1, 0))
    assert np.abs(frame - drawn).mean() < 0.7


@pytest.mark.parametrize("shift", [(-20, 0), (20, 0), (0, -12), (7, 15)])
def test_a_thing_goes_where_it_is_sent_and_leaves_nothing_behind(shift: tuple[int, int]) -> None:
    (frame,) = move(place((48, 48, 15)), (*shift, 1, 0))
    true = place((48 + shift[0], 48 + shift[1], 15)).astype(int)
    assert np.abs(frame - true).mean() < 1.5
    assert np.quantile(np.abs(frame - true).max(-1), 0.95) < 12  # edges are soft


def test_it_grows_about_its_middle_and_turns_clockwise() -> None:
    small, quarter = move(place((48, 48, 15)), (0, 0, 0.5, 0), (0, 0, 1, 90))
    assert np.abs(small - place((48, 48, 7.5))).mean() < 1.5
    blue = np.argwhere((quarter[..., 2] > 150) & (quarter[..., 0] < 80) & (quarter[..., 1] < 80))
    assert blue.mean(0) == pytest.approx([48 + 7.5, 48], abs=1.5)  # right becomes below


def test_its_shadow_goes_along_and_stays_on_the_ground() -> None:
    drawn = place((48, 48, 15)).astype(float)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    dark = (np.hypot((x - 48) / 18, (y - 65) / 3.5) < 1) & (np.hypot(x - 48, y - 48) >= 15)
    drawn[dark] *= 0.8
    left, up = move(drawn.round().astype(np.uint8), (-20, 0, 1, 0), (0, -20, 1, 0))
    light = [frame[65].sum(-1) / (sum(GROUND)) for frame in (left, up)]
    assert light[0][28] == pytest.approx(0.8, abs=0.04) and light[0][62] == pytest.approx(1, abs=0.04)
    assert light[1][48] == pytest.approx(0.8, abs=0.04) and np.abs(up[80] - GROUND).max() < 8


def test_of_two_things_each_goes_its_own_way() -> None:
    cut = CutOut(
        [box_of(25, 48, 12), box_of(70, 48, 12)], np.array([[[0, -20, 1, 0], [0, 20, 1, 0]]], float), room=6
    )
    (frame,) = cut.move(Image.fromarray(place((25, 48, 12), (70, 48, 12))))
    assert np.abs(np.asarray(frame, int) - place((25, 28, 12), (70, 68, 12))).mean() < 2


def test_what_cannot_be_told_from_its_rows_moves_as_an_ellipse() -> None:
    (found,) = find_things(np.full((SIDE, SIDE, 3), 0.5), [(30.0, 30, 60, 70)], least=[100])
    rows, columns = np.nonzero(found)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 69, 30, 59)
    assert found.sum() == pytest.approx(np.pi / 4 * 30 * 40, rel=0.03)


def test_a_mask_is_what_hangs_together_without_holes() -> None:
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8], mask[3:5, 3:5], mask[10, 10] = True, False, True
    seed = np.zeros_like(mask)
    seed[1, 1] = True
    whole = np.zeros_like(mask)
    whole[1:8, 1:8] = True
    assert np.array_equal(fill_holes(grow_within(seed, mask)), whole)


def test_a_planned_cut_is_where_the_thing_was_placed() -> None:
    motion = plan_motion("a dog in a park, moving left", 3)
    cut = motion.cut_out((256, 256), (32, 0))
    (figure,), ((left, top, right, bottom),) = motion.figures, cut.boxes
    assert ((left + right) / 2 - 32, bottom) == pytest.approx((2 * figure.x, 2 * figure.foot))
    assert bottom - top == pytest.approx(2 * figure.size)
    first, middle, last = cut.shifts[:, 0, 0]
    assert first - middle == pytest.approx(middle - last) == pytest.approx(2 * SLIDE / 2)
    assert np.allclose(cut.shifts[..., 1:], [0, 1, 0]) and cut.room == 16


def test_moji_cuts_out_what_moves(tmp_path: Path) -> None:
    words = ("a red car on the beach, moving left", "--shared-noise", "0.5")
    said = CliRunner().invoke(
        app,
        ["clip", *words, "--frames", "3", "--steps", "4", "--out", str(tmp_path / "clip")],
    )
    assert said.exit_code == 0, said.output or repr(said.exception)
    assert "moving left, cut out of one drawing" in said.output
    assert "--shared-noise is not used: every clip here is of one drawing" in said.output
    record = read_json(tmp_path / "clip" / "run.json")
    assert record["clips"][0]["model_reads"] == "a red car on the beach" and "redraw" not in record
    assert record["sampler"] == "ancestral"  # an image's, and not that of clips
    poses = read_film(tmp_path / "clip" / "condition-0-pose.webp").frames
    assert all(pose == poses[0] for pose in poses)
    frames = [
        np.asarray(Image.open(tmp_path / "clip" / "p00-s00" / f"{k:04d}.png").convert("RGB"), int)
        for k in range(3)
    ]
    red = [np.argwhere((one[..., 0] > 150) & (one[..., 1:].max(-1) < 90)).mean(0)[1] for one in frames]
    assert red[0] - 5 > red[1] > red[2] + 5
    assert np.abs(frames[0][:20] - frames[2][:20]).max() <= 1  # the sky stands still


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--motion", "somewhere"], "--redraw is for motions that words alone say, not for --motion"),
        (["--image", "photo.png", "--camera", "zoom-in"], "not for --image"),
    ],
)
def test_redrawing_is_refused_where_it_would_do_nothing(given: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["clip", "a dog, moving left", "--redraw", *given])
    assert result.exit_code != 0 and said in result.output + str(result.exception)


def test_redrawing_says_where_it_does_nothing(tmp_path: Path) -> None:
    words = ("a dog, camera zooming in",)
    result = CliRunner().invoke(
        app,
        ["clip", *words, "--redraw", "--frames", "2", "--steps", "1", "--out", str(tmp_path / "clip")],
    )
    assert result.exit_code == 0 and "--redraw is not used: no words of motion" in result.output
