"""The comparison with diffusers' step is fair: one loss, one gradient; and the totals are added up rightly."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from backbone.io.console import UserError
from backbone.models.model import Backbone
from benchmarks.align import (
    DRAWS,
    KINDS,
    PAIRS,
    Script,
    build_training,
    format_markdown,
    measure_parity,
    sum_totals,
    take_step,
)
from benchmarks.speed.shapes import Parts, find_shape, make_random_images


@pytest.fixture
def parts(tiny: Backbone) -> Parts:
    return Parts(tiny, tiny.autoencoder, tiny.encode_prompts)


def test_both_sides_have_one_loss_and_one_gradient(parts: Parts) -> None:
    training = build_training(parts, 2)
    before = {name: value.detach().clone() for name, value in training.parameters.items()}
    found = measure_parity(training, size=1e-2)
    assert 0.01 < abs(found.here - math.log(2)) < 3  # neither the start nor where the loss is flat
    assert found.loss < 1e-3 and found.gradient < 1e-3
    assert all(torch.equal(value, before[name]) for name, value in training.parameters.items())


def test_every_kind_of_step_trains(parts: Parts) -> None:
    training = build_training(parts, 1)
    script = Script(parts, training, make_random_images(parts.model.resolution, 2))
    for kind in KINDS:
        before = {name: value.detach().clone() for name, value in training.parameters.items()}
        take_step(kind, training, script)
        assert any(not torch.equal(value, before[name]) for name, value in training.parameters.items()), kind


def test_a_banked_step_asks_the_base_nothing(parts: Parts) -> None:
    training = build_training(parts, 1)
    script = Script(parts, training, make_random_images(parts.model.resolution, 2))
    take_step("cached", training, script)
    asked = training.live.nfe
    assert asked == 2
    take_step("bank", training, script)
    assert training.live.nfe == asked


def test_sdxl_s_shape_has_its_own_conditions() -> None:
    """Both encoders' states side by side, and the pooled output beside six sizes."""
    shape = find_shape("sdxl")
    assert sum(config["hidden_size"] for config in shape.text) == shape.unet["cross_attention_dim"]
    widths = 6 * shape.unet["addition_time_embed_dim"] + shape.text[-1]["hidden_size"]
    assert widths == shape.unet["projection_class_embeddings_input_dim"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(shape.unet)
    assert sum(value.numel() for value in unet.parameters()) == 2_567_463_684
    with pytest.raises(UserError, match="sd15, sdxl or moji"):
        find_shape("sd3")


def test_totals_count_the_filling_of_the_caches() -> None:
    seconds = {"script": 4.0, "cached": 3.0, "bank": 2.0}
    seconds |= {f"{name}, checkpointing": 2 * value for name, value in seconds.items()}
    once, _, _, ten = sum_totals(seconds, encode=1.0)
    draws = PAIRS * DRAWS
    assert once["bank"] == once["cached"] == PAIRS * 1.0 + draws * 3.0
    assert ten["bank"] == PAIRS * 1.0 + draws * 3.0 + 9 * draws * 2.0
    assert ten["bank, times faster"] == pytest.approx(40 * draws / ten["bank"])
    assert ten["bank without checkpointing against the script with it"] == pytest.approx(
        80 * draws / ten["bank"]
    )


def test_the_table_says_what_was_measured() -> None:
    seconds = dict.fromkeys(KINDS, 1.0)
    facts = {
        "shape": "moji", "precision": "fp32", "clock": "wall", "batch": 1, "warm_steps": 1, "machine": "none",
        "parity": {"loss": 0.0, "gradient": 0.0}, "seconds_per_pair": seconds, "encode_seconds_per_pair": 0.5,
        "totals": sum_totals(seconds, 0.5), "peak_gib": {"script": 2.0, "bank": 1.0},
    }  # fmt: skip
    text = format_markdown(facts)
    assert text.count("| script") == 4 and "V = 1" in text
