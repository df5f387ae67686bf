"""Motion adapters on the backbone: the same clips as diffusers' AnimateDiff pipelines, and pictures as before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import AnimateDiffPipeline, AnimateDiffSDXLPipeline, MotionAdapter
from torch import Tensor

from backbone.adapters.lora import activate_adapters, add_lora, save_lora
from backbone.diffusion.noise import Estimate, Level
from backbone.io.console import UserError, printed_once
from backbone.io.files import read_tensors, write_tensors
from backbone.models.clips.motion import (
    attach_motion,
    detach_motion,
    frames_as_rows,
    read_motion_adapter,
    rows_as_frames,
)
from backbone.models.clips.windows import predict_in_windows, window_starts
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, draw_initial_noise, reuse_frames, sample_latents
from tests.tiny import tiny_motion_adapter, tiny_stable_diffusion_xl

FRAMES = Frames(4)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion") / "adapter"
    tiny_motion_adapter().save_pretrained(folder)
    return folder


def drawn(model: Backbone, *, steps: int, frames: Frames = FRAMES) -> Tensor:
    (latents,) = sample_latents(
        model, [Request("a dog", (0, 0))], steps=steps, guidance=3.0, seed=0, frames=frames
    )
    return latents


def drawn_by_diffusers(pipeline: Any, model: Backbone, *, steps: int, **more: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    frames = more.pop("frames", FRAMES)
    noise = draw_initial_noise(model, 0, 0, 0, frames=frames)[None]
    found = pipeline(
        "a dog",
        latents=noise,
        num_frames=frames.count,
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="latent",
        **more,
    )
    latents: torch.Tensor = found.frames
    return latents


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_guided_steps_of_a_clip_are_diffusers_own(
    steps: int, tiny: Backbone, tiny_folder: Path, adapter_folder: Path
) -> None:
    attach_motion(tiny.denoiser, read_motion_adapter(str(adapter_folder)))
    pipeline = AnimateDiffPipeline.from_pretrained(
        tiny_folder, motion_adapter=MotionAdapter.from_pretrained(adapter_folder)
    )
    theirs = drawn_by_diffusers(pipeline, tiny, steps=steps)
    torch.testing.assert_close(drawn(tiny, steps=steps), theirs, atol=1e-4, rtol=0)
    still = sample_latents(tiny, [Request("a dog", (0, 0))], steps=steps, guidance=3.0, seed=0)
    assert (next(still) - theirs[:, :, 0]).abs().max() > 0.01


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_clip_longer_than_the_adapter_is_diffusers_own_by_free_noise(
    steps: int, tiny: Backbone, tiny_folder: Path, adapter_folder: Path
) -> None:
    frames = Frames(12, 8, 2, by="attention")
    attach_motion(tiny.denoiser, read_motion_adapter(str(adapter_folder)))
    pipeline = AnimateDiffPipeline.from_pretrained(
        tiny_folder, motion_adapter=MotionAdapter.from_pretrained(adapter_folder)
    )
    pipeline.enable_free_noise(context_length=8, context_stride=2)
    theirs = drawn_by_diffusers(pipeline, tiny, steps=steps, frames=frames)
    torch.testing.assert_close(drawn(tiny, steps=steps, frames=frames), theirs, atol=1e-4, rtol=0)
    short = Frames(8)
    assert torch.equal(
        drawn(tiny, steps=1, frames=short), drawn(tiny, steps=1, frames=replace(short, by="attention"))
    )


def test_behind_the_first_window_noise_comes_again_in_another_order() -> None:
    whose = reuse_frames(Frames(21, 8, 3, by="attention"), torch.Generator().manual_seed(0))
    assert whose[:8] == list(range(8)) and len(whose) == 21
    for first in range(8, 20, 3):
        assert sorted(whose[first : first + 3]) == sorted(whose[first - 8 : first - 5])
    assert whose[8:11] != [0, 1, 2] or whose[11:14] != [3, 4, 5]


@pytest.mark.slow
def test_a_clip_of_sdxl_is_diffusers_own(tmp_path: Path) -> None:
    folder = tiny_stable_diffusion_xl(tmp_path / "xl")
    adapter = tiny_motion_adapter(motion_layers_per_block=2, use_motion_mid_block=False)
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    attach_motion(model.denoiser, adapter)
    pipeline = AnimateDiffSDXLPipeline.from_pretrained(folder, motion_adapter=adapter)
    # diffusers 0.42 copies everything but this layer into its own network, and leaves it random
    embedding = cast(Any, model.denoiser).add_embedding.state_dict()
    pipeline.unet.add_embedding.load_state_dict(embedding)
    theirs = drawn_by_diffusers(pipeline, model, steps=3, height=64, width=64)
    torch.testing.assert_close(drawn(model, steps=3), theirs, atol=1e-4, rtol=0)


def test_a_lora_in_the_motion_layers_is_diffusers_own(
    tiny: Backbone, tiny_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    attach_motion(tiny.denoiser, read_motion_adapter(str(adapter_folder)))
    layers = [
        name
        for name, _ in tiny.denoiser.named_modules()
        if ".motion_modules." in name and name.endswith("to_q")
    ]
    tensors = add_lora(tiny.denoiser, "bounce", rank=2, alpha=2.0, targets=layers)
    for value in tensors.values():
        torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(1))
    without = drawn_without(tiny, layers)
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", tiny.denoiser, "bounce")
    pipeline = AnimateDiffPipeline.from_pretrained(
        tiny_folder, motion_adapter=MotionAdapter.from_pretrained(adapter_folder)
    )
    pipeline.load_lora_weights(tmp_path)
    ours = drawn(tiny, steps=4)
    torch.testing.assert_close(ours, drawn_by_diffusers(pipeline, tiny, steps=4), atol=1e-4, rtol=0)
    assert (ours - without).abs().max() > 1e-3


def drawn_without(model: Backbone, layers: list[str]) -> Tensor:
    activate_adapters(model.denoiser, [])
    latents = drawn(model, steps=4)
    activate_adapters(model.denoiser, ["bounce"])
    return latents


def test_pictures_are_bit_for_bit_those_without_motion_with_it_attached_and_taken_out(
    tiny: Backbone, adapter_folder: Path
) -> None:
    def picture() -> Tensor:
        return next(sample_latents(tiny, [Request("a dog", (0, 0))], steps=2, guidance=3.0, seed=0))

    before, names = picture(), set(tiny.denoiser.state_dict())
    attach_motion(tiny.denoiser, read_motion_adapter(str(adapter_folder)))
    assert set(tiny.denoiser.state_dict()) != names
    assert torch.equal(picture(), before)
    detach_motion(tiny.denoiser)
    assert set(tiny.denoiser.state_dict()) == names and torch.equal(picture(), before)


def test_frames_without_motion_are_the_pictures_of_their_own_noise(tiny: Backbone) -> None:
    clip = drawn(tiny, steps=2)
    still = next(sample_latents(tiny, [Request("a dog", (0, 0))], steps=2, guidance=3.0, seed=0))
    torch.testing.assert_close(clip[:, :, 0], still, atol=1e-5, rtol=0)
    assert (clip[:, :, 1] - still).abs().max() > 0.1


def test_an_adapter_whose_last_layers_are_zero_moves_nothing(tiny: Backbone) -> None:
    still = drawn(tiny, steps=2)
    adapter = tiny_motion_adapter()
    for name, value in adapter.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(value)
    attach_motion(tiny.denoiser, adapter)
    torch.testing.assert_close(drawn(tiny, steps=2), still, atol=1e-5, rtol=0)


def test_the_noise_of_a_frame_does_not_depend_on_how_many_there_are(tiny: Backbone) -> None:
    short, long = (draw_initial_noise(tiny, 3, 1, 2, frames=Frames(count)) for count in (2, 6))
    assert torch.equal(short, long[:, :2])
    assert torch.equal(long[:, 0], draw_initial_noise(tiny, 3, 1, 2))


def test_shared_noise_correlates_the_frames_as_much_as_was_asked(tiny: Backbone) -> None:
    noise = torch.stack([draw_initial_noise(tiny, 0, 0, j, frames=Frames(4, shared=0.7)) for j in range(20)])
    flat = noise.transpose(0, 2).flatten(1)  # [F, samples]
    between = torch.corrcoef(flat)
    assert torch.allclose(between[~torch.eye(4, dtype=torch.bool)], torch.tensor(0.7), atol=0.04)
    assert abs(float(noise.std()) - 1) < 0.03


def test_rows_and_frames_are_inverse() -> None:
    clips = torch.randn(2, 3, 4, 5, 6)
    rows = frames_as_rows(clips)
    assert torch.equal(rows[5], clips[1, :, 1]) and torch.equal(rows_as_frames(rows, 4), clips)


@pytest.mark.parametrize("frames", [3, 8, 9, 21])
def test_windows_cover_every_frame_and_a_prediction_of_each_frame_alone_is_unchanged(frames: int) -> None:
    noisy = torch.randn(1, 2, frames, 2, 2)
    lengths = []

    def alone(x: Tensor, level: Level) -> Estimate:
        lengths.append(x.shape[2])
        return Estimate(2 * x, x - 1)

    clean, noise = predict_in_windows(lambda window: alone, 8, 3)(
        noisy, Level(torch.tensor(0.5), torch.tensor(0.5))
    )
    torch.testing.assert_close(clean, 2 * noisy)
    torch.testing.assert_close(noise, noisy - 1)
    assert max(lengths) <= 8 and window_starts(frames, 8, 3)[-1] + 8 >= frames


def test_an_original_file_is_the_adapter_that_it_was_made_from(tmp_path: Path) -> None:
    adapter = tiny_motion_adapter(motion_norm_num_groups=16, motion_max_seq_length=24)
    file = write_original(tmp_path / "mm.safetensors", adapter)
    read = read_motion_adapter(str(file))
    assert {**read.config}.items() >= {"motion_max_seq_length": 24, "use_motion_mid_block": True}.items()
    for name, value in adapter.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name


def write_original(file: Path, adapter: MotionAdapter) -> Path:
    """As guoyww's trainer names them, positions too."""
    tensors = {}
    for name, value in adapter.state_dict().items():
        name = name.replace(".transformer_blocks", ".temporal_transformer.transformer_blocks")
        for ours, theirs in {
            ".norm1.": ".norms.0.",
            ".norm2.": ".norms.1.",
            ".norm3.": ".ff_norm.",
            ".attn1.": ".attention_blocks.0.",
            ".attn2.": ".attention_blocks.1.",
            **{f".{part}.": f".temporal_transformer.{part}." for part in ("proj_in", "proj_out")},
        }.items():
            name = name.replace(ours, theirs)
        head, _, last = name.rpartition("motion_modules.")
        number, _, rest = last.partition(".")
        rest = f"temporal_transformer.{rest}" if rest.startswith("norm.") else rest
        tensors[f"{head}motion_modules.{number}.{rest}"] = value
    longest = adapter.config.motion_max_seq_length
    for name in [name for name in tensors if name.endswith("attention_blocks.0.to_q.weight")]:
        where = name.removesuffix("to_q.weight") + "pos_encoder.pe"
        tensors[where] = torch.zeros(1, longest, tensors[name].shape[0])
    write_tensors(file, tensors)
    return file


def test_what_is_no_motion_adapter_for_this_model_is_said_with_its_numbers(
    tiny: Backbone, tiny_folder: Path, tmp_path: Path
) -> None:
    def refused(change: Any) -> str:
        with pytest.raises(UserError) as refusal:
            change()
        return str(refusal.value)

    wide = tiny_motion_adapter(block_out_channels=(8, 32))
    assert "8, 32, and the model's are 16, 32" in refused(lambda: attach_motion(tiny.denoiser, wide))
    deep = tiny_motion_adapter(motion_layers_per_block=2)
    assert "layers a block 2, 2, and the model's are 1, 1" in refused(
        lambda: attach_motion(tiny.denoiser, deep)
    )
    assert "is a pickle" in refused(lambda: read_motion_adapter("mm_sd_v15.ckpt"))
    assert "no file" in refused(lambda: read_motion_adapter("nowhere/mm.safetensors"))
    assert "without config.json" in refused(lambda: read_motion_adapter(str(tiny_folder)))
    assert "is a UNet2DConditionModel" in refused(lambda: read_motion_adapter(str(tiny_folder / "unet")))
    write_tensors(tmp_path / "lora.safetensors", {"unet.down_blocks.0.lora_A.weight": torch.ones(2, 2)})
    assert "customize import" in refused(lambda: read_motion_adapter(str(tmp_path / "lora.safetensors")))
    write_tensors(
        tmp_path / "cut.safetensors", {"down_blocks.0.motion_modules.0.proj_in.weight": torch.ones(16, 16)}
    )
    assert "missing" in refused(lambda: read_motion_adapter(str(tmp_path / "cut.safetensors")))
    tiny_motion_adapter(conv_in_channels=9).save_pretrained(tmp_path / "pia")
    assert "PIA" in refused(lambda: read_motion_adapter(str(tmp_path / "pia")))


def test_the_file_of_a_folder_is_the_folder_s_adapter(adapter_folder: Path) -> None:
    own, named = (
        read_motion_adapter(str(place)).state_dict()
        for place in (adapter_folder, adapter_folder / "diffusion_pytorch_model.safetensors")
    )
    assert own.keys() == named.keys() and all(torch.equal(own[name], named[name]) for name in own)


def test_a_folder_s_adapter_that_was_saved_as_it_was_compiled_is_the_same(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = shutil.copytree(adapter_folder, tmp_path / "compiled")
    file = compiled / "diffusion_pytorch_model.safetensors"
    write_tensors(file, {f"_orig_mod.{name}": value for name, value in read_tensors(file)[0].items()})
    own, named = (read_motion_adapter(str(place)).state_dict() for place in (adapter_folder, compiled))
    assert own.keys() == named.keys() and all(torch.equal(own[name], named[name]) for name in own)
    tensors, _ = read_tensors(file)
    name = min(tensors)
    printed_once.clear()
    write_tensors(file, tensors | {"of_another.weight": torch.ones(3)})
    assert read_motion_adapter(str(compiled)).state_dict().keys() == own.keys()
    message = " ".join(capsys.readouterr().err.split())
    assert "holds 1 tensor that its config.json has no use for, as of_another.weight" in message
    for damaged in ({key: tensors[key] for key in tensors if key != name}, tensors | {name: torch.ones(3)}):
        write_tensors(file, damaged)
        with pytest.raises(UserError, match=f"1 of its weights are missing or have another shape .{name}"):
            read_motion_adapter(str(compiled))
