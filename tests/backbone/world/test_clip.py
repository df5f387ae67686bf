"""The moving world: what its words say is what its pixels do, and its truth is theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import ImageChops

from backbone.world.clip import Clip, ClipRendering, render_clip, sample_bilinear, sample_clip, trace_camera
from backbone.world.motions import CAMERAS, MOTIONS, find_moves, opposite
from backbone.world.rendering.render import render
from backbone.world.scene import Scene
from backbone.world.words import Thing

DOG = Scene((Thing("dog"),), "in a park", seed=5)
SMALL = Scene((Thing("ball", small=True),), "in a park", seed=11)
FRAMES = 4

pytestmark = pytest.mark.font


def named(move: str) -> dict[str, Any]:
    return {"move" if move in MOTIONS else "camera": move}


def centroid(rendering: ClipRendering, frame: int) -> np.ndarray:
    weight = np.asarray(rendering.masks[frame][0], dtype=float)
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
    found: np.ndarray = np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
    return found


@pytest.mark.parametrize("scene", [DOG, replace(DOG, style="a pencil sketch of"), replace(DOG, pair=True)])
def test_a_still_clip_is_the_picture_bit_for_bit(scene: Scene) -> None:
    rendering, picture = render_clip(Clip(scene, frames=3)), render(scene)
    for frame, masks in zip(rendering.frames, rendering.masks, strict=True):
        assert ImageChops.difference(frame, picture.image).getbbox() is None
        assert masks == picture.masks
    assert not rendering.flow.any() and (rendering.tracks == rendering.tracks[0]).all()


@pytest.mark.parametrize("move", [*MOTIONS, *CAMERAS])
def test_tracks_are_where_the_pixels_are(move: str) -> None:
    clip = Clip(SMALL, frames=FRAMES, **named(move))
    rendering = render_clip(clip)
    offsets = []
    for t in range(FRAMES):
        x, y, size, _ = rendering.tracks[t, 0]
        mask = np.asarray(rendering.masks[t][0])
        if mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any():
            continue  # the camera left it behind
        area = (np.asarray(rendering.masks[t][0], dtype=float) / 255).sum()
        offsets.append((*(centroid(rendering, t) - (x, y)) / size, area / size**2))
    assert len(offsets) > 1
    # a ball is round: wherever it is, its middle has one distance from its track, and its area one size
    assert np.ptp(np.array(offsets)[:, :2], axis=0).max() < 0.6
    assert np.ptp(np.array(offsets)[:, 2]) < 0.03 * offsets[0][2]


@pytest.mark.parametrize("move", ["left", "grow", "clockwise"])
@pytest.mark.parametrize("camera", ["", "pan-right", "zoom-out", "roll-left"])
def test_flow_carries_one_frame_into_the_next(move: str, camera: str) -> None:
    rendering = render_clip(Clip(DOG, move, camera, frames=6))
    here, there = (np.asarray(rendering.frames[t], dtype=np.float32) for t in (2, 3))
    covers = [np.asarray(rendering.masks[t][0], dtype=np.float32)[..., None] for t in (2, 3)]
    y, x = np.mgrid[: here.shape[0], : here.shape[1]]
    x, y = (at + rendering.flow[2, ..., axis] for axis, at in enumerate((x, y)))
    inside = (x >= 0) & (x <= 127) & (y >= 0) & (y <= 127)
    seen = inside & (np.abs(sample_bilinear(covers[1], x, y) - covers[0])[..., 0] < 25)  # in both frames
    wrong, still = (np.abs(a - here).mean(-1)[seen] for a in (sample_bilinear(there, x, y), there))
    assert seen.mean() > 0.8 and np.median(wrong) < 2 and wrong.mean() < 0.5 * still.mean()


@pytest.mark.parametrize(
    ("move", "axis", "sign"),
    [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1), ("grow", 2, 1), ("shrink", 2, -1)],
)
def test_words_of_direction_are_what_the_track_does(move: str, axis: int, sign: int) -> None:
    for seed in range(4):
        tracks = render_clip(Clip(replace(DOG, seed=seed), move, frames=2)).tracks
        assert sign * (tracks[-1, 0, axis] - tracks[0, 0, axis]) > 0.3
        others = np.delete(tracks[-1, 0] - tracks[0, 0], axis)
        assert np.abs(others).max() < 1e-4


def test_a_pan_to_the_left_shows_things_going_right_and_near_ones_faster() -> None:
    clip = Clip(DOG, camera="pan-left", frames=3)
    rendering = render_clip(clip)
    assert rendering.tracks[-1, 0, 0] > rendering.tracks[0, 0, 0]
    sky, ground = rendering.flow[0, 2, :, 0].mean(), rendering.flow[0, -2, :, 0].mean()
    assert 0 < sky < 0.6 * ground


@pytest.mark.parametrize("move", [*MOTIONS, *CAMERAS])
def test_a_clip_played_backwards_has_the_opposite_words(move: str) -> None:
    clip = Clip(SMALL, frames=5, **named(move))
    assert opposite(opposite(move)) == move
    if opposite(move) != move and move in MOTIONS:
        forth, back = (render_clip(one).tracks for one in (clip, clip.backwards()))
        assert np.allclose(forth[::-1, 0], back[:, 0], atol=1e-3)
    if move in CAMERAS:
        step, other = (np.diff(trace_camera(one)[:, :2], axis=0) for one in (clip, clip.backwards()))
        assert np.allclose(step, -other, atol=1e-4)


def test_captions_say_what_moves_and_paraphrases_are_understood() -> None:
    assert Clip(DOG, "left", speed="slowly").caption() == "a dog in a park, moving left slowly"
    both = replace(DOG, things=(Thing("dog"), Thing("cat")))
    assert Clip(both, "up", "zoom-in").caption() == (
        "a dog next to a cat in a park, the dog moving up, camera zooming in"
    )
    assert Clip(DOG, camera="pan-up", speed="fast").caption().endswith("camera panning up fast")
    assert Clip(DOG).caption() == DOG.caption()
    for seed in range(200):
        clip = sample_clip(seed)
        for caption in (clip.caption(), clip.caption_for_training()):
            assert find_moves(caption) == (clip.move, clip.camera), caption


def test_the_mixture_of_clips_is_as_specified() -> None:
    clips = [sample_clip(seed) for seed in range(2000)]
    assert np.mean([not clip.move and not clip.camera for clip in clips]) == pytest.approx(0.15, abs=0.03)
    assert np.mean([bool(clip.camera) for clip in clips]) == pytest.approx(0.3, abs=0.03)
    assert {clip.move for clip in clips} == {"", *MOTIONS}
