"""Z-Image and FLUX.2 in one file, and in three as ComfyUI lays them: the same models as their folders; refusals."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    Krea2Transformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Model, Qwen3VLTextModel, T5EncoderModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel, Qwen2_5_VLTextModel
from typer.testing import CliRunner

from backbone.adapters.concept import read_concept
from backbone.families.flux2.family import DEV
from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.registry import families
from backbone.families.single_file import split_files
from backbone.io.console import UserError
from backbone.io.files import Header, read_json, write_json, write_tensors
from backbone.models.locate import join_files, locate
from backbone.models.model import Backbone
from backbone.training.models import open_configs
from customize.cli import app
from customize.settings import Subject
from customize.training.reporting.public import copy_without_paths
from customize.training.run import train_concept
from tests.backbone.test_single_file import original_vae_name, part_of
from tests.backbone.test_single_file_flux import original_flux
from tests.backbone.test_single_file_sd3 import UNET, opened, parameters, renamed, together
from tests.tiny import (
    tiny_chroma,
    tiny_flux2_dev,
    tiny_flux2_klein,
    tiny_krea2,
    tiny_qwen_edit,
    tiny_qwen_image,
    tiny_qwen_image21,
    tiny_z_image,
)

Tensors = dict[str, Tensor]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "z-image": tiny_z_image,
    "flux2": tiny_flux2_klein,
    "qwen-image": tiny_qwen_image,
    "krea2": tiny_krea2,
    "qwen-edit": tiny_qwen_edit,
    "flux2-dev": tiny_flux2_dev,
    "chroma": tiny_chroma,
    "qwen-image-2.1": tiny_qwen_image21,
}
NAMES = {
    "z-image": "z_image_bf16",
    "flux2": "flux-2-klein-base-4b",
    "qwen-image": "qwen_image_bf16",
    "krea2": "krea2_raw_bf16",
    "qwen-edit": "qwen_image_edit_bf16",
    "flux2-dev": "flux2_dev_bf16",
    "chroma": "Chroma1-HD",
    "qwen-image-2.1": "qwen_image_2.1_bf16",
}
VIDEO = ("qwen-image", "krea2")  # whose autoencoder is that of a video, in diffusers' names here
TEXT = "text_encoders.qwen3_4b.transformer."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("split")
    return Written(place)


class Written(dict[str, Path]):
    """A family's folder, written when it is asked for."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def __missing__(self, name: str) -> Path:
        self[name] = FAMILIES[name](self.place / name)
        return self[name]


# The original layouts ---------------------------------------------------------------------------------------


def transformer_of(name: str, folder: Path) -> Tensors:
    """A transformer's tensors by the names of the code that it was published with."""
    tensors = part_of(folder, "transformer")
    if name in ("qwen-image", "qwen-edit"):
        return tensors
    if name == "qwen-image-2.1":  # as ComfyUI writes it
        return together(tensors, {"gate_layer proj": "gate_up"})
    if name == "chroma":
        tensors = {
            re.sub(r"(norms\.\d+)\.weight$", r"\1.scale", key)
            .replace(".linear_1.", ".in_layer.")
            .replace(".linear_2.", ".out_layer."): value
            for key, value in tensors.items()
        }
        return original_flux(tensors)
    if name == "krea2":
        changes: Any = (
            (r"^img_in\.", "first."),
            (r"^time_embed\.linear_1\.", "tmlp.0."),
            (r"^time_embed\.linear_2\.", "tmlp.2."),
            (r"^time_mod_proj\.", "tproj.1."),
            (r"^txt_in\.norm\.weight", "txtmlp.0.scale"),
            (r"^txt_in\.linear_1\.", "txtmlp.1."),
            (r"^txt_in\.linear_2\.", "txtmlp.3."),
            (r"^final_layer\.norm\.weight", "last.norm.scale"),
            (r"^final_layer\.scale_shift_table", "last.modulation.lin"),
            (r"^final_layer\.", "last."),
            (r"^text_fusion\.", "txtfusion."),
            (r"^transformer_blocks\.", "blocks."),
            (r"\.norm_([qk])\.weight", r".qknorm.\1norm.scale"),
            (r"\.norm1\.weight", ".prenorm.scale"),
            (r"\.norm2\.weight", ".postnorm.scale"),
            (r"\.attn\.to_gate\.", ".attn.gate."),
            (r"\.attn\.to_out\.0\.", ".attn.wo."),
            (r"\.attn\.to_([qkv])\.", r".attn.w\1."),
            (r"\.ff\.", ".mlp."),
            (r"\.scale_shift_table", ".mod.lin"),
        )
        original = {renamed(key, changes): value for key, value in tensors.items()}
        return {
            k: v.flatten() if k.startswith("blocks.") and k.endswith("mod.lin") else v
            for k, v in original.items()
        }
    if name == "z-image":
        tensors = together(tensors, {"to_q to_k to_v": "qkv"})
        changes = (
            (r"all_(x_embedder|final_layer)\.2-1\.", r"\1."),
            (r"\.to_out\.0\.", ".out."),
            (r"\.norm_([qk])\.", r".\1_norm."),
        )
        return {renamed(key, changes): value for key, value in tensors.items()}
    tensors = together(
        tensors, {"to_q to_k to_v": "img_attn.qkv", "add_q_proj add_k_proj add_v_proj": "txt_attn.qkv"}
    )
    changes = (
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_1\.", "time_in.in_layer."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
        (r"_modulation(_img|_txt|)\.linear\.", r"_modulation\1.lin."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^transformer_blocks\.", "double_blocks."),
        (r"\.attn\.to_qkv_mlp_proj\.", ".linear1."),
        (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
        (r"^(single_blocks\.\d+)\.attn\.to_out\.", r"\1.linear2."),
        (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
        (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
        (r"^(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
        (r"^(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
        (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
        (r"\.attn\.(img|txt)_attn", r".\1_attn"),
        (r"\.ff\.linear_in\.", ".img_mlp.0."),
        (r"\.ff\.linear_out\.", ".img_mlp.2."),
        (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
        (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
    )
    original = {renamed(key, changes): value for key, value in tensors.items()}
    scale, shift = original["final_layer.adaLN_modulation.1.weight"].chunk(2)
    return original | {"final_layer.adaLN_modulation.1.weight": torch.cat([shift, scale])}


def autoencoder_of(folder: Path) -> Tensors:
    """An autoencoder's tensors by the original names; FLUX.2 has its latent's convolutions inside coder and decoder."""
    config = read_json(folder / "vae" / "config.json")
    if "block_out_channels" not in config:
        return part_of(folder, "vae")
    blocks = len(config["block_out_channels"])
    found = {}
    for name, tensor in part_of(folder, "vae").items():
        if "mid_block.attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        original = name if name.startswith("bn.") else original_vae_name(name, blocks=blocks)
        original = (
            {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}.get(
                original.partition(".")[0], original.partition(".")[0]
            )
            + "."
            + original.partition(".")[2]
        )
        found[original] = tensor
    return found


def text_of(folder: Path) -> Tensors:
    """As ComfyUI's files have it: of one that reads pictures the language model is `model`, the eye `visual`."""
    tensors = part_of(folder, "text_encoder")
    if "shared.weight" in tensors:
        return tensors  # T5
    names = {name: re.sub(r"^(model\.|language_model\.)*", "model.", name) for name in tensors}
    return {
        re.sub(r"^model\.(visual|lm_head)\.", r"\1.", names[name]): value for name, value in tensors.items()
    }


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def with_settings(place: Path, folder: Path) -> Path:
    """A folder's configs and tokenizer, without its weights."""
    words = "tokenizer" if (folder / "tokenizer").is_dir() else "processor"
    shutil.copytree(folder / words, place / "tokenizer")
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        shutil.copytree(folder / part, place / part, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in ("limner.json", "model_index.json"):
        shutil.copy(folder / file, place)
    return place


def three_files(place: Path, name: str, folder: Path) -> list[Path]:
    """As ComfyUI lays them: diffusion_models/, vae/, text_encoders/."""
    parts = {
        f"diffusion_models/{NAMES[name]}.safetensors": transformer_of(name, folder),
        "vae/ae.safetensors": autoencoder_of(folder),
        "text_encoders/qwen_3_4b.safetensors": text_of(folder),
    }
    for file, tensors in parts.items():
        (place / file).parent.mkdir(parents=True)
        write_tensors(place / file, tensors)
    with_settings(place / "diffusion_models", folder)
    return [place / file for file in parts]


# The same model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("z-image", "three files"),
        *(
            pytest.param(name, layout, marks=pytest.mark.slow)
            for name in FAMILIES
            for layout in ("one file", "three files", "diffusers' names")
            if (name, layout) != ("z-image", "three files")
        ),
    ],
)
def test_files_are_the_same_model_as_the_folder(
    name: str, layout: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders[name]
    if layout == "one file":
        file = with_settings(tmp_path, folder) / f"{NAMES[name]}.safetensors"
        parts = below(UNET, transformer_of(name, folder)) | below("vae.", autoencoder_of(folder))
        write_tensors(file, parts | below(TEXT, text_of(folder)))
        spelt = str(file)
    else:
        transformer, vae, text = three_files(tmp_path, name, folder)
        if layout == "diffusers' names":
            for file, part in ((transformer, "transformer"), (vae, "vae")):
                write_tensors(file, part_of(folder, part))
        spelt = join_files(str(transformer), str(vae), str(text))
    one, other = Backbone.open(spelt, device="cpu", precision="fp32"), opened(folder)
    assert_same(one, other)
    assert one.fingerprint == Backbone.open(spelt, device="cpu", precision="fp32").fingerprint


def assert_same(one: Backbone, other: Backbone) -> None:
    """The same weights; the same encodings of prompts, latents, pictures and a prediction; the same path."""
    for part in ("denoiser", "autoencoder"):
        mine, theirs = (getattr(model, part).state_dict() for model in (one, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert (one.latent_shape, one.defaults) == (other.latent_shape, other.defaults)
    assert torch.equal(one.schedule(4).b, other.schedule(4).b)
    texts = [model.encode_prompts(["a dog in the snow", "a red cat"]) for model in (one, other)]
    if one.text_sees_images:
        seen = [Image.new("RGB", (64, 64), "red")]
        texts += [model.encode_prompts(["a dog"], seen) for model in (one, other)]
    for mine, theirs in zip(texts[::2], texts[1::2], strict=True):
        assert all(torch.equal(value, theirs.text[name]) for name, value in mine.text.items())
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = [model.encode(pictures).mean for model in (one, other)]
    torch.testing.assert_close(*latents)
    torch.testing.assert_close(*(model.decode(latents[0]) for model in (one, other)))
    with torch.no_grad():
        said = [
            model.predictor(text)(latents[0], other.schedule(4)[1]).noise
            for model, text in zip((one, other), texts[:2], strict=True)
        ]
    torch.testing.assert_close(*said)


@pytest.mark.parametrize(
    ("name", "stem", "defaults"),
    [
        ("z-image", "z_image_turbo_bf16", (8, 1.0)),
        ("z-image", "z_image_bf16", (50, 5.0)),
        ("flux2", "flux-2-klein-4b", (4, 1.0)),
        ("flux2", "flux-2-klein-base-4b", (50, 4.0)),
        ("krea2", "krea2_turbo_bf16", (8, 1.0)),
        ("krea2", "krea2_raw_bf16", (28, 5.5)),
    ],
)
def test_a_file_s_name_says_whether_it_is_distilled(
    name: str, stem: str, defaults: tuple[int, float], folders: dict[str, Path], tmp_path: Path
) -> None:
    files = three_files(tmp_path, name, folders[name])
    for part in ("limner.json", "model_index.json", "scheduler"):
        path = files[0].parent / part
        path.unlink() if path.is_file() else shutil.rmtree(path)
    files[0] = files[0].rename(files[0].with_stem(stem))
    usual = Backbone.open(join_files(*map(str, files)), device="cpu", precision="fp32").defaults
    assert (usual["steps"], usual["guidance"]) == defaults
    if name != "z-image":  # whose scheduler says it
        write_json(files[0].parent / "model_index.json", {"is_distilled": usual["guidance"] != 1})
        other = Backbone.open(join_files(*map(str, files)), device="cpu", precision="fp32").defaults
        assert (other["guidance"] == 1) == (usual["guidance"] != 1), (
            "a model_index.json beside it says better"
        )


def test_of_a_file_whose_name_does_not_say_whether_it_was_distilled_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks: dict[str, tuple[str, ...]] = {
        "Z-Image": ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight", "x_embedder.weight"),
        "Krea 2": ("txtfusion.projector.weight", "first.weight"),
        "FLUX.2": ("double_stream_modulation_img.lin.weight", "img_in.weight"),
    }
    for name, stem, said, few in (
        ("Z-Image", "moodyMix_zitV2", False, True),
        ("Z-Image", "z_image_de_turbo_v1_bf16", False, False),
        ("Z-Image", "z_image_fp8_e4m3fn", False, False),
        ("Z-Image", "transition_v2", True, False),
        ("Krea 2", "krea2_raw_bf16", False, False),
        ("Krea 2", "portraits_v3", True, False),
        ("FLUX.2", "flux-2-klein-4b", False, True),
        ("FLUX.2", "portraits_v3", True, False),
    ):
        header = Header(tmp_path / f"{stem}.safetensors", dict.fromkeys(marks[name], (3072, 4)), {})
        family = next(one for one in families() if one.name == name)
        settings = family.match_checkpoint(header)
        assert settings is not None
        line = "does not say by its name whether it was distilled to few steps"
        assert (line in capsys.readouterr().err) == said
        location = Location(stem, str(header.path), {}, settings)
        assert (family.sampling_defaults(location)["guidance"] == 1) == few


@pytest.mark.parametrize(
    ("part", "kind", "size"),
    [
        ("z-image/transformer", ZImageTransformer2DModel, 6_154_908_736),
        ("z-image/text_encoder", Qwen3Model, 4_022_468_096),
        ("flux2-klein/transformer", Flux2Transformer2DModel, 3_875_544_576),
        ("flux2-klein-9b/transformer", Flux2Transformer2DModel, 9_078_581_248),
        ("flux2-klein-9b/text_encoder", Qwen3Model, 7_568_405_504),
        ("flux2-klein/vae", AutoencoderKLFlux2, 84_046_115),
        ("qwen-image/transformer", QwenImageTransformer2DModel, 20_430_401_088),
        ("qwen-image/text_encoder", Qwen2_5_VLTextModel, 7_070_619_136),
        ("qwen-image/text_encoder", Qwen2_5_VLModel, 7_747_169_280),
        ("qwen-image/vae", AutoencoderKLQwenImage, 126_892_531),
        ("chroma/transformer", ChromaTransformer2DModel, 8_899_983_424),
        ("chroma/text_encoder", T5EncoderModel, 4_762_310_656),
        ("qwen-image-2.1/transformer", QwenImage21Transformer2DModel, 7_115_124_736),
        ("qwen-image-2.1/text_encoder", Qwen3VLTextModel, 7_568_405_504),
        ("flux2-dev/transformer", Flux2Transformer2DModel, 32_223_281_152),
        ("krea2/transformer", Krea2Transformer2DModel, 12_820_073_036),
        ("krea2/text_encoder", Qwen3VLTextModel, 4_022_468_096),
    ],
)
@pytest.mark.slow
def test_the_published_settings_have_the_published_sizes(part: str, kind: Any, size: int) -> None:
    config = read_json(PUBLISHED_CONFIGS / part / "config.json")
    if issubclass(kind, PreTrainedModel):
        with torch.device("meta"):
            whole = "text_config" in kind.config_class.sub_configs
            model = kind(kind.config_class.from_dict(config if whole else config.get("text_config", config)))
        assert sum(value.numel() for value in model.parameters()) == size
    else:
        assert parameters(kind, config) == size


def test_klein_of_9_billions_is_told_by_its_width(tmp_path: Path) -> None:
    flux2 = next(family for family in families() if family.name == "FLUX.2")
    shapes: dict[str, tuple[int, ...]] = {
        "double_stream_modulation_img.lin.weight": (1, 1),
        "img_in.weight": (4096, 128),
    }
    settings = flux2.match_checkpoint(Header(tmp_path / "a.safetensors", shapes, {}))
    assert settings is not None
    location = Location("a", str(tmp_path / "a.safetensors"), {}, settings)
    assert location.config("transformer")["joint_attention_dim"] == 12288
    assert location.config("text_encoder")["hidden_size"] == 4096


def test_a_file_of_qwen_image_says_by_its_name_what_it_was_trained_for(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"), (1,)
    )
    for stem, name in (
        ("qwen_image_fp8", "Qwen-Image"),
        ("qwen_image_second_edition", "Qwen-Image"),
        ("qwen_image_edit_bf16", "Qwen-Image-Edit"),
        ("Qwen-Image-Edit-2509-fp8", "Qwen-Image-Edit-Plus"),
    ):
        header = Header(tmp_path / f"{stem}.safetensors", shapes, {})
        found = [family.name for family in families() if family.match_checkpoint(header) is not None]
        assert found == [name]


def test_a_file_of_the_edition_of_2511_is_read_as_one_by_its_mark_or_its_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"), (1,)
    )
    marked = shapes | {"__index_timestep_zero__": (0,)}
    below_unet = {UNET + name: shape for name, shape in marked.items()}
    for stem, names, clean in (
        ("Qwen-Rapid-AIO-v23", below_unet, True),
        ("qwen_image_edit_2511_bf16", shapes, True),
        ("qwen_image_edit_2509_bf16", shapes, False),
    ):
        header = Header(tmp_path / f"{stem}.safetensors", names, {})
        ((family, settings),) = [
            (one, found) for one in families() if (found := one.match_checkpoint(header)) is not None
        ]
        assert family.name == "Qwen-Image-Edit-Plus"
        config = Location(stem, str(header.path), {}, settings).config("transformer")
        assert config.get("zero_cond_t", False) == clean
    layered = shapes | {"time_text_embed.addition_t_embedding.weight": (2, 1)}
    with pytest.raises(UserError, match="belongs to Qwen-Image-Layered, which is not supported"):
        locate_shapes(layered, tmp_path)
    transformer, vae, text = three_files(tmp_path, "qwen-edit", folders["qwen-edit"])
    named = transformer.with_name("qwen_image_edit_2511_bf16.safetensors")
    write_tensors(
        named, transformer_of("qwen-edit", folders["qwen-edit"]) | {"__index_timestep_zero__": torch.zeros(0)}
    )
    read_all = Backbone.open(
        join_files(*map(str, (named, vae, text))), device="cpu", precision="fp32", task="edit"
    )
    mine, theirs = (model.denoiser.state_dict() for model in (read_all, opened(folders["qwen-edit"])))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def locate_shapes(shapes: dict[str, tuple[int, ...]], place: Path) -> None:
    for family in families():
        family.match_checkpoint(Header(place / "qwen_image_layered.safetensors", shapes, {}))


def test_a_text_encoder_that_ends_at_the_last_layer_that_is_read_says_the_same(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # As ComfyUI publishes the Mistral of FLUX.2 dev: 30 of 40 layers, no norm behind them, the tokenizer as bytes
    transformer, vae, text = three_files(tmp_path, "flux2-dev", folders["flux2-dev"])
    whole, spelt = text_of(folders["flux2-dev"]), join_files(*map(str, (transformer, vae, text)))
    last = max(DEV.layers)
    kept = {
        name: value
        for name, value in whole.items()
        if name != "model.norm.weight"
        and not ((found := re.search(r"layers\.(\d+)\.", name)) and int(found[1]) >= last)
    }
    assert len(kept) < len(whole) - 1
    write_tensors(text, kept | {"tekken_model": torch.zeros(9, dtype=torch.uint8)})
    one, other = Backbone.open(spelt, device="cpu", precision="fp32"), opened(folders["flux2-dev"])
    said = [model.encode_prompts(["a dog in the snow"]).text for model in (one, other)]
    assert all(torch.equal(value, said[1][name]) for name, value in said[0].items())
    write_tensors(text, {name: value for name, value in kept.items() if f"layers.{last - 1}." not in name})
    with pytest.raises(UserError, match=f"layer {last} is read"):
        Backbone.open(spelt, device="cpu", precision="fp32").text_encoder  # noqa: B018
    transformer, vae, text = three_files(tmp_path / "z", "z-image", folders["z-image"])
    whole, spelt = text_of(folders["z-image"]), join_files(*map(str, (transformer, vae, text)))
    write_tensors(text, {name: value for name, value in whole.items() if name != "model.norm.weight"})
    with pytest.raises(UserError, match="cut off behind a layer in the middle, and its last ones are read"):
        Backbone.open(spelt, device="cpu", precision="fp32").text_encoder  # noqa: B018


# Refusals ---------------------------------------------------------------------------------------------------


def test_what_is_missing_or_of_no_use_is_named_with_the_remedy(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    transformer, vae, text = map(str, three_files(tmp_path, "z-image", folders["z-image"]))
    for files, said in (
        (
            (transformer,),
            r"without its autoencoder \(VAE\) and text encoder \(Qwen3-4B\)\. Add --vae FILE and",
        ),
        ((transformer, vae), r"without its text encoder \(Qwen3-4B\)\. Add --text-encoder FILE"),
        ((transformer, "", text), r"without its autoencoder \(VAE\)\. Add --vae FILE"),
        ((transformer, vae, vae), "a second vae"),
        ((transformer, transformer, text), "neither an autoencoder nor a text encoder"),
        ((transformer, vae, str(tmp_path / "nowhere.safetensors")), "There is no file .*nowhere"),
        ((str(tmp_path / "nowhere.gguf"), vae, text), "There is no file .*nowhere.gguf"),
    ):
        with pytest.raises(UserError, match=said):
            locate(join_files(*files))
    (tmp_path / "z.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"z\.gguf is GGUF, which is not read"):
        locate(str(tmp_path / "z.gguf"))


def test_a_component_of_another_model_is_told_before_anything_is_loaded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, vae, text = three_files(tmp_path / "own", "z-image", folders["z-image"])
    _, other_vae, other_text = three_files(tmp_path / "other", "flux2", folders["flux2"])
    monkeypatch.setattr(split_files, "read_weights", lambda *call, **named: pytest.fail("weights are read"))
    for files, said in (
        ((transformer, vae, other_text), f"The text encoder in {other_text} .* of another model"),
        ((transformer, other_vae, text), f"The autoencoder in {other_vae} .* of another model"),
    ):
        with pytest.raises(UserError, match=said):
            Backbone.open(join_files(*map(str, files)), device="cpu", precision="fp32")


def test_a_text_encoder_that_differs_in_a_layer_and_a_missing_tokenizer_are_told(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    transformer, vae, text = three_files(tmp_path, "z-image", folders["z-image"])
    tensors = text_of(folders["z-image"])
    spelt = join_files(str(transformer), str(vae), str(text))
    name = next(one for one in tensors if one.endswith("mlp.up_proj.weight"))
    write_tensors(text, tensors | {name: tensors[name][:-2].contiguous()})
    with pytest.raises(UserError, match="that of another model, or of another size"):
        Backbone.open(spelt, device="cpu", precision="fp32").text_encoder  # noqa: B018
    shutil.rmtree(transformer.parent / "tokenizer")
    with pytest.raises(UserError, match="carries no tokenizer"):
        Backbone.open(spelt, device="cpu", precision="fp32").text_encoder  # noqa: B018


def test_qwen3_vl_without_its_eye_reads_words_and_is_shown_no_image(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    transformer, vae, text = three_files(tmp_path, "qwen-image-2.1", folders["qwen-image-2.1"])
    whole, spelt = text_of(folders["qwen-image-2.1"]), join_files(*map(str, (transformer, vae, text)))
    write_tensors(text, {name: value for name, value in whole.items() if not name.startswith("visual.")})
    one, other = Backbone.open(spelt, device="cpu", precision="fp32"), opened(folders["qwen-image-2.1"])
    said = [model.encode_prompts(["a dog in the snow"]).text for model in (one, other)]
    assert all(torch.equal(value, said[1][name]) for name, value in said[0].items())
    with pytest.raises(UserError, match=r"without its vision tower.*name the file of all of Qwen3-VL-8B"):
        one.encode_prompts(["a dog"], [Image.new("RGB", (64, 64), "red")])


def test_the_options_name_the_files_at_every_door(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`customize sample --model X --vae Y --text-encoder Z`; and what is said of a file without its model."""
    transformer, vae, text = map(str, three_files(tmp_path, "z-image", folders["z-image"]))
    monkeypatch.chdir(tmp_path)
    files = ("--model", transformer, "--vae", vae, "--text-encoder", text)
    place = ("--device", "cpu", "--precision", "fp32", "--steps", "2")
    runner = CliRunner()
    result = runner.invoke(app, ["sample", "a dog", *files, *place, "--out", "drawn"])
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "drawn").glob("*.png"))
    result = runner.invoke(app, ["sample", "a dog", "--vae", vae])
    assert "--vae belongs to the file that --model names" in str(result.exception)
    asked = {"model": os.path.relpath(transformer) + f"+{vae}+{text}", "device": "cpu"}
    assert open_configs(asked)[1]["model"] == join_files(transformer, vae, text)


@pytest.mark.slow
def test_a_run_on_split_files_says_how_diffusers_opens_it_and_is_uploaded_without_a_path(
    folders: dict[str, Path], tmp_path: Path, subject: Path
) -> None:
    spelt = join_files(*map(str, three_files(tmp_path / "models", "z-image", folders["z-image"])))
    one = Subject(images=str(subject), token="[V]", class_noun="dog", token_words="fgh")
    asked = {"model": spelt, "device": "cpu", "precision": "fp32", "steps": 1, "prior": "off"}
    run = train_concept({**asked, "sheet_prompts": ("a {}",)}, [one], out=tmp_path / "run")
    assert read_concept(run).model == spelt
    assert "ZImagePipeline.from_pretrained('Tongyi-MAI/Z-Image')" in (run / "README.md").read_text()
    copy_without_paths(run, tmp_path / "public")
    texts = [path.read_text() for path in (tmp_path / "public").rglob("*") if path.suffix in (".md", ".json")]
    assert any("z_image_bf16.safetensors" in text for text in texts)
    assert not any(str(tmp_path) in text for text in texts)


def test_the_autoencoder_of_a_video_has_other_names_in_the_original_code() -> None:
    """Written down from Wan's code, which Qwen-Image's autoencoder follows: its blocks are counted through."""
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    inner = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    changes: Any = (
        (r"^quant_conv\.", "conv1."),
        (r"^post_quant_conv\.", "conv2."),
        (r"^(en|de)coder\.conv_in\.", r"\1coder.conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"mid_block\.attentions\.0\.", "middle.1."),
        (r"mid_block\.resnets\.(\d)\.", lambda found: f"middle.{2 * int(found[1])}."),
        (
            r"up_blocks\.(\d)\.resnets\.(\d)\.",
            lambda found: f"upsamples.{4 * int(found[1]) + int(found[2])}.",
        ),
        (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda found: f"upsamples.{4 * int(found[1]) + 3}."),
        (r"down_blocks\.(\d+)\.", r"downsamples.\1."),
        (r"conv_shortcut", "shortcut"),
        *(
            (rf"((?:middle|upsamples|downsamples)\.\d+)\.{ours}\.", rf"\1.{theirs}.")
            for ours, theirs in inner.items()
        ),
    )
    theirs = vae.state_dict()
    original = {renamed(name, changes): value for name, value in theirs.items()}
    assert len(original) == len(theirs) and set(original) & set(theirs) == set()
    found = split_files.convert_video_autoencoder(original)
    assert found.keys() == theirs.keys()
    assert all(value is theirs[name] or torch.equal(value, theirs[name]) for name, value in found.items())
