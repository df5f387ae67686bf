"""Adapter files as other tools write them: every family's layers in every naming, every kind of factors.

The truth is ΔW from the formats' formulas; "effective" is what `import` puts on the model.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    Flux2KleinPipeline,
    FluxPipeline,
    Krea2Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from backbone.adapters.concept import read_concept
from backbone.adapters.config import CONFIG_KEY
from backbone.adapters.lora import LORA_WEIGHTS, add_lora, load_lora, save_lora
from backbone.families.flux.original import from_original as from_original_flux
from backbone.families.unet.original import to_original
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.models.model import Backbone
from customize.formats.adapter import AdapterFile, family_from_metadata
from customize.formats.convert import export_adapter, fit_to_model, import_adapter, inspect_adapter
from customize.formats.factors import LayerUpdate
from customize.formats.merging.merge import read_input
from customize.formats.model_weights import LayerWeights, ModelWeights
from customize.formats.read import read_adapter
from customize.formats.write import compare_updates, write_adapter
from tests.customize.adapters import random_layer
from tests.tiny import (
    tiny_chroma,
    tiny_flux,
    tiny_flux2_klein,
    tiny_krea2,
    tiny_pipeline,
    tiny_pixart,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_stable_diffusion_3,
    tiny_stable_diffusion_xl,
    tiny_z_image,
)

NEWER = (
    "zimage",
    "flux2",
    "qwen",
    "krea2",
    "chroma",
    "qwen21",
)  # of which every naming is tried by the long suite
FAMILIES = ("sd", "xl", "sd3", "flux", "pixart", *NEWER)
Tensors = dict[str, Tensor]


@dataclass
class Tiny:
    """A family's tiny model: its folder, its denoiser and the weights of all its adaptable layers by module name."""

    folder: Path
    denoiser: nn.Module
    component: str
    stored: ModelWeights

    @property
    def weights(self) -> dict[str, Tensor]:
        return {
            name: module.weight
            for name, module in self.denoiser.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    place = tmp_path_factory.mktemp("models")
    makers: dict[str, Callable[[Path], Path]] = {
        "sd": tiny_pipeline,
        "xl": tiny_stable_diffusion_xl,
        "sd3": lambda folder: tiny_stable_diffusion_3(folder, t5=False),
        "flux": tiny_flux,
        "pixart": tiny_pixart,
        "zimage": tiny_z_image,
        "flux2": tiny_flux2_klein,
        "qwen": tiny_qwen_image,
        "krea2": tiny_krea2,
        "chroma": tiny_chroma,
        "qwen21": tiny_qwen_image21,
    }
    made = {}
    for family, make in makers.items():
        opened = Backbone.open(str(make(place / family)), device="cpu", precision="fp32")
        component = "unet" if family in ("sd", "xl") else "transformer"
        made[family] = Tiny(place / family, opened.denoiser, component, ModelWeights(opened.location))
    return made


# Names ------------------------------------------------------------------------------------------------------


def flat(name: str) -> str:
    return name.replace(".", "_")


# A naming of diffusers' module names: (component, module) → what stands before the factor.
NAMINGS: dict[str, Callable[[str, str], str]] = {
    "diffusers": lambda component, module: f"{component}.{module}",
    "kohya": lambda component, module: f"lora_unet_{flat(module)}",
    "onetrainer": lambda component, module: f"lora_{component}_{flat(module)}",
    "lycoris": lambda component, module: f"lycoris_{flat(module)}",
    "peft": lambda component, module: f"base_model.model.{module}",
    "peft in a pipeline": lambda component, module: f"{component}.base_model.model.{module}",
    "peft of a pipeline": lambda component, module: f"base_model.model.{component}.{module}",
    "bare": lambda component, module: module,
    "comfyui": lambda component, module: f"diffusion_model.{module}",
}


@pytest.mark.parametrize(
    ("family", "naming"),
    [
        pytest.param(family, naming, marks=[pytest.mark.slow] * (family in NEWER and naming != "kohya"))
        for family in FAMILIES
        for naming in NAMINGS
        if family != "xl" or naming == "kohya"
    ],
)
def test_diffusers_names_under_every_tool_s_prefix_are_the_family_s_layers(
    family: str, naming: str, models: dict[str, Tiny], tmp_path: Path
) -> None:
    model = models[family]
    tensors: Tensors = {}
    truth: Tensors = {}
    for module, weight in model.weights.items():
        stem = NAMINGS[naming](model.component, module)
        factors, truth[f"{model.component}.{module}"] = lora(weight)
        tensors |= {f"{stem}.{end}": value for end, value in factors.items()}
    assert_read(tensors, truth, tmp_path)


@pytest.mark.parametrize(
    "prefix", ["lora_unet_", "diffusion_model.", "", "transformer.", "lora_transformer_"]
)
@pytest.mark.parametrize("family", ["flux", "sd3", "pixart", "zimage", "flux2", "krea2", "chroma", "qwen21"])
def test_the_original_code_s_names_are_the_family_s_layers(
    family: str, prefix: str, models: dict[str, Tiny], tmp_path: Path
) -> None:
    tensors: Tensors = {}
    truth: Tensors = {}
    weights = models[family].weights
    for original, parts in originals(family, weights).items():
        whole = torch.cat([weights[part] for part in parts])
        factors, change = lora(whole)
        stem = prefix + (flat(original) if prefix.endswith("_") else original)
        tensors |= {f"{stem}.{end}": value for end, value in factors.items()}
        # (shift, scale) there, (scale, shift) here
        if (
            family != "zimage"
            and original.endswith("adaLN_modulation.1")
            and (parts[0] == "norm_out.linear" or len(whole) == 2 * whole.shape[1])
        ):
            change = torch.cat([*reversed(change.chunk(2))])
        pieces = change.split([len(weights[part]) for part in parts])
        truth |= {f"transformer.{part}": piece for part, piece in zip(parts, pieces, strict=True)}
    assert set(truth) == {f"transformer.{name}" for name in weights}
    assert_read(tensors, truth, tmp_path)


@pytest.mark.parametrize("style", ["kohya", "dotted"])
def test_sdxl_s_original_block_numbers_and_text_encoders_are_its_layers(
    style: str, models: dict[str, Tiny], tmp_path: Path
) -> None:
    tensors: Tensors = {}
    truth: Tensors = {}
    for module, weight in models["xl"].weights.items():
        original = to_original(module)
        stem = f"lora_unet_{flat(original)}" if style == "kohya" else f"diffusion_model.{original}"
        factors, truth[f"unet.{module}"] = lora(weight)
        tensors |= {f"{stem}.{end}": value for end, value in factors.items()}
    text = "text_model.encoder.layers.1.self_attn.q_proj"
    prefixes = {
        "kohya": ("lora_te1_", "lora_te2_"),
        "dotted": ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
    }[style]
    for prefix, component in zip(prefixes, ("text_encoder", "text_encoder_2"), strict=True):
        stem = prefix + (flat(text) if style == "kohya" else text)
        factors, truth[f"{component}.encoder.layers.1.self_attn.q_proj"] = lora(torch.empty(16, 16))
        tensors |= {f"{stem}.{end}": value for end, value in factors.items()}
    assert_read(tensors, truth, tmp_path)


def test_xlabs_processors_and_onetrainer_s_separate_parts_are_flux_s_layers(tmp_path: Path) -> None:
    tensors: Tensors = {}
    truth: Tensors = {}
    block = "transformer.transformer_blocks.0.attn"
    for stem, names in {
        "double_blocks.0.processor.qkv_lora1": [f"{block}.to_q", f"{block}.to_k", f"{block}.to_v"],
        "double_blocks.0.processor.proj_lora2": [f"{block}.to_add_out"],
        "single_blocks.3.processor.qkv_lora": [
            f"transformer.single_transformer_blocks.3.attn.to_{letter}" for letter in "qkv"
        ],
    }.items():
        factors, change = lora(torch.empty(8 * len(names), 8), alpha=False)
        tensors[f"{stem}.down.weight"] = factors["lora_down.weight"]
        tensors[f"{stem}.up.weight"] = factors["lora_up.weight"]
        truth |= dict(zip(names, change.chunk(len(names)), strict=True))
    factors, truth[f"{block}.add_k_proj"] = lora(torch.empty(8, 8))
    tensors |= {f"transformer.double_blocks.0.txt_attn.qkv.1.{end}": value for end, value in factors.items()}
    assert_read(tensors, truth, tmp_path)


def test_names_of_diffsynth_and_of_some_exports_of_flux2_are_read(tmp_path: Path) -> None:
    for start, layer in (
        ("pipe.dit.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
        ("dit.layers.0.attention.to_q", "transformer.layers.0.attention.to_q"),
        ("pipe.unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("diffusion_model.sformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
    ):
        factors = {"lora_A.default.weight": torch.ones(2, 8), "lora_B.default.weight": torch.ones(8, 2)}
        write_tensors(tmp_path / "a.safetensors", {f"{start}.{end}": value for end, value in factors.items()})
        assert set(read_adapter(tmp_path / "a.safetensors").layers) == {layer}


@pytest.mark.parametrize(
    ("stems", "said"),
    [
        (["lora_unet_blocks_0_new_kind_q", "lora_unet_blocks_0_new_kind_k"], "lora_unet_blocks_0_new_kind_k"),
        (["transformer.layers.0.attention.to_p"], "transformer.layers.0.attention.to_p"),
        (["lora_unet_conv_in", "lora_unet_conv_inn"], "1 layer that no supported model has"),
        (
            ["unet.input_blocks.1.1.time_stack.0.attn1.to_q"],
            "adapts Stable Video Diffusion in 1 layer not read here",
        ),
        (
            ["down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"],
            "is a motion LoRA, of an AnimateDiff adapter",
        ),
        (["lora_te3_encoder_block_0_layer_0_SelfAttention_q"], "T5"),
        (["diffusion_model.double_blocks.0.img_attn_qkv"], "adapts HunyuanVideo"),
        (
            ["lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_19_img_attn_qkv"],
            "HunyuanVideo",
        ),
        (["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"], "T5 in 1 layer ("),
        (["lora_te_model_layers_0_self_attn_q_proj"], "the language model that reads prompts in 1 layer ("),
        (
            ["transformer.layers.0.attention.to_q", "text_encoder.model.layers.0.self_attn.q_proj"],
            "Export it again without the language model",
        ),
        (["vae.encoder.mid_block.attentions.0.to_q", "unet.conv_in"], "adapts the autoencoder (VAE)"),
    ],
)
def test_names_that_no_model_has_are_refused_by_name(stems: list[str], said: str, tmp_path: Path) -> None:
    tensors = {f"{stem}.{end}": v for stem in stems for end, v in lora(torch.empty(4, 4))[0].items()}
    write_tensors(tmp_path / "new.safetensors", tensors)
    doors: tuple[Callable[[], object], ...] = (
        lambda: export_adapter(tmp_path / "new.safetensors", tmp_path / "out.safetensors", "diffusers"),
        lambda: import_adapter(tmp_path / "new.safetensors", tmp_path / "out.safetensors", model=None),
    )
    for door in doors:
        with pytest.raises(UserError, match=re.escape(said)):
            door()
    assert not (tmp_path / "out.safetensors").exists()


ATTENTION = tuple(f"attn{n}.to_{part}" for n in (1, 2) for part in ("q", "k", "v"))
PIXART_S = "transformer.transformer_blocks.{}."


def lora_of(stems: Iterable[str], width: int, *, text: int | None = None) -> Tensors:
    """A LoRA of rank 1 on layers [width, width], on those that read words [width, text]."""
    columns = {stem: text or width if re.search(r"attn2\.to_[kv]$", stem) else width for stem in stems}
    return {
        f"{stem}.{end}": value
        for stem, count in columns.items()
        for end, value in {
            "lora_A.weight": torch.ones(1, count),
            "lora_B.weight": torch.ones(width, 1),
        }.items()
    }


@pytest.mark.parametrize(
    ("blocks", "layers", "width", "text", "said"),
    [
        (20, ATTENTION, 2240, 2240, "Sana"),
        (28, ATTENTION, 1152, 1152, "PixArt or Sana 0.6B"),
        (28, (*ATTENTION, "ff.net.2"), 1152, 1152, "PixArt"),
        (28, ATTENTION, 2048, 2048, "LTX-Video"),
        (48, ATTENTION, 4096, 4096, "LTX-Video"),
        (28, ATTENTION, 2048, 1024, "Cosmos"),
        (30, ATTENTION[:3], 1920, None, "CogVideoX 2B"),
        (42, ATTENTION[:3], 3072, None, "CogVideoX 5B or Mochi 1"),
        (48, ATTENTION[:3], 3072, None, "Mochi 1"),
        (28, ATTENTION[:3], 4096, None, "LTX-Video or CogView 4 or Cosmos"),
        (32, ATTENTION, 2304, 2304, "Allegro"),
        (20, ("attn.to_q", "attn.add_q_proj"), 3072, None, "Qwen-Image"),
        (28, ATTENTION, 24, 24, "unknown (its layers are called as PixArt's, but have another size)"),
    ],
)
def test_models_whose_layers_are_called_alike_are_told_apart_by_their_sizes(
    blocks: int, layers: Sequence[str], width: int, text: int | None, said: str, tmp_path: Path
) -> None:
    stems = [PIXART_S.format(block) + layer for block in (0, blocks - 1) for layer in layers]
    write_tensors(tmp_path / "a.safetensors", lora_of(stems, width, text=text))
    assert inspect_adapter(tmp_path / "a.safetensors")["base"] == said


@pytest.mark.parametrize(
    ("stems", "width", "said"),
    [
        (["transformer.single_transformer_blocks.39.attn.to_q"], 3072, "HunyuanVideo"),
        (["transformer.single_transformer_blocks.37.attn.to_q"], 3072, "FLUX or Chroma"),
        (["transformer.single_transformer_blocks.37.norm.linear"], 3072, "FLUX"),
        (
            [
                *(f"transformer.transformer_blocks.{block}.attn.to_q" for block in range(10)),
                *(f"transformer.single_transformer_blocks.{block}.attn.to_q" for block in range(20)),
            ],
            3072,
            "LongCat-Image",
        ),
        (
            [
                *(f"transformer.transformer_blocks.{block}.attn.to_q" for block in range(6)),
                *(f"transformer.single_transformer_blocks.{block}.attn.to_q" for block in range(27)),
            ],
            3072,
            "Ovis-Image",
        ),
        # Parts of them: the last of both kinds, or all of one
        (
            [f"transformer.{kind}transformer_blocks.{n}.attn.to_q" for kind, n in (("", 9), ("single_", 19))],
            3072,
            "LongCat-Image",
        ),
        (
            [f"transformer.{kind}transformer_blocks.{n}.attn.to_q" for kind, n in (("", 5), ("single_", 26))],
            3072,
            "Ovis-Image",
        ),
        (
            [f"transformer.single_transformer_blocks.{n}.attn.to_q" for n in range(27)],
            3072,
            "FLUX or Ovis-Image",
        ),
        (
            [f"transformer.transformer_blocks.{n}.attn.to_q" for n in range(10)],
            3072,
            "FLUX or LongCat-Image",
        ),
        (
            [f"transformer.single_transformer_blocks.{n}.attn.to_q" for n in (7, 12, 16, 20)],
            3072,
            "FLUX or Chroma",
        ),
        (["diffusion_model.layers.0.attention.out"], 2304, "Lumina 2"),
        (["transformer.layers.33.attention.to_q"], 4608, "Ideogram 4"),
        (["transformer.layers.29.attention.to_q"], 3840, "Z-Image"),
    ],
)
def test_relatives_of_flux_and_z_image_are_not_called_so(
    stems: list[str], width: int, said: str, tmp_path: Path
) -> None:
    write_tensors(tmp_path / "a.safetensors", lora_of(stems, width))
    assert inspect_adapter(tmp_path / "a.safetensors")["base"] == said


@pytest.mark.parametrize(
    ("blocks", "stem", "width", "base", "said"),
    [
        # klein 4B, klein 9B and dev, of their blocks of text and image alone
        (5, "transformer.transformer_blocks.{}.attn.to_q", 3072, "flux2", "FLUX.2"),
        (8, "transformer.transformer_blocks.{}.attn.to_q", 4096, "flux2", "FLUX.2"),
        (8, "transformer.transformer_blocks.{}.attn.to_q", 6144, "flux2", "FLUX.2"),
        (8, "diffusion_model.double_blocks.{}.img_attn.proj", 4096, "flux2", "FLUX.2"),
        (3, "lora_unet_double_blocks_{}_img_attn_qkv", 4096, "flux2", "FLUX.2"),
        (3, "lora_unet_double_blocks_{}_img_attn_qkv", 6144, "flux2", "FLUX.2"),
        (19, "transformer.transformer_blocks.{}.attn.to_q", 3072, "flux", "FLUX or Chroma"),
        (60, "transformer.transformer_blocks.{}.attn.to_q", 3072, "qwen", "Qwen-Image"),
        (32, "transformer.transformer_blocks.{}.attn.to_q", 4096, "qwen21", "Qwen-Image 2.1"),
        (28, "transformer.transformer_blocks.{}.attn.to_q", 6144, "krea2", "Krea 2"),
    ],
)
def test_blocks_that_several_models_have_are_told_by_their_width_and_number(
    blocks: int, stem: str, width: int, base: str, said: str, tmp_path: Path
) -> None:
    tensors = lora_of([stem.format(block) for block in range(blocks)], width)
    if "qkv" in stem:
        tensors = {name: value.repeat(3, 1) if "lora_B" in name else value for name, value in tensors.items()}
    write_tensors(tmp_path / "a.safetensors", tensors)
    assert read_adapter(tmp_path / "a.safetensors").base == base
    assert inspect_adapter(tmp_path / "a.safetensors")["base"] == said


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("qwen-image-2512", "qwen"),
        ("qwen_image_edit_2511", "qwen"),
        ("qwen-image-2.1", "qwen21"),
        ("qwen_image_2", "qwen21"),
        ("flux.1-krea-dev", "flux"),
        ("krea-2", "krea2"),
        ("flux-2-klein", "flux2"),
        ("flux1-kontext", "flux"),
        ("stable-diffusion-xl-v1-base", "sdxl"),
        ("sana", None),
    ],
)
def test_a_version_in_a_header_is_that_of_its_model_and_of_no_namesake(
    architecture: str, family: str | None
) -> None:
    assert family_from_metadata({"modelspec.architecture": f"{architecture}/lora"}) == family
    assert family_from_metadata({"ss_base_model_version": architecture}) == family


def test_a_header_that_names_the_model_decides_whatever_its_size(tmp_path: Path) -> None:
    tensors = lora_of([PIXART_S.format(0) + layer for layer in ATTENTION], 24)
    write_tensors(tmp_path / "a.safetensors", tensors, {"modelspec.architecture": "pixart-sigma/lora"})
    assert inspect_adapter(tmp_path / "a.safetensors")["base"] == "PixArt"


@pytest.mark.parametrize(
    ("stem", "said"),
    [
        ("transformer.transformer_blocks.0.ff.conv_inverted", "Sana"),
        ("transformer.joint_transformer_blocks.0.attn.to_q", "AuraFlow"),
        ("transformer.layers.0.attn.to_q", "Lumina 2 or OmniGen2"),
        ("transformer.ref_image_refiner.0.attn.to_q", "OmniGen2"),
        ("transformer.double_stream_blocks.0.block.attn1.to_q", "HiDream"),
        ("transformer.transformer_blocks.0.attn1.add_q_proj", "Mochi 1"),
        ("transformer.transformer_blocks.0.audio_attn1.to_q", "LTX-2"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan, or a model made of it"),
        ("transformer.blocks.0.ffn.net.2", "Wan, or a model made of it"),
        ("lora_unet_blocks_0_cross_attn_q_proj", "Cosmos, or Anima"),
    ],
)
def test_models_that_are_not_supported_are_refused_by_their_names(
    stem: str, said: str, tmp_path: Path
) -> None:
    beside = [PIXART_S.format(0) + "attn1.to_q"] * stem.startswith("transformer.transformer_blocks")
    write_tensors(tmp_path / "a.safetensors", lora_of([stem, *beside], 2240))
    with pytest.raises(UserError, match=re.escape(f"adapts {said}")):
        inspect_adapter(tmp_path / "a.safetensors")


def test_a_layer_of_ltx_that_has_no_counterpart_is_refused_as_ltx_s(tmp_path: Path) -> None:
    stems = ["transformer.proj_in", *(PIXART_S.format(0) + layer for layer in ATTENTION)]
    write_tensors(tmp_path / "a.safetensors", lora_of(stems, 2048))
    with pytest.raises(UserError, match=r"adapts LTX-Video \(transformer\.proj_in\), which is not supported"):
        inspect_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("layer", "shape", "said"),
    [
        ("context_embedder", (3072, 3584), "LongCat-Image"),
        ("context_embedder", (3072, 2048), "Ovis-Image"),
        ("transformer_blocks.0.ff.net.0.proj", (24576, 3072), "Ovis-Image"),
        ("transformer_blocks.0.ff.net.0.proj", (12288, 3072), "FLUX"),
    ],
)
def test_shorter_models_of_flux_s_blocks_are_told_by_their_sizes(
    layer: str, shape: tuple[int, int], said: str, tmp_path: Path
) -> None:
    tensors = lora_of(["transformer.single_transformer_blocks.3.attn.to_q"], 3072)
    tensors[f"transformer.{layer}.lora_A.weight"] = torch.ones(1, shape[1])
    tensors[f"transformer.{layer}.lora_B.weight"] = torch.ones(shape[0], 1)
    write_tensors(tmp_path / "a.safetensors", tensors)
    assert str(inspect_adapter(tmp_path / "a.safetensors")["base"]).startswith(said)


def test_whole_differences_beside_factors_are_read_exactly_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ComfyUI's trainer writes them: factors of matrices, differences of norms, of biases and of small layers."""
    stem = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn{}.to_q"
    factors = {f"{stem.format(1)}.lora_up.weight": torch.ones(320, 2)}
    factors |= {f"{stem.format(1)}.lora_down.weight": torch.ones(2, 320)}
    changes = {
        "attn2.to_k": torch.randn(320, 768),
        "attn2.to_out.0": torch.randn(320, 320),
        "ff.net.0.proj": torch.randn(2560, 320),
    }
    block = "diffusion_model.input_blocks.1.1.transformer_blocks.0"
    whole = {f"{block}.{name}.diff": value for name, value in changes.items()}
    whole["diffusion_model.input_blocks.0.0.diff"] = torch.randn(320, 4, 3, 3)
    zero = {f"{block}.norm1.diff": torch.zeros(320), f"{block}.attn2.to_out.0.diff_b": torch.zeros(320)}
    write_tensors(tmp_path / "a.safetensors", factors | whole | zero)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert "2 differences of weights that are zero" in capsys.readouterr().err
    ours = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    for name, value in changes.items():
        assert torch.equal(adapter.layers[f"{ours}.{name}"].delta_weight(), value)
    stored = whole["diffusion_model.input_blocks.0.0.diff"]
    assert torch.equal(adapter.layers["unet.conv_in"].delta_weight(), stored.flatten(1))
    write_tensors(tmp_path / "b.safetensors", factors | {f"{block}.norm1.diff": torch.ones(320)})
    with pytest.raises(
        UserError, match=r"1 tensor not read here: .*norm1\.diff.*No LoRA has them\. Bake the file"
    ):
        read_adapter(tmp_path / "b.safetensors")


def test_whole_differences_alone_are_read_exactly(tmp_path: Path) -> None:
    """As LyCORIS' full writes them where it trains no norms and no biases."""
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{}_to_q"
    changes = {stem.format(n): torch.randn(32, 32) for n in (1, 2)} | {
        "lora_unet_conv_in": torch.randn(32, 4, 3, 3)
    }
    write_tensors(tmp_path / "a.safetensors", {f"{name}.diff": value for name, value in changes.items()})
    found = read_adapter(tmp_path / "a.safetensors").layers
    ours = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn{}.to_q"
    assert set(found) == {ours.format(1), ours.format(2), "unet.conv_in"}
    for n in (1, 2):
        assert torch.equal(found[ours.format(n)].delta_weight(), changes[stem.format(n)])
    write_tensors(tmp_path / "b.safetensors", {"lora_unet_conv_in.diff": torch.zeros(32, 4, 3, 3)})
    with pytest.raises(UserError, match="holds no LoRA, LoHa or LoKr, but whole differences"):
        read_adapter(tmp_path / "b.safetensors")


def test_a_fused_layer_of_lumina_is_refused_as_lumina_s(tmp_path: Path) -> None:
    # Queries, and keys and values of a third as many heads
    stem, factors = "lora_unet_layers_0_attention_qkv", lora(torch.empty(3840, 2304))[0]
    write_tensors(tmp_path / "a.safetensors", {f"{stem}.{end}": value for end, value in factors.items()})
    with pytest.raises(
        UserError, match=r"adapts Lumina 2 \(.*3840 × 2304 together\), which is not supported"
    ):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lycoris_conv_in.lambda_layer", "factors of T-LoRA"),
        ("lora_unet_conv_in.diff", "whole differences of weights"),
        ("lora_unet_conv_in.w_norm", "differences of norms"),
        ("lora_unet_conv_in.oft_blocks", "rotations"),
        ("bundle_emb.cat.string_to_param.*", "learned words"),
        ("bundle_emb.cat.t5_out", "learned words"),
        ("lora_unet_conv_in.scalar", "a scale of each layer"),
        ("text_encoder.embeddings.token_embedding.lora_embedding_A", "a LoRA of a table of words"),
        ("lora_unet_conv_in.a1.weight", "GLoRA"),
        ("lora_unet_conv_in.on_input", "IA³"),
        ("oft_unet_conv_in.oft_blocks", "rotations"),
        ("lora_controlnet", "a network that reads maps .* --controlnet FILE"),
        ("lllite_unet_conv_in.down.0.weight", "ControlNet-LLLite"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("<cat>", "learned words"),
        ("base_model.model.conv_in.vera_lambda_b", r"another method of peft \(vera\).*merge_and_unload"),
        ("base_model.model.conv_in.lora_E", r"another method of peft \(adalora\).*merge_and_unload"),
        ("something.else", "something.else"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_tensors_of_other_methods_are_refused_with_what_they_are(
    key: str, said: str, beside: bool, tmp_path: Path
) -> None:
    factors = lora(torch.empty(4, 4))[0] if beside else {}
    tensors = {f"lora_unet_conv_in.{end}": value for end, value in factors.items()}
    write_tensors(tmp_path / "a.safetensors", {**tensors, key: torch.ones(4)})
    with pytest.raises(UserError, match=said):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("end", ["lora_down.weight", "lora_up.weight", "lokr_w1", "hada_w2_b"])
def test_a_factor_that_is_no_matrix_is_refused_by_name(
    end: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {f"lora_unet_conv_in.{one}": value for one, value in lora(torch.empty(4, 4))[0].items()}
    write_tensors(tmp_path / "a.safetensors", tensors | {f"lora_unet_conv_in.{end}": torch.ones(shape)})
    with pytest.raises(UserError, match=rf"lora_unet_conv_in\.{end} in .* and a factor is a matrix"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x.bias"), "a whole model"),
        (("conditioner.embedders.0.transformer.x.weight",), "a whole model"),
        (("conv_in.weight", "down_blocks.0.resnets.0.conv1.bias"), "a model's network"),
        (("double_blocks.0.img_attn.qkv.weight",), "a model's network"),
        (("down_blocks.0.x.lora_B.bias", "down_blocks.0.x.lora_A.weight"), "beside its factors"),
    ],
)
def test_weights_that_are_taken_for_a_lora_are_said_to_be_some(
    names: Sequence[str], said: str, tmp_path: Path
) -> None:
    write_tensors(tmp_path / "a.safetensors", dict.fromkeys(names, torch.ones(4, 4)))
    with pytest.raises(UserError, match=said):
        inspect_adapter(tmp_path / "a.safetensors")


def test_an_adapter_that_changes_nothing_is_said_once_and_by_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = {end: 0 * value for end, value in lora(torch.empty(4, 4))[0].items() if end != "alpha"}
    file = tmp_path / "a.safetensors"
    write_tensors(file, {f"lora_unet_conv_in.{end}": value for end, value in zero.items()})
    export_adapter(file, tmp_path / "b.safetensors", "diffusers")
    said = [line for line in capsys.readouterr().err.splitlines() if "changes nothing" in line]
    assert said == [f"{file} changes nothing: the factors of all its layers give zero. Was it trained?"]


def test_layers_of_other_parts_that_change_nothing_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A LoRA of FLUX.1 whose trainer listed T5 and taught it nothing: its second factors are zero
    own, other = (lora(torch.empty(6, 4))[0] for _ in range(2))
    file = tmp_path / "a.safetensors"
    for stem in (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo",
    ):
        named = {f"lora_unet_img_in.{end}": value for end, value in own.items()}
        others = {f"{stem}.{end}": value * (end != "lora_up.weight") for end, value in other.items()}
        write_tensors(file, named | others)
        assert set(read_adapter(file).layers) == {"transformer.x_embedder"}
        assert f"holds 1 layer of other parts than are read here, as {stem}" in capsys.readouterr().err
        write_tensors(file, named | {f"{stem}.{end}": value for end, value in other.items()})
        with pytest.raises(UserError, match="adapts T5 in 1 layer"):
            read_adapter(file)


def test_a_layer_under_the_names_of_two_tools_counts_once_where_both_say_the_same(tmp_path: Path) -> None:
    (factors, change), file = lora(torch.empty(6, 4)), tmp_path / "a.safetensors"
    kohya = {f"lora_unet_conv_out.{end}": value for end, value in factors.items()}
    scaled = factors["lora_up.weight"] * (factors["alpha"] / len(factors["lora_down.weight"]))
    peft = {"lora_A.weight": factors["lora_down.weight"], "lora_B.weight": scaled}
    write_tensors(file, kohya | {f"unet.conv_out.{end}": value for end, value in peft.items()})
    (layer,) = read_adapter(file).layers.values()
    torch.testing.assert_close(layer.delta_weight(), change)
    write_tensors(file, kohya | {f"unet.conv_out.{end}": 2 * value for end, value in peft.items()})
    with pytest.raises(UserError, match=r"changes unet\.conv_out twice, under two names"):
        read_adapter(file)


def test_dora_scales_of_some_layers_alone_are_kept_or_refused_before_anything_is_written(
    models: dict[str, Tiny], tmp_path: Path
) -> None:
    model, tensors = models["sd"], dict[str, Tensor]()
    for make, module in zip((lora, with_scale(lora, "out")), list(model.weights)[:2], strict=True):
        factors, _ = make(model.weights[module])
        tensors |= {f"lora_unet_{flat(module)}.{end}": value for end, value in factors.items()}
    write_tensors(file := tmp_path / "a.safetensors", tensors)
    said = r"no format for DoRA scales of some layers alone \(1 of 2 have none.* --to kohya"
    with pytest.raises(UserError, match=said):
        export_adapter(file, tmp_path / "d.safetensors", "diffusers")
    with pytest.raises(UserError, match=said):
        import_adapter(file, tmp_path / "run", model=str(model.folder), token_words="bcd")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    export_adapter(file, tmp_path / "k.safetensors", "kohya")
    assert compare_updates(read_adapter(file), read_adapter(tmp_path / "k.safetensors"))[0] == 0


def test_what_wrappers_and_peft_put_into_names_is_no_part_of_them(tmp_path: Path) -> None:
    def write(*names: str) -> Path:
        factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
        tensors = {name.format(end): value for name in names for end, value in factors.items()}
        write_tensors(tmp_path / "a.safetensors", tensors)
        return tmp_path / "a.safetensors"

    for name in (
        "unet.conv_in.lora_{}.my_style.weight",
        "unet._orig_mod.conv_in.lora_{}.weight",
        "module._orig_mod.unet.conv_in.lora_{}.default_0.weight",
    ):
        (layer,) = read_adapter(write(name)).layers.items()
        assert layer[0] == "unet.conv_in" and bool((layer[1].delta_weight() == 2).all())
    factors = {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(2, 1), "lokr_w2_b": torch.ones(1, 2)}
    file = tmp_path / "lokr.safetensors"  # as peft's LoKr and LoHa are called in a model's own state dict
    write_tensors(
        file,
        {
            f"base_model.model.mid_block.attentions.0.proj_in.{name}.default": value
            for name, value in factors.items()
        },
    )
    assert set(read_adapter(file).layers) == {"unet.mid_block.attentions.0.proj_in"}
    with pytest.raises(UserError, match=r"holds 2 adapters \(dog, style\)"):
        read_adapter(write("unet.conv_in.lora_{}.dog.weight", "unet.conv_in.lora_{}.style.weight"))
    with pytest.raises(UserError, match=r"holds unet\.conv_in twice"):
        read_adapter(write("unet.conv_in.lora_{}.dog.weight", "module.unet.conv_in.lora_{}.dog.weight"))
    with pytest.raises(UserError, match=r"holds unet\.conv_in twice"):
        read_adapter(write("unet.conv_in.lora_{}.weight", "unet.conv_in.lora_{}"))


def test_a_file_of_a_compiled_network_is_read_like_the_same_one_of_a_plain_network(tmp_path: Path) -> None:
    layers = ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1")
    shapes = {"A": ((2, 4), (2, 4, 3, 3)), "B": ((4, 2), (4, 2, 1, 1))}
    values = {(n, end): drawn(*shapes[end][n]) for n in range(2) for end in "AB"}

    def updates(prefix: str, sep: str, ends: dict[str, str], settings: dict[str, Any]) -> dict[str, Tensor]:
        tensors = {
            f"{prefix}{layers[n].replace('.', sep)}.{ends[end]}.weight": value
            for (n, end), value in values.items()
        }
        header = {CONFIG_KEY: json.dumps(settings)} if settings else {}
        write_tensors(tmp_path / "a.safetensors", tensors, header)
        found = read_adapter(tmp_path / "a.safetensors").layers
        return {name: layer.delta_weight() for name, layer in found.items()}

    def peft(prefix: str) -> dict[str, Any]:
        targets = [prefix + layer for layer in layers]
        return {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": targets} | {
            "unet.alpha_pattern": {f"{prefix}{layers[1]}": 6}
        }

    kohya, own = {"A": "lora_down", "B": "lora_up"}, {"A": "lora_A", "B": "lora_B"}
    for plain, compiled in (
        (("lora_unet_", "_", kohya, {}), ("lora_unet__orig_mod_", "_", kohya, {})),
        (("unet.", ".", own, peft("")), ("unet._orig_mod.", ".", own, peft("_orig_mod."))),
        (("unet.", ".", own, peft("")), ("_orig_mod.unet.", ".", own, peft(""))),
        (("diffusion_model.", ".", kohya, {}), ("diffusion_model._orig_mod.", ".", kohya, {})),
    ):
        one, other = updates(*plain), updates(*compiled)
        assert one.keys() == other.keys() == {f"unet.{layer}" for layer in layers}
        assert all(torch.equal(value, other[name]) for name, value in one.items())


# Kinds ------------------------------------------------------------------------------------------------------


def kron_case(left: bool, right: bool, factor: int) -> Callable[[Tensor], tuple[Tensors, Tensor]]:
    """A LoKr whose W₁ and W₂ are whole or not, of blocks of `factor`; α 3 counts where a factor is low-rank."""

    def make(weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = len(weight), weight[0].numel()
        up, across = (
            next(n for n in (factor, 1) if rows % n == 0),
            next(n for n in (factor, 1) if columns % n == 0),
        )
        shapes = {"lokr_w1": (up, across), "lokr_w2": (rows // up, columns // across)}
        tensors, whole = {}, []
        for (name, (height, width)), is_whole in zip(shapes.items(), (left, right), strict=True):
            if is_whole:
                tensors[name] = drawn(height, width)
                whole.append(tensors[name])
            else:
                tensors |= {f"{name}_a": drawn(height, 2), f"{name}_b": drawn(2, width)}
                whole.append(tensors[f"{name}_a"] @ tensors[f"{name}_b"])
        scale = 1.0 if left and right else 3 / 2
        return tensors | {"alpha": torch.tensor(3.0)}, scale * torch.kron(*whole)

    return make


def loha(weight: Tensor) -> tuple[Tensors, Tensor]:
    rows, columns = len(weight), weight[0].numel()
    t = {f"hada_w{n}_{s}": drawn(*((rows, 2) if s == "a" else (2, columns))) for n in (1, 2) for s in "ab"}
    change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    return t | {"alpha": torch.tensor(3.0)}, 1.5 * change


def matrix_for_all(weight: Tensor) -> tuple[Tensors, Tensor]:
    """A LoRA as matrices, for convolutions too."""
    return lora(weight.flatten(1))


def kernel_for_all(weight: Tensor) -> tuple[Tensors, Tensor]:
    """A LoRA as 1 × 1 kernels, for linear layers too."""
    return lora(weight if weight.ndim == 4 else weight[:, :, None, None])


def with_scale(
    make: Callable[[Tensor], tuple[Tensors, Tensor]], over: str
) -> Callable[[Tensor], tuple[Tensors, Tensor]]:
    """DoRA over a layer's outputs [out, 1] or inputs [1, in]: gives W' − W."""

    def made(weight: Tensor) -> tuple[Tensors, Tensor]:
        tensors, change = make(weight)
        moved = weight.detach() + change.reshape(weight.shape)
        dims = [d for d in range(weight.ndim) if d != (0 if over == "out" else 1)]
        scale = 0.5 + torch.rand(weight.shape[0 if over == "out" else 1])
        scale = scale.reshape([-1 if d not in dims else 1 for d in range(weight.ndim)])
        after = scale * moved / moved.square().sum(dim=dims, keepdim=True).sqrt()
        return tensors | {"dora_scale": scale}, (after - weight.detach()).flatten(1)

    return made


def lora(weight: Tensor, *, alpha: bool = True) -> tuple[Tensors, Tensor]:
    """kohya's factors of rank 2 for a weight, α 3 or none, and ΔW [out, in·k·k]."""
    spatial = (1, 1) if weight.ndim == 4 else ()
    down, up = drawn(2, *weight.shape[1:]), drawn(len(weight), 2, *spatial)
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    change = up.flatten(1) @ down.flatten(1)
    return (tensors | {"alpha": torch.tensor(3.0)}, 1.5 * change) if alpha else (tensors, change)


def locon(weight: Tensor) -> tuple[Tensors, Tensor]:
    if weight.ndim == 2:
        return lora(weight)
    down, mid, up = drawn(2, weight.shape[1]), drawn(2, 2, *weight.shape[2:]), drawn(len(weight), 2)
    tensors = {"lora_down.weight": down[:, :, None, None], "lora_mid.weight": mid}
    tensors |= {"lora_up.weight": up[:, :, None, None], "alpha": torch.tensor(3.0)}
    return tensors, 1.5 * torch.einsum("or,rskl,si->oikl", up, mid, down).flatten(1)


LOKR = {
    f"lokr {factor} {'w1' if left else 'w1_a w1_b'} {'w2' if right else 'w2_a w2_b'}": kron_case(
        left, right, factor
    )
    for factor, left, right in ((4, True, True), (8, False, True), (4, True, False), (2, False, False))
}
KINDS: dict[str, Callable[[Tensor], tuple[Tensors, Tensor]]] = {
    "lora": lora,
    "lora as matrices": matrix_for_all,
    "lora as kernels": kernel_for_all,
    "locon": locon,
    "dora over outputs": with_scale(lora, "out"),
    "loha": loha,
    "dora of a loha": with_scale(loha, "out"),
    **LOKR,
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("sd", kind) for kind in KINDS), *(("flux", kind) for kind in ("lora", "dora over outputs", *LOKR))],
)
def test_every_kind_changes_the_model_exactly_as_its_format_says(
    family: str, kind: str, models: dict[str, Tiny], tmp_path: Path
) -> None:
    model = models[family]
    tensors: Tensors = {}
    truth: Tensors = {}
    for module, weight in one_of_each_shape(model.weights).items():
        factors, truth[module] = KINDS[kind](weight)
        tensors |= {f"lora_unet_{flat(module)}.{end}": value for end, value in factors.items()}
    file = tmp_path / "a.safetensors"
    write_tensors(file, tensors)
    write_adapter(
        tmp_path / "b.safetensors", fit_to_model(read_adapter(file), model.stored.shapes, file), "peft"
    )
    assert_effective(tmp_path / "b.safetensors", model, truth)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("sd", "lora"), ("sd3", "lora"), ("flux", "lora"), ("pixart", "lora"), ("sd", "lokr 4 w1 w2")],
)
def test_an_import_into_a_run_changes_every_layer_exactly(
    family: str, kind: str, models: dict[str, Tiny], tmp_path: Path
) -> None:
    model = models[family]
    tensors: Tensors = {}
    truth: Tensors = {}
    for module, weight in model.weights.items():
        factors, truth[module] = KINDS[kind](weight)
        tensors |= {f"lora_{model.component}_{flat(module)}.{end}": value for end, value in factors.items()}
    write_tensors(tmp_path / "a.safetensors", tensors)
    import_adapter(tmp_path / "a.safetensors", tmp_path / "run", model=str(model.folder), token_words="bcd")
    assert_effective(read_concept(tmp_path / "run").weights_path, model, truth)


def test_a_whole_lokr_s_alpha_says_nothing_even_where_fp16_had_no_room_for_it(
    models: dict[str, Tiny], tmp_path: Path
) -> None:
    module, weight = next(iter(models["sd"].weights.items()))
    factors, truth = KINDS["lokr 4 w1 w2"](weight)
    tensors = {f"lycoris_{flat(module)}.{end}": value for end, value in factors.items()}
    endless = torch.tensor(1e5).half()  # of the dimension 100,000, by which LyCORIS keeps both factors whole
    write_tensors(tmp_path / "a.safetensors", tensors | {f"lycoris_{flat(module)}.alpha": endless})
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    assert relative(layer.delta_weight().flatten(1), truth) < 1e-5
    half = {name: value for name, value in tensors.items() if not name.endswith("lokr_w2")}
    parts = {"lokr_w2_a": drawn(2, 1), "lokr_w2_b": drawn(1, 2), "alpha": endless}
    half |= {f"lycoris_{flat(module)}.{end}": value for end, value in parts.items()}
    write_tensors(tmp_path / "a.safetensors", half)
    with pytest.raises(UserError, match=r"alpha holds values that are not finite"):
        read_adapter(tmp_path / "a.safetensors")


MISFITS: dict[str, tuple[Tensors, str]] = {
    "a LoHa's first product is a row": (
        {"hada_w1_a": torch.ones(1, 2), "hada_w1_b": torch.ones(2, 6)}
        | {"hada_w2_a": torch.ones(4, 2), "hada_w2_b": torch.ones(2, 6)},
        r"conv_in in .* do not fit one another \(hada_w1_a 1 × 2, ",
    ),
    "a LoHa's second product is a column": (
        {"hada_w1_a": torch.ones(4, 2), "hada_w1_b": torch.ones(2, 6)}
        | {"hada_w2_a": torch.ones(4, 2), "hada_w2_b": torch.ones(2, 1)},
        "do not fit one another",
    ),
    "a LoHa of one kernel": (
        {"hada_w1_a": torch.ones(2, 4), "hada_w1_b": torch.ones(2, 4)}
        | {"hada_w2_a": torch.ones(4, 2), "hada_w2_b": torch.ones(2, 4), "hada_t1": torch.ones(2, 2, 1, 1)},
        "is not whole",
    ),
    "a LoKr's matrix is a kernel": (
        {"lokr_w1": torch.ones(2, 2, 3, 3), "lokr_w2": torch.ones(2, 2)},
        r"conv_in\.lokr_w1 in .* is of the shape \[2, 2, 3, 3\], and this factor is a matrix",
    ),
    "a LoKr's kernel beside the whole": (
        {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2), "lokr_t2": torch.ones(2, 2, 3, 3)},
        "is not whole",
    ),
    "a LoCon's kernel of another rank": (
        {"lora_down.weight": torch.ones(2, 4, 1, 1), "lora_up.weight": torch.ones(4, 2, 1, 1)}
        | {"lora_mid.weight": torch.ones(5, 5, 3, 3)},
        "do not fit one another",
    ),
    "a LoCon's kernel beside a LoHa": (
        {f"hada_w{number}_{side}": torch.ones(2, 2) for number in (1, 2) for side in "ab"}
        | {"lora_mid.weight": torch.ones(2, 2, 3, 3)},
        "is not whole",
    ),
    "complex factors": (
        {"lora_down.weight": torch.ones(2, 4, dtype=torch.complex64), "lora_up.weight": torch.ones(4, 2)},
        "complex64, as no weight is",
    ),
    "a complex α": (
        {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
        | {"alpha": torch.tensor(1 + 1j)},
        "complex64, as no weight is",
    ),
    "one DoRA scale of no dimension": (
        {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(1, 2)}
        | {"dora_scale": torch.tensor(1.0)},
        r"The DoRA scales of lora_unet_conv_in .* are \[\] for a layer of 1 × 4",
    ),
}


@pytest.mark.parametrize(("factors", "said"), MISFITS.values(), ids=MISFITS)
def test_factors_that_are_no_layer_together_are_refused_by_layer_and_shapes(
    factors: Tensors, said: str, tmp_path: Path
) -> None:
    write_tensors(
        tmp_path / "a.safetensors", {f"lora_unet_conv_in.{end}": value for end, value in factors.items()}
    )
    with pytest.raises(UserError, match=said):
        read_adapter(tmp_path / "a.safetensors")


def test_matrices_that_are_stored_as_kernels_of_one_place_are_read_as_matrices(tmp_path: Path) -> None:
    tensors, change = kron_case(True, True, 2)(torch.empty(4, 6))
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    as_kernels = {f"{stem}.{end}": v[:, :, None, None] if v.ndim else v for end, v in tensors.items()}
    write_tensors(tmp_path / "a.safetensors", as_kernels)
    (layer,) = read_adapter(tmp_path / "a.safetensors").layers.values()
    torch.testing.assert_close(layer.delta_weight(), change)


def test_a_dora_in_comfyui_s_format_comes_back_as_it_was_with_its_base_alone(
    models: dict[str, Tiny], tmp_path: Path
) -> None:
    """ComfyUI divides by ‖W‖ where the definition divides by ‖W + ΔW‖, so its scales are of one base."""
    model, file = models["sd"], tmp_path / "dora.safetensors"
    names = [name for name in model.weights if name.endswith(("attn1.to_q", "conv1"))]
    random = torch.Generator().manual_seed(0)
    layers = {
        f"unet.{name}": random_layer(model.denoiser.get_submodule(name), 2, 1.0, random, dora=True)
        for name in names
    }
    weights = LayerWeights(model.stored)
    write_adapter(
        file, AdapterFile(layers, {"modelspec.trigger_phrase": "bcd"}), "comfyui", base="sd1", weights=weights,
        metadata={"modelspec.trigger_phrase": "bcd"},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"written for ComfyUI.*customize import .* --model MODEL --out RUN"):
        read_adapter(file)
    assert "dora" in inspect_adapter(file)["algorithms"]
    import_adapter(file, tmp_path / "run", model=str(model.folder))
    found = read_adapter(tmp_path / "run").layers
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        weight = weights[name]
        torch.testing.assert_close(found[name].merge_into(weight), layer.merge_into(weight))


@pytest.mark.parametrize("kind", ["dora over inputs", "dora of a loha over inputs"])
@pytest.mark.parametrize("square", [True, False])
def test_dora_over_inputs_is_exact_in_a_whole_model_and_refused_for_a_run(
    kind: str, square: bool, models: dict[str, Tiny], tmp_path: Path
) -> None:
    model = models["sd"]
    make = with_scale(lora if kind == "dora over inputs" else loha, "in")
    chosen = {name: w for name, w in model.weights.items() if square == (len(w) == w[0].numel())}
    tensors: Tensors = {}
    truth: Tensors = {}
    for module, weight in chosen.items():
        factors, truth[module] = make(weight)
        tensors |= {f"lora_unet_{flat(module)}.{end}": value for end, value in factors.items()}
    write_tensors(tmp_path / "a.safetensors", tensors)
    read = read_adapter(tmp_path / "a.safetensors")
    for module, weight in chosen.items():
        change = read.layers[f"unet.{module}"].merge_into(weight.detach()) - weight.detach()
        assert relative(change.flatten(1), truth[module]) < 1e-5
    with pytest.raises(UserError, match=r"run over the inputs .* merge .*--bake"):
        import_adapter(
            tmp_path / "a.safetensors", tmp_path / "run", model=str(model.folder), token_words="bcd"
        )
    assert not (tmp_path / "run").exists()
    export_adapter(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya")
    stored, _ = read_tensors(tmp_path / "k.safetensors")
    assert all(value.shape[0] == 1 for name, value in stored.items() if name.endswith("dora_scale"))
    with pytest.raises(UserError, match=r"no format|does not load a loha"):
        export_adapter(tmp_path / "a.safetensors", tmp_path / "d.safetensors", "diffusers")


def test_dora_scales_that_wipe_out_a_layer_or_turn_it_around_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for scale, said in ((0.0, "are zero"), (-1.0, "are below zero in part"), (1.0, "")):
        magnitudes = torch.full((6, 1), scale)
        tensors = lora(torch.empty(6, 6))[0] | {"dora_scale": magnitudes}
        file = tmp_path / f"{scale}.safetensors"
        write_tensors(file, {f"lora_unet_conv_in.{k}": v for k, v in tensors.items()})
        read_adapter(file)
        told = capsys.readouterr().err
        assert said in told and bool(said) == ("DoRA scales" in told)


def test_dora_scales_of_neither_axis_are_refused(tmp_path: Path) -> None:
    for scale in (torch.ones(6), torch.ones(1, 5), torch.ones(5, 1)):
        tensors = lora(torch.empty(6, 6))[0] | {"dora_scale": scale}
        write_tensors(tmp_path / "a.safetensors", {f"lora_unet_conv_in.{k}": v for k, v in tensors.items()})
        with pytest.raises(UserError, match="neither one for each output"):
            read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "types", [(torch.float8_e4m3fn,), (torch.float8_e5m2, torch.float16, torch.float32, torch.bfloat16)]
)
def test_factors_of_any_precision_and_of_several_are_fused_for_kohya(
    types: tuple[torch.dtype, ...], models: dict[str, Tiny], tmp_path: Path
) -> None:
    tensors: Tensors = {}
    for number, (module, weight) in enumerate(models["flux"].weights.items()):
        factors, _ = lora(weight)
        for end, value in factors.items() if ".attn.to_" in module else ():
            kept = value if end == "alpha" else (value / 10).to(types[number % len(types)])
            tensors[f"transformer.{module}.{end}"] = kept
    write_tensors(tmp_path / "a.safetensors", tensors)
    export_adapter(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya", base="flux")
    one, other = (read_adapter(tmp_path / f"{name}.safetensors") for name in "ak")
    assert compare_updates(one, other)[0] < 1e-6


@pytest.mark.parametrize("make", [loha, kron_case(True, True, 12), kron_case(True, False, 12)])
def test_loha_and_lokr_of_fused_layers_are_cut_where_their_blocks_end(
    make: Callable[[Tensor], tuple[Tensors, Tensor]], tmp_path: Path
) -> None:
    factors, change = make(torch.empty(24, 8))
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.{end}": value for end, value in factors.items()}
    names = [f"transformer.transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    assert_read(tensors, dict(zip(names, change.chunk(3), strict=True)), tmp_path)


def test_lokr_of_fused_layers_that_cannot_be_cut_is_refused_with_the_reason(tmp_path: Path) -> None:
    factors, _ = kron_case(True, True, 4)(torch.empty(24, 8))
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.{end}": value for end, value in factors.items()}
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match="blocks of 6 rows"):
        read_adapter(tmp_path / "a.safetensors")


# peft's own files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn2.to_k": 2}},
        {"use_dora": True},
        {"init_lora_weights": "orthogonal"},  # whose factors begin with a product of 0, as MiCA's do
        {"init_lora_weights": "mica"},
    ],
)
def test_peft_s_folder_is_read_with_its_strength(
    settings: dict[str, Any],
    models: dict[str, Tiny],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unet = copy.deepcopy(models["sd"].denoiser)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **settings)
    model: Any = get_peft_model(unet, config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = drawn(*parameter.shape)
    model.save_pretrained(tmp_path / "peft")
    layers = read_adapter(tmp_path / "peft").layers
    file = read_adapter(tmp_path / "peft" / "adapter_model.safetensors").layers
    assert {name: layer.scale for name, layer in file.items()} == {n: x.scale for n, x in layers.items()}
    changed = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
    }
    assert set(layers) == {f"unet.{name}" for name in changed}
    for name, module in changed.items():
        assert relative(layers[f"unet.{name}"].delta_weight(), module.get_delta_weight("default")) < 1e-6
        assert (layers[f"unet.{name}"].magnitude is not None) == bool(settings.get("use_dora"))
    assert not capsys.readouterr().err
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "dog.safetensors")
    renamed = read_adapter(tmp_path / "peft" / "dog.safetensors").layers
    assert {name: layer.scale for name, layer in renamed.items()} == {n: x.scale for n, x in layers.items()}
    (tmp_path / "peft" / "dog.safetensors").rename(tmp_path / "peft" / "adapter_model.safetensors")
    said = capsys.readouterr().err
    assert "assumed" not in said and "the settings beside it are taken for its own" in said
    assert "rank 4, α 32" in said
    (tmp_path / "peft" / "adapter_config.json").unlink()
    assert next(iter(read_adapter(tmp_path / "peft").layers.values())).scale == 1
    assert "α = rank is assumed" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["lora_{}", "lora_{}.default"])
def test_factors_of_bare_names_are_peft_s(end: str, models: dict[str, Tiny], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "to_v", "conv1"])
    model: Any = get_peft_model(copy.deepcopy(models["sd"].denoiser), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = drawn(*parameter.shape)
    model.save_pretrained(tmp_path / "peft")
    tensors, metadata = read_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    bare = {
        re.sub(r"lora_([AB])\.weight$", lambda match: end.format(match[1]), key): value
        for key, value in tensors.items()
    }
    assert not any(key.endswith(".weight") for key in bare)
    write_tensors(tmp_path / "peft" / "adapter_model.safetensors", bare, metadata)
    layers = read_adapter(tmp_path / "peft").layers
    truth = {
        f"unet.{name.removeprefix('base_model.model.')}": module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
    }
    assert set(layers) == set(truth)
    assert max(relative(layers[name].delta_weight(), truth[name]) for name in truth) < 1e-6


@pytest.mark.parametrize("letters", ["AB", "ab"])
def test_factors_that_lie_the_other_way_around_are_read_so_where_their_shapes_tell(
    letters: str, models: dict[str, Tiny], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = one_of_each_shape({n: w for n, w in models["sd"].weights.items() if w.ndim == 2})
    pairs = {f"unet.{name}": (drawn(len(w), 3), drawn(3, w.shape[1])) for name, w in chosen.items()}
    truth = {name: up @ down for name, (up, down) in pairs.items()}

    def write(names: Iterable[str], turned: bool = True) -> Tensors:
        return {
            f"{name}.lora_{letter}": (value.mT if turned else value).contiguous()
            for name in names
            for letter, value in zip(reversed(letters), pairs[name], strict=True)
        }

    assert_read(write(pairs), truth, tmp_path)
    assert "lie the other way around, as MLX has them" in capsys.readouterr().err
    square = {name: change for name, change in truth.items() if change.shape[0] == change.shape[1]}
    assert square
    for turned in (True, False):
        assert_read(write(square, turned), square, tmp_path)
    name = next(iter(square))
    pairs[name] = (torch.eye(len(truth[name])), torch.eye(len(truth[name])))
    write_tensors(tmp_path / "a.safetensors", write([name]))
    with pytest.raises(UserError, match=r"fit their layers either way around.*Save them under peft's names"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules_to_save": ["conv_out"]}, r"modules_to_save: conv_out\), which no adapter holds"),
        ({"modules_to_save": 7}, "modules_to_save is no list of layer names"),
        ({"bias": 3}, "bias is none of none, lora_only, all"),
        ({"peft_type": "OFT"}, "OFT"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 9}, "rank 9"),
        ({"lora_alpha": None}, "lora_alpha is no finite"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"kasa_config": {"beta": 0.1}}, "KaSA"),
    ],
)
def test_a_peft_folder_whose_settings_say_something_else_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    factors, _ = lora(torch.empty(4, 4), alpha=False)
    stem = "base_model.model.down_blocks.0.resnets.0.time_emb_proj"
    write_tensors(
        tmp_path / "adapter_model.safetensors",
        {
            f"{stem}.lora_A.weight": factors["lora_down.weight"],
            f"{stem}.lora_B.weight": factors["lora_up.weight"],
        },
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["time_emb_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert next(iter(read_adapter(tmp_path).layers.values())).scale == 2
    unsaid = {name: value for name, value in settings.items() if name != "lora_alpha"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(unsaid))
    assert next(iter(read_adapter(tmp_path).layers.values())).scale == 4  # peft's own default is 8
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=said):
        read_adapter(tmp_path)


@pytest.mark.parametrize(("bias", "told"), [("all", True), ("lora_only", False), ("none", False)])
def test_biases_that_were_trained_and_are_not_there_are_told(
    bias: str, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors, _ = lora(torch.empty(4, 4), alpha=False)
    stem = "base_model.model.down_blocks.0.resnets.0.time_emb_proj"
    ends = {"lora_A": factors["lora_down.weight"], "lora_B": factors["lora_up.weight"]}
    weights = {f"{stem}.{end}.weight": value for end, value in ends.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", weights)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["time_emb_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"bias": bias}))
    read_adapter(tmp_path)
    assert ("(bias: all)" in capsys.readouterr().err) == told


@pytest.mark.parametrize("whole", [{"modules_to_save": ["conv_out"]}, {"bias": "all"}])
def test_what_peft_trained_as_a_whole_beside_a_lora_is_named(
    whole: dict[str, Any], models: dict[str, Tiny], tmp_path: Path
) -> None:
    network = copy.deepcopy(models["sd"].denoiser)
    settings = LoraConfig(r=2, target_modules=["to_q"], **whole)
    get_peft_model(network, settings).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"trained as a whole .*merge_and_unload.*customize extract"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_what_a_network_of_diffusers_saved_by_itself_has_its_strength(
    family: str, models: dict[str, Tiny], tmp_path: Path
) -> None:
    network: Any = copy.deepcopy(models[family].denoiser)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 32,
        "target_modules": ["to_q", "to_k"],
        "rank_pattern": {"to_k": 2},
    }
    network.add_adapter(LoraConfig(**settings))
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = drawn(*parameter.shape)
    network.save_lora_adapter(tmp_path)  # whose header says its settings without the network's name
    layers = read_adapter(tmp_path).layers
    for name, module in network.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer = layers[f"{models[family].component}.{name}"]
            assert relative(layer.delta_weight(), module.get_delta_weight("default")) < 1e-6
    assert {layer.scale for layer in layers.values()} == {8, 16}


def test_what_other_trainers_wrote_into_a_folder_is_named(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["b_250.safetensors", "b_500.safetensors", "c/pytorch_lora_weights.safetensors", "a.safetensors"]
    ):
        write_tensors(tmp_path / name, {"x": torch.ones(1)})
        os.utime(tmp_path / name, (number, number))
    (tmp_path / "._a.safetensors").touch()
    named = r"b_500.safetensors, c/pytorch_lora_weights.safetensors, a.safetensors and 1 more\."
    with pytest.raises(UserError, match=f"but {named} Name the file that is meant"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match=rf"{named} Make a run .* customize import \S+/a.safetensors --out"):
        read_concept(tmp_path)


def test_a_whole_model_in_place_of_an_adapter_is_told(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"is a whole model, and no adapter\. A model is named with --model"):
        read_adapter(tiny_folder)


def test_folders_of_peft_inside_of_a_folder_are_named(tmp_path: Path) -> None:
    for names, said in (("unet",), "Name it: "), (("text_encoder", "unet"), "2 folders with one"):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            write_tensors(tmp_path / name / "adapter_model.safetensors", {"a": torch.ones(1)})
        with pytest.raises(UserError, match=f"{said}.*{names[-1]}"):
            read_adapter(tmp_path)


def test_a_lora_whose_header_or_names_are_of_another_model_is_told_although_its_layers_fit(
    models: dict[str, Tiny], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "text_model_encoder_layers_1_self_attn_q_proj"
    for number, (stem, version, said) in enumerate(
        [
            (f"lora_te1_{text}", "", "numbers its text encoders (lora_te1_"),
            (f"lora_te_{text}", "", ""),
            (f"lora_te_{text}", "sdxl_base_v1-0", "was made for Stable Diffusion XL"),
            (f"lora_te_{text}", "sd_v1", ""),
        ]
    ):
        tensors = {f"{stem}.{end}": value for end, value in lora(torch.empty(16, 16))[0].items()}
        file = tmp_path / f"{number}.safetensors"
        write_tensors(file, tensors, {"ss_base_model_version": version})
        import_adapter(file, tmp_path / str(number), model=str(models["sd"].folder), token_words="bcd")
        told = capsys.readouterr().err
        assert (said or "Its layers fit") in told if said else "Its layers fit" not in told


def test_a_lora_of_a_model_that_predicts_something_else_is_told(
    models: dict[str, Tiny], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    tensors = {f"{stem}.{end}": value for end, value in lora(torch.empty(16, 16))[0].items()}
    for number, (header, told) in enumerate(
        [
            ({"modelspec.prediction_type": "v"}, True),
            ({"ss_v_parameterization": "True"}, True),
            ({"modelspec.prediction_type": "epsilon"}, False),
        ]
    ):
        write_tensors(tmp_path / f"{number}.safetensors", tensors, header)
        import_adapter(
            tmp_path / f"{number}.safetensors",
            tmp_path / str(number),
            model=str(models["sd"].folder),
            token_words="bcd",
        )
        said = " ".join(capsys.readouterr().err.split())
        assert ("was made for a model that predicts v, and" in said) is told


def test_a_lora_that_learned_at_an_earlier_layer_of_clip_is_told(
    models: dict[str, Tiny], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    tensors = {f"{stem}.{end}": value for end, value in lora(torch.empty(16, 16))[0].items()}
    for skip, told in (("2", True), ("1", False), ("None", False)):
        write_tensors(tmp_path / f"{skip}.safetensors", tensors, {"ss_clip_skip": skip})
        import_adapter(
            tmp_path / f"{skip}.safetensors",
            tmp_path / skip,
            model=str(models["sd"].folder),
            token_words="bcd",
        )
        assert ("learned at clip skip 2, and" in " ".join(capsys.readouterr().err.split())) is told

    # The remedy: a model folder that ends a layer earlier; the LoRA's last layer, never reached, was left as it was
    early = shutil.copytree(models["sd"].folder, tmp_path / "early")
    settings = json.loads((early / "text_encoder" / "config.json").read_text())
    (early / "text_encoder" / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    file, first = tmp_path / "2.safetensors", f"{stem.replace('layers_1', 'layers_0')}"
    with pytest.raises(UserError, match=r"2\.safetensors changes .*layers\.1\..*does not reach"):
        import_adapter(file, tmp_path / "run", model=str(early), token_words="bcd")
    unreached = {name: torch.zeros_like(one) if "lora_up" in name else one for name, one in tensors.items()}
    reached = {name.replace(stem, first): one for name, one in tensors.items()}
    write_tensors(file, reached | unreached, {"ss_clip_skip": "2"})
    import_adapter(file, tmp_path / "run", model=str(early), token_words="bcd")
    assert "1 layer of" in (said := " ".join(capsys.readouterr().err.split())) and "are left out" in said
    assert len(read_adapter(tmp_path / "run").layers) == 1


# What diffusers loads ---------------------------------------------------------------------------------------


PIPELINES: dict[str, Any] = {
    "flux": FluxPipeline,
    "sd3": StableDiffusion3Pipeline,
    "zimage": ZImagePipeline,
    "flux2": Flux2KleinPipeline,
    "qwen": QwenImagePipeline,
    "krea2": Krea2Pipeline,
    "chroma": ChromaPipeline,
}


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_loads_every_layer_of_the_export_with_its_change(
    family: str, models: dict[str, Tiny], tmp_path: Path
) -> None:
    model = models[family]
    tensors: Tensors = {}
    truth: Tensors = {}
    for number, (module, weight) in enumerate(model.weights.items()):
        factors, truth[module] = lora(weight)
        factors["alpha"] = torch.tensor(2.0 + number % 3)
        truth[module] = truth[module] * (2.0 + number % 3) / 3
        tensors |= {f"lora_transformer_{flat(module)}.{end}": value for end, value in factors.items()}
    write_tensors(tmp_path / "a.safetensors", tensors)
    export_adapter(tmp_path / "a.safetensors", tmp_path / "d.safetensors", "diffusers")
    pipeline = pipeline_of(family, model.folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="d.safetensors")
    assert_worn(pipeline, truth)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("zimage", "kohya"),
        ("zimage", "ai-toolkit"),
        ("flux2", "kohya"),
        ("qwen", "kohya"),
        ("qwen", "ai-toolkit"),
    ],
)
def test_diffusers_reads_other_tools_forms_as_we_do(
    family: str, form: str, models: dict[str, Tiny], tmp_path: Path
) -> None:
    """kohya's export of ours, and ai-toolkit's names; of FLUX.2 diffusers leaves out what is outside the blocks."""
    model = models[family]
    tensors: Tensors = {}
    for module, weight in model.weights.items():
        if family != "flux2" or "blocks" in module:
            factors, _ = lora(weight, alpha=form == "kohya")
            names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
            tensors |= {
                f"diffusion_model.{module}.{names.get(end, end)}": value for end, value in factors.items()
            }
    write_tensors(tmp_path / "a.safetensors", tensors)
    read = read_adapter(tmp_path / "a.safetensors")
    if form == "kohya":
        export_adapter(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya")
    pipeline = pipeline_of(family, model.folder)
    name = "k.safetensors" if form == "kohya" else "a.safetensors"
    pipeline.load_lora_weights(str(tmp_path), weight_name=name)
    assert_worn(
        pipeline,
        {name.removeprefix("transformer."): layer.delta_weight() for name, layer in read.layers.items()},
    )


def pipeline_of(family: str, folder: Path) -> Any:
    """diffusers' own pipeline of a tiny model."""
    without = {
        "sd3": ("text_encoder_3", "tokenizer_3", "feature_extractor", "image_encoder"),
        "flux": ("feature_extractor", "image_encoder"),
    }.get(family, ())
    return PIPELINES[family].from_pretrained(folder, **dict.fromkeys(without))


def assert_worn(pipeline: Any, truth: Tensors) -> None:
    """The pipeline's transformer has an adapter on these layers alone, with these changes."""
    loaded = {
        name: module.get_delta_weight(next(iter(module.lora_A))).flatten(1)
        for name, module in pipeline.transformer.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(loaded) == set(truth)
    assert max(relative(loaded[name], truth[name]) for name in truth) < 1e-5


# Damaged files ----------------------------------------------------------------------------------------------

HEADERS: list[tuple[Any, str]] = [
    ("not JSON", "is no JSON"),
    ("[" * 100_000, "is no JSON"),
    ("9" * 6_000, "holds no settings|is no JSON"),
    ([], "holds no settings"),
    (None, "holds no settings"),
    ({}, "holds no settings"),
    ({"unet.lora_alpha": 1}, "unet.r is missing"),
    ({"unet.r": 2}, "unet.target_modules is missing"),
    *(
        ({"unet.r": wrong}, "unet.r is no whole number")
        for wrong in ("sixteen", None, 10**9, 0, -2, 2.5, True, [2])
    ),
    *(({"unet.lora_alpha": wrong}, "unet.lora_alpha is no finite") for wrong in ("x", 0, 1e300, [1], True)),
    *(
        ({"unet.target_modules": wrong}, "unet.target_modules is no list")
        for wrong in (7, [7], {"a": 1}, "(")
    ),
    *(
        ({"unet.rank_pattern": wrong}, "unet.rank_pattern holds")
        for wrong in ([1], "x", {"a": "b"}, {"(": 2})
    ),
    *(
        ({"unet.alpha_pattern": wrong}, "unet.alpha_pattern holds")
        for wrong in ("x", {"a": "b"}, {"a": None})
    ),
    ({"unet.use_dora": "yes"}, "unet.use_dora is not true or false"),
    ({"unet.use_rslora": 1}, "unet.use_rslora is not true or false"),
    ({"unet.kind": "oft"}, "unet.kind is none of"),
    ({"unet.r": 16}, "rank 16"),
]


@pytest.mark.parametrize(("header", "said"), HEADERS, ids=range(len(HEADERS)))
def test_a_header_of_a_wrong_type_is_refused_with_file_and_key(
    header: Any, said: str, saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    path, unet = saved
    tensors, metadata = read_tensors(path)
    right = json.loads(metadata[CONFIG_KEY])
    text = header if isinstance(header, str) else json.dumps(header)
    if isinstance(header, dict) and header and "missing" not in said:
        text = json.dumps(right | header)
    write_tensors(tmp_path / "damaged.safetensors", tensors, {CONFIG_KEY: text})
    for refused in (
        lambda: read_adapter(tmp_path / "damaged.safetensors"),
        lambda: load_lora(tmp_path / "damaged.safetensors", unet, "never"),
    ):
        with pytest.raises(UserError, match=f"damaged.safetensors.*({said})"):
            refused()


@pytest.fixture(scope="module")
def saved(models: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A LoRA of rank 2 on the attention of the tiny UNet, and a UNet without it."""
    folder = models["sd"].folder
    trained, fresh = (Backbone.open(str(folder), device="cpu", precision="fp32").denoiser for _ in range(2))
    for value in add_lora(trained, "a", rank=2, alpha=4.0, targets=("to_q", "to_v")).values():
        value.data = drawn(*value.shape)
    path = tmp_path_factory.mktemp("saved") / LORA_WEIGHTS
    save_lora(path, trained, "a")
    return path, fresh


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_at_every_door(
    wrong: float, saved: tuple[Path, nn.Module], models: dict[str, Tiny], tmp_path: Path
) -> None:
    tensors, metadata = read_tensors(saved[0])
    name = sorted(tensors)[3]
    tensors[name][0, 0] = wrong
    bad = tmp_path / "bad.safetensors"
    write_tensors(bad, tensors, metadata)
    doors: list[Callable[[], object]] = [
        lambda: export_adapter(bad, tmp_path / "out.safetensors", "kohya"),
        lambda: import_adapter(bad, tmp_path / "run", model=str(models["sd"].folder), token_words="bcd"),
        lambda: read_input(bad),
        lambda: load_lora(bad, saved[1], "never"),
    ]
    for door in doors:
        with pytest.raises(UserError, match=f"bad.safetensors is damaged: {re.escape(name)} .* not finite"):
            door()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: (value * 100).to(torch.int8), "is quantised: .* whole numbers .int8."),
        (lambda value: value[:0], "is damaged: .* is empty"),
    ],
    ids=["int8", "rank 0"],
)
def test_factors_that_say_nothing_by_themselves_are_refused_at_every_door(
    change: Callable[[Tensor], Tensor], said: str, saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    tensors, metadata = read_tensors(saved[0])
    write_tensors(tmp_path / "bad.safetensors", {k: change(v) for k, v in tensors.items()}, metadata)
    bad = tmp_path / "bad.safetensors"
    doors: list[Callable[[], object]] = [
        lambda: read_adapter(bad),
        lambda: read_input(bad),
        lambda: load_lora(bad, saved[1], "never"),
    ]
    for door in doors:
        with pytest.raises(UserError, match=said):
            door()


def test_a_component_that_the_header_names_may_not_be_missing(
    saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    tensors, metadata = read_tensors(saved[0])
    settings = json.loads(metadata[CONFIG_KEY])
    text = {key.replace("unet.", "text_encoder."): value for key, value in settings.items()}
    write_tensors(tmp_path / "cut.safetensors", tensors, {CONFIG_KEY: json.dumps(settings | text)})
    with pytest.raises(UserError, match="lacks all tensors of the text_encoder"):
        load_lora(tmp_path / "cut.safetensors", saved[1], "never")


@pytest.mark.parametrize("cut", ["one tensor", "one layer", "all"])
def test_a_file_with_missing_tensors_is_refused_and_not_drawn_with(
    cut: str, saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    tensors, metadata = read_tensors(saved[0])
    layer = sorted(tensors)[0].removesuffix(".lora_A.weight")
    gone = {"one tensor": f"{layer}.lora_B", "one layer": layer, "all": ""}[cut]
    kept = {name: value for name, value in tensors.items() if not name.startswith(gone)}
    write_tensors(tmp_path / "cut.safetensors", kept, metadata)
    said = {
        "one tensor": "is not whole",
        "one layer": "lacks the tensors of 1 layers",
        "all": "holds no tensors",
    }
    with pytest.raises(UserError, match=said[cut]):
        load_lora(tmp_path / "cut.safetensors", saved[1], "never")


def test_an_alpha_of_zero_is_refused_and_any_shape_of_one_is_read(tmp_path: Path) -> None:
    for alpha, scale in (
        (torch.tensor(4), 2.0),
        (torch.tensor([4.0]), 2.0),
        (torch.tensor(-4.0).bfloat16(), -2.0),
    ):
        tensors = lora(torch.empty(4, 4))[0] | {"alpha": alpha}
        write_tensors(tmp_path / "a.safetensors", {f"lora_unet_conv_in.{k}": v for k, v in tensors.items()})
        assert read_adapter(tmp_path / "a.safetensors").layers["unet.conv_in"].scale == scale
    tensors["alpha"] = torch.tensor(0.0)
    write_tensors(tmp_path / "a.safetensors", {f"lora_unet_conv_in.{k}": v for k, v in tensors.items()})
    with pytest.raises(UserError, match=r"α of lora_unet_conv_in in .* is 0"):
        read_adapter(tmp_path / "a.safetensors")
    tensors["alpha"] = torch.tensor(1e30)
    write_tensors(tmp_path / "a.safetensors", {f"lora_unet_conv_in.{k}": v for k, v in tensors.items()})
    with pytest.raises(UserError, match=r"α of lora_unet_conv_in in .* is 1e\+30, which is no strength"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_pairs_of_factors_of_two_ranks_say_no_strength(algorithm: str, tmp_path: Path) -> None:
    prefix = {"loha": "hada", "lokr": "lokr"}[algorithm]
    tensors = {
        f"lora_unet_conv_in.{prefix}_w{n}_{side}": drawn(*((4, n + 1) if side == "a" else (n + 1, 4)))
        for n in (1, 2)
        for side in "ab"
    }
    write_tensors(tmp_path / "a.safetensors", tensors | {"lora_unet_conv_in.alpha": torch.tensor(1.0)})
    with pytest.raises(UserError, match="have ranks 2 and 3"):
        read_adapter(tmp_path / "a.safetensors")


def test_magnitudes_that_are_there_twice_or_not_at_all_are_no_dora(tmp_path: Path) -> None:
    tensors, _ = lora(torch.empty(4, 4), alpha=False)
    stored = {
        f"unet.conv_in.lora_{side}.weight": tensors[f"lora_{name}.weight"]
        for side, name in (("A", "down"), ("B", "up"))
    }
    twice = {"unet.conv_in.dora_scale": torch.ones(4, 1), "unet.conv_in.lora_magnitude_vector": torch.ones(4)}
    write_tensors(tmp_path / "a.safetensors", stored | twice)
    with pytest.raises(UserError, match=r"DoRA scales of unet\.conv_in twice"):
        read_adapter(tmp_path / "a.safetensors")
    says = {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True, "unet.target_modules": ["conv_in"]}
    write_tensors(tmp_path / "a.safetensors", stored, {CONFIG_KEY: json.dumps(says)})
    with pytest.raises(UserError, match=r"says DoRA, and unet\.conv_in has no magnitudes"):
        read_adapter(tmp_path / "a.safetensors")


def test_an_adapter_that_changes_nothing_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, _ = lora(torch.empty(4, 4), alpha=False)
    for name, factor in (("whole", 1), ("zero", 0)):
        path = tmp_path / f"{name}.safetensors"
        tensors["lora_up.weight"] *= factor
        write_tensors(path, {f"lora_unet_conv_in.{key}": value for key, value in tensors.items()})
        read_adapter(path)
        assert ("changes nothing" in capsys.readouterr().err) == (factor == 0)


def test_an_alpha_that_metadata_alone_says_is_not_taken_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, _ = lora(torch.empty(4, 4), alpha=False)
    stored = {f"lora_unet_conv_in.{end}": value for end, value in tensors.items()}
    for alpha, said in (("1", True), ("2", False)):
        entries = {"ss_network_alpha": alpha, "ss_network_dim": "2"}
        write_tensors(tmp_path / "a.safetensors", stored, entries)
        assert read_adapter(tmp_path / "a.safetensors").layers["unet.conv_in"].scale == 1
        assert (
            "holds no α for 1 layer, though its metadata says ss_network_alpha 1" in capsys.readouterr().err
        ) == said
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["qkv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))  # as diffusion-pipe writes it
    flux = {
        f"diffusion_model.double_blocks.0.img_attn.proj.lora_{side}.weight": tensors[f"lora_{name}.weight"]
        for side, name in (("A", "down"), ("B", "up"))
    }
    write_tensors(tmp_path / "renamed.safetensors", flux)
    (layer,) = read_adapter(tmp_path / "renamed.safetensors").layers.values()
    assert layer.scale == 2


def test_an_export_for_a_base_of_another_denoiser_is_refused(
    saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"adapts a UNet, and FLUX has none"):
        export_adapter(saved[0], tmp_path / "a.safetensors", "kohya", base="flux")
    assert not (tmp_path / "a.safetensors").exists()
    export_adapter(saved[0], tmp_path / "a.safetensors", "kohya", base="sdxl")


def test_an_export_never_overwrites(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    export_adapter(saved[0], tmp_path / "a.safetensors", "kohya")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        export_adapter(saved[0], tmp_path / "a.safetensors", "diffusers")
    assert (tmp_path / "a.safetensors").read_bytes() == before


# Helpers ----------------------------------------------------------------------------------------------------


def drawn(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape)


def one_of_each_shape(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer of each size, first the plainly named."""
    chosen: dict[tuple[int, ...], str] = {}
    for name in sorted(weights, key=len):
        chosen.setdefault(tuple(weights[name].shape), name)
    return {name: weights[name] for name in chosen.values()}


def relative(found: Tensor, truth: Tensor) -> float:
    truth = truth.detach().flatten(1)
    return float((found.detach().flatten(1) - truth).norm() / truth.norm())


def assert_read(tensors: Tensors, truth: Mapping[str, Tensor], place: Path) -> None:
    """The file's layers are these, with these changes."""
    write_tensors(place / "a.safetensors", tensors)
    layers: Mapping[str, LayerUpdate] = read_adapter(place / "a.safetensors").layers
    assert set(layers) == set(truth)
    assert max(relative(layers[name].delta_weight(), truth[name]) for name in truth) < 1e-6


def assert_effective(path: Path, model: Tiny, truth: Mapping[str, Tensor]) -> None:
    """What an adapter of ours changes in the model is the truth, layer by layer."""
    denoiser = copy.deepcopy(model.denoiser)
    load_lora(path, denoiser, "a")
    found = {}
    for name, module in list(denoiser.named_modules()):
        if not hasattr(module, "get_delta_weight"):
            continue
        found[name] = name in truth
        change = module.get_delta_weight("a")
        if getattr(module, "use_dora", {}).get("a"):
            before = module.get_base_layer().weight.detach().clone()
            module.merge(adapter_names=["a"])
            change = module.get_base_layer().weight - before
            assert relative(change, truth[name]) < 1e-5, name
        else:
            assert relative(change, truth[name]) < 1e-6, name
    assert set(found) == set(truth)


def originals(family: str, weights: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The original code's layers of a family: name → diffusers' modules in order of their rows."""
    return dict(_originals(family, set(weights)))


def chroma_originals(modules: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """FLUX.1's names without its modulations, and those of the network that computes them."""
    yield from (
        ("img_in", ("x_embedder",)),
        ("txt_in", ("context_embedder",)),
        ("final_layer.linear", ("proj_out",)),
    )
    for module in sorted(modules):
        if module.startswith("distilled_guidance_layer."):
            yield module.replace("linear_1", "in_layer").replace("linear_2", "out_layer"), (module,)
    double = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    }
    single = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",)}
    for block in range(2):
        for theirs, ours, parts in (
            ("double_blocks", "transformer_blocks", double),
            ("single_blocks", "single_transformer_blocks", single),
        ):
            for name, layers in parts.items():
                yield f"{theirs}.{block}.{name}", tuple(f"{ours}.{block}.{layer}" for layer in layers)


def _originals(family: str, modules: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    qkv = ("attn.to_q", "attn.to_k", "attn.to_v")
    if family == "krea2":
        outer = {
            "img_in": "first",
            "time_embed.linear_1": "tmlp.0",
            "time_embed.linear_2": "tmlp.2",
            "time_mod_proj": "tproj.1",
            "txt_in.linear_1": "txtmlp.1",
            "txt_in.linear_2": "txtmlp.3",
            "final_layer.linear": "last.linear",
        }
        for module in sorted(modules):
            name = outer.get(module, module)
            for ours, theirs in (
                ("transformer_blocks.", "blocks."),
                ("text_fusion.", "txtfusion."),
                ("attn.to_out.0", "attn.wo"),
                ("attn.to_gate", "attn.gate"),
                ("attn.to_", "attn.w"),
                (".ff.", ".mlp."),
            ):
                name = name.replace(ours, theirs)
            yield name, (module,)
        return
    if family == "zimage":
        for module in sorted(modules):
            name = module.replace("all_x_embedder.2-1", "x_embedder").replace(
                "all_final_layer.2-1", "final_layer"
            )
            if name.endswith(".attention.to_q"):
                stem = module.removesuffix("to_q")
                yield f"{stem}qkv", (f"{stem}to_q", f"{stem}to_k", f"{stem}to_v")
            elif not name.endswith((".attention.to_k", ".attention.to_v")):
                yield name.replace(".attention.to_out.0", ".attention.out"), (module,)
        return
    if family == "flux2":
        called = {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
            "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
            "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
            "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
            "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.linear_out",
            "double_blocks.0.txt_mlp.0": "transformer_blocks.0.ff_context.linear_in",
            "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.linear_out",
            "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
        }
        yield from ((name, (module,)) for name, module in called.items())
        yield "double_blocks.0.img_attn.qkv", tuple(f"transformer_blocks.0.{part}" for part in qkv)
        added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
        yield "double_blocks.0.txt_attn.qkv", tuple(f"transformer_blocks.0.{part}" for part in added)
        return
    if family == "qwen21":  # as ComfyUI writes it
        for module in sorted(modules):
            if module.endswith(".gate_layer"):
                yield module.replace("gate_layer", "gate_up"), (module, module.replace("gate_layer", "proj"))
            elif not module.endswith("img_mlp.proj"):
                yield module, (module,)
        return
    if family == "chroma":
        yield from chroma_originals(modules)
        return
    if family == "flux":
        names = ("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1")
        embeds = [
            f"{part}_in.{side}_layer" for part in ("time", "vector", "guidance") for side in ("in", "out")
        ]
        plain = ("img_attn.proj", "txt_attn.proj", "img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2")
        double = [f"double_blocks.0.{name}" for name in (*plain, "img_mod.lin", "txt_mod.lin")]
        for name in (*names, *embeds, *double, "single_blocks.0.linear2", "single_blocks.0.modulation.lin"):
            yield name, tuple(part.removesuffix(".weight") for part in from_original_flux(f"{name}.weight"))
        yield "double_blocks.0.img_attn.qkv", tuple(f"transformer_blocks.0.{part}" for part in qkv)
        added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
        yield "double_blocks.0.txt_attn.qkv", tuple(f"transformer_blocks.0.{part}" for part in added)
        parts = (*qkv, "proj_mlp")
        yield "single_blocks.0.linear1", tuple(f"single_transformer_blocks.0.{part}" for part in parts)
        return
    embedder = {"sd3": "time_text_embed", "pixart": "adaln_single.emb"}[family]
    outer = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{embedder}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{embedder}.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_block.1": "adaln_single.linear",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    inner = {
        "sd3": {
            "x_block.attn.qkv": qkv,
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "context_block.attn.proj": ("attn.to_add_out",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        },
        "pixart": {
            "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            "attn.proj": ("attn1.to_out.0",),
            "cross_attn.q_linear": ("attn2.to_q",),
            "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
            "cross_attn.proj": ("attn2.to_out.0",),
            "mlp.fc1": ("ff.net.0.proj",),
            "mlp.fc2": ("ff.net.2",),
        },
    }[family]
    found: dict[str, tuple[str, ...]] = {name: (module,) for name, module in outer.items()}
    for block in range(2):
        start = f"{'joint_blocks' if family == 'sd3' else 'blocks'}.{block}."
        found |= {
            start + name: tuple(f"transformer_blocks.{block}.{part}" for part in parts)
            for name, parts in inner.items()
        }
    yield from ((name, parts) for name, parts in found.items() if set(parts) <= modules)
