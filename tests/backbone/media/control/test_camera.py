"""Camera paths: words, JSON and RealEstate10K's lines are the world's camera, and rays are worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from backbone.io.console import UserError
from backbone.media.control.camera import (
    WORDS,
    Reach,
    as_lines,
    embed_rays,
    flat_path,
    measure_reach,
    read_camera,
    refuse_beyond,
    relative_values,
    trace_corners,
)
from backbone.world.clip import PAN, ROLL, ZOOM, Clip, trace_camera
from backbone.world.motions import CAMERAS
from backbone.world.rendering.render import SIZE
from backbone.world.scene import sample_scene

SQUARE = (SIZE, SIZE)


@pytest.mark.parametrize("word", CAMERAS)
def test_a_word_is_the_worlds_own_path(word: str) -> None:
    assert set(WORDS) == set(CAMERAS)
    path = read_camera(word, 16, SQUARE)
    world = flat_path(trace_camera(Clip(sample_scene(0), camera=word)), SIZE)
    np.testing.assert_allclose(path.poses, world.poses, atol=1e-6)
    np.testing.assert_allclose(path.intrinsics, world.intrinsics, atol=1e-6)


def test_a_point_of_the_picture_is_seen_where_the_world_draws_it() -> None:
    values = np.array([[0, 0, 1, 0], [20, -8, 1.3, 25]], dtype=np.float64)
    path = flat_path(values, SIZE)
    point = np.array([100.0, 40.0])
    ahead = np.append((point - SIZE / 2) / SIZE, 1.0)  # on the plane at depth 1
    seen = path.poses[1, :, :3] @ ahead + path.poses[1, :, 3]
    pixel = SIZE * (path.intrinsics[1, :2] * seen[:2] / seen[2] + path.intrinsics[1, 2:])
    turn = math.radians(25)
    dx, dy = point[0] - 20 - 64, point[1] + 8 - 64
    by_hand = 64 + 1.3 * np.array(
        [math.cos(turn) * dx - math.sin(turn) * dy, math.sin(turn) * dx + math.cos(turn) * dy]
    )
    np.testing.assert_allclose(pixel, by_hand, atol=1e-9)


def test_rays_are_plueckers_coordinates_by_hand() -> None:
    rays = embed_rays(flat_path([[0, 0, 1, 0], [32, 0, 1, 0], [0, 0, 2, 90]], 64), (64, 64)).double()
    assert rays.shape == (3, 6, 64, 64)
    torch.testing.assert_close(
        rays[:, 3:].norm(dim=1), torch.ones(3, 64, 64, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert not rays[0, :3].any()  # the first camera is where rays begin
    direction = torch.tensor([(10.5 / 64 - 0.5), (20.5 / 64 - 0.5), 1.0], dtype=torch.float64)
    direction = direction / direction.norm()
    torch.testing.assert_close(rays[0, 3:, 20, 10], direction, atol=1e-6, rtol=0)
    # Half a width to the right: o × d with o = (0.5, 0, 0)
    moment = torch.linalg.cross(torch.tensor([0.5, 0, 0], dtype=torch.float64), direction)
    torch.testing.assert_close(rays[1, :3, 20, 10], moment, atol=1e-6, rtol=0)
    torch.testing.assert_close(rays[1, 3:], rays[0, 3:])
    # Zoomed twice and turned a quarter clockwise: what is right of the middle was above it
    right = rays[2, 3:, 32, 63]
    assert right[1] < 0 and abs(right[0]) < 0.02 and abs(right[1] / right[2] + (63.5 / 64 - 0.5) / 2) < 1e-6


def test_a_path_as_its_first_frame_sees_it_has_the_same_rays() -> None:
    values = np.array([[5, 3, 1, 10], [9, -4, 1, 35], [20, 8, 1, -10]], dtype=np.float64)
    one, two = flat_path(values, SIZE), flat_path(relative_values(values), SIZE)
    torch.testing.assert_close(embed_rays(one, SQUARE), embed_rays(two, SQUARE), atol=1e-6, rtol=0)
    zoomed = relative_values(values * [1, 1, 1, 1] + [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 2, 0]])
    assert zoomed[:, 2].tolist() == [1, 0.5, 1.5] and zoomed[0].tolist() == [0, 0, 1, 0]


def test_words_say_how_far_and_ease_is_slow_at_both_ends() -> None:
    path = read_camera("pan-left=32px, zoom-in=1.5 roll-right=10deg ease", 5, (128, 64))
    assert path.intrinsics[-1, 0] == pytest.approx(1.5) and path.intrinsics[-1, 1] == pytest.approx(3.0)
    assert measure_reach(path).pan == pytest.approx(0.25) and path.turns[-1] == pytest.approx(10)
    steps = np.diff(path.positions[:, 0])
    assert (
        (steps < 0).all()
        and abs(steps[0]) < 0.5 * abs(steps[1])
        and path.positions[2, 0] == pytest.approx(-0.125)
    )
    one, other = (read_camera(f"{word}=10deg", 3, (64, 64)).poses for word in ("roll", "roll-left"))
    assert np.array_equal(one, other)


def test_a_paths_lines_and_its_json_are_read_back_as_it_is(tmp_path: Path) -> None:
    values: list[list[float]] = [[0, 0, 1, 0], [12, -6, 1.1, 5], [24, -12, 1.2, 10]]
    path = flat_path(values, 64)
    (tmp_path / "it.txt").write_text(as_lines(path))
    lines = {"pan": [[x, y] for x, y, _, _ in values], "zoom": [row[2] for row in values], "roll": [0, 5, 10]}
    (tmp_path / "it.json").write_text(json.dumps({**lines, "width": 64}))
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + as_lines(path).replace("\n", "\r\n").encode())
    for name in ("it.txt", "windows.txt", "it.json"):
        read = read_camera(str(tmp_path / name), 3, (64, 64))
        torch.testing.assert_close(embed_rays(read, (64, 64)), embed_rays(path, (64, 64)), atol=1e-6, rtol=0)


def test_a_wide_films_intrinsics_are_those_of_its_middle(tmp_path: Path) -> None:
    (tmp_path / "film.txt").write_text(
        "https://a.film\n" + 2 * "0 0.5 0.88888889 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n"
    )
    square = read_camera(str(tmp_path / "film.txt"), 2, (64, 64))  # 16 : 9, of which the middle is seen
    assert square.intrinsics[0] == pytest.approx([0.88888889, 0.88888889, 0.5, 0.5])
    wide = read_camera(str(tmp_path / "film.txt"), 2, (128, 72))
    assert wide.intrinsics[0] == pytest.approx([0.5, 0.88888889, 0.5, 0.5])


LINE = "0 0.5 0.5 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n"


@pytest.mark.parametrize(
    ("said", "text", "answer"),
    [
        ("pan-around", "", "there is no pan-around"),
        ("", "", "moves nothing"),
        ("ease", "", "moves nothing"),
        ("pan-left pan-right", "", "two pans in one line"),
        ("zoom-in=0.5", "", "Give 1 or more"),
        ("pan-left=20deg", "", "no amount of a pan"),
        ("roll-left=nan", "", "no amount of a roll"),
        ("nowhere.json", "", "no camera path"),
        ("it.json", "{}", "it has none"),
        ("it.json", "[1]", "it.json"),
        ("it.json", '{"pan": [[0, 0], [1]]}', "no pair"),
        ("it.json", '{"pan": [[0, 0], [1, 2]], "zoom": [1]}', "2 of pan, 1 of zoom"),
        ("it.json", '{"zoom": [1, 0]}', "0 or less"),
        ("it.json", '{"zoom": [1, "a"]}', "zoom"),
        ("it.json", '{"pen": [[0, 0]]}', "a key 'pen'"),
        ("it.json", '{"roll": [0, 1, 2]}', "has 3 poses and the clip 2 frames"),
        ("it.txt", "", "holds no poses"),
        ("it.txt", LINE, "has 1 poses and the clip 2 frames"),
        ("it.txt", LINE + "0 0.5 0.5\n", "Pose 2 of .* is not 19 numbers"),
        ("it.txt", LINE + LINE.replace("0.5 0.5 0.5", "500 500 0.5"), "Pose 2 .* focal lengths 500"),
        ("it.txt", LINE + LINE.replace(" 1 0\n", " 2 0\n"), "Pose 2 .* no camera's"),
        ("it.txt", LINE + LINE.replace(" 1 0\n", " -1 0\n"), "Pose 2 .* no camera's"),
        ("it.txt", LINE + LINE.replace(" 1 0\n", " 1 nan\n"), "no numbers"),
    ],
)
def test_what_is_no_path_is_said_in_a_sentence(said: str, text: str, answer: str, tmp_path: Path) -> None:
    place = tmp_path / said
    if text or said == "it.txt":
        place.write_text(text)
    with pytest.raises(UserError, match=answer):
        read_camera(str(place) if "." in said and "=" not in said else said, 2, (64, 64))


def test_a_path_that_leaves_the_world_is_refused_with_how_far_it_goes() -> None:
    reach = Reach(PAN / SIZE, ZOOM, ROLL)
    for word in WORDS:
        refuse_beyond(read_camera(word, 4, SQUARE), reach, "it")
    for said, answer in (
        ("pan-left=90px", "0.703 widths"),
        ("zoom-out=2", "2 times"),
        ("roll-left=45deg", "45 deg"),
    ):
        with pytest.raises(UserError, match=f"leaves the world that it knows.*{answer}"):
            refuse_beyond(read_camera(said, 4, SQUARE), reach, "it")


@pytest.mark.parametrize(
    ("said", "first", "last"),
    [
        ("pan-right=40px", (-40, 0), (88, 128)),
        ("zoom-in=1.5", (-32, -32), (160, 160)),
        ("roll-left=90deg", (128, 0), (0, 128)),
    ],
)
def test_corners_go_where_the_camera_does_not(
    said: str, first: tuple[float, float], last: tuple[float, float]
) -> None:
    corners = 128 * trace_corners(read_camera(said, 3, (128, 128)))
    np.testing.assert_allclose(corners[0], [(0, 0), (128, 0), (0, 128), (128, 128)], atol=1e-9)
    np.testing.assert_allclose(corners[-1][[0, 3]], [first, last], atol=1e-9)


def test_a_corner_behind_the_camera_is_no_number() -> None:
    path = flat_path(np.tile([0.0, 0.0, 1.0, 0.0], (2, 1)), 128)
    path.poses[1, 2, 3] = -2.0  # two depths forwards
    assert np.isnan(trace_corners(path)[1]).all()
