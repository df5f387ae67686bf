"""Images beside a prompt are read as diffusers reads them, at every door, and never by a model that reads none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxKontextPipeline
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import edit.cli
from backbone.families.flux.family import pack_latents
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json
from backbone.media.transforms import to_image
from backbone.models.by_instruction import encode_references, refuse_too_many
from backbone.models.model import Backbone
from backbone.models.sample import Request, initial_noise, sample_latents
from customize.cli import app
from edit.methods.instruct import instruct
from tests import tiny
from tests.backbone.media.test_registration import picture

HERE = ("--precision", "fp32", "--device", "cpu")


def shown(seed: int) -> Image.Image:
    return to_image(picture(seed, 64, 64))


def tiny_kontext(folder: Path) -> Path:
    """FLUX.1 Kontext: dev's parts, and an index that names another pipeline."""
    tiny.tiny_flux(folder)
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", {**index, "_class_name": "FluxKontextPipeline"})
    return folder


def said_by_kontext(folder: Path, noise: Tensor, images: list[Image.Image]) -> Tensor:
    pipeline: Any = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        image=images[0], prompt="a red dog", latents=pack_latents(noise), height=64, width=64, max_area=64 * 64,
        _auto_resize=False, num_inference_steps=3, guidance_scale=3.0, output_type="pt",
    ).images  # fmt: skip
    return torch.as_tensor(found)


def said_by_klein(folder: Path, noise: Tensor, images: list[Image.Image]) -> Tensor:
    pipeline: Any = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        image=images, prompt="a red dog", latents=noise, height=64, width=64, num_inference_steps=3,
        guidance_scale=3.0, output_type="pt",
    ).images  # fmt: skip
    return torch.as_tensor(found)


Said = Callable[[Path, Tensor, list[Image.Image]], Tensor]
READERS: dict[str, tuple[Callable[[Path], Path], Said, int]] = {
    "kontext": (tiny_kontext, said_by_kontext, 1),
    "klein": (tiny.tiny_flux2_klein, said_by_klein, 4),
}


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = request.param
    return name, READERS[name][0](tmp_path_factory.mktemp(name))


def test_references_are_read_as_diffusers_reads_them(reader: tuple[str, Path]) -> None:
    name, folder = reader
    _, said, most = READERS[name]
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    assert model.most_references == most and not model.reads_as_channels
    images = [shown(seed) for seed in range(min(2, most))]
    theirs = said(folder, initial_noise(model, 0, 0, 0)[None], images)

    def ours(some: list[Image.Image]) -> Tensor:
        (latents,) = sample_latents(
            model, [Request("a red dog", (0, 0))], steps=3, guidance=3.0, seed=0,
            references=encode_references(model, some),
        )  # fmt: skip
        return (model.decode(latents) + 1) / 2

    assert float((ours(images) - theirs).abs().max()) < 1e-4
    assert float((ours([]) - theirs).abs().max()) > 1e-3
    edited = instruct(
        model, images[0], ["a red dog"], references=images[1:], steps=3, guidance=3.0, keep="none"
    )
    assert edited.nfe == (3 if name == "kontext" else 6) and edited.latents.shape[1:] == model.latent_shape
    with pytest.raises(UserError, match=rf"reads {most} images? beside the prompt, and {most + 1} are given"):
        refuse_too_many(model, most + 1)
    with pytest.raises(UserError, match="not guided by it"):
        instruct(model, images[0], ["a red dog"], image_guidance=2.0, steps=1)


def test_both_programs_take_references(reader: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = reader
    shown(0).save(tmp_path / "a.png")
    words = ["sample", "a red dog", "--reference", tmp_path / "a.png", "--model", folder, "--steps", 1, *HERE]
    done = CliRunner().invoke(
        app, [str(word) for word in (*words, "--out", tmp_path / "s")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["references"] == [
        str(tmp_path / "a.png")
    ]


def test_an_edit_with_a_second_reference_is_repeated_exactly(tmp_path: Path) -> None:
    folder = tiny.tiny_flux2_klein(tmp_path / "klein")
    for seed in (0, 1):
        shown(seed).save(tmp_path / f"{seed}.png")
    words = (
        *("instruct", tmp_path / "0.png", "--instruction", "a red dog", "--reference", tmp_path / "1.png"),
        *("--model", folder, "--steps", 1, "--keep", "none", "--no-metrics", *HERE, "--out", tmp_path / "e"),
    )
    for asked in (words, ("replay", tmp_path / "e", "--out", tmp_path / "again")):
        done = CliRunner().invoke(edit.cli.app, [str(word) for word in asked], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    first, second = (Image.open(tmp_path / name / "edit_0.png").tobytes() for name in ("e", "again"))
    assert first == second
    record = read_json(tmp_path / "e" / "run.json")
    assert record["settings"]["references"] == [str(tmp_path / "1.png")]
    assert str(tmp_path / "1.png") in record["files"]
    (tmp_path / "1.png").unlink()
    done = CliRunner().invoke(edit.cli.app, ["replay", str(tmp_path / "e"), "--out", str(tmp_path / "no")])
    assert "1.png is missing or has changed" in str(done.exception)


def test_a_model_that_reads_none_refuses_them(tiny_folder: Path, tmp_path: Path) -> None:
    shown(0).save(tmp_path / "a.png")
    words = [
        "sample",
        "a dog",
        "--reference",
        tmp_path / "a.png",
        "--model",
        tiny_folder,
        "--out",
        tmp_path / "s",
    ]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert "reads no image beside the prompt" in str(done.exception) and not (tmp_path / "s").exists()
