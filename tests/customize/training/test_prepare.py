"""Preparing images for training: tables instead of images, the same runs, and what goes wrong."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.media.sources.pictures import list_images
from backbone.models import encode
from backbone.models.model import Backbone
from backbone.training import prepared as folders
from backbone.training.prepared import Cropping
from backbone.training.run import take_steps
from customize.cli import app
from customize.data.dataset import SubjectGroup, TrainingData, make_training_data
from customize.data.folders import open_prepared, read_images
from customize.data.prepared import PreparedImages
from customize.objectives.dreambooth import DreamBooth
from customize.settings import Settings, Subject
from customize.training.prepare import prepare_images
from tests.customize.objectives.test_dreambooth import settings


def opened(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def prepared(folder: Path, source: Path, out: Path, **changes: Any) -> PreparedImages:
    cropping = {field.name: changes.pop(field.name) for field in fields(Cropping) if field.name in changes}
    return prepare_images(
        list_images(source), str(source), opened(folder), out, cropping=Cropping(**cropping), **changes
    )


def learned(folder: Path, source: Path, asked: Settings) -> dict[str, Tensor]:
    model = opened(folder)
    (pictures,) = read_images([Subject(str(source), "[V]", "dog")])
    prompts = [picture.caption or "a bcd dog" for picture in pictures]
    data: TrainingData = make_training_data(
        model, [SubjectGroup(pictures, prompts, "a dog", str(source))], asked
    )
    training = DreamBooth(model, data, asked)
    for _ in take_steps(training):
        pass
    return {name: value.detach() for name, value in training.parameters.items()}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Five images of three shapes, one with a caption."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    random = np.random.default_rng(1)
    for number, size in enumerate([(128, 64), (64, 120), (80, 80), (64, 64), (130, 66)]):
        pixels = random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "3.txt").write_text("a bcd dog in the snow")
    return folder


@pytest.mark.parametrize(
    "changes",
    [pytest.param({"flip": True}, marks=pytest.mark.slow), {"aspect_buckets": True}],
    ids=["flip", "buckets"],
)
def test_a_run_from_a_prepared_folder_is_the_run_from_its_images_bit_for_bit(
    tiny_folder: Path, shapes: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    asked = settings(shapes, steps=2, **changes)
    found = prepared(tiny_folder, shapes, tmp_path / "out", workers=1, **changes)
    assert [one.caption for one in found.pictures] == [None, None, None, "a bcd dog in the snow", None]
    here = learned(tiny_folder, shapes, asked)
    there = learned(tiny_folder, found.folder, replace(asked, images=str(found.folder)))
    assert all(torch.equal(value, there[name]) for name, value in here.items())
    others = [replace(asked, aspect_buckets=not asked.aspect_buckets)]
    others += [] if asked.flip else [replace(asked, flip=True)]  # what is mirrored too serves without it
    for other in others:
        with pytest.raises(UserError, match=r"holds no mirrored images|--aspect-buckets"):
            learned(tiny_folder, found.folder, other)


def test_a_preparation_that_was_killed_goes_on_and_bad_images_are_left_out_only_when_asked(
    tiny_folder: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(folders, "MIN_CHUNK", 1)
    monkeypatch.setattr(encode, "BATCH_PIXELS", 1)
    monkeypatch.setattr(encode, "SHARD_SECONDS", 0.0)
    (shapes / "1.png").write_bytes(b"no image")
    whole, calls = Backbone.encode, [0]

    def encode_two(self: Backbone, pictures: Tensor) -> Any:
        if calls[0] == 2:
            raise KeyboardInterrupt
        calls[0] += len(pictures)
        return whole(self, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "encode", encode_two)
        with pytest.raises(KeyboardInterrupt):
            prepared(tiny_folder, shapes, tmp_path / "out")
        with pytest.raises(UserError, match="not prepared to its end"):
            PreparedImages(tmp_path / "out")
        calls[0] = 0
        with pytest.raises(UserError, match="1 of 5 images cannot be used") as caught:
            prepared(tiny_folder, shapes, tmp_path / "out")
        assert "1.png is text, not a picture" in str(caught.value) and calls[0] == 2
        found = prepared(tiny_folder, shapes, tmp_path / "out", skip_bad=True)  # encodes nothing more
    assert found.facts.bad == 1 and [one.path.stem for one in found.pictures] == ["0", "2", "3", "4"]
    capsys.readouterr()
    open_prepared(str(found.folder))  # as a training does
    assert capsys.readouterr().err == f"Left out of {found.folder}: 1 image that cannot be used.\n"
    for path in shapes.glob("*.png"):
        path.unlink()
    assert found.pictures[2].open().size == (64, 64), "the first are kept"


def test_a_vanished_shard_another_model_and_masks_are_refused(
    tiny_folder: Path, shapes: Path, tmp_path: Path
) -> None:
    found = prepared(tiny_folder, shapes, tmp_path / "out")
    with pytest.raises(UserError, match=r"was prepared for .* this would be moji"):
        found.refuse_other_encoder(Backbone.open("moji", device="cpu", precision="fp32"), flip=False)
    next(tmp_path.glob("out/images-*/*.arrow")).unlink()
    with pytest.raises(UserError, match=r"arrow is gone\. Run `customize prepare`"):
        found.encoded(flip=False)
    again = prepared(tiny_folder, shapes, tmp_path / "out")
    assert len(again.encoded(flip=False)[1]) == 5
    Image.new("L", (64, 64), 255).save(shapes / "3.mask.png")
    with pytest.raises(UserError, match=r"3\.mask\.png is a mask, and a prepared folder holds none"):
        prepared(tiny_folder, shapes, tmp_path / "other")


@pytest.mark.parametrize("changed", ["a caption", "a file", "a name"])
def test_a_source_that_has_changed_since_is_not_taken_for_prepared(
    changed: str, tiny_folder: Path, shapes: Path, tmp_path: Path
) -> None:
    prepared(tiny_folder, shapes, tmp_path / "out")
    prepared(tiny_folder, shapes, tmp_path / "out")  # nothing is left to do
    if changed == "a caption":
        (shapes / "3.txt").write_text("a bcd cat in the snow")
    elif changed == "a file":
        Image.new("RGB", (64, 64), "red").save(shapes / "3.png")
    else:
        (shapes / "0.png").rename(shapes / "9.png")  # the second image is the first now
    with pytest.raises(UserError, match=r"is not what it was when .* was begun"):
        prepared(tiny_folder, shapes, tmp_path / "out")


def test_a_source_and_a_model_that_have_moved_are_the_ones_that_were_prepared(
    tiny_folder: Path, shapes: Path, tmp_path: Path
) -> None:
    prepared(tiny_folder, shapes, tmp_path / "out")
    moved = shapes.rename(tmp_path / "moved")
    prepared(Path(shutil.copytree(tiny_folder, tmp_path / "model")), moved, tmp_path / "out")
    (moved / "0.png").rename(moved / "9.png")
    with pytest.raises(UserError, match="is not what it was when"):
        prepared(tiny_folder, moved, tmp_path / "out")


def test_the_commands_prepare_and_train(tiny_folder: Path, shapes: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    where = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu")
    said = run("prepare", "--images", shapes, "--out", tmp_path / "prepared", "--json", *where)
    assert '"images": 5' in said
    quick = ("--steps", 2, "--rank", 2, "--prior", "off", "--sample-steps", 1, "--evaluation-steps", 2)
    source = ("--images", tmp_path / "prepared", "--token", "[V]", "--class", "dog")
    run("train", *source, "--out", tmp_path / "run", *where, *quick)
    assert (tmp_path / "run" / "sheet.png").is_file()
