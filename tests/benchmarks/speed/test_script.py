"""The script is run as it is, and everyone's steps are timed at the ends of the optimiser's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from backbone.io.console import UserError
from backbone.io.files import write_bytes
from backbone.models.model import Backbone
from benchmarks.speed import shapes
from benchmarks.speed.script import SIDES, Side, format_markdown, install_stand_in, run_side
from benchmarks.speed.shapes import (
    Shape,
    find_shape,
    load_like_script,
    make_random_images,
    open_parts,
    run_module,
    save_random,
)

SCRIPT = """
import argparse
import torch
from torchvision import transforms
parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir", "mixed_precision",
             "class_data_dir", "class_prompt"):
    parser.add_argument(f"--{name}")
for name in ("resolution", "train_batch_size", "rank", "max_train_steps", "seed", "num_class_images"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--with_prior_preservation", action="store_true")
asked = parser.parse_args()
assert asked.rank == 4 and asked.with_prior_preservation == (asked.class_data_dir is not None)
weight = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.AdamW([weight])
for _ in range(asked.max_train_steps):
    weight.sum().backward()
    optimizer.step()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the subject's and the class's pictures, and a script."""
    monkeypatch.setattr(sys, "argv", ["pytest"])
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, None)  # so that the stand-in goes away at the end
        monkeypatch.delitem(sys.modules, name)
    for name in ("subject", "class"):
        for number, content in enumerate(make_random_images(20, 2)):
            write_bytes(tmp_path / name / f"{number}.jpg", content)
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("prior", [False, True])
def test_a_side_s_steps_are_counted_and_its_memory_is_read(
    tiny_folder: Path, place: Path, side: Side, prior: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run_side(
        side, str(tiny_folder), place, steps=3, precision="fp32", prior=prior, script=place / "script.py"
    )
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(said["all"]) == 2 and min(said["all"]) > 0 and said["gib"] > 0.1


def test_the_stand_in_scales_crops_and_normalises(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, None)
    install_stand_in()
    transforms: Any = sys.modules["torchvision.transforms"]
    image = Image.new("RGB", (30, 20), (255, 0, 0))
    image.paste((0, 255, 0), (0, 0, 15, 20))
    prepared = transforms.Compose(
        [
            transforms.Resize(10, interpolation=transforms.InterpolationMode.NEAREST),
            transforms.CenterCrop(10),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )(image)
    assert prepared.shape == (3, 10, 10)
    assert prepared[:, 0, 0].tolist() == [-1, 1, -1] and prepared[:, 0, -1].tolist() == [1, -1, -1]
    for _ in range(5):
        assert transforms.RandomCrop(7)(image).size == (7, 7)


def test_a_random_model_of_a_shape_is_a_whole_model(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens as any other, and a script's way of loading it gives the same network."""

    def small(part: str) -> dict[str, Any]:
        return json.loads((tiny_folder / part / "config.json").read_text())  # type: ignore[no-any-return]

    words = {
        **find_shape("sd15").text[0],
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    words |= {"num_attention_heads": 2}
    unet = {**small("unet"), "cross_attention_dim": 16}
    shape = Shape("StableDiffusionPipeline", unet, small("vae"), (words,))
    monkeypatch.setattr(shapes, "find_shape", lambda name: shape)
    save_random("sd15", tmp_path)
    parts, theirs = open_parts(str(tmp_path), "cpu", "fp32"), load_like_script(str(tmp_path), "cpu", "fp32")
    noisy = torch.randn(1, *parts.model.latent_shape)
    answers = []
    for side in (parts, theirs):
        with torch.no_grad():
            network = side.model.family.network(side.model.denoiser, side.encode(["a dog"]))
            answers.append(network(noisy, torch.tensor([500.0])))
    assert torch.allclose(answers[0], answers[1], atol=1e-5)
    assert Backbone.open(str(tmp_path), device="cpu").fingerprint == parts.model.fingerprint


@pytest.mark.slow
def test_a_side_that_fails_is_named_with_its_last_line() -> None:
    with pytest.raises(UserError, match=r"benchmarks.speed.script side nobody .* failed"):
        run_module("benchmarks.speed.script", "side", "nobody", "moji", ".")


def test_the_table_sets_every_side_beside_the_script() -> None:
    sides = {
        side + suffix: {"seconds": number + 1.0, "gib": 4.0 / (number + 1)}
        for number, side in enumerate(SIDES)
        for suffix in ("", ", prior")
    }
    facts = {
        "command": "python -m", "precision": "bf16", "steps": 6, "clock": "wall", "machine": "none", "sides": sides,
    }  # fmt: skip
    assert "| here | 3.000 | 0.33× | 1.33 | 0.33 |" in format_markdown(facts)
