"""Adapters: silent until trained, fp32, switched off and on without a trace, read by diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import Concept
from backbone.adapters.config import AdapterType, read_adapter_configs
from backbone.adapters.embeddings import EMBEDDINGS_FILE, save_embeddings
from backbone.adapters.lora import (
    LORA_WEIGHTS,
    AdapterKind,
    activate_adapters,
    add_lora,
    disable_adapters,
    load_lora,
    lora_parameters,
    match_ranks,
    save_lora,
    say_useless_rank,
)
from backbone.conditions.conditions import Conditions
from backbone.io.console import UserError, printed_names, printed_once
from backbone.io.files import read_header
from backbone.models.model import Backbone
from backbone.models.placement import Placement

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def said(model: Backbone, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    noisy = torch.randn(2, *model.latent_shape, generator=random)
    text = Conditions({"hidden": torch.randn(2, 77, 16, generator=random)})
    with torch.no_grad():
        return model.family.network(model.denoiser, text)(noisy, torch.tensor([10, 500]))


def trained(model: Backbone) -> dict[str, Tensor]:
    parameters = add_lora(model.denoiser, "one", rank=2, alpha=4.0, targets=TARGETS)
    random = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return parameters


def test_a_new_adapter_changes_nothing(tiny: Backbone) -> None:
    before = said(tiny)
    add_lora(tiny.denoiser, "one", rank=2, alpha=2.0, targets=TARGETS)
    assert torch.equal(said(tiny), before)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_an_adapter_drops_nothing_out_while_its_network_does_not_learn(
    tiny: Backbone, kind: AdapterType
) -> None:
    drops = AdapterKind(kind, dropout=0.5)
    for value in add_lora(tiny.denoiser, "one", rank=2, alpha=2.0, targets=TARGETS, kind=drops).values():
        value.data += 0.1
    assert torch.equal(said(tiny), said(tiny))
    tiny.denoiser.train()
    assert not torch.equal(said(tiny), said(tiny))


def test_trainables_are_fp32_over_a_half_precision_base(tiny_folder: Path) -> None:
    model = Backbone.open(str(tiny_folder), device="cpu", precision="bf16")
    parameters = add_lora(model.denoiser, "one", rank=2, alpha=2.0, targets=TARGETS)
    assert next(model.denoiser.parameters()).dtype is torch.bfloat16
    assert all(p.dtype is torch.float32 and p.requires_grad for p in parameters.values())
    others = [p for key, p in model.denoiser.named_parameters() if key not in parameters]
    assert not any(p.requires_grad for p in others)


def test_switched_off_adapters_give_the_base_and_come_back_bit_for_bit(tiny: Backbone) -> None:
    base = said(tiny)
    parameters = trained(tiny)
    adapted = said(tiny)
    flags = {key: p.requires_grad for key, p in tiny.denoiser.named_parameters()}
    with disable_adapters(tiny.denoiser):
        assert torch.equal(said(tiny), base)
    assert torch.equal(said(tiny), adapted)
    assert not torch.equal(adapted, base)
    assert flags == {key: p.requires_grad for key, p in tiny.denoiser.named_parameters()}
    assert all(p.requires_grad for p in parameters.values())


def test_they_come_back_after_an_error_too(tiny: Backbone) -> None:
    trained(tiny)
    adapted = said(tiny)
    with pytest.raises(RuntimeError), disable_adapters(tiny.denoiser):
        raise RuntimeError
    assert torch.equal(said(tiny), adapted)


def test_a_saved_adapter_loads_in_diffusers_and_gives_the_same_prediction(
    tmp_path: Path, tiny_folder: Path, tiny: Backbone
) -> None:
    from diffusers import StableDiffusionPipeline

    trained(tiny)
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipeline.load_lora_weights(tmp_path)
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *tiny.latent_shape, generator=random)
    hidden = torch.randn(2, 77, 16, generator=random)
    with torch.no_grad():
        theirs = pipeline.unet(noisy, torch.tensor([10, 500]), hidden).sample
    assert torch.allclose(theirs, said(tiny), atol=1e-5)


def test_saving_and_loading_gives_the_same_prediction(
    tmp_path: Path, tiny_folder: Path, tiny: Backbone
) -> None:
    trained(tiny)
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    again = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    load_lora(tmp_path / LORA_WEIGHTS, again.denoiser, "other")
    assert torch.equal(said(again), said(tiny))


def test_strength_scales_the_change_and_two_adapters_add(
    tmp_path: Path, tiny_folder: Path, tiny: Backbone
) -> None:
    trained(tiny)
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    halves = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    for name in ("left", "right"):
        load_lora(tmp_path / LORA_WEIGHTS, halves.denoiser, name, scale=0.5)
    activate_adapters(halves.denoiser, ["left", "right"])
    assert torch.allclose(said(halves), said(tiny), atol=1e-4)
    assert len(lora_parameters(halves.denoiser, "left")) == len(lora_parameters(halves.denoiser, "right")) > 0


def test_that_a_strength_leaves_a_dora_s_magnitudes_is_said(
    tmp_path: Path, tiny_folder: Path, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_names.cache_clear()
    add_lora(tiny.denoiser, "one", rank=2, alpha=4.0, targets=("to_q",), kind=AdapterKind("dora"))
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    for scale, told in ((1.0, False), (0.5, True)):
        again = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        load_lora(tmp_path / LORA_WEIGHTS, again.denoiser, "one", scale=scale)
        assert ("a strength of 0.5 scales its direction" in capsys.readouterr().err) is told


def test_what_reads_the_base_s_weights_is_refused_on_one_in_few_bits(
    tmp_path: Path, tiny_folder: Path, tiny: Backbone
) -> None:
    add_lora(tiny.denoiser, "one", rank=2, alpha=4.0, targets=("to_q",), kind=AdapterKind("loha"))
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    again: Any = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    again.denoiser.is_loaded_in_8bit = True  # as `quantize` marks it
    with pytest.raises(UserError, match="a LoHa or LoKr, which reads the base"):
        load_lora(tmp_path / LORA_WEIGHTS, again.denoiser, "one")
    changes = Concept("subject", tiny.location.name, tiny.fingerprint, {}, "", changed="d", folder=tmp_path)
    small = Backbone.open(str(tiny_folder), device="cpu", placement=Placement(quantize="8bit"))
    with pytest.raises(UserError, match="changes the base's own weights, which cannot lie in 8bit"):
        load_concepts(small, [changes])


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, tiny_folder: Path, tiny: Backbone) -> None:
    add_lora(tiny.denoiser, "one", rank=2, alpha=4.0, targets=("to_q",))
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    from backbone.io.files import read_tensors, write_tensors

    tensors, header = read_tensors(tmp_path / LORA_WEIGHTS)
    write_tensors(tmp_path / LORA_WEIGHTS, {key: value[..., :-1] for key, value in tensors.items()}, header)
    again = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    with pytest.raises(UserError, match="another model"):
        load_lora(tmp_path / LORA_WEIGHTS, again.denoiser, "one")


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("attn2", lambda name: "attn2" in name),
        ("attn2.to_k", lambda name: "attn2.to_k" in name),
        ("down_blocks.0", lambda name: "down_blocks.0." in name),
        (r"to_(k|v)", lambda name: ".to_k" in name or ".to_v" in name),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_a_rank_pattern_holds_for_every_layer_whose_name_contains_it(
    pattern: str, chosen: Callable[[str], bool], kind: AdapterType, tiny: Backbone, tmp_path: Path
) -> None:
    like = AdapterKind(kind, rank_pattern={pattern: 2})
    parameters = add_lora(tiny.denoiser, "one", rank=4, alpha=8.0, targets=TARGETS, kind=like)
    mark = "lora_A" if kind == "lora" else "hada_w1_b"
    ranks = {name: len(value) for name, value in parameters.items() if mark in name}
    assert ranks == {name: 2 if chosen(name) else 4 for name in ranks}
    assert len(set(ranks.values())) == 2
    for module in tiny.denoiser.modules():
        if "one" in getattr(module, "scaling", {}):
            assert module.scaling["one"] == 2  # type: ignore[index]
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    again = read_adapter_configs(tmp_path / LORA_WEIGHTS, read_header(tmp_path / LORA_WEIGHTS).metadata)[
        "unet"
    ]
    for name, rank in ranks.items():
        assert again.layer_rank(name.partition(f".{mark}")[0]) == rank


def test_the_longest_rank_pattern_decides_and_one_that_decides_nothing_is_refused(tiny: Backbone) -> None:
    ranks = match_ranks(tiny.denoiser, TARGETS, {"attn2": 4, "attn2.to_k": 2})
    assert {rank for name, rank in ranks.items() if name.endswith("attn2.to_k")} == {2}
    assert {rank for name, rank in ranks.items() if not name.endswith("attn2.to_k")} == {4}
    for patterns in (
        {"attn3": 4},
        {"conv1": 4},
        {"attn": 4, "attn1": 2, "attn2": 2},
        {"blocks.9": 4},
        {"(": 4},
    ):
        with pytest.raises(UserError, match="rank pattern"):
            match_ranks(tiny.denoiser, TARGETS, patterns)


def test_a_rank_above_the_layers_is_said(tiny: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    say_useless_rank(add_lora(tiny.denoiser, "small", rank=2, alpha=2.0, targets=TARGETS))
    assert not capsys.readouterr().err
    say_useless_rank(add_lora(tiny.denoiser, "large", rank=40, alpha=2.0, targets=TARGETS))
    assert "larger than" in capsys.readouterr().err


def test_a_rank_that_would_fill_the_memory_is_refused_and_leaves_nothing(tiny: Backbone) -> None:
    before = {name for name, _ in tiny.denoiser.named_parameters()}
    for rank, pattern in ((100_000, {}), (4, {"attn2": 100_000})):
        kind = AdapterKind(rank_pattern=pattern)
        with pytest.raises(UserError, match="rank 100000 is far above what any layer can use"):
            add_lora(tiny.denoiser, "huge", rank=rank, alpha=2.0, targets=TARGETS, kind=kind)
    assert {name for name, _ in tiny.denoiser.named_parameters()} == before


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale: float, tiny: Backbone) -> None:
    with pytest.raises(UserError, match="scale of the concepts"):
        load_concepts(tiny, [], scale=scale)


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (1.2, ""),
        (80.0, "At 80 times the strength"),
        (-50.0, "Was -0.5 meant?"),
        (0.0, "At scale 0 nothing of the concepts' weights is used"),
    ],
)
def test_a_scale_that_nobody_means_is_said(
    scale: float, told: str, tiny: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tiny)
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "one")
    model, fingerprint = tiny.location.name, tiny.fingerprint
    concept = Concept("preference", model, fingerprint, {}, "", weights=LORA_WEIGHTS, folder=tmp_path)
    printed_once.clear()
    load_concepts(tiny, [concept], scale=scale)
    assert told in (err := capsys.readouterr().err) and bool(told) == bool(err)


def test_a_scale_of_learned_words_alone_is_said_to_have_no_effect(
    tiny: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, fingerprint = tiny.location.name, tiny.fingerprint
    save_embeddings(tmp_path / EMBEDDINGS_FILE, {"[V]": {"text_encoder": torch.ones(1, 16)}}, metadata={})
    words = Concept(
        "subject", model, fingerprint, {"[V]": "[V]"}, "dog", words=EMBEDDINGS_FILE, folder=tmp_path
    )
    printed_once.clear()
    load_concepts(tiny, [words], scale=0.5)
    assert "The scale 0.5 has no effect: these concepts are learned words" in capsys.readouterr().err
