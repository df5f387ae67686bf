"""SparseCtrl on the backbone: the same clips as diffusers' pipeline, from pictures at some of their frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffSparseControlNetPipeline, MotionAdapter, SparseControlNetModel
from diffusers.pipelines.animatediff import pipeline_animatediff_sparsectrl
from PIL import Image
from torch import Tensor

from backbone.conditions.control import Control
from backbone.io.console import UserError
from backbone.io.files import write_tensors
from backbone.media.control.maps import as_hints
from backbone.models.clips.motion import attach_motion, read_motion_adapter
from backbone.models.clips.sparse import build_sparsectrl, open_sparsectrl, scatter_frames
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, draw_initial_noise, sample_latents
from tests.tiny import tiny_motion_adapter

FRAMES = Frames(4)
PIXELS: dict[str, Any] = {
    "conditioning_channels": 3,
    "use_simplified_condition_embedding": False,
    "conditioning_embedding_out_channels": (4, 4, 8, 8),
}


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    opened = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    folder = tmp_path_factory.mktemp("motion") / "adapter"
    tiny_motion_adapter().save_pretrained(folder)
    attach_motion(opened.denoiser, read_motion_adapter(str(folder)))
    opened.adapter_folder = folder  # type: ignore[attr-defined]
    return opened


@pytest.fixture(scope="module")
def folders(model: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two variants, with weights of theirs that are not zero."""
    found = {}
    for name, settings in {"rgb": {}, "scribble": PIXELS}.items():
        torch.manual_seed(3)
        network: Any = build_sparsectrl(model.denoiser, motion_max_seq_length=8, **settings)
        for key, value in network.named_parameters():
            if key.startswith("controlnet_"):
                torch.nn.init.normal_(value, std=0.1)
        found[name] = tmp_path_factory.mktemp("sparse") / name
        network.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]


def drawn(model: Backbone, controls: tuple[Control, ...], *, steps: int = 3) -> Tensor:
    (latents,) = sample_latents(
        model,
        [Request("a dog", (0, 0)), Request("a cat", (1, 0))],
        steps=steps,
        guidance=3.0,
        seed=0,
        frames=FRAMES,
        controls=controls,
    )
    return latents


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["rgb", "scribble"])
def test_guided_steps_under_given_frames_are_diffusers_own(
    kind: str,
    steps: int,
    model: Backbone,
    tiny_folder: Path,
    folders: dict[str, Path],
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = open_sparsectrl(model, str(folders[kind]))
    maps, places = torch.cat([as_hints(picture) for picture in pictures]), [1, 3]
    ours = drawn(model, (network.of(maps, places, scale=0.7),), steps=steps)
    pipeline = AnimateDiffSparseControlNetPipeline.from_pretrained(
        tiny_folder,
        motion_adapter=MotionAdapter.from_pretrained(model.adapter_folder),  # type: ignore[attr-defined]
        controlnet=SparseControlNetModel.from_pretrained(folders[kind]),
    )
    pipeline.set_progress_bar_config(disable=True)
    # diffusers draws the latents of the given frames at random; here they are the posterior's mean
    monkeypatch.setattr(
        pipeline_animatediff_sparsectrl, "retrieve_latents", lambda encoded: encoded.latent_dist.mode()
    )
    theirs = pipeline(
        "a dog",
        latents=draw_initial_noise(model, 0, 0, 0, frames=FRAMES)[None],
        num_frames=FRAMES.count,
        num_inference_steps=steps,
        guidance_scale=3.0,
        conditioning_frames=pictures,
        controlnet_frame_indices=places,
        controlnet_conditioning_scale=0.7,
        output_type="latent",
    ).frames
    torch.testing.assert_close(ours[:1], theirs, atol=1e-4, rtol=0)
    assert (ours - drawn(model, (), steps=steps)).abs().amax((1, 2, 3, 4)).min() > 0.01


def test_at_scale_zero_and_untrained_it_changes_nothing(
    model: Backbone, folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path
) -> None:
    plain, maps = drawn(model, (), steps=2), as_hints(pictures[0])
    off = open_sparsectrl(model, str(folders["rgb"])).of(maps, [0], scale=0.0)
    assert torch.equal(drawn(model, (off,), steps=2), plain)
    build_sparsectrl(model.denoiser).save_pretrained(tmp_path / "new")  # type: ignore[operator]
    new = open_sparsectrl(model, str(tmp_path / "new")).of(maps, [0])
    torch.testing.assert_close(drawn(model, (new,), steps=2), plain, atol=1e-5, rtol=0)


def test_given_frames_stand_where_they_were_given_and_nothing_elsewhere() -> None:
    pictures = torch.arange(1.0, 5).reshape(2, 2, 1, 1, 1)
    shown, mask = scatter_frames(pictures, torch.tensor([[0, 2], [1, -1]]), 3)
    assert shown[:, 0, :, 0, 0].tolist() == [[1, 0, 2], [0, 3, 0]]
    assert mask[:, 0, :, 0, 0].tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("kind", ["rgb", "scribble"])
def test_an_original_file_is_the_network_that_it_was_made_from(
    kind: str, model: Backbone, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = open_sparsectrl(model, str(folders[kind]))
    file = write_original(tmp_path / f"v3_sd15_sparsectrl_{kind}.safetensors", folder.module)
    read = open_sparsectrl(model, str(file))
    assert read.reads_latents == (kind == "rgb") and read.longest == 8
    for name, value in folder.module.state_dict().items():
        assert torch.equal(read.module.state_dict()[name], value), name


def write_original(file: Path, module: torch.nn.Module) -> Path:
    """As guoyww's trainer names them."""
    tensors = {}
    for name, value in module.state_dict().items():
        if ".motion_modules." in name:
            block, _, rest = name.partition(".motion_modules.")
            number, _, rest = rest.partition(".")
            for ours, theirs in {
                ".norm1.": ".norms.0.",
                ".norm3.": ".ff_norm.",
                ".attn1.": ".attention_blocks.0.",
                ".pos_embed.": ".attention_blocks.0.pos_encoder.",
            }.items():
                rest = rest.replace(ours, theirs)
            name = f"{block}.motion_modules.{number}.temporal_transformer.{rest}"
            if "attention_blocks.0.to_q.weight" in name:
                place = name.replace("to_q.weight", "pos_encoder.pe")
                tensors["module." + place] = torch.zeros(1, 8, value.shape[0])
        tensors.setdefault(f"module.{name}", value.contiguous())
    write_tensors(file, tensors)
    return file


def test_what_is_no_sparsectrl_for_this_model_is_said(
    model: Backbone, folders: dict[str, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    def refused(name: Any) -> str:
        with pytest.raises(UserError) as refusal:
            open_sparsectrl(model, str(name))
        return str(refusal.value)

    build_sparsectrl(model.denoiser, conditioning_channels=3).save_pretrained(tmp_path / "three")  # type: ignore[operator]
    assert "condition channels is 3, and this model has 4" in refused(tmp_path / "three")
    half = PIXELS | {"conditioning_embedding_out_channels": (4, 4, 8)}
    build_sparsectrl(model.denoiser, **half).save_pretrained(tmp_path / "half")  # type: ignore[operator]
    assert "reduction of pictures is 4, and this model has 8" in refused(tmp_path / "half")
    file = write_original(
        tmp_path / "cut.safetensors",
        open_sparsectrl(model, str(folders["rgb"])).module.down_blocks,  # type: ignore[arg-type]
    )
    assert "is no SparseCtrl" in refused(file)
    assert "is a pickle" in refused("v3_sd15_sparsectrl_rgb.ckpt")
    assert "There is no SparseCtrl nowhere" in refused("nowhere")
    assert "is a UNet2DConditionModel, and a SparseCtrl is needed" in refused(tiny_folder / "unet")
