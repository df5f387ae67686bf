"""The SparseCtrl's recipe on a small `moji`: it learns from its own frames, goes on exactly, and hears a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbone.adapters.motion import Moves, set_in_motion
from backbone.io.files import read_tensors, write_tensors
from backbone.models.clips.motion import make_motion_adapter
from backbone.models.clips.sparse import open_sparsectrl
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, sample_latents
from recipes.moji.adapters.motion import FRAMES
from recipes.moji.adapters.sparse import SparseSettings, begin, draw_places, export, train_sparse
from tests.tiny import tiny_moji


@pytest.fixture(scope="module")
def moji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moji(tmp_path_factory.mktemp("sparse") / "moji")


@pytest.fixture
def settings(moji: Path, tmp_path: Path) -> SparseSettings:
    """A step or two on six clips of noise that drifts, beside an adapter that moves nothing yet."""
    model = Backbone.open(str(moji), device="cpu", precision="fp32")
    make_motion_adapter(model.location.config("unet")).save_pretrained(tmp_path / "motion")
    noise = torch.randn(6, 8, FRAMES, 16, 16, generator=torch.Generator().manual_seed(0))
    words = ["a dog, moving left", "a dog going left", "a dog, moving right", "a dog going right"]
    write_tensors(
        tmp_path / "clips" / "000000.safetensors",
        {"mean": (noise[:, :, :1] + 0.3 * noise).half()},
        {"captions": json.dumps([words] * 6)},
    )
    return SparseSettings(
        model=str(moji),
        motion=str(tmp_path / "motion"),
        steps=3,
        batch=2,
        warmup=1,
        decay=1,
        workdir=tmp_path,
    )


@pytest.mark.slow
def test_a_stopped_training_ends_at_the_same_weights_and_pictures_are_given_to_clips(
    settings: SparseSettings, moji: Path
) -> None:
    train_sparse(0, settings)
    whole = read_tensors(settings.workdir / "sparse.safetensors")[0]
    (settings.workdir / "sparse.safetensors").unlink()
    train_sparse(0, replace(settings, minutes=0.0))  # stops, and saves, after its first step
    train_sparse(0, settings)
    resumed = read_tensors(settings.workdir / "sparse.safetensors")[0]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    out = settings.workdir / "out"
    export(model=str(moji), motion=settings.motion, out=out, averaged=False, workdir=settings.workdir)
    model = Backbone.open(str(moji), device="cpu", precision="fp32")
    set_in_motion(model, Moves(settings.motion))
    side = model.resolution
    control = open_sparsectrl(model, str(out)).of(torch.rand(1, 3, side, side), [0])
    drawn = [
        next(
            sample_latents(
                model,
                [Request("a dog", (0, 0))],
                steps=2,
                guidance=3.0,
                seed=0,
                frames=Frames(3),
                controls=some,
            )
        )
        for some in ((), (control,))
    ]
    assert torch.isfinite(drawn[1]).all() and not torch.equal(*drawn)


def test_it_begins_as_the_encoder_with_the_motion_layers_and_adds_nothing(settings: SparseSettings) -> None:
    network, parameters = begin(settings)
    own, unet = network.module.state_dict(), network.model.denoiser.state_dict()
    layer = next(name for name in own if ".motion_modules." in name and name.endswith("attn1.to_q.weight"))
    resnet = next(name for name in own if name.endswith("resnets.0.conv1.weight"))
    assert all(torch.equal(own[name], unet[name]) for name in (layer, resnet, "conv_in.weight"))
    assert all(not value.any() for name, value in own.items() if name.startswith("controlnet_"))
    assert len(parameters) == sum(1 for _ in network.module.parameters())
    assert not any(value.requires_grad for value in network.model.denoiser.parameters())


def test_mostly_the_first_frame_is_given() -> None:
    random = torch.Generator().manual_seed(0)
    drawn = [tuple(draw_places(8, random).tolist()) for _ in range(400)]
    assert drawn.count((0, -1, -1)) / 400 == pytest.approx(0.9, abs=0.04)
    assert (0, 7, -1) in drawn and any(min(places) >= 0 and len(set(places)) == 3 for places in drawn)
