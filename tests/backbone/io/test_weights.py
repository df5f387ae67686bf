"""What a loader of diffusers or transformers may open."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from backbone.evaluation.clip import load_image_encoder
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.io.weights import check_weights, list_weight_files, read_weight_index
from backbone.models.locate import locate
from backbone.models.model import Backbone
from customize.formats.model_weights import ModelWeights
from tests.tiny import tiny_eye, tiny_stable_diffusion_xl

EVIL = b"\x80\x04cos\nsystem\n(S'touch evil'\ntR."
PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SHARDS: dict[str, Any] = {
    "a pickle": {"weight_map": {"w": "evil.bin"}},
    "a pickle in capitals": {"weight_map": {"w": "evil.BIN"}},
    "a pickle of torch": {"weight_map": {"w": "evil.pt"}},
    "a checkpoint": {"weight_map": {"w": "evil.ckpt"}},
    "no ending": {"weight_map": {"w": "evil"}},
    "a folder above": {"weight_map": {"w": "../vae/diffusion_pytorch_model.safetensors"}},
    "a folder below": {"weight_map": {"w": "sub/a.safetensors"}},
    "an absolute path": {"weight_map": {"w": "/tmp/a.safetensors"}},
    "another system's separator": {"weight_map": {"w": "..\\a.safetensors"}},
    "a hidden file": {"weight_map": {"w": ".safetensors"}},
    "nothing": {},
    "an empty map": {"weight_map": {}},
    "null": {"weight_map": None},
    "a list": [],
    "a number": {"weight_map": {"w": 1}},
}


@pytest.fixture
def model(tmp_path: Path, tiny_folder: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def load(folder: Path, part: str, precision: str = "fp32") -> Any:
    model = Backbone.open(str(folder), device="cpu", precision=precision)
    return {"unet": lambda: model.denoiser, "vae": lambda: model.autoencoder}.get(
        part, lambda: model.text_encoder
    )()


def use(folder: Path, part: str) -> object:
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    return model.latent_shape, model.path, load(folder, part)


@pytest.mark.parametrize("index", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("part", PARTS)
def test_an_index_names_only_safetensors_beside_it_and_no_pickle_is_opened(
    model: Path, monkeypatch: pytest.MonkeyPatch, part: str, index: Any
) -> None:
    monkeypatch.setattr(torch, "load", lambda *given, **named: pytest.fail("a pickle was opened"))
    (model / part / f"{PARTS[part]}.safetensors").unlink()
    (model / part / f"{PARTS[part]}.safetensors.index.json").write_text(json.dumps(index))
    for name in ("evil.bin", "evil.BIN", "evil.pt", "evil.ckpt", "evil"):
        (model / part / name).write_bytes(EVIL)
    with pytest.raises(UserError, match=r"index\.json"):
        load(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_shards_are_read_by_their_index(model: Path, part: str) -> None:
    file = model / part / f"{PARTS[part]}.safetensors"
    tensors, _ = read_tensors(file)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        write_tensors(file.with_name(shard), {name: tensors[name] for name in held}, {"format": "pt"})
    file.unlink()
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {n: shard for shard, held in shards.items() for n in held},
    }
    (model / part / f"{PARTS[part]}.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in list_weight_files(model / part)] == list(shards)
    assert load(model, part) is not None


def split(file: Path, factor: float = 1.0) -> list[Path]:
    """Two shards beside a file of weights, with their index; their values are times `factor`."""
    tensors, _ = read_tensors(file)
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        shard = file.with_name(f"{file.stem}-0000{number + 1}-of-00002.safetensors")
        write_tensors(shard, {name: factor * tensors[name] for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard.name)
    file.with_name(f"{file.name}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return [file.with_name(name) for name in sorted(set(weight_map.values()))]


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_there_twice_or_under_another_name_are_refused_and_nothing_is_chosen(
    model: Path, part: str
) -> None:
    file = model / part / f"{PARTS[part]}.safetensors"
    shards = split(file, factor=0.0)
    with pytest.raises(UserError, match="holds its weights twice, whole"):
        load(model, part)
    with pytest.raises(UserError, match="holds its weights twice, whole"):
        list_weight_files(model / part)
    file.rename(file.with_suffix(".away"))
    first, _ = read_tensors(shards[0])
    second, _ = read_tensors(shards[1])
    name = min(first)
    write_tensors(shards[1], second | {name: 7 + first[name]}, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} twice, in .*00001.* and in .*00002"):
        load(model, part)
    away = shards[1].rename(shards[1].with_suffix(".away"))
    said = rf"{part} lacks {shards[1].name} of the 2 files that {file.name}\.index\.json names\. Download that too"
    with pytest.raises(UserError, match=said):
        load(model, part)
    with pytest.raises(UserError, match=said):
        list_weight_files(model / part)
    away.rename(shards[1])
    for given in (*shards, file.with_name(f"{file.name}.index.json")):
        with pytest.raises(UserError, match=rf"one part of a model\. Name the model's folder: {model}\."):
            Backbone.open(str(given), device="cpu")
    file.with_name(f"{file.name}.index.json").unlink()
    with pytest.raises(UserError, match=rf"without {file.name}\.index\.json\. Download that too"):
        load(model, part)
    for shard in shards:
        shard.unlink()
    file.with_suffix(".away").rename(file.with_suffix(".non_ema.safetensors"))
    with pytest.raises(UserError, match=rf"variant .*Rename it to {file.name}"):
        load(model, part)
    file.with_suffix(".non_ema.safetensors").rename(file)
    assert load(model, part) is not None


@pytest.mark.parametrize("in_shards", [False, True], ids=["whole", "in shards"])
def test_a_model_that_was_downloaded_in_one_precision_is_opened(model: Path, in_shards: bool) -> None:
    """As `snapshot_download` of the files called `.fp16.safetensors` leaves it."""

    def networks() -> dict[str, Any]:
        opened = Backbone.open(str(model), device="cpu", precision="fp32")
        text = opened.text_encoder.slots[0].model
        return {"unet": opened.denoiser, "vae": opened.autoencoder, "text_encoder": text}

    before = {part: network.state_dict() for part, network in networks().items()}
    whole = Backbone.open(str(model), device="cpu").fingerprint
    for part, stem in PARTS.items():
        file = model / part / f"{stem}.safetensors"
        write_tensors(file, {name: value.half() for name, value in read_tensors(file)[0].items()}, {})
        if in_shards:
            index = file.with_name(f"{file.name}.index.json")
            for shard in split(file):
                renamed = shard.name.replace(f"{stem}-", f"{stem}.fp16-")
                index.write_text(index.read_text().replace(shard.name, renamed))
                shard.rename(shard.with_name(renamed))
            index.rename(index.with_suffix(".fp16.json"))
            file.unlink()
            assert len(list_weight_files(model / part)) == 2
        else:
            file.rename(file.with_suffix(".fp16.safetensors"))
    for part, network in networks().items():
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[part][name].half().to(value.dtype))
    assert Backbone.open(str(model), device="cpu").fingerprint != whole


def test_a_text_encoder_that_was_saved_as_it_was_compiled_is_told(model: Path) -> None:
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = model / part / f"{name}.safetensors"
        tensors, _ = read_tensors(file)
        write_tensors(file, {f"_orig_mod.{key}": value for key, value in tensors.items()}, {"format": "pt"})
    assert load(model, "unet") is not None
    with pytest.raises(UserError, match=r"as torch\.compile wraps it"):
        load(model, "text_encoder")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_was_saved_with_an_adapter_on_it_is_told(model: Path, part: str) -> None:
    file = model / part / f"{PARTS[part]}.safetensors"
    tensors, _ = read_tensors(file)
    layer = next(name for name in tensors if name.endswith(("to_q.weight", "q_proj.weight"))).removesuffix(
        ".weight"
    )
    wrapped = {name.replace(f"{layer}.", f"{layer}.base_layer."): value for name, value in tensors.items()}
    width = tensors[f"{layer}.weight"].shape[1]
    write_tensors(file, wrapped | {f"{layer}.lora_A.default.weight": torch.ones(2, width)}, {"format": "pt"})
    with pytest.raises(UserError, match=r"was saved with an adapter on it \(base_layer in its names\)"):
        load(model, part)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", bytes(100), EVIL, b"PK\x03\x04" + bytes(60), b"<html>", (2**63).to_bytes(8, "little")],
)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_weight_file_is_one_sentence(model: Path, part: str, content: bytes) -> None:
    (model / part / f"{PARTS[part]}.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="safetensors"):
        load(model, part)


@pytest.mark.parametrize("kind", [torch.int8, torch.complex64, torch.bool])
@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_no_floating_point_numbers_are_refused_and_not_drawn_with(
    model: Path, part: str, kind: torch.dtype
) -> None:
    file = model / part / f"{PARTS[part]}.safetensors"
    tensors, _ = read_tensors(file)
    name = next(name for name in sorted(tensors) if name.endswith(".weight"))
    write_tensors(file, {**tensors, name: tensors[name].to(kind)}, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} has the type (I8|C64|BOOL)\. Take its version in fp16"):
        load(model, part)


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale_inv"])
@pytest.mark.parametrize("part", PARTS)
def test_weights_of_eight_bits_with_scales_beside_them_are_refused_in_a_folder_whose_loaders_drop_them(
    model: Path, part: str, end: str
) -> None:
    file = model / part / f"{PARTS[part]}.safetensors"
    tensors, _ = read_tensors(file)
    name = next(name for name in sorted(tensors) if name.endswith(".weight") and tensors[name].ndim == 2)
    scale = tensors[name].abs().max().float() / 448
    small = {
        name: (tensors[name] / scale).to(torch.float8_e4m3fn),
        f"{name.removesuffix('weight')}{end}": scale,
    }
    write_tensors(file, tensors | small, {"format": "pt"})
    said = rf"is quantised: it has .*{end} beside its weights.*fp16, bf16 or fp32"
    with pytest.raises(UserError, match=said):
        load(model, part)
    if part != "vae":  # what is extracted from it, or baked, would be of other weights
        with pytest.raises(UserError, match=said):
            ModelWeights(locate(str(model)))


@pytest.mark.parametrize("left", [0, 1, -1])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_with_missing_tensors_is_refused_and_not_made_up(model: Path, part: str, left: int) -> None:
    file = model / part / f"{PARTS[part]}.safetensors"
    tensors, _ = read_tensors(file)
    kept = dict(list(tensors.items())[:left])
    write_tensors(file, kept, {"format": "pt"})
    with pytest.raises(UserError, match=r"is not whole: .* missing"):
        load(model, part)


@pytest.mark.parametrize("key", ["transformers_weights", "auto_map"])
def test_a_config_that_names_other_files_is_refused(model: Path, key: str) -> None:
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    (model / "text_encoder" / "config.json").write_text(json.dumps({**config, key: "../evil.safetensors"}))
    with pytest.raises(UserError, match=key):
        load(model, "text_encoder")


def test_an_adapter_beside_a_text_encoder_is_refused(model: Path) -> None:
    (model / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/name"}')
    with pytest.raises(UserError, match=r"adapter_config\.json would load weights from elsewhere"):
        load(model, "text_encoder")


def test_a_scorer_folder_is_looked_at_in_the_same_way(tmp_path: Path) -> None:
    folder = tiny_eye(tmp_path / "eye", "dinov2")
    check_weights(folder)
    tensors, _ = read_tensors(folder / "model.safetensors")
    write_tensors(folder / "model.safetensors", dict(list(tensors.items())[:-2]), {"format": "pt"})
    with pytest.raises(UserError, match="is not whole"):
        load_image_encoder(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "evil.bin"}}')
    with pytest.raises(UserError, match=r"'evil\.bin'"):
        load_image_encoder(folder)
    with pytest.raises(UserError, match=r"'evil\.bin'"):
        read_weight_index(folder / "model.safetensors.index.json")


CONFIGS: dict[str, tuple[str, Any]] = {
    "channels as a text": ("unet", {"block_out_channels": "x"}),
    "no channels": ("unet", {"block_out_channels": []}),
    "channels for no memory": ("unet", {"block_out_channels": [2**40, 2**40]}),
    "a size as a text": ("unet", {"sample_size": "big"}),
    "blocks of no kind": ("unet", {"down_block_types": ["NoBlock", "DownBlock2D"]}),
    "layers without end": ("text_encoder", {"num_hidden_layers": 10**9}),
    "no width": ("text_encoder", {"hidden_size": 0}),
    "a width as a list": ("text_encoder", {"hidden_size": [16]}),
    "heads that do not fit": ("text_encoder", {"num_attention_heads": 3}),
    "a shift beyond all numbers": ("unet", {"freq_shift": 10**30}),
    "a shift as a text": ("unet", {"freq_shift": "x"}),
    "a shift of 400 digits": ("unet", {"freq_shift": 10**400}),
    "a padding that is a bool": ("unet", {"downsample_padding": True}),
    "an epsilon as a list of texts": ("unet", {"norm_eps": ["x"]}),
    "no steps": ("scheduler", {"num_train_timesteps": 0}),
    "betas as a text": ("scheduler", {"beta_start": "x"}),
    "a scale as a text": ("vae", {"scaling_factor": "x"}),
    "no number of latents": ("vae", {"latent_channels": None}),
    "other inputs as a list": ("unet", {"encoder_hid_dim": [[]]}),
    "an activation that there is not": ("vae", {"act_fn": "none of them"}),
}


@pytest.mark.parametrize(("part", "change"), CONFIGS.values(), ids=CONFIGS)
def test_a_damaged_config_is_one_sentence(model: Path, part: str, change: dict[str, Any]) -> None:
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=part):
        use(model, part)


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({"model_max_length": 10**30}, 77),
        ({"model_max_length": 1000}, 77),
        ({"model_max_length": 20}, 20),
        ({"model_max_length": 0}, 0),
        ({"model_max_length": 1.5}, 0),
        ({"pad_token": "<no such>"}, 0),
    ],
    ids=str,
)
def test_a_tokenizer_gives_what_its_encoder_has_positions_and_embeddings_of(
    model: Path, change: dict[str, Any], length: int
) -> None:
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if length:
        assert load(model, "text_encoder").tokenizer.model_max_length == length
    else:
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            load(model, "text_encoder")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_under_the_name_of_another_library_or_behind_a_link_are_told_for_what_they_are(
    model: Path, part: str
) -> None:
    file = next((model / part).glob("*.safetensors"))
    other = file.with_name("model.safetensors" if part == "unet" else "diffusion_pytorch_model.safetensors")
    file.rename(other)
    with pytest.raises(UserError, match=rf"{other.name}\). Rename it to {file.name}"):
        load(model, part)
    other.unlink()
    file.symlink_to("../blobs/0a1b")
    with pytest.raises(
        UserError, match=rf"{file.name} is a link to ../blobs/0a1b, which is not there\. Download"
    ):
        load(model, part)


def test_a_tokenizer_without_its_vocabulary_is_refused_and_not_drawn_with(model: Path) -> None:
    (model / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="text_encoder knows no words"):
        load(model, "text_encoder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_max_length": "77"}, "says model_max_length 77"),
        ({"unk_token": ""}, "that its vocabulary lacks"),
    ],
)
def test_a_tokenizer_that_reads_no_prompt_is_one_sentence(
    model: Path, change: dict[str, Any], words: str
) -> None:
    """The first was a `TypeError`, the second a `RecursionError`."""
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words):
        load(model, "text_encoder")


def test_what_a_mac_leaves_beside_files_on_other_disks_is_no_part_of_a_model(model: Path) -> None:
    for file in [*model.glob("*/*.json"), *model.glob("*/*.safetensors")]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    for part in ("unet", "vae", "text_encoder"):
        use(model, part)


@pytest.mark.parametrize(
    ("part", "value", "precision"),
    [
        ("unet", float("inf"), "bf16"),  # attention on a processor makes zeros of such a query, and draws
        ("vae", float("nan"), "fp32"),
        ("text_encoder", float("-inf"), "fp32"),
        ("unet", 1e6, "fp16"),  # finite in the file
    ],
)
def test_a_weight_that_is_infinite_or_no_number_is_refused_by_name_and_not_drawn_with(
    model: Path, part: str, value: float, precision: str
) -> None:
    (file,) = (model / part).glob("*.safetensors")
    tensors, metadata = read_tensors(file)
    name = next(name for name in tensors if name.endswith(("to_q.weight", "q_proj.weight")))
    tensors[name][0, 1] = value
    write_tensors(file, tensors, metadata)
    remedy = "give --precision bf16 or fp32, or download" if precision == "fp16" else "Download"
    with pytest.raises(UserError, match=rf"not finite numbers \({name}\).*{remedy} the model again"):
        load(model, part, precision)


@pytest.mark.parametrize(
    "file", ["model_index.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"]
)
def test_a_pointer_of_git_in_place_of_a_model_s_record_is_told(model: Path, file: str) -> None:
    (model / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(
        UserError, match=rf"{file} is a Git LFS pointer, not the file itself\. Run `git lfs pull`"
    ):
        use(model, "text_encoder")


def test_a_tokenizer_without_its_settings_is_refused_since_it_would_fill_prompts_up_otherwise(
    tmp_path: Path,
) -> None:
    model = tiny_stable_diffusion_xl(tmp_path / "xl")
    (model / "tokenizer_2" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_2 lacks tokenizer_config\.json"):
        load(model, "text_encoder")


def test_a_word_that_was_added_to_the_tokenizer_alone_is_refused_by_name(model: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    tokenizer.add_tokens(["cattoy"])
    tokenizer.save_pretrained(model / "tokenizer")
    encoder = load(model, "text_encoder")
    encoder(["a dog"])
    with pytest.raises(UserError, match="has the token cattoy, and the encoder has no embedding of it"):
        encoder(["a cattoy"])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b'{"model": 3}', b'{"version": "9"}'])
def test_a_damaged_tokenizer_is_one_sentence_or_of_no_account(model: Path, name: str, content: bytes) -> None:
    (model / "tokenizer" / name).write_bytes(content)
    with suppress(UserError):  # nothing else
        load(model, "tokenizer")
