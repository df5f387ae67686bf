"""Cameras in motion modules: nothing while untrained or off, the formula by hand, one file, and whose model it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from backbone.conditions.control import Control
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.media.control.camera import Reach, embed_rays, read_camera
from backbone.models.clips.camera import (
    HEADER,
    Camera,
    CameraAdapter,
    as_places,
    attach_camera,
    make_camera,
    open_camera,
    save_camera,
)
from backbone.models.clips.motion import attach_motion, detach_motion
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, sample_latents
from backbone.training.attention import fast_attention_backward
from tests.tiny import tiny_motion_adapter

SIZE = (64, 64)


@pytest.fixture
def moving(tiny: Backbone) -> Backbone:
    attach_motion(tiny.denoiser, tiny_motion_adapter())
    return tiny


def trained(model: Backbone) -> Camera:
    """As a training would leave it: its layers are not zero."""
    camera = make_camera(model)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in camera.module.parameters():
            if not value.any():
                value.copy_(0.3 * torch.randn(value.shape, generator=random))
    camera.module.eval().requires_grad_(False)
    return camera


def rays(word: str = "zoom-in") -> Tensor:
    return embed_rays(read_camera(word, 4, SIZE), SIZE)


def drawn(
    model: Backbone, *controls: Control, prompts: tuple[str, ...] = ("a dog",), frames: int = 4
) -> Tensor:
    asked = [Request(prompt, (i, 0)) for i, prompt in enumerate(prompts)]
    clip = Frames(frames) if frames else None
    return next(sample_latents(model, asked, steps=2, guidance=3.0, seed=0, frames=clip, controls=controls))


def test_an_untrained_camera_and_one_that_is_off_are_the_base_bit_for_bit(moving: Backbone) -> None:
    base, picture = drawn(moving), drawn(moving, frames=0)
    camera = make_camera(moving)
    with torch.no_grad():
        assert torch.equal(drawn(moving, Control.of(camera, rays()).as_clip()), base)
    camera = trained(moving)
    followed = drawn(moving, Control.of(camera, rays()).as_clip())
    assert (followed - base).abs().max() > 1e-3
    assert (followed - drawn(moving, Control.of(camera, rays("pan-left")).as_clip())).abs().max() > 1e-4
    assert torch.equal(drawn(moving, Control.of(camera, rays(), scale=0.0).as_clip()), base)
    assert torch.equal(drawn(moving), base) and torch.equal(drawn(moving, frames=0), picture)
    detach_motion(moving.denoiser)
    assert torch.equal(drawn(moving, frames=0), picture)


def test_features_are_merged_before_queries_keys_and_values_by_the_papers_formula(moving: Backbone) -> None:
    name = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1"
    layer, inputs = moving.denoiser.get_submodule(name), []
    camera = trained(moving)
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    control = Control.of(camera, rays(), scale=0.7).as_clip()
    noisy = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    level, text = moving.schedule(4)[1], moving.encode_prompts(["a dog", "a cat"])
    with torch.no_grad():
        moving.predictor(text)(noisy, level)
    # The first clip is controlled, the second is not
    both = replace(control, hints=tuple(value.expand(2, *value.shape[1:]) for value in control.hints))
    both = replace(both, scale=torch.tensor([0.7, 0.0]))
    with torch.no_grad():
        moving.predictor(replace(text, controls=(both,)))(noisy, level)
        plain, heard = inputs
        feature = as_places(control.hints[0])
        merge = camera.module.get_submodule("merges.0")
        wanted = plain[:64] + 0.7 * merge(plain[:64] + feature)
    torch.testing.assert_close(heard[:64], wanted, atol=1e-6, rtol=0)
    assert torch.equal(heard[64:], plain[64:])
    assert feature.shape == (64, 4, 16) and torch.equal(feature[9, 2], control.hints[0][0, 2, :, 1, 1])


@pytest.mark.slow
def test_a_clip_of_a_batch_is_the_clip_alone(moving: Backbone) -> None:
    control = Control.of(trained(moving), rays()).as_clip()
    together = drawn(moving, control, prompts=("a dog", "a cat"))
    torch.testing.assert_close(together[:1], drawn(moving, control), atol=1e-4, rtol=0)


def test_gradients_reach_the_encoder(moving: Backbone) -> None:
    camera = trained(moving)
    moving.denoiser.requires_grad_(False)
    camera.module.requires_grad_(True)
    noisy, index = torch.randn(1, 4, 4, 8, 8), torch.tensor([500])
    control = Control(camera, camera.encode(rays()[None]), torch.ones(1), frames=4)
    text = replace(moving.encode_prompts(["a dog"]), controls=(control,))
    with fast_attention_backward(moving.denoiser):
        moving.predict(noisy, index, text).square().mean().backward()
    assert all(value.grad is not None for name, value in camera.module.named_parameters() if ".bring" in name)


@pytest.fixture
def file(moving: Backbone, tmp_path: Path) -> Path:
    camera = trained(moving)
    save_camera(
        tmp_path / "camera.safetensors",
        cast(CameraAdapter, camera.module),
        replace(camera.settings, reach=Reach(0.5)),
        torch.float32,
    )
    return tmp_path / "camera.safetensors"


def reopened(folder: Path, **adapter: Any) -> Backbone:
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    attach_motion(model.denoiser, tiny_motion_adapter(**adapter))
    return model


def test_a_file_is_the_camera_that_it_was_written_from(
    moving: Backbone, tiny_folder: Path, file: Path
) -> None:
    own = Control.of(trained(moving), rays()).as_clip()
    model = reopened(tiny_folder)
    camera = open_camera(model, file)
    assert camera.settings.reach == Reach(0.5) and camera.settings.base == model.fingerprint
    assert len(camera.settings.layers) == 7  # of two levels, and of the middle
    theirs = drawn(model, Control.of(camera, rays()).as_clip())
    torch.testing.assert_close(theirs, drawn(moving, own), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="positions for 8 frames, and the clip has 9"):
        camera.read(torch.zeros(9, 6, 64, 64))


def test_what_is_no_camera_of_this_model_is_said_with_its_numbers(
    moving: Backbone, tiny_folder: Path, file: Path, tmp_path: Path
) -> None:
    tensors, header = read_tensors(file)
    settings = json.loads(header[HEADER])

    def refused(changes: dict[str, Any], kept: dict[str, Tensor] = tensors) -> str:
        write_tensors(tmp_path / "it.safetensors", kept, {HEADER: json.dumps(settings | changes)})
        with pytest.raises(UserError) as refusal:
            open_camera(moving, tmp_path / "it.safetensors")
        return str(refusal.value)

    assert "is damaged" in refused({"widths": [8, 32]})
    assert "describes no network" in refused({"factor": 10**9})
    assert "is missing, foreign" in refused({}, {"encoder.bring.bias": tensors["encoder.bring.bias"]})
    assert "no numbers" in refused({}, tensors | {"merges.0.bias": torch.full((16,), torch.nan)})
    for changes, said in (
        ({"widths": (8, 32)}, "levels of the widths 8, 32, and"),
        ({"factor": 4}, "pixels to a latent's side 4"),
        ({"layers": {"down_blocks.0.motion_modules.0": 16}}, r"motion modules 1, and .* has 7"),
    ):
        module = CameraAdapter(replace(make_camera(moving).settings, **changes))
        with pytest.raises(UserError, match=said):
            attach_camera(moving, module, "it")
    fewer = reopened(tiny_folder, use_motion_mid_block=False)
    with pytest.raises(UserError, match=r"motion modules 7, and .* has 6"):
        open_camera(fewer, file)
    write_tensors(tmp_path / "other.safetensors", {"a": torch.ones(1)})
    for path, said in (
        (tmp_path / "other.safetensors", "no camera adapter"),
        (tmp_path / "none.safetensors", "There is no camera adapter"),
        (Path("camera.ckpt"), "pickle"),
    ):
        with pytest.raises(UserError, match=said):
            open_camera(moving, path)
    detach_motion(moving.denoiser)
    with pytest.raises(UserError, match="Name one with --motion"):
        open_camera(moving, file)
