"""Single checkpoint files: the same model as the folder they were written from, without a network; and refusals."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from backbone.families.location import PUBLISHED_CONFIGS
from backbone.families.sd1.checkpoint import convert_to_transformers
from backbone.families.single_file import clip as clip_file
from backbone.families.single_file.clip import load_tokenizer
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.models.locate import locate
from backbone.models.model import Backbone

Tensors = dict[str, Tensor]
PARTS = ("unet", "vae", "text_encoder", "scheduler", "tokenizer")
SIZES = {  # parameters of the published models
    "stable-diffusion-1/unet": 859_520_964,
    "stable-diffusion-2/unet": 865_910_724,
    "768/unet": 865_910_724,
    "stable-diffusion-1/vae": 83_653_863,
    "stable-diffusion-1/text_encoder": 123_060_480,
    "stable-diffusion-2/text_encoder": 340_387_840,
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("there is no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Tensors:
    """The random pipeline in the layout of Stable Diffusion 1."""
    return {**networks(tiny_folder), **text_of_version_1(part_of(tiny_folder, "text_encoder"))}


@pytest.fixture
def file(tmp_path: Path, tiny_folder: Path, checkpoint: Tensors) -> Path:
    """The random pipeline as one file, with its settings beside it."""
    return written(tmp_path / "tiny.safetensors", checkpoint, settings=tiny_folder)


def test_a_single_file_is_the_same_model_as_the_folder(file: Path, tiny: Backbone) -> None:
    assert_same_model(opened(file), tiny)


def test_it_has_the_folder_s_shape_path_and_defaults(file: Path, tiny: Backbone, tiny_folder: Path) -> None:
    shutil.copy(tiny_folder / "limner.json", file.parent)
    single = opened(file)
    assert single.latent_shape == tiny.latent_shape
    assert single.resolution == tiny.resolution
    assert single.autoencoder_config == tiny.autoencoder_config
    assert single.defaults == tiny.defaults
    assert single.path.prediction_type == tiny.path.prediction_type
    assert torch.equal(single.schedule(4).a, tiny.schedule(4).a)


def test_a_version_2_text_encoder_is_the_same_too(tmp_path: Path, tiny_folder: Path, tiny: Backbone) -> None:
    text = text_of_version_2(part_of(tiny_folder, "text_encoder"), layers=2)
    file = written(tmp_path / "v2.safetensors", {**networks(tiny_folder), **text}, settings=tiny_folder)
    assert_same_model(opened(file), tiny)


def test_text_encoders_are_read_with_and_without_transformers_level(
    tmp_path: Path, tiny_folder: Path, checkpoint: Tensors, tiny: Backbone
) -> None:
    flat = {name.replace(".text_model.", "."): tensor for name, tensor in checkpoint.items()}
    assert flat.keys() != checkpoint.keys()
    single = opened(written(tmp_path / "flat.safetensors", flat, settings=tiny_folder))
    prompts = ["a dog in the snow"]
    assert torch.equal(
        single.encode_prompts(prompts).text["hidden"], tiny.encode_prompts(prompts).text["hidden"]
    )


def test_settings_in_a_folder_of_the_file_s_name_come_before_those_beside_it(
    file: Path, tiny_folder: Path
) -> None:
    settings = json.loads((tiny_folder / "scheduler" / "scheduler_config.json").read_text())
    own = file.with_suffix("") / "scheduler" / "scheduler_config.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps(settings | {"prediction_type": "v_prediction"}))
    before = opened(file.rename(file.with_name("other.safetensors")))
    assert before.path.prediction_type == "epsilon"
    file.with_name("other.safetensors").rename(file)
    assert opened(file).path.prediction_type == "v_prediction"


def test_an_autoencoder_without_a_scale_in_its_settings_has_the_usual_one(file: Path, tiny: Backbone) -> None:
    settings = file.parent / "vae" / "config.json"
    config = json.loads(settings.read_text())
    assert config.pop("scaling_factor") == 0.18215
    settings.write_text(json.dumps(config))  # as Stable Diffusion 1.5's own is
    pictures = some_pictures(tiny)
    assert torch.equal(opened(file).encode(pictures).mean, tiny.encode(pictures).mean)


def test_half_precision_keeps_the_text_encoder_and_the_autoencoder_safe(file: Path) -> None:
    model = Backbone.open(str(file), device="cpu", precision="fp16")
    assert next(model.denoiser.parameters()).dtype is torch.float16
    assert next(model.autoencoder.parameters()).dtype is torch.float32
    assert model.encode_prompts(["a dog"]).text["hidden"].dtype is torch.float32


def test_the_fingerprint_follows_weights_and_settings_and_not_the_name(
    file: Path, tmp_path: Path, tiny_folder: Path, checkpoint: Tensors
) -> None:
    first = opened(file).fingerprint
    assert opened(file.rename(file.with_name("renamed.safetensors"))).fingerprint == first
    for folder in ("weights", "settings"):
        (tmp_path / folder).mkdir()
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    changed = {**checkpoint, name: checkpoint[name] + 1}
    weights = written(tmp_path / "weights" / "tiny.safetensors", changed, settings=tiny_folder)
    settings = written(tmp_path / "settings" / "tiny.safetensors", checkpoint, settings=tiny_folder)
    scheduler = settings.parent / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("epsilon", "v_prediction"))
    assert len({first, opened(weights).fingerprint, opened(settings).fingerprint}) == 3


@pytest.mark.parametrize("part", SIZES)
def test_the_published_settings_have_the_published_sizes(part: str) -> None:
    config = json.loads((PUBLISHED_CONFIGS / part / "config.json").read_text())
    with init_empty_weights():
        if part.endswith("text_encoder"):
            model: Any = CLIPTextModel(CLIPTextConfig.from_dict(config))
        else:
            model = (UNet2DConditionModel if "unet" in part else AutoencoderKL).from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[part]


@pytest.mark.parametrize(
    ("name", "width", "metadata", "kind", "size", "said"),
    [
        ("sd15", 768, {}, "epsilon", 64, False),
        ("sd15-v", 768, {"modelspec.prediction_type": "v"}, "v_prediction", 64, False),
        ("v2-1_768-ema-pruned", 1024, {}, "v_prediction", 96, True),
        ("v2-1_512-ema-pruned", 1024, {}, "epsilon", 64, True),
        ("mine", 1024, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", 96, False),
        ("mine", 1024, {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", 64, False),
    ],
)
def test_published_checkpoints_are_told_by_their_headers(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    width: int,
    metadata: dict[str, str],
    kind: str,
    size: int,
    said: bool,
) -> None:
    path = tmp_path / f"{name}.safetensors"
    write_tensors(path, few_tensors(width), metadata)
    model = opened(path)
    assert model.path.prediction_type == kind
    assert model.latent_shape == (4, size, size)
    assert model.location.config("unet")["cross_attention_dim"] == width
    assert model.autoencoder_config["scaling_factor"] == 0.18215
    assert ("does not say what it predicts" in capsys.readouterr().err) is said


def test_openclip_s_names_become_those_that_diffusers_gives_them(tiny_folder: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    text = part_of(tiny_folder, "text_encoder")
    checkpoint = text_of_version_2(text, layers=2)
    theirs = convert_open_clip_checkpoint(CLIPTextModel, checkpoint)
    ours = convert_to_transformers(checkpoint, layers=2)
    assert ours.keys() == text.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[f"text_model.{name}"], tensor)


def test_the_tokenizer_is_clip_s_own_where_none_lies_beside_the_file(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tiny: Backbone
) -> None:
    stored = json.loads((tiny_folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(stored["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, stored["merges"])))
    monkeypatch.setattr(clip_file, "hub_file", lambda _, name, revision=None: tmp_path / name)
    write_tensors(tmp_path / "sd.safetensors", few_tensors(768))
    location = locate(str(tmp_path / "sd.safetensors"))
    prompt, like = "A dog in the snow", {"padding": "max_length", "max_length": 77}
    theirs = tiny.text_encoder.tokenizer(prompt, **like)["input_ids"]
    assert load_tokenizer(location, pads_with="<|endoftext|>")(prompt, **like)["input_ids"] == theirs
    assert load_tokenizer(location, pads_with="!")(prompt, **like)["input_ids"][-1] == 0  # as OpenCLIP pads


def test_a_file_without_a_tokenizer_beside_it_or_on_this_machine_says_where_to_put_one(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(clip_file, "TOKENIZER", "limner/on-no-machine")
    shutil.rmtree(file.parent / "tokenizer")
    with pytest.raises(UserError, match=r"Put a tokenizer/ folder"):
        opened(file).encode_prompts(["a dog"])


def test_a_tokenizer_of_another_model_is_a_clear_mistake(file: Path, tiny_folder: Path) -> None:
    stored = file.parent / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(stored.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"more{number}": len(vocabulary) + number for number in range(5)}
    stored.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"tokenizer has .* tokens"):
        opened(file).encode_prompts(["a dog"])


@pytest.mark.parametrize(
    ("part", "loaded"),
    [("unet", "denoiser"), ("vae", "autoencoder"), ("text_encoder", "text_encoder")],
)
def test_a_part_that_is_not_built_as_its_settings_say_is_a_clear_mistake(
    file: Path, part: str, loaded: str
) -> None:
    shutil.rmtree(file.parent / part)  # so that the published settings are taken
    with pytest.raises(UserError, match=f"Put the {part}/config.json of this model beside the file"):
        getattr(opened(file), loaded)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_a_part_with_a_tensor_too_few_or_too_many_is_a_clear_mistake(
    tmp_path: Path, tiny_folder: Path, checkpoint: Tensors, change: str
) -> None:
    name = "model.diffusion_model.out.2.bias"
    if change == "missing":
        changed = {other: tensor for other, tensor in checkpoint.items() if other != name}
    else:
        changed = {**checkpoint, "model.diffusion_model.out.3.bias": checkpoint[name]}
    file = written(tmp_path / "changed.safetensors", changed, settings=tiny_folder)
    with pytest.raises(UserError, match="unet"):
        _ = opened(file).denoiser


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.CKPT"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"pickle.*[Cc]onvert it to safetensors"):
        Backbone.open(str(tmp_path / name))


def test_a_pickle_under_another_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="holds a pickle"):
        Backbone.open(str(tmp_path / "model.safetensors"))


def test_a_damaged_download_is_told(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"not a whole safetensors file.*Download"):
        Backbone.open(str(file))


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b'{"error": "Unauthorized"}'])
def test_a_web_page_in_place_of_the_download_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"Log in"):
        Backbone.open(str(tmp_path / "model.safetensors"))


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(UserError, match="There is no file"):
        Backbone.open("models/missing.safetensors")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_k.lora_A.weight"], "a LoRA"),
        (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "a LoRA"),
        (
            ["conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.1.0.x"],
            "Stable Diffusion XL, or its refiner",
        ),
        (["model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"], "FLUX"),
        (["model.diffusion_model.joint_blocks.0.context_block.x"], "Stable Diffusion 3"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["first_stage_model.encoder.down.0.block.0.conv1.weight"], "an autoencoder"),
        (["encoder.down.0.block.0.conv1.weight"], "an autoencoder"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one part of a diffusers model"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "one part of a diffusers model"),
        (["emb_params"], "an embedding"),
        (
            ["model_ema.diffusion_modelinput_blocks00weight", "first_stage_model.encoder.down.0.x.weight"],
            r"the mean over its training \(EMA\) alone",
        ),
        (["model.diffusion_model.input_blocks.1.0.in_layers.0.weight"], "without its text encoder"),
        (
            [
                "model.diffusion_model.input_blocks.1.0.x",
                "first_stage_model.encoder.down.0.block.0.conv1.weight",
            ],
            "without its text encoder",
        ),
        (
            ["cond_stage_model.transformer.x", "first_stage_model.encoder.down.0.block.0.conv1.weight"],
            "without its UNet",
        ),
        (["something", "else"], "no checkpoint of a known layout"),
    ],
)
def test_a_file_that_is_no_stable_diffusion_checkpoint_is_told_for_what_it_is(
    tmp_path: Path, names: list[str], said: str
) -> None:
    write_tensors(tmp_path / "model.safetensors", {name: torch.zeros(1) for name in names})
    with pytest.raises(UserError, match=rf"{said}.*works with Stable Diffusion"):
        Backbone.open(str(tmp_path / "model.safetensors"))


def test_a_checkpoint_with_the_mean_of_its_weights_is_read_by_the_plain_ones_and_says_so(
    tmp_path: Path, tiny_folder: Path, checkpoint: Tensors, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = "model.diffusion_model."
    means = {
        f"model_ema.diffusion_model{name.removeprefix(unet).replace('.', '')}": torch.zeros_like(tensor)
        for name, tensor in checkpoint.items()
        if name.startswith(unet)
    }
    whole = {**checkpoint, **means, "model_ema.decay": torch.tensor(0.9999)}
    assert_same_model(opened(written(tmp_path / "ema.safetensors", whole, settings=tiny_folder)), tiny)
    assert "ema.safetensors also holds the mean" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["qweight", "wscales", "weight.absmax"])
def test_a_transformer_of_four_bits_is_told_for_what_it_is(tmp_path: Path, end: str) -> None:
    # As Nunchaku's and bitsandbytes' files of FLUX.1 and Qwen-Image, in diffusers' names
    name = f"transformer_blocks.0.attn.to_out.0.{end}"
    write_tensors(tmp_path / "model.safetensors", {name: torch.zeros(4, 4)})
    with pytest.raises(UserError, match=rf"is quantised in a format that is not supported \(it has {name}\)"):
        Backbone.open(str(tmp_path / "model.safetensors"))


def test_an_inpainting_checkpoint_is_told_for_what_it_is(tmp_path: Path) -> None:
    tensors = few_tensors(768) | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match="9 channels and a latent has 4, as for inpainting"):
        Backbone.open(str(tmp_path / "model.safetensors"))
    for channels, said in (
        (8, "InstructPix2Pix does, which is not read from a single file. .* timbrooks/instruct-pix2pix"),
        (5, r"5 channels and a latent has 4\)"),
    ):
        kernel = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, channels, 3, 3)}
        write_tensors(tmp_path / "model.safetensors", tensors | kernel)
        with pytest.raises(UserError, match=said):
            Backbone.open(str(tmp_path / "model.safetensors"))


def opened(file: Path) -> Backbone:
    return Backbone.open(str(file), device="cpu", precision="fp32")


def written(path: Path, tensors: Tensors, *, settings: Path) -> Path:
    """A checkpoint with copies of a diffusers folder's settings beside it, without its weights."""
    write_tensors(path, tensors)
    for part in PARTS:
        shutil.copytree(settings / part, path.parent / part, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def some_pictures(model: Backbone) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, model.resolution, model.resolution, generator=random) * 2 - 1


def assert_same_model(one: Backbone, other: Backbone) -> None:
    """Exactly the same embeddings, posteriors, pictures and predictions."""
    texts = [model.encode_prompts(["a dog in the snow", "a red cat"]) for model in (one, other)]
    assert torch.equal(texts[0].text["hidden"], texts[1].text["hidden"])
    posteriors = [model.encode(some_pictures(other)) for model in (one, other)]
    for mine, theirs in zip(*posteriors, strict=True):
        assert torch.equal(mine, theirs)
    latents = posteriors[1].mean
    assert torch.equal(one.decode(latents), other.decode(latents))
    with torch.no_grad():
        level = other.schedule(4)[1]
        predictions = [
            model.predictor(text)(latents, level) for model, text in zip((one, other), texts, strict=True)
        ]
    for mine, theirs in zip(*predictions, strict=True):
        assert torch.equal(mine, theirs)


# The original layout, written down from the original code: latent-diffusion's `openaimodel.py` and `model.py`.


def part_of(folder: Path, part: str) -> Tensors:
    (path,) = (folder / part).glob("*.safetensors")
    return read_tensors(path)[0]


def networks(folder: Path) -> Tensors:
    """The denoiser and the autoencoder of a diffusers folder, and what else original checkpoints hold."""
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    return {
        **{
            f"model.diffusion_model.{original_unet_name(name, unet)}": tensor
            for name, tensor in part_of(folder, "unet").items()
        },
        **{
            f"first_stage_model.{original_vae_name(name, blocks=len(vae['block_out_channels']))}": (
                tensor[:, :, None, None] if "mid_block.attentions" in name and tensor.ndim == 2 else tensor
            )
            for name, tensor in part_of(folder, "vae").items()
        },
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.zeros(()),
        "alphas_cumprod": torch.ones(1000),
    }


def original_unet_name(name: str, config: dict[str, Any]) -> str:
    """`down_blocks.1.resnets.0.conv1.weight` → `input_blocks.4.0.in_layers.2.weight`, and so on."""
    layers = config["layers_per_block"]
    for ours, original in (
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"\.norm1\.", ".in_layers.0."),
        (r"\.conv1\.", ".in_layers.2."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.norm2\.", ".out_layers.0."),
        (r"\.conv2\.", ".out_layers.3."),
        (r"\.conv_shortcut\.", ".skip_connection."),
    ):
        if "transformer_blocks" not in name:
            name = re.sub(ours, original, name)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return name.replace(found[0], f"middle_block.{place}.")
    if found := re.match(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.", name):
        block, kind, layer = int(found[1]), found[2], int(found[3])
        if kind == "downsamplers":
            return name.replace(f"{found[0]}conv", f"input_blocks.{(block + 1) * (layers + 1)}.0.op")
        place = 1 + block * (layers + 1) + layer
        return name.replace(found[0], f"input_blocks.{place}.{int(kind == 'attentions')}.")
    if found := re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.", name):
        block, kind, layer = int(found[1]), found[2], int(found[3])
        if kind == "upsamplers":
            after = 1 + ("CrossAttn" in config["up_block_types"][block])
            return name.replace(found[0], f"output_blocks.{block * (layers + 1) + layers}.{after}.")
        place = block * (layers + 1) + layer
        return name.replace(found[0], f"output_blocks.{place}.{int(kind == 'attentions')}.")
    return name


def original_vae_name(name: str, *, blocks: int) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` → `decoder.up.3.block.1.conv1.weight`, and so on."""
    name = re.sub(r"conv_norm_out", "norm_out", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(
        r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{blocks - 1 - int(found[1])}.block.", name
    )
    name = re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0\.", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample.", name
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("conv_shortcut", "nin_shortcut")
    for ours, original in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        name = name.replace(f"mid_block.attentions.0.{ours}", f"mid.attn_1.{original}")
    return name


def text_of_version_1(text: Tensors) -> Tensors:
    """Transformers' own names, of the time when it had a level `text_model` and kept its positions."""
    names = {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
    return {
        **names,
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }


def text_of_version_2(text: Tensors, *, layers: int) -> Tensors:
    """OpenCLIP's names, with a further layer that Stable Diffusion 2 does not use."""
    original: Tensors = {}
    for name, tensor in text.items():
        name = name.replace("embeddings.token_embedding", "token_embedding").replace(
            "embeddings.position_embedding.weight", "positional_embedding"
        )
        name = name.replace("final_layer_norm", "ln_final").replace("encoder.layers", "transformer.resblocks")
        name = name.replace("layer_norm1", "ln_1").replace("layer_norm2", "ln_2")
        name = name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        original[name.replace("self_attn", "attn")] = tensor
    for kind in ("weight", "bias"):
        for layer in range(layers):
            inside = f"transformer.resblocks.{layer}.attn."
            three = [original.pop(f"{inside}{letter}_proj.{kind}") for letter in "qkv"]
            original[f"{inside}in_proj_{kind}"] = torch.cat(three)
    unused = {
        name.replace("resblocks.0.", f"resblocks.{layers}."): tensor + 1
        for name, tensor in original.items()
        if "resblocks.0." in name
    }
    further = {"text_projection": torch.eye(16), "logit_scale": torch.ones(())}
    return {
        f"cond_stage_model.model.{name}": tensor for name, tensor in {**original, **unused, **further}.items()
    }


def few_tensors(width: int) -> Tensors:
    """Enough of a published checkpoint to tell it by."""
    text = "model.token_embedding.weight" if width == 1024 else "transformer.text_model.final_layer_norm.bias"
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        f"cond_stage_model.{text}": torch.zeros(1),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(512, 4, 3, 3),
    }
