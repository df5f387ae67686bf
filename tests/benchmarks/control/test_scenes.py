"""The benchmark of control: what it measures is right where the truth is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backbone.io.files import read_json
from backbone.models.model import Backbone
from backbone.world.scene import Pose, Scene
from backbone.world.words import Thing
from benchmarks.control import scenes as control
from benchmarks.control.scenes import (
    FIRST_SEED,
    compare_poses,
    edge_f1,
    find_pose,
    iou,
    judge_order,
    load_drawings,
    make_case,
    select_scenes,
    thing_iou,
)
from benchmarks.judges.classifier import prepare_images
from customize.control_settings import resolve_settings
from customize.objectives.control_networks import make_network, save_network
from tests.tiny import tiny_moji

ROCKET = Scene((Thing("rocket"),), "in space", seed=3, poses=(Pose(56, 100, 60, 45.0),))


def test_scenes_are_held_out_and_a_third_is_on_white() -> None:
    scenes = select_scenes(30)
    assert all(scene.seed >= FIRST_SEED and scene.poses for scene in scenes)
    white = [scene for scene in scenes if scene.place == "on a white background"]
    assert 10 <= len(white) < 18
    assert all(scene.style is None for scene in scenes[::3])


def test_the_drawings_are_24_in_six_manners_and_enclose_something() -> None:
    drawings = load_drawings()
    assert len(drawings) == 24
    assert {one.manner for one in drawings} == {"thin", "thick", "shaky", "open", "shifted", "one stroke"}
    for one in drawings:
        ink = np.asarray(one.image()).max(2) > 0
        assert 60 < ink.sum() < 2500, one
        assert one.area().sum() > 2 * ink.sum() / one.width, one
        assert (ink & ~one.area()).sum() < 0.5 * ink.sum(), one


def test_errors_of_a_pose_are_of_its_middle_and_go_round() -> None:
    asked = Pose(60, 100, 40, 170, True)
    error = compare_poses(asked, Pose(63, 106, 44, -170, True))
    assert error.place == pytest.approx(np.hypot(3, 4))
    assert error.size == pytest.approx(0.1)
    assert error.angle == pytest.approx(20)
    assert error.mirror and error.turned


def test_masks_agree_by_what_they_share() -> None:
    one, other = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[:2], other[1:3] = True, True
    assert iou(one, other) == pytest.approx(1 / 3)
    white, black = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
    assert thing_iou(white, white) == 1 and thing_iou(white, black) == 0
    tinted = [Image.new("RGB", white.size, (245, 240, 230)) for _ in range(2)]
    tinted[1].paste((200, 30, 20), (10, 10, 30, 30))
    thing = white.copy()
    thing.paste((200, 30, 20), (10, 10, 30, 30))
    assert thing_iou(white, tinted[0]) == thing_iou(thing, tinted[1]) == 1
    assert edge_f1(white, white) == 1


@pytest.mark.font
def test_the_true_picture_is_obeyed_in_every_way() -> None:
    scene = Scene(
        (Thing("apple"), Thing("car")),
        "on a white background",
        seed=5,
        poses=(Pose(56, 90, 50, depth=0.7), Pose(76, 96, 60, depth=0.3)),
    )
    case = make_case(scene)
    first, second = scene.poses or ()
    swapped = make_case(replace(scene, poses=(replace(first, depth=0.3), replace(second, depth=0.7))))
    assert list(judge_order(case, case.picture)) == [True]
    assert list(judge_order(case, swapped.picture)) == [False]
    assert edge_f1(case.picture, case.picture) == 1 and edge_f1(case.picture, swapped.picture) < 0.9
    assert thing_iou(case.picture, swapped.picture) > 0.95


@pytest.mark.font
@pytest.mark.slow
def test_a_glyph_is_found_as_it_is_held() -> None:
    picture = (prepare_images([make_case(ROCKET).picture])[0] + 1) / 2
    assert ROCKET.poses is not None
    error = compare_poses(ROCKET.poses[0], find_pose(picture, ROCKET.things[0], None))
    assert error.place < 2 and error.size < 0.06 and error.angle < 8


@pytest.mark.font
@pytest.mark.slow
def test_the_benchmark_writes_its_tables_and_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_moji(tmp_path / "model")
    opened = Backbone.open(str(model), device="cpu", precision="fp32")
    settings = resolve_settings({"images": "x", "condition": "sketch"}, {})
    save_network(make_network(opened, settings).module, settings.kind, tmp_path / "net")
    monkeypatch.setattr(control, "FEW", 3)
    asked: dict[str, Any] = {
        "model": str(model),
        "network": str(tmp_path / "net"),
        "kinds": ("sketch", "pose"),
        "sweep": (0.5,),
        "stops": (0.5,),
        "together": ("sketch+pose",),
        "other_nouns": (1.0,),
    }
    control.run(control.ControlSettings(**asked, scenes="small", steps=2, out=tmp_path / "out"))
    table = read_json(tmp_path / "out" / "table.json")
    further = ["sketch, scale 0.5", "sketch, until 0.5", "sketch+pose", "true, round trip"]
    further += ["sketch of another noun, scale 1"]
    assert list(table["rows"]) == ["no condition", "sketch", "pose", *further]
    assert len(table["drawings"]) == 24
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert (
        text.count("| sketch") == 5
        and "Drawings by hand, 24" in text
        and text.strip() in capsys.readouterr().out
    )
    assert all((tmp_path / "out" / name).exists() for name in ("sheet.png", "kinds.png", "drawings.png"))
    drawn = sorted((tmp_path / "out" / "pictures").rglob("*.png"))
    singles = sum(len(scene.figures) == 1 for scene in control.select_scenes(3))
    assert len(drawn) == 6 * 3 + singles + 24
