"""Adapter files of several tools: what is written comes back, and diffusers itself reads it as we mean it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from torch import nn

from backbone.adapters.lora import add_lora, load_lora, save_lora
from backbone.families.unet.original import from_original, to_original
from backbone.io.console import UserError
from backbone.io.files import read_header, read_tensors, write_tensors
from customize.formats.adapter import AdapterFile, FileFormat
from customize.formats.factors import LayerUpdate, row_norms
from customize.formats.layers.names import flatten_name
from customize.formats.layers.translate import find
from customize.formats.metadata import build_metadata
from customize.formats.read import read_adapter
from customize.formats.write import compare_updates, to_state_dict, write_adapter
from tests.customize.adapters import (
    modules_of,
    outputs,
    put_into,
    random_adapter,
    random_layer,
    tiny_xl,
    whole_pipeline,
)

FORMS: tuple[FileFormat, ...] = ("diffusers", "peft", "kohya", "comfyui")


@pytest.fixture(scope="module")
def some(tiny_folder: Path) -> dict[str, nn.Module]:
    """Layers of every sort: attention, convolutions, projections, the text encoder."""
    return modules_of(whole_pipeline(tiny_folder))


@pytest.mark.parametrize("file_format", FORMS)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_a_random_lora_comes_back_from_every_form(
    file_format: FileFormat, seed: int, some: dict[str, nn.Module], tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(seed)
    chosen = {name: module for name, module in some.items() if torch.rand((), generator=random) < 0.4}
    adapter = random_adapter(chosen, seed=seed, alphas=(0.3, 1.0, 8.0))
    write_adapter(tmp_path / "a.safetensors", adapter, file_format)
    back = read_adapter(tmp_path / "a.safetensors")
    assert compare_updates(adapter, back)[0] == 0
    for name, layer in adapter.layers.items():
        assert back.layers[name].rank == layer.rank
        assert back.layers[name].alpha == pytest.approx(layer.alpha)


def test_a_chain_through_all_forms_changes_nothing(some: dict[str, nn.Module], tmp_path: Path) -> None:
    adapter = current = random_adapter(some, alphas=(2.0, 5.0))
    for number, file_format in enumerate((*FORMS, *reversed(FORMS))):
        write_adapter(tmp_path / f"{number}.safetensors", current, file_format)
        current = read_adapter(tmp_path / f"{number}.safetensors")
    assert compare_updates(adapter, current)[0] == 0


@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "comfyui"])
def test_diffusers_draws_with_an_export_as_the_definition_says(
    file_format: FileFormat, tiny_folder: Path, some: dict[str, nn.Module], tmp_path: Path
) -> None:
    adapter = random_adapter(_loadable(some), alphas=(3.0,))
    write_adapter(tmp_path / "a.safetensors", adapter, file_format)
    loaded, defined = whole_pipeline(tiny_folder), whole_pipeline(tiny_folder)
    before = outputs(loaded)
    loaded.load_lora_weights(tmp_path, weight_name="a.safetensors")
    put_into(defined, adapter)
    assert (outputs(loaded) - outputs(defined)).abs().max() < 1e-5
    assert (outputs(loaded) - before).abs().max() > 1e-2


def test_diffusers_reads_one_alpha_for_each_layer_from_our_diffusers_form(
    tiny_folder: Path, some: dict[str, nn.Module], tmp_path: Path
) -> None:
    adapter = random_adapter(_loadable(some), alphas=(1.0, 4.0, 7.0))
    write_adapter(tmp_path / "a.safetensors", adapter, "diffusers")
    loaded, defined = whole_pipeline(tiny_folder), whole_pipeline(tiny_folder)
    loaded.load_lora_weights(tmp_path, weight_name="a.safetensors")
    put_into(defined, adapter)
    assert (outputs(loaded) - outputs(defined)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "file_format", [pytest.param("diffusers", marks=pytest.mark.slow), "kohya", "comfyui"]
)
def test_diffusers_reads_sdxl_with_both_text_encoders(file_format: FileFormat, tmp_path: Path) -> None:
    loaded, defined = tiny_xl(), tiny_xl()
    known = _loadable(modules_of(loaded))
    # Diffusers does not read this layer by diffusers' name from a file of this form
    if file_format == "comfyui":
        known = {name: module for name, module in known.items() if "add_embedding" not in name}
    adapter = random_adapter(known, alphas=(3.0,))
    assert adapter.base == "sdxl"
    write_adapter(tmp_path / "a.safetensors", adapter, file_format)
    loaded.load_lora_weights(tmp_path, weight_name="a.safetensors")
    put_into(defined, adapter)
    assert (outputs(loaded) - outputs(defined)).abs().max() < 1e-5


def test_diffusers_reads_dora_from_its_own_form(
    tiny_folder: Path, some: dict[str, nn.Module], tmp_path: Path
) -> None:
    chosen = {name: module for name, module in _loadable(some).items() if name.startswith("unet.")}
    adapter = random_adapter(chosen, dora=True)
    write_adapter(tmp_path / "a.safetensors", adapter, "diffusers")
    loaded, defined = whole_pipeline(tiny_folder), whole_pipeline(tiny_folder)
    loaded.load_lora_weights(tmp_path, weight_name="a.safetensors")
    put_into(defined, adapter)
    assert (outputs(loaded) - outputs(defined)).abs().max() < 1e-4


def test_our_loader_takes_ranks_and_alphas_of_each_layer(
    tiny_folder: Path, some: dict[str, nn.Module], tmp_path: Path
) -> None:
    adapter = random_adapter(_loadable(some), alphas=(1.0, 4.0))
    write_adapter(tmp_path / "a.safetensors", adapter, "peft")
    loaded, defined = whole_pipeline(tiny_folder), whole_pipeline(tiny_folder)
    text = {"text_encoder": loaded.text_encoder}
    load_lora(tmp_path / "a.safetensors", loaded.unet, "a", text_encoders=text)
    put_into(defined, adapter)
    assert (outputs(loaded) - outputs(defined)).abs().max() < 1e-5


def test_what_training_saves_is_read_with_its_true_alpha(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = whole_pipeline(tiny_folder)
    trained = add_lora(pipeline.unet, "a", rank=4, alpha=2.0, targets=("to_q", "conv1"))
    for value in trained.values():
        value.data.normal_(std=0.1)
    save_lora(tmp_path / "a.safetensors", pipeline.unet, "a")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert {(layer.rank, layer.alpha) for layer in adapter.layers.values()} == {(4, 2.0)}
    defined = whole_pipeline(tiny_folder)
    put_into(defined, adapter)
    assert (outputs(pipeline) - outputs(defined)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("effective", [True, False])
def test_loha_and_lokr_go_into_lycoris_form_and_back(
    kind: str, effective: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    unet = whole_pipeline(tiny_folder).unet
    shared: dict[str, Any] = {
        "r": 2,
        "alpha": 3,
        "target_modules": ["to_q", "conv1", "conv_shortcut"],
        "init_weights": False,
        "use_effective_conv2d": effective,
    }
    config = LoHaConfig(**shared) if kind == "loha" else LoKrConfig(**shared, decompose_both=True)
    inject_adapter_in_model(config, unet, adapter_name="a")
    save_lora(tmp_path / "own.safetensors", unet, "a")
    adapter = read_adapter(tmp_path / "own.safetensors")
    assert adapter.algorithms == [kind]
    for name, module in unet.named_modules():  # peft's own ΔW
        if hasattr(module, "get_delta_weight"):
            ours = adapter.layers[f"unet.{name}"].delta_weight()
            torch.testing.assert_close(ours, module.get_delta_weight("a").detach().flatten(1))
    write_adapter(tmp_path / "kohya.safetensors", adapter, "kohya")
    names = read_header(tmp_path / "kohya.safetensors").shapes
    mark = "hada_w1_a" if kind == "loha" else "lokr_w1"
    assert all(name.startswith("lora_unet_") for name in names)
    assert any(mark in name for name in names)
    assert compare_updates(adapter, read_adapter(tmp_path / "kohya.safetensors"))[0] < 1e-6
    with pytest.raises(UserError, match="kohya"):
        write_adapter(tmp_path / "no.safetensors", adapter, "diffusers")
    assert not (tmp_path / "no.safetensors").exists()


def test_a_lokr_without_small_factors_keeps_its_strength_where_lycoris_ignores_alpha(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    whole = {"lokr_w1": torch.randn(2, 2, generator=random), "lokr_w2": torch.randn(4, 3, generator=random)}
    adapter = AdapterFile({"unet.conv_in": LayerUpdate("lokr", whole, 4, 1.0)})
    tensors, _ = to_state_dict(adapter, "kohya", base="sd1")
    as_lycoris = torch.kron(tensors["lora_unet_conv_in.lokr_w1"], tensors["lora_unet_conv_in.lokr_w2"])
    torch.testing.assert_close(as_lycoris, adapter.layers["unet.conv_in"].delta_weight())


def test_dora_goes_to_lycoris_as_it_is_and_to_comfyui_for_its_formula(tmp_path: Path) -> None:
    """ComfyUI: (W + ΔW)·scale/‖W‖ where the definition is (W + ΔW)·m/‖W + ΔW‖."""
    module = nn.Linear(6, 5)
    random = torch.Generator().manual_seed(0)
    layer = random_layer(module, 2, 1.0, random, dora=True)
    adapter, weight = AdapterFile({"unet.conv_in": layer}), module.weight.detach()
    lycoris, _ = to_state_dict(adapter, "kohya", base="sd1")
    assert layer.magnitude is not None
    torch.testing.assert_close(lycoris["lora_unet_conv_in.dora_scale"], layer.magnitude[:, None])
    comfy, _ = to_state_dict(adapter, "comfyui", base="sd1", weights={"unet.conv_in": weight})
    scale = comfy["lora_unet_conv_in.dora_scale"]
    drawn = (weight + layer.delta_weight()) * (scale / row_norms(weight)[:, None])
    torch.testing.assert_close(drawn, layer.merge_into(weight))
    with pytest.raises(UserError, match="--model"):
        to_state_dict(adapter, "comfyui", base="sd1")


def test_kohya_names_its_text_encoders_by_family(some: dict[str, nn.Module]) -> None:
    name = "text_encoder.encoder.layers.0.self_attn.q_proj"
    adapter = random_adapter({name: some[name]})
    for base, stem in (("sd1", "lora_te"), ("sdxl", "lora_te1")):
        tensors, _ = to_state_dict(adapter, "kohya", base=base)  # type: ignore[arg-type]
        assert f"{stem}_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors


def test_alpha_is_written_as_it_is(some: dict[str, nn.Module]) -> None:
    name = next(name for name in some if name.endswith("attn1.to_q"))
    tensors, _ = to_state_dict(random_adapter({name: some[name]}, alphas=(0.3,)), "kohya")
    (alpha,) = [value for key, value in tensors.items() if key.endswith(".alpha")]
    assert alpha.item() == pytest.approx(0.3)


def layer_of(name: str) -> tuple[str, ...]:
    target = find("unet", name)
    return () if target is None else target.layers


@pytest.mark.parametrize("config", ["sd1", "sdxl"])
def test_every_layer_name_survives_underscores_and_the_original_block_numbers(config: str) -> None:
    for name, module in _shell(config).named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert layer_of(flatten_name(name)) == (name,)
            if config == "sdxl":
                original = to_original(name)
                assert original.startswith(("input_", "output_", "middle_", "time_", "label_", "out."))
                assert from_original(original) == name
                assert layer_of(flatten_name(original)) == (name,)


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        (
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
        ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks.8.0.skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("out.2", "conv_out"),
    ],
)
def test_original_names_by_hand(original: str, ours: str) -> None:
    assert from_original(original) == ours


def test_a_file_of_diffusers_before_peft_is_read(tmp_path: Path) -> None:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    write_tensors(
        tmp_path / "old.safetensors",
        {
            f"{stem}.to_q_lora.down.weight": torch.ones(2, 4),
            f"{stem}.to_q_lora.up.weight": torch.ones(4, 2),
            f"{stem}.to_out_lora.down.weight": torch.ones(2, 4),
            f"{stem}.to_out_lora.up.weight": torch.ones(4, 2),
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": torch.ones(2, 4),
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": torch.ones(4, 2),
        },
    )
    layers = read_adapter(tmp_path / "old.safetensors").layers
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert set(layers) == {
        f"{block}.to_q",
        f"{block}.to_out.0",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
    }
    assert layers[f"{block}.to_q"].delta_weight().eq(2).all()


def test_a_convolution_with_a_small_kernel_between_is_one_kernel(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    down = nn.Conv2d(3, 2, 1, bias=False)
    middle, up = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(2, 4, 1, bias=False)
    stem = "lora_unet_conv_in"
    write_tensors(
        tmp_path / "locon.safetensors",
        {
            f"{stem}.lora_down.weight": down.weight,
            f"{stem}.lora_mid.weight": middle.weight,
            f"{stem}.lora_up.weight": up.weight,
            f"{stem}.alpha": torch.tensor(2.0),
        },
    )
    kernel = (
        read_adapter(tmp_path / "locon.safetensors").layers["unet.conv_in"].delta_weight().reshape(4, 3, 3, 3)
    )
    picture = torch.randn(1, 3, 6, 6, generator=random)
    torch.testing.assert_close(torch.conv2d(picture, kernel, padding=1), up(middle(down(picture))))


def test_half_precision_is_verified_too(some: dict[str, nn.Module], tmp_path: Path) -> None:
    worst = write_adapter(tmp_path / "h.safetensors", random_adapter(some), "kohya", dtype=torch.float16)
    assert 0 < worst < 2e-3
    tensors, _ = read_tensors(tmp_path / "h.safetensors")
    assert {value.dtype for name, value in tensors.items() if "lora_" in name and "alpha" not in name} == {
        torch.float16
    }


def test_the_header_says_what_kohyas_tools_look_for(some: dict[str, nn.Module], tmp_path: Path) -> None:
    adapter = random_adapter({name: some[name] for name in list(some)[3:9]})
    adapter = replace(
        adapter, layers={name: replace(layer, rank=layer.rank) for name, layer in adapter.layers.items()}
    )
    header = build_metadata(adapter, title="dog", base="sd1")
    write_adapter(tmp_path / "a.safetensors", adapter, "kohya", metadata=header, base="sd1")
    said = read_header(tmp_path / "a.safetensors").metadata
    assert said["ss_network_module"] == "networks.lora"
    assert said["ss_base_model_version"] == "sd_v1"
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.hash_sha256"].startswith("0x")
    assert json.loads(said["ss_network_args"]) is not None


# Files that cannot be used.


def _file(path: Path, **tensors: torch.Tensor) -> Path:
    write_tensors(path, {name.replace("__", "."): value for name, value in tensors.items()})
    return path


def test_a_file_without_a_lora_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.safetensors", unet__conv_in__weight=torch.ones(3))
    with pytest.raises(UserError, match="holds no LoRA"):
        read_adapter(path)


def test_a_truncated_file_is_refused(some: dict[str, nn.Module], tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.safetensors", random_adapter(some), "kohya")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_adapter(tmp_path / "b.safetensors")


def test_factors_of_different_ranks_are_refused(tmp_path: Path) -> None:
    stem = "unet__conv_in__lora"
    path = _file(
        tmp_path / "a.safetensors",
        **{f"{stem}_A__weight": torch.ones(2, 4), f"{stem}_B__weight": torch.ones(4, 3)},
    )
    with pytest.raises(UserError, match="ranks 2 and 3"):
        read_adapter(path)


def test_half_a_layer_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.safetensors", unet__conv_in__lora_A__weight=torch.ones(2, 4))
    with pytest.raises(UserError, match="not whole"):
        read_adapter(path)


def test_tensors_that_are_not_read_are_not_dropped_in_silence(tmp_path: Path) -> None:
    stem = "unet__conv_in__lora"
    path = _file(
        tmp_path / "a.safetensors",
        **{
            f"{stem}_A__weight": torch.ones(2, 4),
            f"{stem}_B__weight": torch.ones(4, 2),
            f"{stem}_B__bias": torch.ones(4),
        },
    )
    with pytest.raises(UserError, match=r"lora_B\.bias.*Merge it into its model in peft or diffusers"):
        read_adapter(path)


def test_biases_of_a_lora_that_are_zero_change_nothing_and_are_no_hindrance(tmp_path: Path) -> None:
    factors = {"A__weight": torch.ones(2, 4), "B__weight": torch.ones(4, 2), "B__bias": torch.zeros(4)}
    path = _file(
        tmp_path / "a.safetensors", **{f"unet__conv_in__lora_{end}": one for end, one in factors.items()}
    )
    assert set(read_adapter(path).layers) == {"unet.conv_in"}


def test_an_export_that_does_not_come_back_is_not_written(
    some: dict[str, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("customize.formats.write.to_kohya_name", lambda name, **_: "lora_unet_conv_in")
    with pytest.raises(UserError, match="Nothing was written"):
        write_adapter(tmp_path / "a.safetensors", random_adapter(some), "kohya")
    assert list(tmp_path.iterdir()) == []


def _loadable(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that diffusers' loaders know."""
    text = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return {
        name: module
        for name, module in modules.items()
        if name.startswith("unet.") or name.endswith(tuple(f".{leaf}" for leaf in text))
    }


def _shell(config: str) -> nn.Module:
    """The UNet of a family without storage."""
    wide = {
        "sd1": {},
        "sdxl": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }[config]
    with torch.device("meta"):
        network: nn.Module = UNet2DConditionModel(**wide)
    return network
