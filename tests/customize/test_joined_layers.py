"""Adapters of SD3, FLUX and PixArt in other tools' forms: what kohya joins, what ComfyUI calls by diffusers' names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from backbone.families.chroma.family import Chroma
from backbone.families.flux.family import Flux
from backbone.families.flux2.family import Flux2
from backbone.families.krea2.family import Krea2
from backbone.families.pixart.family import PixArt
from backbone.families.qwen.family import QwenImage
from backbone.families.qwen.image21 import QwenImage21
from backbone.families.sd3.family import StableDiffusion3
from backbone.families.zimage.family import ZImage
from backbone.io.console import UserError
from backbone.io.files import read_header, read_tensors, write_tensors
from customize.formats.adapter import AdapterFile
from customize.formats.layers.names import flatten_name
from customize.formats.layers.originals import find_original
from customize.formats.layers.translate import find
from customize.formats.read import read_adapter
from customize.formats.write import compare_updates, to_state_dict, write_adapter
from tests.customize.adapters import random_adapter, random_layer
from tests.tiny import (
    tiny_chroma,
    tiny_flux,
    tiny_flux2_klein,
    tiny_krea2,
    tiny_pixart,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_stable_diffusion_3,
    tiny_z_image,
)

Folders = dict[str, Path]
PARTS: dict[str, tuple[Any, Any]] = {
    "flux": (FluxTransformer2DModel, Flux),
    "sd3": (SD3Transformer2DModel, StableDiffusion3),
    "pixart": (PixArtTransformer2DModel, PixArt),
    "flux2": (Flux2Transformer2DModel, Flux2),
    "zimage": (ZImageTransformer2DModel, ZImage),
    "qwen": (QwenImageTransformer2DModel, QwenImage),
    "krea2": (Krea2Transformer2DModel, Krea2),
    "chroma": (ChromaTransformer2DModel, Chroma),
    "qwen21": (QwenImage21Transformer2DModel, QwenImage21),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    place = tmp_path_factory.mktemp("models")
    return {
        "flux": tiny_flux(place / "flux"),
        "sd3": tiny_stable_diffusion_3(place / "sd3", t5=False),
        "pixart": tiny_pixart(place / "pixart"),
        "flux2": tiny_flux2_klein(place / "flux2"),
        "zimage": tiny_z_image(place / "zimage"),
        "qwen": tiny_qwen_image(place / "qwen"),
        "krea2": tiny_krea2(place / "krea2"),
        "chroma": tiny_chroma(place / "chroma"),
        "qwen21": tiny_qwen_image21(place / "qwen21"),
    }


@pytest.mark.parametrize("base", ["flux", "sd3", "flux2", "zimage", "qwen", "krea2", "chroma", "qwen21"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_layer_that_can_be_trained_goes_to_kohya_and_back(
    folders: Folders, tmp_path: Path, base: str, dora: bool
) -> None:
    adapter = random_adapter(targets(folders, base), dora=dora, alphas=(1.0, 3.0))
    said = {"modelspec.architecture": f"{base}/lora"} if base == "chroma" else {}  # whose names are FLUX.1's
    adapter = replace(adapter, metadata=said)
    assert adapter.base == base
    assert write_adapter(tmp_path / "a.safetensors", adapter, "kohya", metadata=said) < 1e-5
    names = read_header(tmp_path / "a.safetensors").shapes
    assert all(name.startswith("lora_unet_") for name in names)
    joined = any(name.endswith("attn_qkv.lora_up.weight") for name in names)
    assert joined == (base in ("flux", "sd3", "flux2", "chroma")), (
        "others are known by diffusers' names, or join nothing"
    )
    assert read_adapter(tmp_path / "a.safetensors").base == base


@pytest.mark.parametrize("base", ["flux", "sd3", "pixart", "flux2", "zimage", "qwen", "qwen21"])
def test_comfyui_s_form_has_diffusers_names(folders: Folders, tmp_path: Path, base: str) -> None:
    adapter = random_adapter(targets(folders, base))
    assert adapter.base == base
    write_adapter(tmp_path / "a.safetensors", adapter, "comfyui")
    names = read_header(tmp_path / "a.safetensors").shapes
    stems = {name.removesuffix(".alpha") for name in names if name.endswith(".alpha")}
    assert stems == set(adapter.layers)
    assert compare_updates(adapter, read_adapter(tmp_path / "a.safetensors"))[0] < 1e-6


def test_a_joined_layer_changes_what_its_parts_change() -> None:
    random = torch.Generator().manual_seed(0)
    query, value = (random_layer(nn.Linear(6, 6), rank, 3.0, random) for rank in (2, 3))
    block = "transformer.single_transformer_blocks.4"
    adapter = AdapterFile({f"{block}.attn.to_q": query, f"{block}.attn.to_v": value})
    tensors, _ = to_state_dict(adapter, "kohya", base="flux")
    stem = "lora_unet_single_blocks_4_linear1"
    up, down, alpha = (tensors[f"{stem}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    whole = up @ down * float(alpha) / len(down)
    nothing = torch.zeros(6, 6)
    wanted = torch.cat([query.delta_weight(), nothing, value.delta_weight(), *[nothing] * 4])
    torch.testing.assert_close(whole, wanted)


def test_a_joined_layer_that_was_trained_as_one_is_taken_apart(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    layer = random_layer(nn.Linear(4, 12), 2, 1.0, random)
    write_adapter(tmp_path / "a.safetensors", AdapterFile({"unet.conv_in": layer}), "kohya", base="sd1")
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    named = {name.replace("lora_unet_conv_in", stem): value for name, value in tensors.items()}
    write_tensors(tmp_path / "b.safetensors", named, {})
    found = read_adapter(tmp_path / "b.safetensors")
    names = [f"transformer.transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    assert list(found.layers) == names
    torch.testing.assert_close(
        torch.cat([found.layers[name].delta_weight() for name in names]), layer.delta_weight()
    )


def test_diffusers_reads_what_kohya_s_form_joins(folders: Folders, tmp_path: Path) -> None:
    chosen = {
        name: module for name, module in targets(folders, "flux").items() if ".transformer_blocks." in name
    }
    random = torch.Generator().manual_seed(0)
    adapter = AdapterFile({name: random_layer(module, 2, 3.0, random) for name, module in chosen.items()})
    write_adapter(tmp_path / "a.safetensors", adapter, "kohya", base="flux")
    theirs, ours = (FluxPipeline.from_pretrained(folders["flux"]) for _ in range(2))
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    modules = dict(ours.transformer.named_modules())
    for name, layer in adapter.layers.items():
        weight = modules[name.removeprefix("transformer.")].weight
        weight.data.copy_(layer.merge_into(weight.data))
    said = [asked(pipeline.transformer) for pipeline in (theirs, ours)]
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=1e-5)
    assert not torch.allclose(said[0], asked(FluxPipeline.from_pretrained(folders["flux"]).transformer))


def test_a_layer_that_kohya_has_no_name_for_is_a_clear_mistake(folders: Folders, tmp_path: Path) -> None:
    adapter = random_adapter(targets(folders, "pixart"))
    with pytest.raises(UserError, match="PixArt"):
        write_adapter(tmp_path / "a.safetensors", adapter, "kohya")


@pytest.mark.parametrize("base", ["flux", "sd3", "flux2", "krea2", "chroma"])
def test_names_go_to_the_original_code_and_back(folders: Folders, base: str) -> None:
    for name in targets(folders, base):
        module = name.removeprefix("transformer.")
        place = find_original(module, base)
        assert place is not None
        target = find(base, flatten_name(place[1]))  # type: ignore[arg-type]
        assert target is not None and target.layers[place[2]] == module


def test_qwen_image_21_is_read_from_comfyui_s_joined_gates(folders: Folders, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    names = [f"transformer.transformer_blocks.1.img_mlp.{part}" for part in ("gate_layer", "proj")]
    modules: dict[str, Any] = {**targets(folders, "qwen21")}
    whole = nn.Linear(modules[names[0]].in_features, 2 * modules[names[0]].out_features)
    layer = random_layer(whole, 2, 1.0, random)
    stem = "diffusion_model.transformer_blocks.1.img_mlp.gate_up"
    tensors = {f"{stem}.lora_A.weight": layer.factors["down"], f"{stem}.lora_B.weight": layer.factors["up"]}
    write_tensors(tmp_path / "a.safetensors", {**tensors, f"{stem}.alpha": torch.tensor(layer.alpha)}, {})
    found = read_adapter(tmp_path / "a.safetensors")
    assert list(found.layers) == names and found.base == "qwen21"
    parts = torch.cat([found.layers[name].delta_weight() for name in names])
    torch.testing.assert_close(parts, layer.delta_weight())


# Helpers ----------------------------------------------------------------------------------------------------


def targets(folders: Folders, base: str) -> dict[str, nn.Module]:
    """The layers that `--lora_layers all` trains, by our names."""
    kind, family = PARTS[base]
    wanted = family.lora_targets["all"]
    return {
        f"transformer.{name}": module
        for name, module in kind.from_pretrained(folders[base], subfolder="transformer").named_modules()
        if isinstance(module, nn.Linear) and any(name == end or name.endswith(f".{end}") for end in wanted)
    }


@torch.no_grad()
def asked(transformer: Any) -> torch.Tensor:
    """What FLUX's network says to a fixed question."""
    random = torch.Generator().manual_seed(0)
    said: torch.Tensor = transformer(
        hidden_states=torch.randn(1, 4, 16, generator=random),
        timestep=torch.tensor([0.5]),
        guidance=torch.ones(1),
        encoder_hidden_states=torch.randn(1, 3, 32, generator=random),
        pooled_projections=torch.randn(1, 16, generator=random),
        txt_ids=torch.zeros(3, 3),
        img_ids=torch.zeros(4, 3),
    ).sample
    return said
