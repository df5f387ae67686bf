"""No step of `train-control` or `train-motion` makes the processor wait for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backbone.adapters.motion import Moves, set_in_motion
from backbone.media.sources.pictures import list_images
from backbone.models.cache import encode_prompts_cached
from customize.clips.settings import TrainMotionOptions
from customize.clips.train import MotionLearning, Prior, WholeMotionLearning
from customize.control_settings import resolve_settings
from customize.data.control_pairs import ControlPair
from customize.objectives.control import ControlTraining, PairData
from customize.objectives.control_networks import make_network
from tests.customize.test_methods import fresh
from tests.syncs import count_waits
from tests.tiny import tiny_motion_adapter


@pytest.mark.parametrize(
    "kind",
    [
        "t2i-adapter",
        pytest.param("controlnet", marks=pytest.mark.slow),
        pytest.param("control-lora", marks=pytest.mark.slow),
    ],
)
def test_no_step_of_a_control_network_waits_for_the_device(
    tiny_folder: Path, subject: Path, kind: str
) -> None:
    model = fresh(tiny_folder)
    asked = resolve_settings(
        {
            "images": str(subject),
            "condition": "edges",
            "kind": kind,
            "steps": 8,
            "batch": 2,
            "map_dropout": 0.3,
        }
        | {"prompt_dropout": 0.3, "device": "cpu", "precision": "fp32"},
        {},
    )
    network = make_network(model, asked)
    pairs = [ControlPair(image, None) for image in list_images(subject)]
    training = ControlTraining(model, network, PairData(model, pairs, "edges", flip=True), asked)
    assert count_waits(training, model, network.module) == []


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_no_step_of_a_motion_waits_for_the_device(tiny_folder: Path, tmp_path: Path, method: str) -> None:
    tiny_motion_adapter().save_pretrained(tmp_path / "adapter")
    model = fresh(tiny_folder)
    set_in_motion(model, Moves(str(tmp_path / "adapter")))
    asked = TrainMotionOptions(clips="x", motion="y", method=method, frames=3, rank=2, steps=8)
    clips = [torch.randn(4, 5, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    conditions = encode_prompts_cached(model, ["a dog", "a cat", ""])
    kept: Any = Prior([clip[:, :3] for clip in clips], conditions) if method == "lora" else None
    kind = MotionLearning if method == "lora" else WholeMotionLearning
    training = kind(model, clips, conditions, asked, kept)
    assert count_waits(training, model, conditions.tensors()) == []
