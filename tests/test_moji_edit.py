"""`moji-edit`, the adapter that is carried along: small, of this `moji`, found by itself, and diffusers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from typer.testing import CliRunner

from backbone.adapters.concept import EDITS, OWN_EDITOR, read_concept
from backbone.cli.sampling import default_guidance_interval
from backbone.diffusion.noise import generator
from backbone.io.files import read_header, read_tensors
from backbone.media.transforms import to_tensor
from backbone.models.model import Backbone
from customize.cli import app as customize
from edit.cli import app
from edit.methods.instruct import instruct
from edit.run.open import Opening, load_model
from recipes.moji.denoiser import DEFAULTS
from tests.edit.models import photo


def test_it_is_small_and_made_for_the_moji_that_it_lies_beside() -> None:
    concept = read_concept("moji-edit")
    assert concept.folder == OWN_EDITOR and concept.kind == EDITS
    assert concept.fingerprint == Backbone.open("moji").fingerprint
    assert sum(path.stat().st_size for path in OWN_EDITOR.iterdir()) < 15_000_000
    for name in (concept.weights, concept.changed):
        tensors, _ = read_tensors(OWN_EDITOR / name)
        assert {value.dtype for value in tensors.values()} == {torch.float16}
    shapes = read_header(OWN_EDITOR / concept.changed).shapes
    (widened,) = (shape for shape in shapes.values() if len(shape) == 4)
    assert widened[1] == 2 * Backbone.open("moji").latent_shape[0]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the run of one instruction, and what the command said."""
    place = tmp_path_factory.mktemp("edit")
    photo().resize((128, 128)).save(place / "photo.png")
    words = ["instruct", str(place / "photo.png"), "--instruction", "make it night", "--steps", "1"]
    said = CliRunner().invoke(app, [*words, "--no-metrics", "--device", "cpu", "--out", str(place / "run")])
    assert said.exit_code == 0, said.output or repr(said.exception)
    return place / "run", said.output


def test_moji_follows_an_instruction_without_being_told_how(
    followed: tuple[Path, str], tmp_path: Path
) -> None:
    run, said = followed
    assert "moji follows instructions with moji-edit" in said
    record = json.loads((run / "run.json").read_text())
    assert [one["folder"] for one in record["concepts"]] == [str(OWN_EDITOR)]
    assert record["sampler"] == "ancestral" and record["guidance"] == 4.0
    assert (record["guidance_start"], record["guidance_stop"]) == default_guidance_interval(DEFAULTS)
    again = CliRunner().invoke(app, ["replay", str(run), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output or repr(again.exception)
    first, second = (Image.open(one / "edit_0.png").tobytes() for one in (run, tmp_path / "again"))
    assert first == second


def test_a_record_from_before_samplers_is_repeated_by_deterministic_steps(
    followed: tuple[Path, str], tmp_path: Path
) -> None:
    run, again = Path(shutil.copytree(followed[0], tmp_path / "run")), tmp_path / "again"
    record = json.loads((run / "run.json").read_text())
    del record["settings"]["sampler"]
    record["guidance"] = 4.0  # which was the usual one, and was not asked for
    (run / "run.json").write_text(json.dumps(record))
    assert CliRunner().invoke(app, ["replay", str(run), "--out", str(again)]).exit_code == 0
    repeated = json.loads((again / "run.json").read_text())
    assert repeated["sampler"] == "ddim" and repeated["guidance"] == 4.0


@pytest.mark.slow
def test_diffusers_opens_the_whole_model_and_draws_our_latents(tmp_path: Path) -> None:
    words = ["merge", str(OWN_EDITOR), "--bake", "--model", "moji", "--out", str(tmp_path / "whole")]
    assert CliRunner().invoke(customize, words).exit_code == 0
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "whole").to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(Opening(concepts=["moji-edit"], device="cpu", precision="fp32"), image_count=1).model
    picture = photo().resize((128, 128))
    noise = torch.randn((1, *model.latent_shape), generator=generator(0, 0, "instruct"))
    theirs = pipeline(
        "make it night", image=(to_tensor(picture)[None] + 1) / 2, latents=noise, num_inference_steps=4,
        guidance_scale=4.0, image_guidance_scale=1.5, output_type="latent",
    ).images  # fmt: skip
    ours = instruct(
        model,
        picture,
        ["make it night"],
        steps=4,
        guidance=4.0,
        guidance_stop=1.0,
        sampler="ddim",
        keep="none",
    )
    assert float((ours.latents - theirs).abs().max()) < 2e-2 * float(theirs.abs().max())  # baked in fp16
