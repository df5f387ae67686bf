"""A camera that moves over one drawing sees of it what its path says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.media.control.camera import (
    CORNERS,
    find_homographies,
    flat_path,
    read_camera,
    relative_values,
    trace_corners,
)
from backbone.media.control.views import plan_views

SIZE = (64, 48)
PIXELS = np.array([*SIZE, 1.0])
RANDOM = np.random.default_rng(0)
MOVES = [
    {"x": x, "y": y, "zoom": 1.5**zoom, "roll": roll}
    for x, y, zoom, roll in RANDOM.uniform(-1, 1, (12, 4)) * [30, 20, 1, 30]
]


def path_of(move: dict[str, float], frames: int = 3) -> np.ndarray:
    """[F, 4] of an even way."""
    u = np.linspace(0, 1, frames)
    return np.stack([move["x"] * u, move["y"] * u, move["zoom"] ** u, move["roll"] * u], axis=-1)


def dotted(size: tuple[int, int]) -> Image.Image:
    """A smooth drawing in which no two places are alike."""
    y, x = np.mgrid[: size[1], : size[0]]
    colours = np.stack(
        [127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7), 127 + 120 * np.sin((x + y) / 11)], -1
    )
    return Image.fromarray(colours.astype(np.uint8))


@pytest.mark.parametrize("move", MOVES)
def test_homographies_take_the_corners_where_the_path_takes_them(move: dict[str, float]) -> None:
    path = flat_path(path_of(move), SIZE[0], SIZE[0] / SIZE[1])
    corners = np.concatenate([CORNERS, np.ones((4, 1))], axis=1)
    seen = np.einsum("fij,cj->fci", find_homographies(path), corners)
    assert np.allclose(seen[..., :2] / seen[..., 2:], trace_corners(path))


@pytest.mark.parametrize("move", MOVES)
def test_every_frame_lies_inside_of_the_drawing(move: dict[str, float]) -> None:
    views = plan_views(flat_path(path_of(move), SIZE[0], SIZE[0] / SIZE[1]), SIZE, multiple=16)
    assert all(side % 16 == 0 for side in views.canvas)
    corners = np.concatenate([CORNERS * SIZE, np.ones((4, 1))], axis=1)
    points = np.einsum("fij,cj->fci", views.homographies, corners)
    places = points[..., :2] / points[..., 2:]
    assert (places > -1e-6).all() and (places < np.array(views.canvas) + 1e-6).all()
    white = views.look_at([Image.new("L", views.canvas, 255)])
    assert all(frame.size == SIZE and frame.getextrema() == (255, 255) for frame in white)


@pytest.mark.parametrize(
    ("words", "crops"),
    [
        ("pan-right=8px", [(0, 0), (4, 0), (8, 0)]),
        ("pan-left=8px", [(8, 0), (4, 0), (0, 0)]),
        ("pan-down=8px", [(0, 0), (0, 4), (0, 8)]),
    ],
)
def test_a_pan_cuts_frames_out_of_the_drawing(words: str, crops: list[tuple[int, int]]) -> None:
    views = plan_views(read_camera(words, 3, SIZE), SIZE, multiple=8)
    drawn = dotted(views.canvas)
    for frame, (x, y) in zip(views.look_at([drawn]), crops, strict=True):
        cut = drawn.crop((x, y, x + SIZE[0], y + SIZE[1]))
        assert np.abs(np.asarray(frame, int) - np.asarray(cut)).max() <= 1


def test_a_camera_that_stands_shows_the_drawing_itself() -> None:
    views = plan_views(
        flat_path(path_of({"x": 0, "y": 0, "zoom": 1, "roll": 0}), SIZE[0], SIZE[0] / SIZE[1]), SIZE
    )
    drawn = dotted(SIZE)
    assert views.canvas == SIZE and all(frame == drawn for frame in views.look_at([drawn] * 3))


def test_zooming_out_ends_at_the_whole_drawing_and_zooming_in_begins_there() -> None:
    drawn = dotted(SIZE)
    for words, whole in (("zoom-out=1.5", -1), ("zoom-in=1.5", 0)):
        views = plan_views(read_camera(words, 4, SIZE), SIZE, multiple=16)
        assert views.canvas == SIZE
        assert np.abs(np.asarray(views.look_at([drawn])[whole], int) - np.asarray(drawn)).max() <= 1


def test_a_path_may_begin_anywhere() -> None:
    values = path_of({"x": 20, "y": 5, "zoom": 1.3, "roll": 10}, 4) + np.array([7.0, 3.0, 0.0, 5.0])
    one, other = (
        plan_views(flat_path(each, SIZE[0], SIZE[0] / SIZE[1]), SIZE)
        for each in (values, relative_values(values))
    )
    assert one.canvas == other.canvas and np.allclose(one.homographies, other.homographies)


def test_paths_that_leave_every_drawing_are_refused() -> None:
    with pytest.raises(UserError, match="more than 4 times"):
        plan_views(read_camera("pan-left=400px", 4, SIZE), SIZE)
    turned = flat_path(path_of({"x": 0, "y": 0, "zoom": 1, "roll": 0}), 1.0, name="round")
    aside = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    turned.poses[2, :, :3] = aside
    with pytest.raises(UserError, match="round looks past what is drawn"):
        plan_views(turned, SIZE)


@pytest.mark.parametrize(
    "words", ["pan-right=16px", "pan-left=16px zoom-in=1.2", "pan-up=6px pan-right=9px roll-left=8deg"]
)
def test_what_is_all_equally_near_is_seen_as_a_plane(words: str) -> None:
    views = plan_views(read_camera(words, 3, SIZE), SIZE, multiple=8)
    drawn = dotted(views.canvas)
    seen = views.with_nearness(np.ones(views.canvas[::-1])).look_at([drawn])
    for plane, frame in zip(views.look_at([drawn]), seen, strict=True):
        inside = slice(2, -2), slice(2, -2)
        assert np.abs(np.asarray(frame, int)[inside] - np.asarray(plane)[inside]).max() <= 3


@pytest.mark.parametrize(("way", "begins"), [("right", 0), ("left", 16)])
def test_what_is_half_as_near_moves_half_as_far(way: str, begins: int) -> None:
    views = plan_views(read_camera(f"pan-{way}=16px", 3, SIZE), SIZE, multiple=8)
    drawn = dotted(views.canvas)
    rows = np.where(np.arange(SIZE[1]) < 20, 0.5, 1.0)
    seen = views.with_nearness(np.repeat(rows[:, None], views.canvas[0], axis=1)).look_at([drawn])
    for frame, gone in zip(seen, (0, 4, 8), strict=True):
        for band, rate in ((slice(0, 19), 1), (slice(21, None), 2)):
            x = begins + gone * rate * (1 if way == "right" else -1)
            cut = np.asarray(drawn.crop((x, 0, x + SIZE[0], SIZE[1])), int)[band, 2:-2]
            assert np.abs(np.asarray(frame)[band, 2:-2] - cut).max() <= 3
