"""Stable Diffusion 3 in one file: the same model as the folder it was written from, without a network; refusals."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from backbone.families.location import PUBLISHED_CONFIGS
from backbone.io.console import UserError, run_app
from backbone.io.files import read_json, write_tensors
from backbone.models.fingerprint import compute_fingerprint
from backbone.models.model import Backbone
from customize.cli import app
from tests.backbone.test_single_file import original_vae_name, part_of, some_pictures
from tests.tiny import clip_settings, tiny_stable_diffusion_3, tiny_tokenizer

Tensors = dict[str, Tensor]
UNET = "model.diffusion_model."
T5 = "text_encoders.t5xxl.transformer."
PROMPTS = ["a dog in the snow", "", "a red cat"]
PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
SIZES = {  # parameters of the published models
    "stable-diffusion-3/transformer": (SD3Transformer2DModel, 2_028_328_000),
    "stable-diffusion-3.5-medium/transformer": (SD3Transformer2DModel, 2_243_171_520),
    "stable-diffusion-3.5-large/transformer": (SD3Transformer2DModel, 8_056_627_520),
    "stable-diffusion-3/vae": (AutoencoderKL, 83_819_683),
    "stable-diffusion-3/text_encoder_3": (T5EncoderModel, 4_762_310_656),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline whose first CLIP projects nothing, as it is in the published ones."""
    folder = tiny_stable_diffusion_3(tmp_path_factory.mktemp("single") / "sd3")
    first = CLIPTextModelWithProjection(clip_settings(tiny_tokenizer(), width=12, end=2))
    torch.nn.init.eye_(first.text_projection.weight)
    first.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Tensors:
    """The random pipeline in the layout of Stability AI's files, with all encoders."""
    first = part_of(folder, "text_encoder")
    del first["text_projection.weight"]
    return {
        **transformer_of(folder),
        **autoencoder_of(folder, "first_stage_model."),
        **clip_of(first, "clip_l"),
        **clip_of(part_of(folder, "text_encoder_2"), "clip_g"),
        **t5_of(part_of(folder, "text_encoder_3")),
        "model_sampling.sigmas": torch.ones(1000),
    }


@pytest.fixture
def file(tmp_path: Path, folder: Path, checkpoint: Tensors) -> Path:
    return written(tmp_path / "sd3.safetensors", checkpoint, settings=folder)


def test_a_single_file_is_the_same_model_as_the_folder(file: Path, folder: Path) -> None:
    assert_same_model(opened(file), opened(folder))


def test_without_t5_a_file_is_the_same_model_as_a_folder_without_it(
    tmp_path: Path, folder: Path, checkpoint: Tensors
) -> None:
    without = tmp_path / "folder"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("*_3"))
    index = read_json(without / "model_index.json")
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (without / "model_index.json").write_text(json.dumps(index))
    fewer = {name: tensor for name, tensor in checkpoint.items() if not name.startswith(T5)}
    (tmp_path / "file").mkdir()
    one = opened(written(tmp_path / "file" / "sd3.safetensors", fewer, settings=folder))
    assert_same_model(one, opened(without))
    assert "text_encoder_3" not in one.family.spec(one.location, one.dtype).text_encoders
    assert one.encode_prompts(PROMPTS).text["hidden"][:, 77:].abs().max() == 0


def test_a_transformer_without_norms_and_second_attention_is_the_same_too(
    tmp_path: Path, folder: Path, checkpoint: Tensors
) -> None:
    settings = read_json(folder / "transformer" / "config.json")
    torch.manual_seed(1)
    plain = SD3Transformer2DModel.from_config(settings | {"qk_norm": None, "dual_attention_layers": []})
    other = tmp_path / "folder"
    shutil.copytree(folder, other)
    plain.save_pretrained(other / "transformer")
    rest = {name: tensor for name, tensor in checkpoint.items() if not name.startswith(UNET)}
    (tmp_path / "file").mkdir()
    file = written(tmp_path / "file" / "sd3.safetensors", {**rest, **transformer_of(other)}, settings=other)
    assert_same_model(opened(file), opened(other))


def test_a_transformer_without_a_prefix_beside_its_encoders_is_the_same_too(
    folder: Path, tmp_path: Path, checkpoint: Tensors
) -> None:
    plain = {name.removeprefix(UNET): tensor for name, tensor in checkpoint.items()}
    assert_same_model(opened(written(tmp_path / "sd3.safetensors", plain, settings=folder)), opened(folder))


@pytest.mark.parametrize("scaled", ["", "scale_weight", "weight_scale"])
def test_weights_of_8_bits_are_read_as_what_they_stand_for(
    tmp_path: Path, folder: Path, checkpoint: Tensors, scaled: str
) -> None:
    eight, rounded = dict(checkpoint), dict(checkpoint)
    for name, tensor in checkpoint.items():
        if name.startswith((UNET, T5)) and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.abs().max() / 448 if scaled else torch.ones(())  # 448 is the largest number
            eight[name] = (tensor / scale).to(torch.float8_e4m3fn)
            rounded[name] = eight[name].to(torch.float32) * scale
            if scaled:
                eight[name.replace(".weight", f".{scaled}")] = scale
                eight[name.replace(".weight", ".scale_input")] = torch.ones(())
                eight[name.replace(".weight", ".comfy_quant")] = torch.tensor([123, 125], dtype=torch.uint8)
    if scaled:
        eight |= {f"{prefix}scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn) for prefix in (UNET, T5)}
    models = []
    for name, tensors in (("eight", eight), ("rounded", rounded)):
        (tmp_path / name).mkdir()
        models.append(opened(written(tmp_path / name / "sd3.safetensors", tensors, settings=folder)))
    assert_same_model(models[0], models[1])


def test_half_precision_keeps_the_clips_and_the_autoencoder_safe(file: Path) -> None:
    model = Backbone.open(str(file), device="cpu", precision="fp16")
    assert next(model.denoiser.parameters()).dtype is torch.float16
    assert next(model.autoencoder.parameters()).dtype is torch.float32
    assert {next(side.model.parameters()).dtype for side in model.text_encoder.slots} == {torch.float32}
    assert model.text_encoder.t5.model.shared.weight.dtype is torch.float16  # type: ignore[attr-defined]


def test_the_fingerprint_follows_the_transformer_s_settings(file: Path) -> None:
    before = compute_fingerprint(opened(file).location)
    settings = file.parent / "transformer" / "config.json"
    settings.write_text(settings.read_text().replace('"sample_size": 8', '"sample_size": 16'))
    assert compute_fingerprint(opened(file).location) != before


@pytest.mark.parametrize("part", SIZES)
def test_the_published_settings_have_the_published_sizes(part: str) -> None:
    kind, size = SIZES[part]
    assert parameters(kind, read_json(PUBLISHED_CONFIGS / part / "config.json")) == size


@pytest.mark.parametrize(
    ("marks", "layers", "positions", "dual"),
    [
        ((), 24, 192, 0),
        (("x_block.attn.ln_q.weight", "x_block.attn2.qkv.weight"), 24, 384, 13),
        (("x_block.attn.ln_q.weight",), 38, 192, 0),
    ],
)
def test_published_checkpoints_are_told_by_their_headers(
    tmp_path: Path, marks: tuple[str, ...], layers: int, positions: int, dual: int
) -> None:
    tensors = few_tensors() | {f"{UNET}joint_blocks.0.{mark}": torch.zeros(1) for mark in marks}
    write_tensors(tmp_path / "sd3.safetensors", tensors)
    model = opened(tmp_path / "sd3.safetensors")
    settings = model.location.config("transformer")
    assert model.family.name == "Stable Diffusion 3"
    assert (settings["num_layers"], settings["pos_embed_max_size"]) == (layers, positions)
    assert len(settings["dual_attention_layers"]) == dual
    assert (settings["qk_norm"] is None) is not any("ln_q" in mark for mark in marks)
    assert model.latent_shape == (16, 128, 128) and model.path.prediction_type == "flow"
    assert model.autoencoder_config["scaling_factor"] == 1.5305
    assert model.autoencoder_config["shift_factor"] == 0.0609
    assert [model.location.config(f"text_encoder{n}")["hidden_size"] for n in ("", "_2")] == [768, 1280]
    # 3·t / (1 + 2·t) at t = ½, the middle of the ladder before it is shifted
    shifted = opened(tmp_path / "sd3.safetensors").path.levels.b
    torch.testing.assert_close(shifted.median(), torch.tensor(0.75, dtype=shifted.dtype), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (("text_encoders.clip",), "text encoder CLIP-L and text encoder CLIP-G"),
        (("text_encoders.clip_g", T5), "text encoder CLIP-G"),
        (("first_stage_model.",), "autoencoder"),
        (
            ("text_encoders.", "first_stage_model."),
            "text encoder CLIP-L, text encoder CLIP-G and autoencoder",
        ),
    ],
)
def test_a_file_without_a_part_says_which_and_what_to_take(
    tmp_path: Path, checkpoint: Tensors, without: tuple[str, ...], said: str
) -> None:
    fewer = {name: tensor for name, tensor in checkpoint.items() if not name.startswith(without)}
    write_tensors(tmp_path / "sd3.safetensors", fewer)
    with pytest.raises(UserError, match=rf"without its {said}.* Take the version that includes them"):
        opened(tmp_path / "sd3.safetensors")


def test_the_transformer_alone_without_a_prefix_is_told_too(tmp_path: Path, checkpoint: Tensors) -> None:
    alone = {name.removeprefix(UNET): value for name, value in checkpoint.items() if name.startswith(UNET)}
    write_tensors(tmp_path / "sd3.safetensors", alone)
    with pytest.raises(UserError, match="the transformer of a Stable Diffusion 3 without its"):
        opened(tmp_path / "sd3.safetensors")


def test_the_door_answers_a_file_without_clips_with_one_sentence_and_exit_code_two(
    tmp_path: Path, checkpoint: Tensors, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "sd3_medium.safetensors", tmp_path / "pictures"
    fewer = {name: tensor for name, tensor in checkpoint.items() if not name.startswith("text_encoders.")}
    write_tensors(file, fewer)
    answer = said_by_the_door(monkeypatch, capsys, "sample", "a dog", "--model", str(file), "--out", str(out))
    assert answer.startswith(f"Error: {file} holds the transformer of a Stable Diffusion 3 without its")
    assert len(answer.splitlines()) == 1 and not out.exists()


def test_a_damaged_file_is_told(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"not a whole safetensors file.*Download"):
        opened(file)


def test_t5_without_a_tokenizer_beside_the_file_says_where_to_put_it(file: Path) -> None:
    shutil.rmtree(file.parent / "tokenizer_3")
    with pytest.raises(UserError, match="Put the tokenizer_3/ folder of this model"):
        _ = opened(file).text_encoder


def test_a_tokenizer_of_another_t5_is_a_clear_mistake(file: Path) -> None:
    stored = file.parent / "tokenizer_3" / "tokenizer.json"
    tokenizer = json.loads(stored.read_text())
    tokenizer["model"]["vocab"] += [[f"more{number}", -9.0] for number in range(5)]
    stored.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"tokenizer_3 has .* tokens"):
        _ = opened(file).text_encoder


@pytest.mark.parametrize(
    ("part", "loaded"),
    [
        ("transformer", "denoiser"),
        ("vae", "autoencoder"),
        ("text_encoder", "text_encoder"),
        ("text_encoder_3", "text_encoder"),
    ],
)
def test_a_part_that_is_not_built_as_its_settings_say_is_a_clear_mistake(
    file: Path, part: str, loaded: str
) -> None:
    settings = file.parent / part / "config.json"
    config = json.loads(settings.read_text())
    size = next(name for name in ("num_layers", "num_hidden_layers", "latent_channels") if name in config)
    settings.write_text(json.dumps(config | {size: config[size] + 1}))
    with pytest.raises(UserError, match=f"Put the {part}/config.json of this model beside the file"):
        getattr(opened(file), loaded)


@pytest.mark.parametrize(
    ("name", "loaded"),
    [
        (f"{UNET}joint_blocks.1.x_block.mlp.fc1.bias", "denoiser"),
        (f"{UNET}final_layer.linear.bias", "denoiser"),
        (f"{T5}encoder.final_layer_norm.weight", "text_encoder"),
        ("text_encoders.clip_g.transformer.text_projection.weight", "text_encoder"),
    ],
)
@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_a_tensor_too_few_or_too_many_is_a_clear_mistake(
    tmp_path: Path, folder: Path, checkpoint: Tensors, name: str, loaded: str, change: str
) -> None:
    changed = dict(checkpoint)
    if change == "missing":
        del changed[name]
    else:
        changed[f"{name.rpartition('.')[0]}.more.bias"] = checkpoint[name]
    file = written(tmp_path / "sd3.safetensors", changed, settings=folder)
    with pytest.raises(UserError, match="is not built as"):
        getattr(opened(file), loaded)


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("weight.absmax", torch.zeros(4)),
        ("weight_scale", torch.ones(())),  # of a weight that is no fp8
        ("weight_scale_2", torch.ones(())),
        ("weight_scale_inv", torch.ones(1, 1)),  # of blocks of 128 × 128
    ],
)
def test_weights_of_few_bits_in_another_form_are_refused(
    name: str, beside: Tensor, tmp_path: Path, checkpoint: Tensors
) -> None:
    name = f"{UNET}joint_blocks.0.x_block.mlp.fc1.{name}"
    write_tensors(tmp_path / "sd3.safetensors", {**checkpoint, name: beside})
    with pytest.raises(UserError, match=r"quantised.*Take its version in fp16, bf16 or fp8"):
        opened(tmp_path / "sd3.safetensors")


def test_a_transformer_for_another_task_is_told_for_what_it_is(tmp_path: Path) -> None:
    tensors = few_tensors() | {f"{UNET}x_embedder.proj.weight": torch.zeros(4, 33, 2, 2)}
    write_tensors(tmp_path / "sd3.safetensors", tensors)
    with pytest.raises(UserError, match="takes 33 channels and a latent has 16"):
        opened(tmp_path / "sd3.safetensors")


# What both families' tests share ----------------------------------------------------------------------------


def opened(place: Path) -> Backbone:
    return Backbone.open(str(place), device="cpu", precision="fp32")


def written(path: Path, tensors: Tensors, *, settings: Path) -> Path:
    """A checkpoint with copies of a diffusers folder's settings beside it, without its weights."""
    write_tensors(path, tensors)
    for part in ("transformer", "vae", "scheduler", *PARTS):
        if (settings / part).is_dir():
            shutil.copytree(
                settings / part, path.parent / part, ignore=shutil.ignore_patterns("*.safetensors")
            )
    shutil.copy(settings / "limner.json", path.parent)
    return path


def parameters(kind: Any, config: dict[str, Any]) -> int:
    """How many a network of these settings has, without building its table of positions."""
    small = {"pos_embed_max_size": 8} if "pos_embed_max_size" in config else {}
    with torch.device("meta"):
        model = (
            kind(T5Config.from_dict(config)) if kind is T5EncoderModel else kind.from_config(config | small)
        )
    return sum(parameter.numel() for parameter in model.parameters())


def said_by_the_door(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What a command of `customize` says on stderr when it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["customize", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
    with pytest.raises(SystemExit) as leaving:
        run_app(app)
    assert leaving.value.code == 2
    return capsys.readouterr().err


def assert_same_model(one: Backbone, other: Backbone) -> None:
    """The same weights; to 1e-5 the same prompts' encodings, latents, pictures and a prediction; the same path."""
    for part in ("denoiser", "autoencoder"):
        mine, theirs = (getattr(model, part).state_dict() for model in (one, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert (one.latent_shape, one.defaults) == (other.latent_shape, other.defaults)
    assert one.path.prediction_type == other.path.prediction_type == "flow"
    assert torch.equal(one.schedule(4).b, other.schedule(4).b)
    assert torch.equal(one.path.levels.b, other.path.levels.b)
    texts = [model.encode_prompts(PROMPTS) for model in (one, other)]
    for name in ("hidden", "pooled"):
        torch.testing.assert_close(texts[0].text[name], texts[1].text[name], rtol=0, atol=1e-5)
    assert (
        texts[1].text["pooled"][0] - texts[1].text["pooled"][2]
    ).abs().max() > 1e-3  # prompts are told apart
    latents = [model.encode(some_pictures(other)).mean for model in (one, other)]
    torch.testing.assert_close(*latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(*(model.decode(latents[1]) for model in (one, other)), rtol=0, atol=1e-5)
    level = other.schedule(4)[1]
    with torch.no_grad():
        said = [
            model.predictor(text[:2])(latents[1], level).noise
            for model, text in zip((one, other), texts, strict=True)
        ]
    torch.testing.assert_close(*said, rtol=0, atol=1e-5)


# The original layout, written down from Stability AI's `mmdit.py` and `other_impls.py` of sd3.5 ---------------


def transformer_of(folder: Path) -> Tensors:
    """The transformer of a diffusers folder: queries, keys and values in one, and shift before scale at the end."""
    tensors = part_of(folder, "transformer")
    last = max(int(found[1]) for name in tensors if (found := re.match(r"transformer_blocks\.(\d+)\.", name)))
    ends = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    original: Tensors = {}
    for name, tensor in together(
        tensors,
        {
            "attn.to_q attn.to_k attn.to_v": "x_block.attn.qkv",
            "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv",
            "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "context_block.attn.qkv",
        },
    ).items():
        if name.startswith(ends):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        original[UNET + renamed(name, SD3_NAMES)] = tensor
    return original


SD3_NAMES = (
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.", "t_embedder.mlp."),
    (r"^time_text_embed\.text_embedder\.", "y_embedder.mlp."),
    (r"\.linear_1\.", ".0."),
    (r"\.linear_2\.", ".2."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.(attn2?)\.norm_(q|k)\.", r".x_block.\1.ln_\2."),
    (r"\.attn\.norm_added_(q|k)\.", r".context_block.attn.ln_\1."),
    (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
    (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
)


def renamed(name: str, names: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]) -> str:
    for ours, original in names:
        name = re.sub(ours, original, name)
    return name


def together(tensors: Tensors, groups: dict[str, str]) -> Tensors:
    """Layers that the original code keeps in one, by their names: those side by side → that of the one."""
    found = dict(tensors)
    for several, one in groups.items():
        first, *others = several.split()
        for name in tensors:
            if f".{first}." in name:
                names = [name, *(name.replace(f".{first}.", f".{other}.") for other in others)]
                if all(other in found for other in names):
                    found[name.replace(f".{first}.", f".{one}.")] = torch.cat([found.pop(n) for n in names])
    return found


def autoencoder_of(folder: Path, prefix: str) -> Tensors:
    return {
        prefix + original_vae_name(name, blocks=4): (
            tensor[:, :, None, None] if "mid_block.attentions" in name and tensor.ndim == 2 else tensor
        )
        for name, tensor in part_of(folder, "vae").items()
    }


def clip_of(tensors: Tensors, name: str) -> Tensors:
    """A CLIP with transformers' old level `text_model`, and what else the files hold."""
    level = {
        key if key.startswith("text_projection") else f"text_model.{key.removeprefix('text_model.')}": tensor
        for key, tensor in tensors.items()
    }
    named = {f"text_encoders.{name}.transformer.{key}": tensor for key, tensor in level.items()}
    return {**named, f"text_encoders.{name}.logit_scale": torch.ones(())}


def t5_of(tensors: Tensors) -> Tensors:
    named = {f"{T5}{name}": tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
    return {**named, "text_encoders.t5xxl.logit_scale": torch.ones(())}


def few_tensors() -> Tensors:
    """Enough of a published checkpoint to tell it by."""
    return {
        f"{UNET}x_embedder.proj.weight": torch.zeros(4, 16, 2, 2),
        f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1),
        "first_stage_model.decoder.conv_in.weight": torch.zeros(512, 16, 3, 3),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": torch.zeros(1),
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias": torch.zeros(1),
    }
