"""Models that are not for text alone are refused before anything loads, and a toy world says that it is one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from backbone.io.console import UserError, printed_once
from backbone.models.model import Backbone
from edit.pictures import encode_image


@pytest.mark.parametrize(
    ("pipeline", "part", "reads", "latents", "task"),
    [
        ("StableDiffusionPipeline", "unet", 9, 4, "an inpainting model"),
        ("StableDiffusionXLPipeline", "unet", 9, 4, "an inpainting model"),
        ("StableDiffusionPipeline", "unet", 5, 4, "a model for another task"),  # depth
        ("StableDiffusionPipeline", "unet", 8, 4, "a model for another task"),  # InstructPix2Pix
        ("StableDiffusion3Pipeline", "transformer", 33, 16, "an inpainting model"),
        ("FluxPipeline", "transformer", 384, 16, "a model for another task"),  # Fill
        ("PixArtSigmaPipeline", "transformer", 9, 4, "an inpainting model"),
    ],
)
def test_a_denoiser_that_reads_more_than_latents_is_refused_in_one_sentence(
    tmp_path: Path, pipeline: str, part: str, reads: int, latents: int, task: str
) -> None:
    index = {"_class_name": pipeline, part: ["diffusers", "X"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name, config in ((part, {"in_channels": reads}), ("vae", {"latent_channels": latents})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=f"reads {reads} channels and its latents have {latents}: it is {task}"
    ):
        Backbone.open(str(tmp_path), device="cpu", precision="fp32")


def test_a_photograph_before_a_toy_model_is_told_the_model_to_take_once(
    tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = Backbone.open("moji", device="cpu")
    assert "1920 × 1080" in toy.describe_misfit([(1920, 1080)]) and "--model sd15" in toy.describe_misfit(
        [(512, 512)]
    )
    assert (
        not toy.describe_misfit([(128, 128)])
        and not toy.describe_misfit([(256, 3000)])
        and not toy.describe_misfit([])
    )
    assert not toy.describe_misfit([(128, 128), (128, 128), (3000, 2000)])
    assert not tiny.describe_misfit([(3000, 2000)])
    tiny.location = dataclasses.replace(tiny.location, name="moji")
    printed_once.clear()
    for _ in range(2):
        encode_image(tiny, Image.new("RGB", (400, 300)))
    assert capsys.readouterr().err.count("--model sd15") == 1
