"""Clips without a motion adapter: a motion that is planned from the words, and frames that are linked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor
from typer.testing import CliRunner

from backbone.cli.sampling import Sampler
from backbone.evaluation.motion import TRACK
from backbone.io.files import read_json
from backbone.media.clips import read_film, write_film
from backbone.media.control.camera import read_camera
from backbone.media.control.views import plan_views
from backbone.models.control import Condition
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, sample_latents
from backbone.world.clip import FAR, Clip, pan_rate, thing_rate
from backbone.world.motions import MOTIONS, CutMotion, cut_camera, cut_motion
from backbone.world.rendering.render import SIZE
from customize.cli import app
from customize.clips.draw import publish, write_maps
from customize.clips.planned.parallax import find_nearness
from customize.clips.planned.plan import SLENDER, PlannedClip, describe_plan, plan_motion
from customize.clips.settings import ClipOptions
from tests.customize.test_evaluate_clip import walking


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(
        app, ["clip", *map(str, words), "--device", "cpu", "--steps", "2", "--frames", "3"]
    )


@pytest.mark.parametrize(("frames", "sampler"), [(1, "ancestral"), (2, "ddim")])
def test_fresh_noise_is_in_the_steps_of_one_drawing_and_not_of_frames(frames: int, sampler: Sampler) -> None:
    model = Backbone.open("moji", device="cpu")
    assert model.defaults["sampler"] == "ancestral"

    def draw(**how: Any) -> Tensor:
        (latents,) = sample_latents(
            model, [Request("a dog", (0, 0))], steps=2, guidance=1.0, seed=0, frames=Frames(frames), **how
        )
        return latents

    own, ddim, fresh = draw(), draw(sampler="ddim"), draw(sampler="ancestral")
    assert not torch.equal(ddim, fresh) and torch.equal(own, fresh if sampler == "ancestral" else ddim)


def test_a_clip_s_command_names_no_sampler_that_was_not_named() -> None:
    usual = {"steps": 3, "guidance": 2.0, "sampler": "ancestral"}
    assert ClipOptions(words=("a dog",)).with_defaults(usual).sampler is None
    assert ClipOptions(words=("a dog",), sampler="heun").with_defaults(usual).sampler == "heun"


def test_a_clip_s_row_of_the_sheet_ends_with_the_way_that_it_goes(tmp_path: Path) -> None:
    frames = walking(5, 4)
    record = {
        "command": "customize clip",
        "model": "moji",
        "motion": "",
        "concepts": [],
        "frames": 4,
        "fps": 8.0,
    }
    record |= {"steps": 2, "guidance": 4.0, "seed": 0}
    still = {"pose, scale 1": frames[:1] * 4}
    for moving, maps in ((frames, still), (frames[:1] * 4, still)):
        folder = tmp_path / str(moving is frames)
        write_film(folder / "p00-s00", moving, 8.0)
        publish(folder, [Request("a dog", (0, 0))], ["a dog"], [moving], record, maps)
    pages = [Image.open(tmp_path / name / "sheet.png").convert("RGB") for name in ("True", "False")]
    shown = [ImageColor.getrgb(TRACK) in {one for _, one in page.getcolors(1 << 24) or ()} for page in pages]
    assert shown == [True, False] and pages[0].size == pages[1].size


def middle(pose: Image.Image) -> tuple[float, float]:
    """Where the middle of what a map of poses shows is, (x, y)."""
    y, x = np.nonzero(np.asarray(pose).max(-1))
    return float(x.mean()), float(y.mean())


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a dog in a park, moving left", CutMotion("a dog in a park", "left")),
        ("a dog moving left fast in a park", CutMotion("a dog in a park", "left", "fast")),
        ("a [V] dog in the snow, growing", CutMotion("a [V] dog in the snow", "grow")),
        ("a cat next to a dog, the dog is rising", CutMotion("a cat next to a dog", "up", "", "dog")),
        ("a cat growing and shrinking at night", CutMotion("a cat at night", "pulse")),
        ("A dog that moves to the left", CutMotion("A dog", "left")),
        ("the rising sun", CutMotion("the rising sun")),
        ("a bouncing castle", CutMotion("a bouncing castle")),
        ("a dog, camera rising", CutMotion("a dog, camera rising")),
        ("a dog. It is rising fast.", CutMotion("a dog. It.", "up", "fast")),
        ("a [V] dog walking left in the snow", CutMotion("a [V] dog in the snow", "left", walks=True)),
        ("a dog that runs quickly to the right", CutMotion("a dog", "right", "fast", walks=True)),
        ("a rocket in space, slowly flying upwards", CutMotion("a rocket in space", "up", "slowly")),
        ("a cat jumping in a park", CutMotion("a cat in a park", "bounce")),
        ("a dog running away", CutMotion("a dog", "shrink", walks=True)),
        ("a dog walking in the snow", CutMotion("a dog in the snow", "left", walks=True)),
        ("a fish swims slowly under the sea", CutMotion("a fish under the sea", "left", "slowly")),
        ("a racing car in the city", CutMotion("a racing car in the city")),
        ("a falling star at night", CutMotion("a falling star at night")),
        ("a spinning top, a rocking chair", CutMotion("a spinning top, a rocking chair")),
        ("a dog moving left, then right", CutMotion("a dog moving left, then right")),
        ("a dog moving left and jumping", CutMotion("a dog moving left and jumping")),
        ("a dog and a cat moving left", CutMotion("a dog and a cat", "left")),
        ("a dog running, camera panning left", CutMotion("a dog, camera panning left", "left", walks=True)),
    ],
)  # fmt: skip
def test_words_of_motion_are_taken_out_of_a_prompt(prompt: str, said: CutMotion) -> None:
    assert cut_motion(prompt) == said


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a dog moving to the left and to the right", "“moving to the left and to the right”"),
        ("a dog walking left, then right", "“walking left, then right”"),
        ("a dog moving left and jumping", "“moving left”"),
        ("a dog in a park, camera panning left and right", "“camera panning left and right”"),
        ("a dog running back and forth", "“running back and forth”"),
    ],
)
def test_motion_that_is_named_and_not_understood_is_not_called_none(prompt: str, words: str) -> None:
    said = describe_plan(prompt, PlannedClip(prompt, 1))
    assert len(said) == 1 and words in said[0] and "Name one alone" in said[0]
    assert "names no motion" in describe_plan("a dog in a park", PlannedClip("a dog in a park", 1))[0]


def test_every_way_to_say_a_motion_is_understood() -> None:
    for move, ways in MOTIONS.items():
        for words in ways:
            said = cut_motion(f"a dog in a park, {words} slowly")
            assert (said.prompt, said.move, said.speed) == ("a dog in a park", move, "slowly")


@pytest.mark.parametrize(
    ("words", "move"),
    [
        ("the camera pans to the left", "pan-left"),
        ("camera tilts up", "pan-up"),
        ("panning right slowly", "pan-right"),
        ("dolly in", "zoom-in"),
        ("camera pulling back", ""),
        ("camera dollies out", "zoom-out"),
        ("camera rolls left", "roll-left"),
    ],
)
def test_a_camera_s_move_is_understood_as_people_say_it(words: str, move: str) -> None:
    said = cut_camera(f"a dog walking left, {words}")
    assert said.move == move and cut_motion(said.prompt).move == "left"


def test_what_walks_rises_and_leans_at_every_step_and_ends_where_what_slides_does() -> None:
    slides, walks = (
        plan_motion(f"a dog in a park, {verb} left", 24).tracks[:, 0] for verb in ("moving", "walking")
    )
    assert np.array_equal(slides[:, 0], walks[:, 0]) and np.array_equal(slides[0], walks[0])
    assert 1 < np.ptp(walks[:, 1]) < 4 and (walks[:, 1] <= slides[:, 1]).all()
    assert 3 < np.ptp(walks[:, 3]) < 7


@pytest.mark.parametrize(
    ("words", "way"),
    [("moving left", (-1, 0)), ("moving right", (1, 0)), ("rising", (0, -1)), ("sinking", (0, 1))],
)
def test_a_planned_thing_goes_the_way_that_is_said(words: str, way: tuple[int, int]) -> None:
    motion = plan_motion(f"a dog in a park, {words}", 5)
    path = np.diff([middle(one) for one in motion.maps], axis=0)
    assert motion.still_prompt == "a dog in a park"
    assert (path @ way > 3).all() and (abs(path @ way[::-1]) < 1).all()


def test_of_two_things_the_named_one_moves_and_of_a_pair_both() -> None:
    one = plan_motion("a cat next to a dog, the dog moving down", 2).maps
    pair = plan_motion("two cats in space, moving down", 2).maps
    moved = [
        np.abs(np.diff(np.stack([np.asarray(m, np.int16) for m in maps]), axis=0))[0] for maps in (one, pair)
    ]
    assert moved[0][:, :60].max() == 0 < moved[0][:, 68:].max()
    assert moved[1][:, :60].max() > 0 and moved[1][:, 68:].max() > 0


def test_what_moji_s_world_does_not_know_is_one_thing() -> None:
    assert len(plan_motion("a [V] dog in the snow, moving left", 2, nouns={"[V]": ""}).figures) == 1
    assert plan_motion("a steam locomotive near Verona, moving left", 2).move == "left"


def test_moji_follows_the_words_by_a_pose_in_each_frame(tmp_path: Path) -> None:
    said = call("a dog in a park, moving left, camera zooming in", "--redraw", "--out", tmp_path / "clip")
    assert said.exit_code == 0, said.output or repr(said.exception)
    record = read_json(tmp_path / "clip" / "run.json")
    assert record["clips"][0]["model_reads"] == "a dog in a park"
    assert record["conditions"][0]["kind"] == "pose" and record["shared_noise"] == 1
    assert "moving left by a pose in each frame" in said.output
    assert "the camera moves over one drawing of 128 × 128 pixels" in said.output
    assert record["drawings"] == [[128, 128]]
    poses = [middle(frame)[0] for frame in read_film(tmp_path / "clip" / "condition-0-pose.webp").frames]
    assert poses[0] > poses[1] > poses[2]


def test_a_camera_looks_over_one_drawing_of_any_model(tiny_folder: Path, tmp_path: Path) -> None:
    for words, name in (
        (("a dog, camera panning right",), "said"),
        (("a dog", "--camera", "pan-right"), "path"),
    ):
        said = call(*words, "--model", tiny_folder, "--out", tmp_path / name)
        assert said.exit_code == 0, said.output or repr(said.exception)
    record = read_json(tmp_path / "said" / "run.json")
    assert record["clips"][0]["model_reads"] == "a dog" and "conditions" not in record
    ((width, height),), size = record["drawings"], Image.open(tmp_path / "said" / "p00-s00" / "0000.png").size
    assert width > size[0] and height == size[1]
    clips = [
        [np.asarray(frame) for frame in read_film(tmp_path / name / "p00-s00.webp").frames]
        for name in ("said", "path")
    ]
    assert np.array_equal(clips[0], clips[1]) and len(clips[0]) == 3
    gone = round(0.3125 * size[0] / 2)  # pixels from frame to frame
    apart = np.abs(clips[0][0][:, gone:].astype(int) - clips[0][1][:, :-gone]).mean()
    assert apart < 0.5 * np.abs(clips[0][0].astype(int) - clips[0][1]).mean()
    assert (tmp_path / "path" / "camera.txt").is_file()


def test_a_transformer_s_camera_moves_too_where_nothing_else_does(tmp_path: Path) -> None:
    said = call("a dog, camera panning right", "--model", "moji-flow", "--out", tmp_path / "clip")
    assert said.exit_code == 0, said.output or repr(said.exception)
    assert read_json(tmp_path / "clip" / "run.json")["drawings"] == [[192, 128]]


def test_a_camera_begins_with_a_picture_and_the_drawing_goes_on_around_it(tmp_path: Path) -> None:
    picture = Image.effect_mandelbrot((96, 128), (-2, -1, 1, 1), 60).convert("RGB")
    picture.save(tmp_path / "photo.png")
    said = call(
        "in a park, camera panning left",
        "--image",
        tmp_path / "photo.png",
        "--out",
        tmp_path / "clip",
        "--width",
        "96",
    )
    assert said.exit_code == 0, said.output or repr(said.exception)
    record = read_json(tmp_path / "clip" / "run.json")
    assert record["drawings"] == [[128, 128]] and record["images"] == [str(tmp_path / "photo.png")]
    first, *_, last = (
        np.asarray(Image.open(tmp_path / "clip" / "p00-s00" / f"{k:04d}.png").convert("RGB"), int)
        for k in range(3)
    )
    assert (
        np.abs(first - np.asarray(picture))[:, 8:].max() <= 1
    )  # but for the border at which the drawing goes on
    assert np.abs(last[:, 38:] - np.asarray(picture)[:, 8:-30]).max() <= 1


def test_every_prompt_beside_a_picture_moves_something(tmp_path: Path) -> None:
    Image.new("RGB", (128, 128)).save(tmp_path / "photo.png")
    said = call(
        "a dog", "a dog, camera zooming in", "--image", tmp_path / "photo.png", "--out", tmp_path / "clip"
    )
    assert (
        said.exit_code != 0
        and "“a dog” moves nothing in the picture and no camera" in str(said.exception) + said.output
    )


def test_a_zoom_into_a_picture_draws_nothing(tmp_path: Path) -> None:
    Image.effect_mandelbrot((128, 128), (-2, -1, 1, 1), 60).convert("RGB").save(tmp_path / "photo.png")
    said = call("a dog, camera zooming in", "--image", tmp_path / "photo.png", "--out", tmp_path / "clip")
    assert said.exit_code == 0, said.output or repr(said.exception)
    frames = [Image.open(tmp_path / "clip" / "p00-s00" / f"{k:04d}.png").convert("RGB") for k in range(3)]
    picture = Image.open(tmp_path / "photo.png")
    assert np.array_equal(np.asarray(frames[0]), np.asarray(picture)) and frames[1] != frames[0]


def test_a_thing_under_a_camera_stands_where_it_stands_without_one() -> None:
    path = read_camera("pan-left=20px", 3, (128, 128))
    views = plan_views(path, (128, 128), multiple=32)
    pose = plan_motion("a dog in a park", 1).maps[0]
    first, *_, last = views.look_at([views.lay_out(pose)])
    assert np.array_equal(np.asarray(first), np.asarray(pose))
    assert middle(last)[0] - middle(first)[0] == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize("place", ["in a park", "in space", "on a white background"])
@pytest.mark.parametrize("way", ["left", "right"])
def test_what_is_near_passes_a_pan_faster_and_nothing_is_folded(place: str, way: str) -> None:
    views = plan_views(read_camera(f"pan-{way}=40px", 3, (128, 128)), (128, 128), multiple=32)
    motion = plan_motion(f"a dog {place}", 1)
    near = find_nearness(motion.scene, motion.figures, motion.tracks, views, slender=SLENDER)
    assert near.shape == (1, 128, 192) and near.min() >= FAR - 1e-9 and near.max() <= 1
    clip = Clip(motion.scene)
    away = -1 if way == "right" else 0  # the column that is farthest from the thing
    assert near[0, 0, away] == pytest.approx(FAR)
    assert near[0, -1, away] == pytest.approx(float(pan_rate(SIZE, motion.scene.horizon, clip)), abs=0.02)
    (figure,), ((x, y, *_),) = motion.figures, motion.tracks[0]
    middle = near[0, round(float(y)), views.corner[0] + round(float(x))]
    assert middle == pytest.approx(thing_rate(figure, motion.scene.horizon, clip))
    assert (np.abs(np.diff(near[0], axis=1)) * 40).max() < 0.75  # of 1, at which the drawing folds


def extent(pose: Image.Image) -> tuple[float, float, float]:
    """The width and the height of what a map of poses shows, and its foot."""
    y, x = np.nonzero(np.asarray(pose).max(-1))
    return float(np.ptp(x)), float(np.ptp(y)), float(y.max())


@pytest.mark.parametrize("size", [(256, 128), (128, 256), (192, 96)])
def test_a_thing_keeps_its_shape_in_frames_that_are_not_square(size: tuple[int, int]) -> None:
    """Its place is spread over the frame, and its foot stays at its share of the height."""
    square = plan_motion("a dog in a park, moving left", 3)
    assert square.in_frame((64, 64)).at_rest.tobytes() == square.at_rest.tobytes()
    motion = square.in_frame(size)
    for pose, own in zip(motion.maps, square.maps, strict=True):
        (width, height, foot), (own_width, own_height, own_foot) = extent(pose), extent(own)
        assert (width, height) == pytest.approx((own_width, own_height), abs=1.5)
        assert foot / pose.height == pytest.approx(own_foot / SIZE, abs=0.02)
        assert middle(pose)[0] / pose.width == pytest.approx(middle(own)[0] / SIZE, abs=0.02)
    # What is cut out of the drawing lies where its pose is
    ((left, top, right, bottom),) = motion.cut_out(size, (0, 0)).boxes
    scale = size[0] / motion.canvas[0]
    assert (right - left, bottom - top) == pytest.approx(
        (SLENDER * square.figures[0].size * scale, square.figures[0].size * scale), abs=0.1
    )
    assert bottom == pytest.approx(square.figures[0].foot * size[1] / SIZE, abs=0.1)


@pytest.mark.parametrize("size", [(128, 256), (256, 128)])
def test_the_ground_of_a_pan_begins_at_the_horizon_of_frames_that_are_not_square(
    size: tuple[int, int],
) -> None:
    views = plan_views(read_camera("pan-left=40px", 3, size), size, multiple=32)
    motion = plan_motion("a dog in a park", 1).in_frame(size)
    near = find_nearness(motion.scene, motion.figures, motion.tracks, views, slender=SLENDER)
    column = near[0, views.corner[1] : views.corner[1] + size[1], 0]  # far from the thing
    rows = (np.arange(size[1]) + 0.5) * SIZE / size[1]
    assert np.abs(column - pan_rate(rows, motion.scene.horizon, Clip(motion.scene))).max() < 0.02


@pytest.mark.parametrize("way", ["left", "right"])
def test_a_thing_before_a_pan_moves_as_its_foot_does(way: str) -> None:
    views = plan_views(read_camera(f"pan-{way}=20px", 3, (128, 128)), (128, 128), multiple=32)
    motion = plan_motion("a dog in a park", 1)
    seen = views.with_nearness(
        find_nearness(motion.scene, motion.figures, motion.tracks, views, slender=SLENDER)
    )
    first, *_, last = seen.look_at([views.lay_out(motion.maps[0])])
    rate = thing_rate(motion.figures[0], motion.scene.horizon, Clip(motion.scene))
    gone = np.subtract(middle(last), middle(first)) * (-1 if way == "right" else 1)
    assert gone == pytest.approx([20 * rate, 0], abs=0.6) and rate < 0.95


def test_without_words_of_motion_a_clip_stands_still(tiny_folder: Path, tmp_path: Path) -> None:
    said = call("a dog", "--model", tiny_folder, "--out", tmp_path / "still")
    assert said.exit_code == 0 and "has no network that reads poses" in said.output
    still = read_film(tmp_path / "still" / "p00-s00.webp")  # in which equal frames are one
    first, *others = (np.asarray(frame) for frame in still.frames)
    assert len(still.frames) == 3 and still.name.endswith(".webp")
    assert all(np.abs(first.astype(int) - one).max() <= 1 for one in others)


def test_the_maps_of_two_prompts_are_both_shown(tmp_path: Path) -> None:
    planned = [tuple(plan_motion(f"a dog, moving {way}", 2).maps) for way in ("left", "right")]
    facts = {"kind": "pose", "scale": 1.0}
    conditions = [Condition(cast(Any, None), maps[0], facts, maps) for maps in planned]
    shown = write_maps(tmp_path, conditions, ClipOptions(words=("a dog",), frames=2))
    assert list(shown.values()) == planned
    assert {path.name for path in tmp_path.glob("*.webp")} == {
        "condition-0-pose.webp",
        "condition-1-pose.webp",
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--camera", "pan-left", "--camera-scale", "0.5"), "--camera-scale has no effect without --motion"),
        (("--camera", "pan-left", "--camera-adapter", "a.safetensors"), "--camera-adapter has no effect"),
        (("--camera", "pan-left", "--condition", "pose=a.png"), "Leave one out"),
        (("--camera", "pan-left=2000px"), "needs a drawing of"),
        (("--image", "photo.png"), "photo.png"),
        (("--image", "a.png", "--image", "b.png", "--camera", "pan-left"), "2 --image is too much"),
        (("--image", "a.png", "--image-at", "1", "--camera", "pan-left"), "--image-at is too much"),
        (("--camera", "pan-sideways"), "there is no pan-sideways"),
        (("--context-length", "8"), "--context-length has no effect without --motion"),
        (("--model", "moji-flow"), "is a transformer"),
    ],
)
def test_what_only_an_adapter_does_is_refused(words: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    said = call("a dog, moving left", *words, "--out", tmp_path / "clip")
    assert sentence in str(said.exception) + said.output and not (tmp_path / "clip").exists()
