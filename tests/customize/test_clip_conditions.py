"""`customize clip` under conditions: maps of frames and a camera's path stand in the record, or are refused."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.run_folder import CONDITION_FILE
from backbone.media.clips import read_film
from backbone.media.control.camera import Reach, read_camera
from backbone.models.clips.camera import CAMERA_WEIGHTS, make_camera, save_camera
from backbone.models.clips.motion import attach_motion
from backbone.models.model import Backbone
from customize.cli import app
from tests.backbone.test_control import controlnet
from tests.tiny import tiny_motion_adapter, tiny_unet


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A motion adapter with a camera beside it, a ControlNet, and four maps."""
    place = tmp_path_factory.mktemp("conditions")
    adapter = tiny_motion_adapter()
    adapter.save_pretrained(place / "motion")
    adapter.save_pretrained(place / "bare")
    controlnet(tiny_unet(), place / "net", 0)
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    attach_motion(model.denoiser, adapter)
    camera: Any = make_camera(model)
    torch.nn.init.normal_(camera.module.merges[0].weight)
    reach = Reach(0.4, 1.5, 30)
    save_camera(
        place / "motion" / CAMERA_WEIGHTS, camera.module, replace(camera.settings, reach=reach), torch.float32
    )
    (place / "maps").mkdir()
    for number in range(4):
        frame = Image.new("RGB", (64, 64))
        frame.paste((255, 255, 255), (10 * number + 5, 10, 10 * number + 9, 50))
        frame.save(place / "maps" / f"{number}.png")
    return place


def call(model: Path, place: Path, *words: str) -> Any:
    said = [word.format(place=place) for word in words]
    usual = {"--frames": "4", "--motion": str(place / "motion"), "--steps": "2", "--precision": "fp32"}
    rest = [part for flag, value in usual.items() if flag not in said for part in (flag, value)]
    return CliRunner().invoke(app, ["clip", *said, "--model", str(model), "--device", "cpu", *rest])


def test_maps_and_a_path_are_followed_and_stand_in_the_record(
    tiny_folder: Path, place: Path, tmp_path: Path
) -> None:
    under = ("--condition", "sketch={place}/maps", "--controlnet", "{place}/net", "--condition-scale", "0.8")
    path = ("--camera", "pan-left=16px zoom-in", "--camera-scale", "0.5")
    drawn = {}
    for name, words in {"both": (*under, *path), "none": ()}.items():
        answer = call(tiny_folder, place, "a dog", *words, "--out", str(tmp_path / name))
        assert answer.exit_code == 0, answer.exception
        drawn[name] = read_film(tmp_path / name / "p00-s00.webp").frames[3].tobytes()
    assert drawn["both"] != drawn["none"]
    record = read_json(tmp_path / "both" / "run.json")
    (condition,) = record["conditions"]
    assert (condition["kind"], condition["scale"]) == ("sketch", 0.8)
    assert (record["camera"], record["camera_scale"]) == ("pan-left=16px zoom-in", 0.5)
    assert "--camera" in record["command"] and "--condition" in record["command"]
    maps = read_film(tmp_path / "both" / "condition-0-sketch.webp").frames
    assert len(maps) == 4 and maps[0] != maps[3]
    path_file = read_camera(str(tmp_path / "both" / "camera.txt"), 4, (64, 64))
    assert path_file.positions[-1, 0] == pytest.approx(-0.25)


def test_the_command_that_repeats_clips_holds_how_strongly_their_control_network_acted(
    tiny_folder: Path, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "net", tmp_path / "net")
    record = tmp_path / "net" / CONDITION_FILE
    record.write_text('{"defaults": {"scale": 0.5, "stop": 0.5}}')
    under = ("--condition", "sketch={place}/maps", "--controlnet", str(tmp_path / "net"))
    assert call(tiny_folder, place, "a dog", *under, "--out", str(tmp_path / "first")).exit_code == 0
    _, _, *again = shlex.split(read_json(tmp_path / "first" / "run.json")["command"])
    record.unlink()
    answer = CliRunner().invoke(app, ["clip", *again, "--out", str(tmp_path / "again")])
    assert answer.exit_code == 0, answer.output
    frames = [(tmp_path / name / "p00-s00/0002.png").read_bytes() for name in ("first", "again")]
    assert frames[0] == frames[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--condition", "sketch={place}/maps", "--controlnet", "{place}/net", "--frames", "3"),
            "has 4 maps and the",
        ),
        (("--condition", "sketch=auto", "--controlnet", "{place}/net"), "nothing is edited here"),
        (("--controlnet", "{place}/net"), "has no effect without"),
        (("--camera-scale", "0.5"), "--camera-scale has no effect without --camera"),
        (("--camera", "pan-around"), "there is no pan-around"),
        (("--camera", "pan-left=60px"), "leaves the world that"),
        (("--camera", "pan-left", "--motion", "{place}/bare"), "brings no camera.safetensors"),
        (("--camera", "pan-left", "--camera-adapter", "{place}/net/config.json"), "config.json"),
        (("--camera", "pan-left", "--context-length", "3", "--context-stride", "1"), "drawn in one window"),
        (("--camera", "{place}/no.txt"), "no camera path"),
        (("camera panning right", "--camera", "pan-left"), "contradict each other"),
    ],
)
def test_conditions_that_cannot_be_followed_are_said_in_a_sentence(
    words: tuple[str, ...], said: str, tiny_folder: Path, place: Path, tmp_path: Path
) -> None:
    answer = call(tiny_folder, place, *("a dog", *words, "--out", str(tmp_path / "out")))
    message = str(answer.exception) if isinstance(answer.exception, UserError) else answer.output
    assert answer.exit_code != 0 and said in message and not (tmp_path / "out").exists()
