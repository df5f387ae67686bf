"""Stable Video Diffusion on the backbone: the same clips as diffusers' pipeline, from the same picture and noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from torch import Tensor

from backbone.families.stable_video.image_encoder import resize_smoothed
from backbone.io.console import UserError
from backbone.media.transforms import to_tensor
from backbone.models.clips.animate import (
    Still,
    animate,
    condition_on,
    condition_on_stills,
    encode_still,
    guide_over_frames,
)
from backbone.models.model import Backbone
from backbone.models.sample import Frames, draw_initial_noise
from tests.tiny import tiny_stable_video

FRAMES = Frames(4)


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_video(tmp_path_factory.mktemp("video") / "svd")


@pytest.fixture(scope="module")
def video(video_folder: Path) -> Backbone:
    return Backbone.open(str(video_folder), device="cpu", precision="fp32", task="image-to-video")


@pytest.fixture(scope="module")
def pipeline(video_folder: Path) -> Any:
    opened = StableVideoDiffusionPipeline.from_pretrained(video_folder)
    opened.set_progress_bar_config(disable=True)
    return opened


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """One that CLIP's 224 pixels make smaller: 320 × 256."""
    coarse = np.random.default_rng(0).integers(0, 255, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((320, 256), Image.Resampling.BICUBIC)


def still_of(picture: Image.Image, size: tuple[int, int], **told: float) -> Still:
    small = picture.resize(size, Image.Resampling.LANCZOS)
    return Still(to_tensor(small), original=to_tensor(picture), **told)


def test_one_prediction_is_diffusers_own(video: Backbone, pipeline: Any, picture: Image.Image) -> None:
    still = still_of(picture, (64, 64), noise=0.0)
    conditions = condition_on(video, still, encode_still(video, still), torch.Generator())
    theirs = pipeline._encode_image(picture, "cpu", 1, False)
    torch.testing.assert_close(conditions.text["hidden"], theirs, atol=1e-5, rtol=0)
    noise = draw_initial_noise(video, 0, 0, 0, frames=FRAMES)[None]
    index = torch.tensor([600])
    sigma = video.path.levels[index].sigma.float()
    given = torch.cat([noise, conditions.references[0][:, :, None].expand_as(noise)], 1).transpose(1, 2)
    ids = torch.tensor([[6.0, 127.0, 0.0]])
    wanted = pipeline.unet(given, 0.25 * sigma.log(), theirs, added_time_ids=ids).sample.transpose(1, 2)
    torch.testing.assert_close(video.predict(noise, index, conditions), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("highest", [3.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_guided_steps_and_their_frames_are_diffusers_own(
    steps: int, highest: float, video: Backbone, pipeline: Any, picture: Image.Image
) -> None:
    still = still_of(picture, (96, 64), fps=5, motion_bucket=90, noise=0.0)
    conditions = condition_on_stills(video, [still], [(0, 0)], seed=0)
    (latents,) = animate(video, conditions, [(0, 0)], steps=steps, guidance=highest, seed=0, frames=FRAMES)
    noise = draw_initial_noise(video, 0, 0, 0, (8, 12), frames=FRAMES)[None].transpose(1, 2)
    told = {"fps": 5, "motion_bucket_id": 90, "noise_aug_strength": 0.0, "height": 64, "width": 96}
    theirs = pipeline(
        picture,
        latents=noise,
        num_inference_steps=steps,
        max_guidance_scale=highest,
        output_type="latent",
        **told,
    ).frames
    torch.testing.assert_close(latents, theirs.transpose(1, 2), atol=1e-4, rtol=0)
    for chunk in (0, 3):
        decoded = pipeline.decode_latents(theirs, FRAMES.count, chunk or FRAMES.count)[0].transpose(0, 1)
        torch.testing.assert_close(
            video.decode_clip(latents[0], chunk), decoded.clamp(-1, 1), atol=1e-4, rtol=0
        )


def test_noise_on_the_picture_is_in_its_latents_and_in_what_the_network_is_told(
    video: Backbone, pipeline: Any, picture: Image.Image
) -> None:
    still = still_of(picture, (64, 64), noise=0.3)
    hidden = encode_still(video, still)
    found = condition_on(video, still, hidden, torch.Generator().manual_seed(1))
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1))
    wanted = pipeline.vae.encode((still.pixels + 0.3 * noise)[None]).latent_dist.mode()
    torch.testing.assert_close(found.references[0], wanted, atol=1e-5, rtol=0)
    assert found.text["ids"].tolist() == [[6, 127, pytest.approx(0.3)]]


def test_guidance_grows_from_the_first_frame_to_the_last(video: Backbone, picture: Image.Image) -> None:
    still = still_of(picture, (64, 64))
    conditions = condition_on(video, still, encode_still(video, still), torch.Generator().manual_seed(0))
    noise = draw_initial_noise(video, 0, 0, 0, frames=FRAMES)[None]
    level = video.schedule(4)[1]
    plain, (strong, _), (grown, _) = (
        guide_over_frames(video, conditions, scales)(noise, level)
        for scales in (torch.ones(4), torch.full((4,), 3.0), torch.tensor([1.0, 1.0, 1.0, 3.0]))
    )
    torch.testing.assert_close(grown[:, :, :3], plain.clean[:, :, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grown[:, :, 3], strong[:, :, 3], atol=1e-5, rtol=1e-5)
    assert (grown - plain.clean)[:, :, 3].abs().max() > 1e-3


def test_a_picture_that_becomes_smaller_is_blurred_first() -> None:
    stripes = torch.arange(448).remainder(2).float().mul(2).sub(1).expand(1, 3, 448, 448)
    assert resize_smoothed(stripes, (224, 224)).abs().max() < 0.6
    same = torch.rand(1, 3, 20, 24)
    torch.testing.assert_close(resize_smoothed(same, (20, 24)), same)
    for few in ((1, 1), (1, 900), (2, 300)):  # of which less is there than the blur mirrors
        grey = torch.full((1, 3, *few), 0.25)
        torch.testing.assert_close(resize_smoothed(grey, (8, 8)), torch.full((1, 3, 8, 8), 0.25))


def test_a_model_without_words_is_opened_for_clips_of_pictures_alone(
    video_folder: Path,
) -> None:
    with pytest.raises(UserError, match="reads no words, so it cannot be used here"):
        Backbone.open(str(video_folder), device="cpu")


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("unet/config.json", {"in_channels": 9}, "input channels 9, and its other parts make 8"),
        ("unet/config.json", {"cross_attention_dim": 12}, "embedding 12, and its other parts make 16"),
        ("scheduler/scheduler_config.json", {"timestep_type": "discrete"}, "has timestep_type discrete"),
        ("scheduler/scheduler_config.json", {"sigma_min": 800.0}, "to sigma_min 800"),
        ("feature_extractor/preprocessor_config.json", {"image_std": [1.0]}, "not of three colours"),
    ],
)
def test_parts_that_do_not_belong_together_are_said(
    part: str, change: dict[str, Any], said: str, video_folder: Path, tmp_path: Path
) -> None:
    for path in video_folder.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(video_folder)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(video_folder)).symlink_to(path)
    config = json.loads((video_folder / part).read_text())
    (tmp_path / part).unlink()
    (tmp_path / part).write_text(json.dumps(config | change))
    model = Backbone.open(str(tmp_path), device="cpu", precision="fp32", task="image-to-video")
    with pytest.raises(UserError, match=said):
        cast(Tensor, (model.path, model.image_encoder, model.denoiser))
