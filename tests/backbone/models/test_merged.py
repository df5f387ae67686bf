"""LoRAs in the weights for the length of a drawing: the same pictures, nearer to fp32's, and no trace of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from backbone.adapters.config import AdapterType
from backbone.adapters.lora import AdapterKind, activate_adapters, add_lora, disable_adapters
from backbone.models.merged import merged_loras
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample_latents
from tests.backbone.adapters.test_lora import TARGETS, said

LAYERS = (*TARGETS, "conv1", "conv2", "proj_in")


def learned(model: Backbone, name: str = "one", kind: AdapterType = "lora") -> None:
    adapter = AdapterKind(kind)
    random = torch.Generator().manual_seed(len(name))
    for value in add_lora(model.denoiser, name, rank=2, alpha=4.0, targets=LAYERS, kind=adapter).values():
        value.data = 0.1 * torch.randn(value.shape, generator=random)


def in_precision(folder: Path, precision: str) -> Backbone:
    model = Backbone.open(str(folder), device="cpu", precision=precision)
    learned(model)
    return model


def asked(model: nn.Module) -> list[bool]:
    """Of each layer with a LoRA, whether its factors are asked at a call."""
    return [not layer.disable_adapters for layer in model.modules() if isinstance(layer, LoraLayer)]


def test_merged_loras_predict_what_they_predict_beside_the_weights(tiny: Backbone) -> None:
    learned(tiny)
    learned(tiny, "another")
    activate_adapters(tiny.denoiser, ["one", "another"])
    beside = said(tiny)
    with merged_loras(tiny.denoiser):
        assert not any(asked(tiny.denoiser))
        inside = said(tiny)
    torch.testing.assert_close(inside, beside, atol=1e-5, rtol=1e-4)


def test_merged_weights_are_those_that_diffusers_fuses(tiny: Backbone) -> None:
    """diffusers' `fuse_lora` calls peft's `merge` of each layer."""
    learned(tiny)
    layers: list[Any] = [layer for layer in tiny.denoiser.modules() if isinstance(layer, LoraLayer)]
    with merged_loras(tiny.denoiser):
        ours = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    for layer, weight in zip(layers, ours, strict=True):
        before = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        assert torch.equal(layer.get_base_layer().weight, weight) and not torch.equal(weight, before)


def test_afterwards_the_very_tensors_are_back_after_an_error_too(tiny: Backbone) -> None:
    learned(tiny)
    beside = said(tiny)
    tensors = [value.data_ptr() for value in tiny.denoiser.parameters()]
    with pytest.raises(RuntimeError), merged_loras(tiny.denoiser):
        raise RuntimeError
    assert [value.data_ptr() for value in tiny.denoiser.parameters()] == tensors
    assert all(asked(tiny.denoiser))
    assert torch.equal(said(tiny), beside)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_other_adapters_are_left_beside_the_weights(tiny: Backbone, kind: AdapterType) -> None:
    learned(tiny, kind=kind)
    beside = said(tiny)
    with merged_loras(tiny.denoiser):
        assert torch.equal(said(tiny), beside)


def test_what_is_switched_off_stays_off(tiny: Backbone) -> None:
    base = said(tiny)
    learned(tiny)
    with disable_adapters(tiny.denoiser):
        with merged_loras(tiny.denoiser):
            assert torch.equal(said(tiny), base)
        assert torch.equal(said(tiny), base)


def test_a_large_model_is_left_as_it_is(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    learned(tiny)
    monkeypatch.setattr("backbone.models.merged.LARGEST", 10)
    with merged_loras(tiny.denoiser):
        assert all(asked(tiny.denoiser))


def test_what_is_drawn_in_bf16_is_nearer_to_fp32_than_with_products_that_are_rounded_each(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(model: Backbone) -> Tensor:
        requests = [Request("a dog", (0, 0)), Request("a cat", (1, 0))]
        return next(sample_latents(model, requests, steps=4, guidance=4.0, seed=0))

    half = in_precision(tiny_folder, "bf16")
    merged = draw(half)
    assert all(asked(half.denoiser))
    monkeypatch.setattr("backbone.models.merged.LARGEST", -1)
    exact = draw(in_precision(tiny_folder, "fp32"))
    beside = draw(half)
    assert not torch.equal(merged, beside)
    assert (merged - exact).square().mean() < (beside - exact).square().mean()
