"""FLUX.1 in one file: the same model as the folder it was written from, without a network; refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import Tensor
from transformers import T5EncoderModel

from backbone.families.flux import checkpoint as flux_file
from backbone.families.location import PUBLISHED_CONFIGS
from backbone.io.console import UserError
from backbone.io.files import read_json, write_tensors
from tests.backbone.test_single_file import _no_network, part_of  # noqa: F401 (a fixture)
from tests.backbone.test_single_file_sd3 import (
    UNET,
    assert_same_model,
    autoencoder_of,
    clip_of,
    opened,
    parameters,
    renamed,
    said_by_the_door,
    t5_of,
    together,
    written,
)
from tests.tiny import tiny_flux

Tensors = dict[str, Tensor]
SIZES = {  # parameters of the published models
    "flux-dev/transformer": (FluxTransformer2DModel, 11_901_408_320),
    "flux-schnell/transformer": (FluxTransformer2DModel, 11_891_178_560),
    "flux/vae": (AutoencoderKL, 83_819_683),
    "flux/text_encoder_2": (T5EncoderModel, 4_762_310_656),
}


@pytest.fixture(scope="module", params=["dev", "schnell"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("single") / request.param
    return tiny_flux(place, guidance=request.param == "dev")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("single") / "dev")


@pytest.fixture
def file(tmp_path: Path, dev: Path) -> Path:
    return written(tmp_path / "flux.safetensors", checkpoint_of(dev), settings=dev)


def test_a_single_file_is_the_same_model_as_the_folder(folder: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "flux.safetensors", checkpoint_of(folder), settings=folder)
    one, other = opened(file), opened(folder)
    assert_same_model(one, other)
    text = other.encode_prompts(["a dog"])
    told = [model.family.embed_guidance(model.denoiser, text, 3.5) for model in (one, other)]
    assert [value is not None and value.guidance is not None for value in told] == [folder.name == "dev"] * 2
    assert one.defaults["guidance"] == other.defaults["guidance"]


def test_a_transformer_without_a_prefix_beside_its_encoders_is_the_same_too(
    dev: Path, tmp_path: Path
) -> None:
    plain = {name.removeprefix(UNET): tensor for name, tensor in checkpoint_of(dev).items()}
    assert_same_model(opened(written(tmp_path / "flux.safetensors", plain, settings=dev)), opened(dev))


def test_its_names_become_those_that_diffusers_gives_them() -> None:
    checkpoint = names_of_width(3072)  # the only one that diffusers' converter knows
    ours = flux_file.convert_to_diffusers(dict(checkpoint))
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("part", SIZES)
def test_the_published_settings_have_the_published_sizes(part: str) -> None:
    kind, size = SIZES[part]
    assert parameters(kind, read_json(PUBLISHED_CONFIGS / part / "config.json")) == size


@pytest.mark.parametrize(("told", "steps", "tokens"), [(True, 28, 512), (False, 4, 256)])
def test_published_checkpoints_are_told_by_their_headers(
    tmp_path: Path, told: bool, steps: int, tokens: int
) -> None:
    guidance = {f"{UNET}guidance_in.in_layer.weight": torch.zeros(1)} if told else {}
    write_tensors(tmp_path / "flux.safetensors", few_tensors() | guidance)
    model = opened(tmp_path / "flux.safetensors")
    assert model.family.name == "FLUX.1"
    assert model.location.config("transformer")["guidance_embeds"] is told
    assert model.latent_shape == (16, 128, 128) and model.path.prediction_type == "flow"
    assert model.autoencoder_config["scaling_factor"] == 0.3611
    assert model.autoencoder_config["shift_factor"] == 0.1159
    assert model.location.config("text_encoder")["hidden_size"] == 768
    assert model.defaults["steps"] == steps
    assert model.family.spec(model.location, model.dtype).text_shapes["hidden"] == (tokens, 4096)
    shift = float(torch.tensor(1.15).exp()) if told else 1.0  # at 1024² pixels
    median = model.path.levels.b.median()
    expected = torch.tensor(shift / (1 + shift), dtype=median.dtype)
    torch.testing.assert_close(median, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("prefix", ["", UNET])
def test_the_transformer_alone_says_what_is_missing_and_what_to_take(
    dev: Path, tmp_path: Path, prefix: str
) -> None:
    alone = {prefix + name.removeprefix(UNET): tensor for name, tensor in transformer_of(dev).items()}
    write_tensors(tmp_path / "flux1-dev.safetensors", alone)
    missing = r"text encoder CLIP-L, text encoder T5 and autoencoder \(VAE\)"
    with pytest.raises(UserError, match=rf"FLUX.1 without its {missing}. Take a file that includes them"):
        opened(tmp_path / "flux1-dev.safetensors")


def test_the_door_answers_the_transformer_alone_with_one_sentence_and_exit_code_two(
    dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "flux1-dev.safetensors", tmp_path / "pictures"
    write_tensors(file, {name.removeprefix(UNET): value for name, value in transformer_of(dev).items()})
    answer = said_by_the_door(monkeypatch, capsys, "sample", "a dog", "--model", str(file), "--out", str(out))
    assert answer.startswith(f"Error: {file} holds the transformer of a FLUX.1 without its")
    assert len(answer.splitlines()) == 1 and not out.exists()


def test_a_file_without_t5_is_not_a_whole_flux(dev: Path, tmp_path: Path) -> None:
    fewer = {name: value for name, value in checkpoint_of(dev).items() if "t5xxl" not in name}
    write_tensors(tmp_path / "flux.safetensors", fewer)
    with pytest.raises(UserError, match=r"without its text encoder T5\. Take"):
        opened(tmp_path / "flux.safetensors")


def test_a_flux_for_another_task_is_told_for_what_it_is(tmp_path: Path) -> None:
    fill = few_tensors() | {f"{UNET}img_in.weight": torch.zeros(8, 384)}
    write_tensors(tmp_path / "fill.safetensors", fill)
    with pytest.raises(UserError, match="takes 384 channels and a latent has 64"):
        opened(tmp_path / "fill.safetensors")


def test_a_relative_of_flux_is_not_taken_for_one(tmp_path: Path) -> None:
    chroma = {name: value for name, value in few_tensors().items() if "vector_in" not in name}
    write_tensors(tmp_path / "chroma.safetensors", chroma)
    with pytest.raises(UserError, match=r"a derivative of it \(like Chroma\)"):
        opened(tmp_path / "chroma.safetensors")


def test_a_damaged_file_is_told(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"not a whole safetensors file.*Download"):
        opened(file)


@pytest.mark.parametrize("change", ["missing", "surplus", "another width"])
def test_a_transformer_that_does_not_fit_its_settings_is_a_clear_mistake(
    file: Path, dev: Path, change: str
) -> None:
    tensors, name = checkpoint_of(dev), f"{UNET}single_blocks.0.linear1.bias"
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        tensors[f"{UNET}single_blocks.1.linear1.bias"] = tensors[name]
    else:
        tensors[name] = tensors[name][:-1]
    write_tensors(file, tensors)
    with pytest.raises(UserError, match=r"Put the transformer/config\.json of this model beside the file"):
        _ = opened(file).denoiser


def test_t5_without_a_tokenizer_beside_the_file_says_where_to_put_it(file: Path) -> None:
    shutil.rmtree(file.parent / "tokenizer_2")
    with pytest.raises(UserError, match="Put the tokenizer_2/ folder of this model"):
        _ = opened(file).text_encoder


# The original layout, written down from Black Forest Labs' `flux/model.py` and `modules/layers.py` -------------


def checkpoint_of(folder: Path) -> Tensors:
    """A diffusers folder in the layout of ComfyUI's full checkpoints."""
    # Which is not used
    clip = part_of(folder, "text_encoder") | {"text_projection.weight": torch.ones(16, 16)}
    return {
        **transformer_of(folder),
        **autoencoder_of(folder, "vae."),
        **clip_of(clip, "clip_l"),
        **t5_of(part_of(folder, "text_encoder_2")),
    }


def transformer_of(folder: Path) -> Tensors:
    """The transformer of a diffusers folder by its original names."""
    return {UNET + name: value for name, value in original_flux(part_of(folder, "transformer")).items()}


def original_flux(blocks: Tensors) -> Tensors:
    """A transformer's tensors by the original names: layers side by side in one, shift before scale at the end."""
    original: Tensors = {}
    singles = {
        name: blocks.pop(name) for name in list(blocks) if name.startswith("single_transformer_blocks.")
    }
    double = together(
        blocks,
        {
            "attn.to_q attn.to_k attn.to_v": "img_attn.qkv",
            "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "txt_attn.qkv",
        },
    )
    single = together(singles, {"attn.to_q attn.to_k attn.to_v proj_mlp": "linear1"})
    for name, tensor in {**double, **single}.items():
        if name.startswith("norm_out.linear"):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        original[renamed(name, FLUX_NAMES)] = tensor
    return original


FLUX_NAMES = (
    (r"^time_text_embed\.timestep_embedder\.", "time_in."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"^time_text_embed\.text_embedder\.", "vector_in."),
    (r"\.linear_1\.", ".in_layer."),
    (r"\.linear_2\.", ".out_layer."),
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^(single_transformer_blocks\.\d+)\.norm\.linear\.", r"\1.modulation.lin."),
    (r"^(single_transformer_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"^(single_transformer_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"^(single_transformer_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
    (r"\.norm1\.linear\.", ".img_mod.lin."),
    (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
    (r"\.ff\.net\.2\.", ".img_mlp.2."),
    (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
    (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
)


def names_of_width(width: int) -> Tensors:
    """Every kind of tensor of the original transformer; rows count, columns are one."""
    random = torch.Generator().manual_seed(0)

    def layer(name: str, rows: int) -> Tensors:
        return {
            f"{name}.weight": torch.rand(rows, 1, generator=random),
            f"{name}.bias": torch.rand(rows, generator=random),
        }

    found: Tensors = {}
    for name in ("time_in", "vector_in", "guidance_in"):
        found |= layer(f"{name}.in_layer", width) | layer(f"{name}.out_layer", width)
    for name in ("img_in", "txt_in"):
        found |= layer(name, width)
    found |= layer("final_layer.linear", 64) | layer("final_layer.adaLN_modulation.1", 2 * width)
    for number in range(2):
        block = f"double_blocks.{number}."
        for side in ("img", "txt"):
            found |= layer(f"{block}{side}_mod.lin", 6 * width) | layer(f"{block}{side}_attn.qkv", 3 * width)
            found |= layer(f"{block}{side}_attn.proj", width)
            found |= layer(f"{block}{side}_mlp.0", 4 * width) | layer(f"{block}{side}_mlp.2", width)
            for norm in ("query_norm", "key_norm"):
                found[f"{block}{side}_attn.norm.{norm}.scale"] = torch.rand(128, generator=random)
        block = f"single_blocks.{number}."
        found |= layer(f"{block}modulation.lin", 3 * width) | layer(f"{block}linear1", 7 * width)
        found |= layer(f"{block}linear2", width)
        for norm in ("query_norm", "key_norm"):
            found[f"{block}norm.{norm}.scale"] = torch.rand(128, generator=random)
    return found


def few_tensors() -> Tensors:
    """Enough of a published checkpoint to tell it by."""
    return {
        f"{UNET}img_in.weight": torch.zeros(8, 64),
        f"{UNET}vector_in.in_layer.weight": torch.zeros(1),
        f"{UNET}double_blocks.0.img_mod.lin.weight": torch.zeros(1),
        "vae.decoder.conv_in.weight": torch.zeros(512, 16, 3, 3),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": torch.zeros(1),
        "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight": torch.zeros(1),
    }
