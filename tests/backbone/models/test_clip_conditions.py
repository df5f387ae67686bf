"""Conditions on the layout of clips: a map for each frame, as in diffusers, and nothing where they are off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffControlNetPipeline, ControlNetModel
from PIL import Image
from torch import Tensor

from backbone.cli.conditions import RequestedControl, parse_map
from backbone.conditions.control import Control
from backbone.io.console import UserError
from backbone.media.clips import encode_webp
from backbone.media.control.maps import MapTarget, read_maps
from backbone.media.transforms import to_image
from backbone.models.clips.motion import attach_motion
from backbone.models.control import open_clip_conditions, open_control
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, draw_initial_noise, sample_latents
from tests.backbone.test_control import controlnet
from tests.tiny import tiny_motion_adapter, tiny_unet

FRAMES = Frames(4)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = controlnet(tiny_unet(), tmp_path_factory.mktemp("net") / "controlnet", 0)
    module = ControlNetModel.from_pretrained(folder)
    with torch.no_grad():  # a random one hardly hears its map
        module.controlnet_cond_embedding.conv_out.weight.mul_(30)
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def maps() -> Tensor:
    return (torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(9)) > 0.8).float()


def drawn(model: Backbone, *controls: Control, steps: int = 3, frames: Frames = FRAMES) -> Tensor:
    asked = [Request("a dog", (0, 0))]
    return next(
        sample_latents(model, asked, steps=steps, guidance=3.0, seed=0, frames=frames, controls=controls)
    )


def test_maps_of_frames_are_heard_as_in_diffusers_own_pipeline(
    tiny: Backbone, tiny_folder: Path, net: Path, maps: Tensor
) -> None:
    adapter = tiny_motion_adapter()
    pipeline = AnimateDiffControlNetPipeline.from_pretrained(
        tiny_folder, motion_adapter=adapter, controlnet=ControlNetModel.from_pretrained(net)
    )
    pipeline.set_progress_bar_config(disable=True)
    shown = [to_image(2 * one - 1) for one in maps]
    theirs = pipeline(
        "a dog", conditioning_frames=shown, latents=draw_initial_noise(tiny, 0, 0, 0, frames=FRAMES)[None],
        num_frames=4, num_inference_steps=3, guidance_scale=3.0, controlnet_conditioning_scale=0.8,
        control_guidance_end=0.7, output_type="latent", width=64, height=64,
    ).frames  # fmt: skip
    attach_motion(tiny.denoiser, adapter)
    control = Control.of(open_control(tiny, str(net)).network, maps, scale=0.8, stop=0.7).as_clip()
    ours = drawn(tiny, control)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours - drawn(tiny)).abs().max() > 0.01


def test_off_is_the_base_bit_for_bit_and_a_still_is_a_map_for_every_frame(
    tiny: Backbone, net: Path, maps: Tensor
) -> None:
    attach_motion(tiny.denoiser, tiny_motion_adapter())
    network = open_control(tiny, str(net)).network
    assert torch.equal(drawn(tiny, Control.of(network, maps, scale=0.0).as_clip()), drawn(tiny))
    still = drawn(tiny, Control.of(network, maps[:1]))
    repeated = drawn(tiny, Control.of(network, maps[:1].expand(4, -1, -1, -1)).as_clip())
    torch.testing.assert_close(repeated, still, rtol=0, atol=1e-5)  # embedded four at a time, and alone
    assert (still - drawn(tiny, Control.of(network, maps).as_clip())).abs().max() > 0.01


@pytest.mark.slow
def test_windows_of_frames_have_the_maps_of_their_own_frames(tiny: Backbone, net: Path, maps: Tensor) -> None:
    """Without an adapter a frame is a picture by itself, so windows change nothing."""
    control = Control.of(open_control(tiny, str(net)).network, maps).as_clip()
    whole, parts = (drawn(tiny, control, frames=frames) for frames in (FRAMES, Frames(4, 2, 1)))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)


def test_maps_for_another_number_of_frames_are_refused(tiny: Backbone, net: Path, maps: Tensor) -> None:
    control = Control.of(open_control(tiny, str(net)).network, maps).as_clip()
    with pytest.raises(UserError, match="maps for 4 frames, and the clip has 3"):
        drawn(tiny, control, frames=Frames(3))


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines that walk: a folder of maps, the same as a clip, and one of them as a still."""
    place = tmp_path_factory.mktemp("walk")
    frames = [Image.new("RGB", (64, 64)) for _ in range(4)]
    for number, frame in enumerate(frames):
        frame.paste((255, 255, 255), (10 * number + 5, 10, 10 * number + 9, 50))
    for number, frame in enumerate(frames):
        (place / "maps").mkdir(exist_ok=True)
        frame.save(place / "maps" / f"{number}.png")
    (place / "walk.webp").write_bytes(encode_webp(frames, 8))
    frames[0].save(place / "still.png")
    return place


def opened(model: Backbone, net: Path, said: str, **more: Any) -> tuple[Control, list[bytes]]:
    asked = RequestedControl(parse_map(said), str(net))
    (one,) = open_clip_conditions(model, [asked], (64, 64), 4, **more)
    return one.control, [image.tobytes() for image in one.maps]


def test_a_folder_an_animation_a_still_and_a_clip_to_look_at_give_a_map_a_frame(
    tiny: Backbone, net: Path, walk: Path
) -> None:
    control, folder = opened(tiny, net, f"sketch={walk / 'maps'}")
    assert control.frames == 4 and control.hints[0].shape[:2] == (1, 4) and len(set(folder)) == 4
    assert opened(tiny, net, f"sketch={walk / 'walk.webp'}")[1] == folder
    assert opened(tiny, net, f"sketch={walk / 'still.png'}")[1] == folder[:1] * 4
    film = [Image.open(walk / "maps" / f"{number}.png").convert("RGB") for number in range(4)]
    found = opened(tiny, net, "edges=auto", film=film)[1]
    assert found == opened(tiny, net, f"edges={walk / 'maps'}:auto")[1] and len(set(found)) == 4


@pytest.mark.parametrize(
    ("said", "frames", "answer"),
    [
        ("sketch={walk}/maps", 16, "has 4 maps and the clip 16 frames"),
        ("sketch={walk}/walk.webp", 3, "has 4 maps and the clip 3 frames"),
        ("sketch={walk}/nowhere", 4, "nowhere"),
        ("sketch={walk}", 4, "has 2 maps"),
        ("labels={walk}/nothing.mp4", 4, "no film"),
    ],
)
def test_what_are_no_maps_of_these_frames_is_said(said: str, frames: int, answer: str, walk: Path) -> None:
    with pytest.raises(UserError, match=answer):
        read_maps(parse_map(said.format(walk=walk)), MapTarget((64, 64)), frames)
