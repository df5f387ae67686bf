"""Concepts in the first steps: weaker there where it is asked for, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbone.adapters.apply import load_concepts, say_idle_early_scale
from backbone.adapters.concept import Concept
from backbone.adapters.config import AdapterType
from backbone.adapters.lora import LORA_WEIGHTS, disable_adapters, save_lora
from backbone.cli.sampling import DrawingOptions, EarlyScale
from backbone.io.console import UserError
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, SamplerArguments, sample_latents
from tests.backbone.models.test_merged import learned

STEPS = 5


def drawn(model: Backbone, early: EarlyScale | None = None, **how: Any) -> Tensor:
    how = {"steps": STEPS, "guidance": 3.0, "seed": 0, "early": early, **how}
    return torch.cat(list(sample_latents(model, [Request("a dog", (0, 0)), Request("a cat", (1, 0))], **how)))


def with_subject(model: Backbone, kind: AdapterType = "lora") -> Backbone:
    learned(model, kind=kind)
    model.subject_adapters.add("one")
    return model


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_subject_without_strength_in_all_steps_is_not_drawn(tiny: Backbone, kind: AdapterType) -> None:
    with_subject(tiny, kind)
    with disable_adapters(tiny.denoiser):
        base = drawn(tiny)
    if kind != "dora":  # whose magnitudes remain at strength 0
        torch.testing.assert_close(drawn(tiny, EarlyScale(0.0, 1.0)), base, atol=1e-5, rtol=1e-4)
    assert (drawn(tiny) - base).abs().max() > 0.01


def test_in_the_first_steps_its_strength_is_the_early_one_and_then_its_own(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_subject(tiny)
    layer: Any = next(module for module in tiny.denoiser.modules() if "one" in getattr(module, "scaling", {}))
    own, seen = layer.scaling["one"], []
    weight = layer.get_base_layer().weight.clone()
    forward = tiny.denoiser.forward

    def watched(*inputs: Any, **named: Any) -> Any:
        merged = (layer.get_base_layer().weight - weight).norm() / layer.get_delta_weight("one").norm()
        seen.append((round(layer.scaling["one"] / own, 3), round(float(merged), 3)))
        return forward(*inputs, **named)

    monkeypatch.setattr(tiny.denoiser, "forward", watched)
    drawn(tiny, EarlyScale(0.5, 0.4))
    assert seen == [(0.5, 1.0)] * 2 + [(1.0, 1.0)] * 3
    assert layer.scaling["one"] == own and torch.equal(layer.get_base_layer().weight, weight)


def test_beside_the_weights_a_subject_is_weakened_as_in_them(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_subject(tiny)
    inside = drawn(tiny, EarlyScale(0.5, 0.6))
    monkeypatch.setattr("backbone.models.merged.LARGEST", 10)
    torch.testing.assert_close(drawn(tiny, EarlyScale(0.5, 0.6)), inside, atol=1e-4, rtol=1e-3)


def test_a_batch_and_its_images_alone_are_weakened_alike(tiny: Backbone) -> None:
    with_subject(tiny)
    together, alone = (drawn(tiny, EarlyScale(0.3, 0.4), batch=batch) for batch in (2, 1))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_full_strength_and_adapters_that_carry_no_subject_are_as_they_were(tiny: Backbone) -> None:
    learned(tiny)
    before = drawn(tiny)
    assert torch.equal(drawn(tiny, EarlyScale(0.0, 1.0)), before)
    tiny.subject_adapters.add("one")
    assert torch.equal(drawn(tiny, EarlyScale(1.0, 0.4)), before)


def test_a_model_says_how_strong_subjects_are_in_its_first_steps(tiny: Backbone) -> None:
    with_subject(tiny)
    asked = drawn(tiny, EarlyScale(0.2, 0.8))
    assert not torch.equal(drawn(tiny), asked)
    tiny.defaults = {**tiny.defaults, "early_scale": 0.2, "early_steps": 0.8}
    assert torch.equal(drawn(tiny), asked)
    clip = SamplerArguments(steps=STEPS, guidance=3.0, seed=0)
    assert clip.resolve_early(tiny, Frames(1)) == EarlyScale(0.2, 0.8)
    assert clip.resolve_early(tiny, Frames(8)) == EarlyScale()


@pytest.mark.parametrize(("tokens", "carried"), [({"[V]": "vkf"}, {"concept_0"}), ({}, set())])
def test_an_adapter_with_a_token_carries_a_subject(
    tiny: Backbone, tmp_path: Path, tokens: dict[str, str], carried: set[str]
) -> None:
    learned(tiny)
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    concept = Concept("lora", "tiny", tiny.fingerprint, tokens, "dog", LORA_WEIGHTS, folder=tmp_path)
    load_concepts(tiny, [concept])
    assert tiny.subject_adapters == carried


def test_an_early_strength_without_effect_is_refused_or_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, concepts = {"steps": 10, "guidance": 4.0}, (tmp_path,)
    with pytest.raises(UserError, match=r"--early-steps has no effect\. Lower --early-scale"):
        DrawingOptions(concepts=concepts, early_steps=0.5).with_defaults(usual)
    DrawingOptions(concepts=concepts, early_steps=0.04, early_scale=0.5).with_defaults(usual)
    assert "0.04 of 10 steps is less than one, so --early-scale has no effect" in capsys.readouterr().err
    own = DrawingOptions(concepts=concepts, early_steps=0.5).with_defaults({**usual, "early_scale": 0.3})
    assert own.early == EarlyScale(0.3, 0.5) and own.for_sampler()["early"] == own.early
    assert (own.facts()["early_scale"], own.facts()["early_steps"]) == (0.3, 0.5)
    assert "early_scale" not in DrawingOptions(concepts=concepts).with_defaults(usual).facts()
    words = Concept("textual-inversion", "tiny", "", {"[V]": "[V]"}, "dog", words="words.safetensors")
    say_idle_early_scale([words], 1)
    assert not capsys.readouterr().err
    say_idle_early_scale([words], 0.5)
    assert "--early-scale 0.5 has no effect" in capsys.readouterr().err
