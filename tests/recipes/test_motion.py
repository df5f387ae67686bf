"""The motion adapter's recipe on a small `moji`: it learns, goes on exactly, and diffusers loads the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from torch import Tensor

from backbone.adapters.motion import Moves, set_in_motion
from backbone.cli.sampling import ALL_STEPS
from backbone.io.files import read_tensors, write_tensors
from backbone.models.clips.motion import make_motion_adapter, read_motion_adapter
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, draw_initial_noise, sample_latents
from backbone.world.clip import sample_clip
from recipes.moji.adapters.motion import (
    FRAMES,
    ClipLatents,
    MotionSettings,
    begin,
    export,
    sample_mixed_noise,
    train_motion,
    write_shard,
)
from tests.tiny import tiny_moji


@pytest.fixture(scope="module")
def moji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moji(tmp_path_factory.mktemp("motion") / "moji")


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Six clips of noise that drifts, with words."""
    noise = torch.randn(6, 8, FRAMES, 16, 16, generator=torch.Generator().manual_seed(0))
    clip = noise[:, :, :1] + 0.3 * noise
    words = ["a dog, moving left", "a dog going left", "a dog, moving right", "a dog going right"]
    captions = json.dumps([words] * 6)
    write_tensors(tmp_path / "clips" / "000000.safetensors", {"mean": clip.half()}, {"captions": captions})
    return tmp_path


@pytest.mark.slow
def test_a_stopped_training_ends_at_the_same_weights_and_diffusers_draws_the_same(
    moji: Path, workdir: Path
) -> None:
    settings = MotionSettings(model=str(moji), steps=4, batch=2, warmup=1, decay=1, workdir=workdir)
    train_motion(0, settings)
    whole = read_tensors(workdir / "motion.safetensors")[0]
    (workdir / "motion.safetensors").unlink()
    train_motion(0, replace(settings, minutes=0.0))  # stops, and saves, after its first step
    train_motion(0, settings)
    resumed = read_tensors(workdir / "motion.safetensors")[0]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    _, _, fresh = begin(settings)
    moved = [name for name, value in fresh.items() if not torch.equal(whole[f"parameter/{name}"], value)]
    assert any(".proj_out." in name for name in moved) and any(name.startswith("words.") for name in moved)

    export(model=str(moji), out=workdir / "out", averaged=False, workdir=workdir)
    assert read_motion_adapter(str(workdir / "out")).config.motion_max_seq_length == 32
    model = Backbone.open(str(moji), device="cpu", precision="fp32")
    set_in_motion(model, Moves(str(workdir / "out")))
    pipeline = AnimateDiffPipeline.from_pretrained(
        moji, motion_adapter=MotionAdapter.from_pretrained(workdir / "out"), safety_checker=None
    )
    pipeline.load_lora_weights(workdir / "out")
    pipeline.set_progress_bar_config(disable=True)
    frames = Frames(3)
    request = [Request("a dog in a park, moving left", (0, 0))]
    # In all steps, as diffusers guides
    ours = next(
        sample_latents(model, request, steps=3, guidance=3.0, guided=ALL_STEPS, seed=0, frames=frames)
    )
    theirs = pipeline(
        request[0].prompt, latents=draw_initial_noise(model, 0, 0, 0, frames=frames)[None], num_frames=3,
        num_inference_steps=3, guidance_scale=3.0, output_type="latent",
    ).frames  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_batches_are_clips_of_even_strides_with_the_words_of_their_direction(workdir: Path) -> None:
    data = ClipLatents(workdir, held_out=0)
    data.mean = torch.arange(FRAMES).half().view(1, 1, -1, 1, 1).expand(6, 8, -1, 16, 16)
    seen = set()
    for clean, words in drawn(data):
        steps = clean[0, 0, :, 0, 0].diff()
        assert steps.unique().numel() == 1 and steps[0].abs() in (1, 2)
        assert words[0] == "" or ("left" in words[0]) == bool(steps[0] > 0)
        seen.add((float(steps[0]), bool(words[0])))
    assert {step for step, _ in seen} == {1, 2, -1, -2}


def drawn(data: ClipLatents) -> Iterator[tuple[Tensor, list[str]]]:
    for seed in range(60):
        yield data.batch(1, 8, torch.Generator().manual_seed(seed))


def test_a_new_adapter_is_small_enough_for_the_wheel_and_changes_nothing_yet() -> None:
    widths = {"block_out_channels": (64, 160, 320), "layers_per_block": 1, "norm_num_groups": 32}
    adapter = make_motion_adapter(widths)
    count = sum(value.numel() for value in adapter.parameters())
    assert count == pytest.approx(8.75e6, rel=0.01)  # 17.5 MB in fp16; the words' LoRA has 1.1
    assert not any(value.any() for key, value in adapter.named_parameters() if ".proj_out." in key)


def test_mixed_noise_has_one_variance_whatever_is_shared() -> None:
    noise = sample_mixed_noise(torch.zeros(64, 2, 4, 8, 8), 0.6, torch.Generator().manual_seed(0))
    between = torch.corrcoef(noise.transpose(0, 2).flatten(1))
    assert torch.allclose(between[0, 1:], torch.tensor(0.6), atol=0.03) and abs(float(noise.std()) - 1) < 0.02


@pytest.mark.font
def test_clips_are_encoded_with_captions_of_both_directions(moji: Path, tmp_path: Path) -> None:
    model = Backbone.open(str(moji), device="cpu", precision="fp32")
    values = [sample_clip(seed, frames=3) for seed in range(2)]
    data_path = write_shard(model, tmp_path / "clips" / "000000.safetensors", values)
    data = ClipLatents(data_path.parents[1], held_out=1)
    assert data.mean.shape == (2, 8, 3, 16, 16) and data.count == 1
    assert (
        data.captions[1][0] == values[1].caption() and data.captions[1][2] == values[1].backwards().caption()
    )
