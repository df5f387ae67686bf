"""The camera's recipe on a small `moji`: clips with exact cameras, a training that goes on, a file that is followed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backbone.adapters.motion import Moves, set_in_motion
from backbone.conditions.control import Control
from backbone.io.files import read_tensors, write_tensors
from backbone.media.control.camera import embed_rays, flat_path, read_camera
from backbone.models.clips.camera import CAMERA_WEIGHTS, open_camera
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, sample_latents
from backbone.world.clip import Clip, Journey, sample_clip, trace_camera
from backbone.world.scene import sample_scene
from recipes.moji.adapters.camera import (
    CameraClips,
    CameraSettings,
    embed_cameras,
    export,
    find_reach,
    sample_travel,
    train_camera,
    write_shard,
)
from tests.tiny import tiny_moji, tiny_motion_adapter

WORDS = ["a dog, camera panning left", "a dog", "a dog, camera panning right", "a dog"]


def with_travels(workdir: Path) -> Path:
    """Six clips of noise that drifts, whose camera pans left and zooms in."""
    noise = torch.randn(6, 8, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    clip = (noise[:, :, :1] + 0.3 * noise).half()
    way = np.linspace(0, 1, 6)
    camera = np.stack([-40 * way, 0 * way, 1.3**way, 0 * way], axis=-1)
    tensors = {"mean": clip, "camera": torch.from_numpy(camera).float().expand(6, 6, 4).contiguous()}
    write_tensors(workdir / "travels" / "000000.safetensors", tensors, {"captions": json.dumps([WORDS] * 6)})
    return workdir


@pytest.mark.slow
def test_a_stopped_training_ends_at_the_same_weights_and_its_file_is_followed(tmp_path: Path) -> None:
    workdir, moji, adapter = with_travels(tmp_path), tiny_moji(tmp_path / "moji"), tmp_path / "moji-motion"
    tiny_motion_adapter().save_pretrained(adapter)
    settings = CameraSettings(
        model=str(moji), motion=str(adapter), steps=4, batch=2, warmup=1, decay=1, workdir=workdir
    )
    train_camera(0, settings)
    whole = read_tensors(workdir / "camera.safetensors")[0]
    (workdir / "camera.safetensors").unlink()
    train_camera(0, replace(settings, minutes=0.0))  # stops, and saves, after its first step
    train_camera(0, settings)
    resumed = read_tensors(workdir / "camera.safetensors")[0]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert any("/merges." in name and value.any() for name, value in whole.items())

    export(model=str(moji), motion=str(adapter), out=None, blocks=1, averaged=False, workdir=workdir)
    model = Backbone.open(str(moji), device="cpu", precision="fp32")
    set_in_motion(model, Moves(str(adapter)))
    camera = open_camera(model, adapter / CAMERA_WEIGHTS)
    reach = camera.settings.reach
    assert reach is not None and reach.pan == pytest.approx(1.3 * 40 / 128, rel=0.02) and reach.turn < 0.1
    request = [Request("a dog in a park", (0, 0))]
    drawn = [
        next(
            sample_latents(model, request, steps=2, guidance=3.0, seed=0, frames=Frames(4), controls=controls)
        )
        for controls in (
            (),
            (Control.of(camera, embed_rays(read_camera("pan-left", 4, (128, 128)), (128, 128))).as_clip(),),
        )
    ]
    assert not torch.equal(*drawn)


def test_batches_are_clips_whose_camera_begins_where_it_is_with_the_words_of_its_way(tmp_path: Path) -> None:
    data = CameraClips(with_travels(tmp_path), held_out=0)
    seen = set()
    for seed in range(40):
        clean, cameras, (words,) = data.batch(1, 4, torch.Generator().manual_seed(seed))
        assert clean.shape == (1, 8, 4, 16, 16) and cameras[0, 0].tolist() == [0, 0, 1, 0]
        left = bool(cameras[0, -1, 0] < 0)
        assert left == bool(cameras[0, -1, 2] > 1)
        assert "panning" not in words or ("left" in words) == left
        seen.add((left, "panning" in words))
    assert len(seen) == 4
    rays = embed_cameras(cameras, 64)
    assert rays.shape == (1, 4, 6, 64, 64)
    torch.testing.assert_close(rays[0], embed_rays(flat_path(cameras[0].numpy(), 128), (64, 64)))
    assert find_reach(data.camera).pan == pytest.approx(
        1.3 * 40 / 128, rel=1e-3
    )  # backwards it is seen zoomed in


def test_half_of_the_clips_follow_a_word_and_the_others_a_path_without_any() -> None:
    clips = [sample_travel(seed) for seed in range(200)]
    assert all(clip.travels for clip in clips) and 80 < sum(bool(clip.camera) for clip in clips) < 120
    assert 30 < sum(bool(clip.move) for clip in clips) < 70
    paths = np.stack([trace_camera(clip) for clip in clips if clip.journey])
    assert (paths[:, 0] == [0, 0, 1, 0]).all() and (paths[:, -1] != [0, 0, 1, 0]).any(1).all()
    assert (
        np.abs(paths[..., 0]).max() <= 40 and 1 / 1.35 <= paths[..., 2].min() <= paths[..., 2].max() <= 1.35
    )


def test_a_journey_that_goes_as_far_as_a_word_is_that_words_path() -> None:
    scene = sample_scene(0)
    word, journey = Clip(scene, camera="pan-left"), Clip(scene, journey=Journey(x=-40.0))
    np.testing.assert_allclose(trace_camera(word), trace_camera(journey), atol=1e-5)
    assert "camera" not in journey.caption()


@pytest.mark.font
def test_clips_are_written_with_the_cameras_by_which_they_were_rendered(tmp_path: Path) -> None:
    model = Backbone.open(str(tiny_moji(tmp_path / "moji")), device="cpu", precision="fp32")
    values = [
        replace(sample_clip(0, frames=3), move="", camera="zoom-in", speed=""),
        sample_travel(1, frames=3),
    ]
    write_shard(model, tmp_path / "travels" / "000000.safetensors", values)
    data = CameraClips(tmp_path, held_out=0)
    assert data.mean.shape == (2, 8, 3, 16, 16) and data.camera[0, -1, 2] == pytest.approx(1.35)
    assert data.captions[0][0].endswith("camera zooming in") and "camera" not in data.captions[0][1]
    assert data.captions[0][2].endswith("camera zooming out")
