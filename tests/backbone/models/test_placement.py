"""A base that lies elsewhere, or in fewer bits, answers and teaches as the whole one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from backbone.adapters.lora import add_lora
from backbone.conditions.conditions import Conditions
from backbone.io.console import UserError
from backbone.models.model import Backbone
from backbone.models.placement import (
    Placement,
    enable_tiling,
    find_offloadable_layers,
    find_quantizable_layers,
    offload,
    place_denoiser,
)
from tests.tiny import tiny_autoencoder, tiny_flux

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1)]
)
def test_a_lent_layer_answers_and_passes_gradients_as_before(layer: nn.Module) -> None:
    shape = (2, 3, 8, 8) if isinstance(layer, nn.Conv2d) else (2, 4, 5)
    x = torch.randn(shape, requires_grad=True)
    before = layer(x)
    (wanted,) = torch.autograd.grad(before.square().sum(), x)
    offload(layer)
    after = layer(x)
    (found,) = torch.autograd.grad(after.square().sum(), x)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(found, wanted)


def test_a_lent_layer_stays_where_it_is_and_keeps_nothing_for_the_gradient() -> None:
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 2)])})
    place_denoiser(network, Placement(offload=1.0), torch.device("meta"))
    assert all(value.device == CPU for value in network.parameters())
    kept: list[torch.Tensor] = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(3, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        network["blocks"][0](x)  # type: ignore[index]
    assert kept == []


def test_the_largest_layers_are_lent_first() -> None:
    layers = [nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(2, 2)]
    network = nn.ModuleDict({"blocks": nn.ModuleList(layers), "outside": nn.Linear(99, 99)})
    assert find_offloadable_layers(network, 0.5) == [layers[1]]
    assert find_offloadable_layers(network, 0.9) == layers[1::-1]
    assert set(find_offloadable_layers(network)) == set(layers)


def test_a_denoiser_that_is_lent_learns_as_the_whole_one(tiny_folder: Path) -> None:
    gradients = []
    for placement in (Placement(), Placement(offload=0.5)):
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32", placement=placement)
        lora = add_lora(model.denoiser, "one", rank=2, alpha=2, targets=("to_q", "to_out.0"))
        for number, value in enumerate(lora.values()):
            random = torch.Generator().manual_seed(number)
            value.data = torch.randn(value.shape, generator=random)
        text = Conditions({"hidden": torch.linspace(-1, 1, 77 * 16).reshape(1, 77, 16)})
        noisy = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)
        model.family.network(model.denoiser, text)(noisy, torch.tensor([5.0])).square().sum().backward()
        gradients.append([value.grad for value in lora.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_tiles_are_taken_where_a_picture_is_larger() -> None:
    autoencoder = tiny_autoencoder().eval()
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    whole = autoencoder.encode(pictures).latent_dist.mean
    enable_tiling(autoencoder, 64)
    torch.testing.assert_close(autoencoder.encode(pictures).latent_dist.mean, whole)
    enable_tiling(autoencoder, 32)
    parts = autoencoder.encode(pictures).latent_dist.mean
    assert parts.shape == whole.shape and not torch.equal(parts, whole)
    assert autoencoder.decode(parts).sample.shape == pictures.shape


def test_tiles_that_are_too_small_to_see_much_in_are_said(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for resolution, said in ((0, True), (512, False)):
        model = Backbone.open(
            str(tiny_folder), device="cpu", placement=Placement(tiling=True), resolution=resolution
        )
        assert model.autoencoder is not None
        assert ("is off by several percent" in " ".join(capsys.readouterr().err.split())) == said


@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_a_base_in_few_bits_is_near_the_whole_one_and_carries_an_adapter(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny_flux(tmp_path / "flux")
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    names = list(find_quantizable_layers(model.denoiser))
    assert "transformer_blocks.0.attn.to_q" in names and "x_embedder" not in names
    small = Backbone.open(str(folder), device="cpu", precision="fp32", placement=Placement(quantize=kind))
    text = model.encode_prompts(["a dog in the snow"])
    noisy, time = torch.randn(1, *model.latent_shape), torch.tensor([500.0])
    whole, rounded = (one.family.network(one.denoiser, text)(noisy, time).detach() for one in (model, small))
    off = float((whole - rounded).norm() / whole.norm())
    assert 0 < off < 0.2
    lora = add_lora(small.denoiser, "one", rank=2, alpha=2, targets=("to_q", "to_v"))
    small.family.network(small.denoiser, text)(noisy, time).square().sum().backward()
    assert all(value.grad is not None for value in lora.values())


def test_measures_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="Choose one"):
        Placement(quantize="nf4", offload=0.5)
    with pytest.raises(UserError, match="8bit or nf4"):
        Placement(quantize="int3")
    with pytest.raises(UserError, match="between 0 and 1"):
        Placement(offload=2)


def test_without_the_library_few_bits_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        place_denoiser(nn.Linear(2, 2), Placement(quantize="nf4"), CPU)
