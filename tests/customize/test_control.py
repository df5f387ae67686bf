"""`customize sample --condition`: the map beside the images, records, networks of other tools, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter
from PIL import Image
from typer.testing import CliRunner

from backbone.io.console import UserError, printed_once
from backbone.io.files import write_json
from backbone.io.run_folder import CONDITION_FILE
from backbone.models.control import find_control, get_condition_defaults
from backbone.models.model import Backbone
from customize.cli import app
from tests import tiny
from tests.backbone.media.control.test_maps import photograph, ring
from tests.backbone.test_control import adapter, controlnet


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with an embedded network for sketches and labels, a ControlNet, a run, and maps."""
    place = tmp_path_factory.mktemp("control")
    model = Backbone.open(str(tiny.tiny_pipeline(place / "model")), device="cpu", precision="fp32")
    own = place / "model" / "control" / "all"
    adapter(own / "t2i_adapter", 0)
    known = {"kinds": ["sketch", "labels"], "palette": {"sky": [160, 208, 248], "dog": [248, 0, 0]}}
    write_json(
        own / CONDITION_FILE,
        {**known, "base": model.fingerprint, "defaults": {"scale": 0.8, "scales": {"sketch": 0.9}}},
    )
    adapter(place / "run" / "t2i_adapter", 1)
    write_json(place / "run" / CONDITION_FILE, {"kinds": ["edges"], "base": "another", "model": "sd15"})
    controlnet(model.denoiser, place / "controlnet", 2)
    controlnet(tiny.tiny_unet(cross_attention_dim=24), place / "other", 0)
    ring().save(place / "ring.png")
    photograph().save(place / "photo.png")
    ring(ink=(200, 30, 30), paper=(90, 180, 90), width=6).save(place / "scene.png")
    return place


def invoked(place: Path, *arguments: object) -> Any:
    model = () if "--model" in arguments else ("--model", place / "model")
    quick = (*model, "--precision", "fp32", "--device", "cpu", "--steps", 3)
    return CliRunner().invoke(app, [str(one) for one in ("sample", "a dog", *quick, *arguments)])


def pixels(path: Path) -> Any:
    return np.array(Image.open(path).convert("RGB"))


def test_the_map_stands_beside_the_images_and_in_the_record(place: Path, tmp_path: Path) -> None:
    done = invoked(
        *(place, "--condition", f"sketch={place}/ring.png", "--condition", f"canny={place}/scene.png:auto"),
        *("--controlnet", place / "run", "--controlnet", place / "controlnet"),
        *("--control-guidance-end", "0.7", "--count", 2, "--out", tmp_path / "out"),
    )
    assert isinstance(done.exception, UserError) and "was trained on edges, not on sketch" in str(
        done.exception
    )
    assert not (tmp_path / "out").exists()
    done = invoked(
        *(place, "--condition", f"edges={place}/ring.png", "--condition", f"canny={place}/scene.png:auto"),
        *("--controlnet", place / "run", "--controlnet", place / "controlnet"),
        *("--control_guidance_end", "0.7", "--count", 2, "--out", tmp_path / "out"),
    )
    assert done.exit_code == 0, done.output
    assert "run was trained on sd15" in done.stderr and "scales add up to 2" in done.stderr
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    first, second = record["conditions"]
    at_place = {"kind": "edges", "map": f"{place}/ring.png", "network": f"{place}/run"}
    how = {"scale": 1.0, "start": 0.0, "stop": 0.7, "rows": "both", "guess": False}
    assert first == at_place | how | {"weights": find_control(f"{place}/run").hash_weights()}
    assert second["how"] == "auto" and second["network"] == f"{place}/controlnet"
    assert np.array_equal(pixels(tmp_path / "out" / "condition-0-edges.png"), np.array(ring()))
    assert (tmp_path / "out" / "condition-1-edges.png").exists()
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 4 * 64  # two maps and two images
    with Image.open(tmp_path / "out" / "p00-s01.png") as image:
        told = json.loads(image.info["limner"])["conditions"]  # of the disk only last names
    assert [(one["map"], one["network"]) for one in told] == [
        ("ring.png", "run"),
        ("scene.png", "controlnet"),
    ]


def test_the_model_s_own_network_is_taken_with_its_own_strength(place: Path, tmp_path: Path) -> None:
    for name, more in (("own", ()), ("off", ("--condition-scale", 0)), ("plain", None)):
        asked = () if more is None else ("--condition", f"sketch={place}/ring.png", *more)
        done = invoked(place, *asked, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "own" / "samples.json").read_text())
    (said,) = record["conditions"]
    assert said["scale"] == 0.9 and said["network"].endswith("control/all")
    model = Backbone.open(str(place / "model"), device="cpu", precision="fp32")
    assert get_condition_defaults(model, find_control(said["network"]).record, "labels")["scale"] == 0.8
    assert "conditions" not in json.loads((tmp_path / "plain" / "samples.json").read_text())
    own, off, plain = (pixels(tmp_path / name / "p00-s00.png") for name in ("own", "off", "plain"))
    assert np.array_equal(off, plain) and not np.array_equal(own, plain)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            ("--condition", "depth={}/ring.png"),
            "has networks for labels, sketch, so nothing reads depth maps",
        ),
        (("--condition", "{}/ring.png"), "nothing says what kind of map it is"),
        (("--condition", "sketch={}/photo.png"), "looks like a photograph"),
        (("--condition", "labels={}/ring.png"), "colours that no label has"),
        (("--condition", "sketch=auto"), "nothing is edited here"),
        (("--condition", "sketch={}/ring.png", "--width", "96"), "another shape"),
        (("--condition", "sketch={}/ring.png", "--guess-mode"), "guess mode has no effect"),
        (("--condition-rows", "both"), "condition"),
        (
            (
                *("--condition", "edges={}/ring.png", "--controlnet", "{}/controlnet", "--guess-mode"),
                *("--condition-rows", "both"),
            ),
            "acts on prompted rows alone",
        ),
        (("--condition", "sketch={}/ring.png", "--controlnet", "net.pth"), "is a pickle"),
        (("--condition", "sketch={}/ring.png", "--controlnet", "{}/other"), "its width of the text is 24"),
        (("--condition", "sketch={}/ring.png", "--controlnet", "{}/model/unet"), "is a UNet2DConditionModel"),
        (("--condition", "sketch={}/ring.png", "--controlnet", "{}/nowhere"), "no control network"),
        (("--condition", "sketch={}/ring.png", "--condition-scale", "3"), "not between 0 and 2"),
        (
            ("--condition", "sketch={}/ring.png", *["--condition-scale", "1"] * 2),
            "has 2 values for 1 condition",
        ),
        (("--condition", "sketch={}/ring.png", "--condition-start", "1"), "never acts"),
        (
            ("--condition", "sketch={}/ring.png", *("--condition-start", "0.4", "--condition-stop", "0.5")),
            "None of 3",
        ),
        (("--condition-scale", "0.5"), "condition"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    place: Path, tmp_path: Path, asked: tuple[str, ...], words: str
) -> None:
    done = invoked(place, *(one.replace("{}", str(place)) for one in asked), "--out", tmp_path / "out")
    assert isinstance(done.exception, UserError) and words in str(done.exception), done.output
    assert not (tmp_path / "out").exists()


def test_rows_of_guidance_that_there_is_none_of_are_said_to_have_no_effect(
    place: Path, tmp_path: Path
) -> None:
    asked = ("--condition", f"sketch={place}/ring.png", "--condition-rows", "prompted")
    for guidance in (1, 2):
        printed_once.clear()
        done = invoked(place, *asked, "--guidance", guidance, "--out", tmp_path / str(guidance))
        assert done.exit_code == 0, done.output
        assert ("so --condition-rows has no effect" in done.stderr) is (guidance == 1)


def test_a_family_without_control_networks_says_so(place: Path, tmp_path: Path) -> None:
    model = tiny.tiny_pixart(tmp_path / "pixart")
    done = invoked(
        place, "--model", model, "--condition", f"sketch={place}/ring.png", "--out", tmp_path / "out"
    )
    assert "No control network is read for PixArt" in str(done.exception)


def test_a_grey_adapter_reads_luminance(place: Path) -> None:
    torch.manual_seed(0)
    module = T2IAdapter(in_channels=1, channels=[16, 32], num_res_blocks=1)
    model = Backbone.open(str(place / "model"), device="cpu", precision="fp32")
    network = model.family.control_network(module, model.denoiser, None)  # type: ignore[attr-defined]
    colours = torch.rand(1, 3, 64, 64)
    grey = (colours[0] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    for ours, theirs in zip(network.read(colours), module(grey[None, None]), strict=True):
        torch.testing.assert_close(ours, theirs)
