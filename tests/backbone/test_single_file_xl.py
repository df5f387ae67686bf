"""Stable Diffusion XL in one file: the same model as the folder it was written from, without a network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from backbone.families.location import PUBLISHED_CONFIGS
from backbone.io.console import UserError
from backbone.io.files import write_tensors
from backbone.models.model import Backbone
from tests.backbone.test_single_file import networks, part_of, some_pictures, text_of_version_2
from tests.tiny import tiny_stable_diffusion_xl

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "tokenizer_2")
SECOND = "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion_xl(tmp_path_factory.mktemp("single") / "xl")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> dict[str, Tensor]:
    """The random pipeline in the layout of Stability AI's generative-models."""
    found = {original(name): value for name, value in networks(folder).items()}
    for name, value in part_of(folder, "text_encoder").items():
        plain = name.removeprefix("text_model.")
        found[f"conditioner.embedders.0.transformer.text_model.{plain}"] = value
    second = {
        name.removeprefix("text_model."): value for name, value in part_of(folder, "text_encoder_2").items()
    }
    projection = second.pop("text_projection.weight")
    for name, value in text_of_version_2(second, layers=2).items():
        if ".resblocks.2." not in name:
            found[name.replace("cond_stage_model.model.", SECOND)] = value
    found[f"{SECOND}text_projection"] = projection.T.contiguous()
    return found


@pytest.fixture
def file(tmp_path: Path, folder: Path, checkpoint: dict[str, Tensor]) -> Path:
    write_tensors(tmp_path / "xl.safetensors", checkpoint)
    for part in PARTS:
        shutil.copytree(folder / part, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "xl.safetensors"


def original(name: str) -> str:
    for ours, theirs in (
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ):
        name = name.replace(ours, theirs)
    return name


def opened(place: Path) -> Backbone:
    return Backbone.open(str(place), device="cpu", precision="fp32")


def test_a_single_file_is_the_same_model_as_the_folder(file: Path, folder: Path) -> None:
    one, other = opened(file), opened(folder)
    prompts = ["a dog in the snow", "", "a red cat"]
    texts = [model.encode_prompts(prompts) for model in (one, other)]
    for name in ("hidden", "pooled"):
        torch.testing.assert_close(texts[0].text[name], texts[1].text[name], rtol=0, atol=1e-6)
    for ours, theirs in ((one.denoiser, other.denoiser), (one.autoencoder, other.autoencoder)):
        wanted = theirs.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())
    posteriors = [model.encode(some_pictures(other)).mean for model in (one, other)]
    torch.testing.assert_close(*posteriors, rtol=0, atol=1e-6)
    latents, level = posteriors[1][:1], other.schedule(4)[1]
    assert torch.equal(one.schedule(4).b, other.schedule(4).b)
    with torch.no_grad():
        said = [
            model.predictor(text[:1])(latents, level).noise
            for model, text in zip((one, other), texts, strict=True)
        ]
    torch.testing.assert_close(*said, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale_of", ["tensor", "row"])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_weights_of_8_bits_are_read_times_the_scales_beside_them(
    name: str, scale_of: str, file: Path, checkpoint: dict[str, Tensor]
) -> None:
    eight, rounded = dict(checkpoint), dict(checkpoint)
    for key, value in checkpoint.items():
        if re.search(r"(attn1\.to_q|self_attn\.q_proj|mlp\.c_fc)\.weight$", key):
            largest = value.abs().amax(1, keepdim=True) if scale_of == "row" else value.abs().max()
            scale, stem = largest / 448, key.removesuffix("weight")
            eight[key] = (value / scale).to(torch.float8_e4m3fn)
            eight |= {f"{stem}{name}": scale, f"{stem}comfy_quant": torch.zeros(3, dtype=torch.uint8)}
            rounded[key] = eight[key].float() * scale
    models: list[Backbone] = []
    for tensors in (eight, rounded):
        write_tensors(file.with_name(f"{len(models)}.safetensors"), tensors)
        models.append(opened(file.with_name(f"{len(models)}.safetensors")))
    ours, theirs = (model.denoiser.state_dict() for model in models)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    texts = [model.encode_prompts(["a dog"]).text["hidden"] for model in models]
    assert torch.equal(*texts)
    write_tensors(
        file, {**eight, **{key: value.to(torch.int8) for key, value in eight.items() if "to_q" in key}}
    )
    with pytest.raises(UserError, match="is quantised"):
        opened(file)


def test_the_published_settings_have_the_published_sizes() -> None:
    published: tuple[tuple[str, Any, int], ...] = (
        ("unet", UNet2DConditionModel, 2_567_463_684),
        ("text_encoder_2", CLIPTextModelWithProjection, 694_659_840),
    )
    for part, kind, size in published:
        config: Any = json.loads(
            (PUBLISHED_CONFIGS / "stable-diffusion-xl" / part / "config.json").read_text()
        )
        with init_empty_weights():
            model = kind(CLIPTextConfig.from_dict(config)) if "text" in part else kind.from_config(config)
        assert sum(value.numel() for value in model.parameters()) == size


FEW = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
    "model.diffusion_model.label_emb.0.0.weight": torch.zeros(1),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.zeros(1),
    f"{SECOND}ln_final.bias": torch.zeros(1),
    "first_stage_model.decoder.conv_in.weight": torch.zeros(512, 4, 3, 3),
}


def test_a_published_checkpoint_is_told_by_its_header(tmp_path: Path) -> None:
    write_tensors(tmp_path / "sdxl.safetensors", FEW)
    model = opened(tmp_path / "sdxl.safetensors")
    assert model.latent_shape == (4, 128, 128) and model.path.prediction_type == "epsilon"
    assert model.autoencoder_config["scaling_factor"] == 0.13025
    assert model.location.config("text_encoder")["hidden_size"] == 768
    write_tensors(tmp_path / "v.safetensors", {**FEW, "v_pred": torch.zeros(1)})
    assert opened(tmp_path / "v.safetensors").path.prediction_type == "v_prediction"


def test_a_file_s_marks_say_from_which_noise_it_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = torch.zeros(1)
    write_tensors(tmp_path / "noob.safetensors", {**FEW, "v_pred": one, "ztsnr": one})  # NoobAI-XL's
    path = opened(tmp_path / "noob.safetensors").path
    theirs = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=False,
    )
    theirs.set_timesteps(10)
    assert path.prediction_type == "v_prediction"
    levels = path.schedule(10, (4, 4)).a[:-1]
    torch.testing.assert_close(
        levels, theirs.alphas_cumprod[theirs.timesteps].sqrt().double(), rtol=0, atol=1e-6
    )
    assert float(levels[0]) == 0
    for mark, model in (("edm_mean", "Playground"), ("edm_vpred.sigma_max", "CosXL")):
        write_tensors(tmp_path / "edm.safetensors", {**FEW, mark: one})
        with pytest.raises(UserError, match=f"levels of noise of EDM, as {model}"):
            opened(tmp_path / "edm.safetensors")
    write_tensors(tmp_path / "rf.safetensors", FEW, {"modelspec.prediction_type": "rectified_flow"})
    with pytest.raises(UserError, match="says that it predicts 'rectified_flow'"):
        opened(tmp_path / "rf.safetensors")
    write_tensors(tmp_path / "my-vpred.safetensors", FEW)
    assert opened(tmp_path / "my-vpred.safetensors").path.prediction_type == "epsilon"
    assert "though its name says v" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_part_that_is_not_built_as_its_settings_say_is_a_clear_mistake(file: Path, part: str) -> None:
    shutil.rmtree(file.parent / part)  # so that the published settings are taken
    loaded = {"unet": "denoiser", "vae": "autoencoder"}.get(part, "text_encoder")
    with pytest.raises(UserError, match=f"Put the {part}/config.json of this model beside the file"):
        getattr(opened(file), loaded)
