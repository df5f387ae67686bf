"""The world's ground truth: maps agree with the picture to the pixel, and what they were made for is unchanged."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from backbone.world.maps import HandStyle, draw_by_hand, draw_labels, draw_maps, find_visible, look_at
from backbone.world.rendering.record import GROUND, Part, Record, Stick, find_label, load_labels
from backbone.world.rendering.render import SIZE, find_font, render
from backbone.world.scene import Pose, Scene, sample_posed_scene, sample_scene
from backbone.world.words import Thing, load_vocabulary

FONT = "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"  # that the pinned pictures were drawn with
PINNED = "edd8f18e77d9c3fe88ceb6b772fcc3fd93c004a647a7c7b856ba9f3e989812e4"
WHITE = Scene((Thing("car"),), "on a white background", seed=5, poses=(Pose(64, 96, 60),))
TWO = Scene(
    (Thing("apple"), Thing("car")),
    "in space",
    seed=5,
    poses=(Pose(56, 90, 50, depth=0.7), Pose(76, 96, 60, depth=0.3)),
)


def disc(x: float, y: float, radius: float) -> Image.Image:
    image = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return image


def drawn_record() -> Record:
    """A field under the sky, and an apple before a dog in it."""
    record, side = Record(), 2 * SIZE
    record.begin("in a park", 64)
    field = Image.new("L", (side, side))
    ImageDraw.Draw(field).rectangle((0, 128, side, side), fill=255)
    record.ground(GROUND, field, 64)
    stick = Stick((50, 80), (50, 40), (30, 60), (70, 60))
    record.parts.append(Part("dog", disc(50, 60, 20), foot=80, stick=stick))
    record.parts.append(Part("apple", disc(64, 80, 20), foot=100, stick=stick))
    return record


# --- without the font -----------------------------------------------------------------------------------------


def test_every_noun_has_a_label_and_a_colour_of_its_own() -> None:
    labels = load_labels()
    assert list(labels)[5:] == list(load_vocabulary().nouns)
    assert len(set(labels.values())) == len(labels)
    assert find_label("poodle") == "dog"  # a concept is its class


def test_the_nearest_part_is_seen_and_the_ground_rises_to_the_viewer() -> None:
    layers = find_visible(drawn_record())
    names = np.array(list(load_labels()))[layers.labels]
    assert [names[y, x] for x, y in ((5, 10), (5, 120), (40, 50), (60, 70))] == [
        "sky",
        "ground",
        "dog",
        "apple",
    ]
    assert layers.depth[10, 5] == 0
    assert layers.depth[120, 5] == pytest.approx((120 - 64) / 64)
    assert layers.depth[50, 40] == pytest.approx((80 - 64) / 64)  # the ground's depth at the dog's foot
    assert layers.depth[70, 60] > layers.depth[50, 40]


def test_labels_survive_a_png() -> None:
    image = draw_labels(find_visible(drawn_record()).labels)
    file = io.BytesIO()
    image.save(file, "PNG")
    again = Image.open(file)
    assert np.array_equal(np.asarray(again), np.asarray(image))
    assert np.array_equal(np.asarray(again.convert("RGB")), np.asarray(image.convert("RGB")))
    assert tuple(np.asarray(image.convert("RGB"))[50, 40]) == load_labels()["dog"]


def test_lines_run_where_labels_meet() -> None:
    record = drawn_record()
    layers = find_visible(record)
    lines = np.asarray(draw_maps(layers)["lines"].convert("L")) > 0
    assert lines[63:65, 5].all() and not lines[60, 5] and not lines[68, 5]  # the horizon
    meets = layers.part[:, 1:] != layers.part[:, :-1]
    assert (lines[:, 1:] & lines[:, :-1])[meets].all()


def test_a_steady_hand_draws_the_outline_and_a_shaky_one_stays_near_it() -> None:
    shape = np.asarray(disc(64, 64, 30)) > 0
    rows, columns = np.indices(shape.shape)
    off = np.abs(np.hypot(columns - 64, rows - 64) - 30)
    steady = np.asarray(draw_by_hand([shape], HandStyle(width=2), Random(0)).convert("L")) > 0
    assert steady[off < 0.5].all() and off[steady].max() < 2.5
    shaky = np.asarray(draw_by_hand([shape], HandStyle(width=2, wobble=2), Random(0)).convert("L")) > 0
    assert 1 < off[shaky].max() < 6 and not np.array_equal(shaky, steady)
    gaps = np.asarray(draw_by_hand([shape], HandStyle(width=2, gaps=0.25), Random(0)).convert("L")) > 0
    assert 0.6 < gaps.sum() / steady.sum() < 0.9
    wide = np.asarray(draw_by_hand([shape], HandStyle(width=4), Random(0)).convert("L")) > 0
    assert wide.sum() / steady.sum() == pytest.approx(2, rel=0.2)


def test_a_stick_says_which_end_is_the_top_and_which_the_right() -> None:
    pose = np.asarray(draw_maps(find_visible(drawn_record()))["pose"]).astype(int)
    red = (pose[..., 0] > 150) & (pose[..., 1] < 120)
    green = (pose[..., 1] > 150) & (pose[..., 0] < 120)
    assert red[38:43, 46:55].sum() > 2 * red[78:83, 46:55].sum()  # a disc at the top
    assert green[56:65, 68:73].sum() > 2 * green[56:65, 28:33].sum()  # and at the right


def test_a_posed_scene_says_the_same_words_and_is_a_function_of_its_seed() -> None:
    scenes = [sample_posed_scene(seed) for seed in range(400)]
    assert scenes == [sample_posed_scene(seed) for seed in range(400)]
    assert all(replace(one, poses=None) == sample_scene(one.seed) for one in scenes)
    poses = [pose for one in scenes for pose in one.poses or ()]
    assert all(len(one.poses or ()) == len(one.figures) for one in scenes)
    assert np.mean([pose.angle == 0 for pose in poses]) == pytest.approx(0.5, abs=0.06)
    assert min(pose.angle for pose in poses) < -150 and max(pose.angle for pose in poses) > 150
    small = [
        pose.size
        for one in scenes
        for thing, pose in zip(one.figures, one.poses or (), strict=True)
        if thing.small
    ]
    assert max(small) <= 40


# --- with it --------------------------------------------------------------------------------------------------


@pytest.mark.font
def test_scenes_without_poses_are_drawn_bit_for_bit_as_ever() -> None:
    if hashlib.sha256(find_font().read_bytes()).hexdigest() != FONT:
        pytest.skip("another edition of the font")
    pixels = hashlib.sha256()
    for seed in range(60):
        drawn = render(sample_scene(seed))
        for image in (drawn.image, *drawn.masks):
            pixels.update(image.tobytes())
    for place in load_vocabulary().places:
        pixels.update(render(Scene((Thing("dog", accessory="a crown"),), place, seed=7)).image.tobytes())
    assert pixels.hexdigest() == PINNED


@pytest.mark.font
def test_the_map_shows_what_the_picture_shows() -> None:
    red = replace(WHITE, things=(Thing("apple"),), place="in space")  # on black, without a shadow
    (drawn, layers), empty = look_at(red), render(red, without=0)
    changed = np.abs(np.asarray(drawn.image).astype(int) - np.asarray(empty.image)).max(-1) > 60
    thing = layers.part == layers.things[0]
    assert (changed & ~thing).sum() < 0.03 * thing.sum()
    assert (thing & ~changed).sum() < 0.06 * thing.sum()


@pytest.mark.font
def test_the_nearer_thing_hides_the_other_and_is_the_nearer_in_the_depth() -> None:
    for poses in (TWO.poses, tuple(replace(one, depth=1 - one.depth) for one in TWO.poses or ())):
        drawn, layers = look_at(replace(TWO, poses=poses))
        near = int(np.argmax([one.depth for one in poses or ()]))
        both = (np.asarray(drawn.masks[0]) > 127) & (np.asarray(drawn.masks[1]) > 127)
        assert both.sum() > 100
        names = np.array(list(load_labels()))[layers.labels]
        assert set(names[both]) == {("apple", "car")[near]}
        assert np.allclose(layers.depth[both], 0.7)


@pytest.mark.font
@pytest.mark.parametrize("angle", [0.0, 90.0, -140.0])
def test_a_stick_reaches_from_edge_to_edge_of_the_thing(angle: float) -> None:
    scene = replace(WHITE, poses=(Pose(64, 90, 60, angle),))
    drawn, layers = look_at(scene)
    stick = layers.record.parts[layers.things[0]].stick
    assert stick is not None
    rows, columns = np.nonzero(np.asarray(drawn.masks[0]) > 127)
    turn = np.deg2rad(angle)
    middle = [(a + b) / 2 for a, b in zip(stick.left, stick.right, strict=True)]
    along = (columns - middle[0]) * np.cos(turn) + (rows - middle[1]) * np.sin(turn)
    across = -(columns - middle[0]) * np.sin(turn) + (rows - middle[1]) * np.cos(turn)
    width = np.hypot(stick.right[0] - stick.left[0], stick.right[1] - stick.left[1])
    height = np.hypot(stick.top[0] - stick.foot[0], stick.top[1] - stick.foot[1])
    assert np.ptp(along) + 1 == pytest.approx(width, abs=2)
    assert np.ptp(across) + 1 == pytest.approx(height, abs=2)
    assert along.min() == pytest.approx(-width / 2, abs=2) and across.max() == pytest.approx(
        height / 2, abs=2
    )


@pytest.mark.font
def test_a_mirrored_thing_has_its_right_at_the_left() -> None:
    sides = []
    for mirrored in (False, True):
        _, layers = look_at(replace(WHITE, poses=(Pose(64, 90, 60, 20, mirrored),)))
        stick = layers.record.parts[layers.things[0]].stick
        assert stick is not None
        sides.append((stick.left, stick.right))
    assert sides[0] == sides[1][::-1]


@pytest.mark.font
def test_a_full_turn_changes_nothing() -> None:
    turned = replace(WHITE, poses=(Pose(64, 96, 60, 360.0),))
    assert render(turned).image.tobytes() == render(WHITE).image.tobytes()
