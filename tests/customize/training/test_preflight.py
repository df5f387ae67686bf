"""Warnings before a run, and what it will need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image, ImageEnhance, ImageFilter
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.media.duplicates import NEAR, perceptual_hash
from backbone.media.sources.pictures import list_images
from backbone.models.model import Backbone
from customize.cli import app
from customize.settings import Subject, read_settings, resolve_settings
from customize.training import preflight
from customize.training.preflight import (
    estimate,
    find_near_duplicates,
    list_warnings,
    measure_image,
    measure_sharpness,
)
from customize.training.run import resume_concept, train_concept
from tests.tiny import tiny_stable_diffusion_3


def scene(seed: int, size: tuple[int, int] = (160, 160)) -> Image.Image:
    """A picture with large shapes and fine grain."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = random.integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))


def test_the_hash_survives_scaling_compression_and_brightness(tmp_path: Path) -> None:
    picture = scene(0)
    picture.save(tmp_path / "low.jpg", quality=40)
    for changed in (
        picture.resize((97, 97)),
        Image.open(tmp_path / "low.jpg"),
        ImageEnhance.Brightness(picture).enhance(0.9),
    ):
        assert (perceptual_hash(picture) != perceptual_hash(changed)).sum() <= NEAR


def test_different_pictures_have_different_hashes() -> None:
    distances = [
        (perceptual_hash(scene(a)) != perceptual_hash(scene(b))).sum() for a in range(6) for b in range(a)
    ]
    assert min(distances) > 2 * NEAR


def test_copies_and_mirror_images_are_grouped(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "a.png")
    scene(0).resize((120, 120)).save(tmp_path / "b.jpg")
    scene(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    scene(1).save(tmp_path / "d.png")
    looks = [measure_image(picture) for picture in list_images(tmp_path)]
    assert find_near_duplicates(looks) == [["a.png", "b.jpg", "c.png"]]


def test_the_laplacian_by_hand() -> None:
    one = np.zeros((3, 4), dtype=np.uint8)
    one[1, 1] = 100
    assert measure_sharpness(Image.fromarray(one)) == pytest.approx(np.var([-400, 100]))


def test_blur_lowers_sharpness_below_the_line() -> None:
    assert measure_sharpness(scene(0)) > preflight.SHARP
    assert measure_sharpness(scene(0).filter(ImageFilter.GaussianBlur(3))) < preflight.SHARP


def test_every_fault_gets_its_warning_and_good_pictures_none(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for seed in range(3):
        scene(seed).save(good / f"{seed}.png")
    assert list_warnings(list_images(good), resolution=128) == []
    scene(0).save(good / "copy.png")
    scene(4, (60, 300)).save(good / "narrow.png")
    scene(5).filter(ImageFilter.GaussianBlur(4)).save(good / "soft.png")
    (good / "0.txt").write_text("a dog")
    said = "\n".join(list_warnings(list_images(good), resolution=128))
    for words in (
        "0.png, copy.png are almost the same",
        "narrow.png is 60 × 300",
        "soft.png looks blurred",
        "have no caption",
        "0.20 to 1.00",
    ):
        assert words in said


def test_memory_follows_from_shapes(tiny: Backbone) -> None:
    settings = resolve_settings({"images": "x", "token": "[V]", "class_noun": "dog"}, tiny.defaults)
    found = estimate(tiny, settings)
    network = UNet2DConditionModel.from_config(tiny.location.config("unet"))
    weights = 4 * sum(value.numel() for value in network.parameters())
    training = found.phases["training"].total_bytes
    assert weights + found.activations < training < 2 * (weights + found.activations)
    assert found.step_seconds is not None
    assert found.step_seconds > 0
    assert any("GiB" in sentence for sentence in found.sentences())


def test_a_large_model_is_not_timed(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SMALL_MODEL", 10)
    settings = resolve_settings({"images": "x", "token": "[V]", "class_noun": "dog"}, tiny.defaults)
    found = estimate(tiny, settings)
    assert found.step_seconds is None
    assert any("unknown" in sentence for sentence in found.sentences())


def test_check_estimates_a_transformer_and_plans_for_a_gpu(subject: Path, tmp_path: Path) -> None:
    model = tiny_stable_diffusion_3(tmp_path / "sd3", t5=False)
    asked = ["check", "--images", str(subject), "--model", str(model)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "training" in done.output and "A step took" in done.output
    planned = CliRunner().invoke(app, [*asked, "--vram", "8"])
    assert planned.exit_code == 0, planned.output
    assert "8 GiB" in planned.output
    refused = CliRunner().invoke(app, [*asked, "--vram", "0.1"])
    assert isinstance(refused.exception, UserError)
    assert "a device of 8 GiB" in str(refused.exception)


def test_a_run_with_every_measure_of_a_cpu_trains_and_goes_on(
    tiny_folder: Path, subject: Path, tmp_path: Path
) -> None:
    asked = {
        "model": str(tiny_folder), "device": "cpu", "precision": "fp32", "steps": 2, "gradient_checkpointing": True,
        "cpu_offload": 0.5, "vae_tiling": True, "text_on_cpu": True, "one_by_one": True, "sheet_prompts": ("a {}",),
        "prior_draws": 2,
    }  # fmt: skip
    one = Subject(images=str(subject), token="[V]", class_noun="dog", token_words="fgh")
    run = train_concept(asked, [one], out=tmp_path / "run", vram=4.0)
    kept = read_settings(run)
    assert (kept.cpu_offload, kept.vae_tiling, kept.text_on_cpu, kept.one_by_one) == (0.5, True, True, True)
    assert "--cpu-offload 0.5" in (run / "README.md").read_text()
    assert resume_concept(run) == run
