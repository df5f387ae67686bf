"""Stable Video Diffusion in one file: the published names, and the same predictions as from diffusers' folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor

from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.stable_video.checkpoint import (
    PICTURE,
    TOWER,
    build_outline,
    name_coder_layers,
    name_unet_layers,
)
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.models.clips.animate import Still, condition_on, encode_still
from backbone.models.model import Backbone
from backbone.models.sample import Frames, draw_initial_noise
from tests.tiny import tiny_stable_video

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
PUBLISHED = {  # of svd.safetensors
    "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
    "down_blocks.1.attentions.1.proj_in.weight": "input_blocks.5.1.proj_in.weight",
    "down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
    "down_blocks.3.resnets.1.temporal_res_block.norm2.bias": "input_blocks.11.0.time_stack.out_layers.0.bias",
    "mid_block.resnets.1.time_mixer.mix_factor": "middle_block.2.time_mixer.mix_factor",
    "mid_block.attentions.0.time_pos_embed.linear_2.bias": "middle_block.1.time_pos_embed.2.bias",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
    "up_blocks.2.upsamplers.0.conv.weight": "output_blocks.8.2.conv.weight",
    "up_blocks.3.attentions.2.temporal_transformer_blocks.0.ff_in.net.0.proj.weight": (
        "output_blocks.11.1.time_stack.0.ff_in.net.0.proj.weight"
    ),
    "add_embedding.linear_2.weight": "label_emb.0.2.weight",
    "conv_norm_out.weight": "out.0.weight",
}
PUBLISHED_CODERS = {
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": f"{PICTURE}encoder.down.1.block.0.nin_shortcut.weight",
    "encoder.mid_block.attentions.0.to_out.0.bias": f"{PICTURE}encoder.mid.attn_1.proj_out.bias",
    "quant_conv.weight": f"{PICTURE}quant_conv.weight",
    "decoder.mid_block.resnets.1.time_mixer.mix_factor": "first_stage_model.decoder.mid.block_2.mix_factor",
    "decoder.up_blocks.0.resnets.2.temporal_res_block.conv1.weight": (
        "first_stage_model.decoder.up.3.block.2.time_stack.in_layers.2.weight"
    ),
    "decoder.up_blocks.2.upsamplers.0.conv.bias": "first_stage_model.decoder.up.1.upsample.conv.bias",
    "decoder.time_conv_out.weight": "first_stage_model.decoder.conv_out.time_mix_conv.weight",
}


def test_layers_are_called_as_in_the_published_files() -> None:
    location = Location("svd", "none.safetensors", {}, (PUBLISHED_CONFIGS / "stable-video-diffusion",))
    unet = name_unet_layers(build_outline(UNetSpatioTemporalConditionModel, location, "unet"))
    coders = name_coder_layers(build_outline(AutoencoderKLTemporalDecoder, location, "vae"), PICTURE)
    assert {name: unet[name] for name in PUBLISHED} == {k: UNET + v for k, v in PUBLISHED.items()}
    assert {name: coders[name] for name in PUBLISHED_CODERS} == PUBLISHED_CODERS
    assert len(set(unet.values())) == 1428 and len(set(coders.values())) == 374


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_video(tmp_path_factory.mktemp("video") / "svd")


@pytest.fixture(scope="module")
def original(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder under the original names, as the published files have them."""
    location = Location("svd", str(folder), {})
    tensors: dict[str, Tensor] = {}
    for part, kind, names in (
        ("unet", UNetSpatioTemporalConditionModel, name_unet_layers),
        ("vae", AutoencoderKLTemporalDecoder, lambda network: name_coder_layers(network, PICTURE)),
    ):
        held, _ = read_tensors(folder / part / "diffusion_pytorch_model.safetensors")
        for name, stored in names(build_outline(kind, location, part)).items():
            kernel = "mid.attn_1" in stored and stored.endswith(
                ("q.weight", "k.weight", "v.weight", "t.weight")
            )
            tensors[stored] = held[name][..., None, None] if kernel else held[name]
    encoder = {k: v for k, v in tensors.items() if k.startswith(f"{PICTURE}encoder.")}
    other = {FIRST_STAGE + k.removeprefix(PICTURE): v + 1 for k, v in encoder.items()}
    return tensors | other | name_tower(folder)


def name_tower(folder: Path) -> dict[str, Tensor]:
    """CLIP's tower as OpenCLIP has it: queries, keys and values in one, the projection on its side."""
    held, _ = read_tensors(folder / "image_encoder" / "model.safetensors")
    plain = {name.removeprefix("vision_model."): value for name, value in held.items()}
    tensors = {
        "proj": plain["visual_projection.weight"].T.contiguous(),
        "conv1.weight": plain["embeddings.patch_embedding.weight"],
        "class_embedding": plain["embeddings.class_embedding"],
        "positional_embedding": plain["embeddings.position_embedding.weight"],
    }
    for end in ("weight", "bias"):
        tensors |= {f"ln_pre.{end}": plain[f"pre_layrnorm.{end}"]}
        tensors |= {f"ln_post.{end}": plain[f"post_layernorm.{end}"]}
        for layer in range(2):
            block, own = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            tensors[f"{block}.attn.in_proj_{end}"] = torch.cat(
                [plain[f"{own}.self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            )
            for theirs, ours in {
                "attn.out_proj": "self_attn.out_proj",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }.items():
                tensors[f"{block}.{theirs}.{end}"] = plain[f"{own}.{ours}.{end}"]
    return {TOWER + name: value for name, value in tensors.items()}


def write_file(place: Path, folder: Path, tensors: dict[str, Tensor], *, configs: bool = True) -> Path:
    """One file, and the configs of its small model in the folder of its name."""
    for part in ("unet", "vae", "image_encoder", "scheduler") if configs else ():
        (place / "svd" / part).mkdir(parents=True)
        for config in (folder / part).glob("*config.json"):
            shutil.copy(config, place / "svd" / part)
    write_tensors(place / "svd.safetensors", tensors)
    return place / "svd.safetensors"


def open_video(path: Path) -> Backbone:
    return Backbone.open(str(path), device="cpu", precision="fp32", task="image-to-video")


def answers(model: Backbone) -> list[Tensor]:
    """A picture's embedding and latents, one prediction, decoded frames."""
    random = torch.Generator().manual_seed(0)
    still = Still(torch.rand(3, 64, 64, generator=random) * 2 - 1)
    hidden = encode_still(model, still)
    conditions = condition_on(model, still, hidden, torch.Generator().manual_seed(1))
    noisy = draw_initial_noise(model, 0, 0, 0, frames=Frames(4))[None]
    said = model.predict(noisy, torch.tensor([600]), conditions)
    return [hidden, conditions.references[0], said, model.decode_clip(noisy[0])]


def test_one_file_answers_as_the_diffusers_folder_of_the_same_weights(
    folder: Path, original: dict[str, Tensor], tmp_path: Path
) -> None:
    for found, wanted in zip(
        answers(open_video(write_file(tmp_path, folder, original))), answers(open_video(folder)), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_without_the_conditioner_s_autoencoder_the_first_stage_encodes_and_has_its_last_layer_in_itself(
    folder: Path, original: dict[str, Tensor], tmp_path: Path
) -> None:
    kept = {name: value for name, value in original.items() if not name.startswith(PICTURE)}
    model = open_video(write_file(tmp_path, folder, kept))
    network: Any = model.autoencoder
    held = original[f"{FIRST_STAGE}encoder.conv_in.weight"]
    assert torch.equal(network.encoder.conv_in.weight, held)
    given = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(network.quant_conv(given), given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (TOWER, "without its picture's encoder (CLIP's tower). Take the whole file"),
        (f"{FIRST_STAGE}decoder", "without its autoencoder"),
        (f"{UNET}middle_block.1.time_stack.0.norm_in.weight", "The unet in .* is not built as"),
        (f"{TOWER}proj", "The image_encoder in .* is not built as"),
        (f"{FIRST_STAGE}decoder.mid.block_1.mix_factor", "The vae in .* is not built as"),
    ],
)
def test_a_file_that_lacks_something_is_refused_with_what_it_lacks(
    change: str, said: str, folder: Path, original: dict[str, Tensor], tmp_path: Path
) -> None:
    kept = {name: value for name, value in original.items() if not name.startswith(change)}
    path = write_file(tmp_path, folder, kept)
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
        answers(open_video(path))


def test_the_number_of_frames_is_in_the_name_and_another_model_s_ids_are_refused(
    folder: Path, original: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_file(tmp_path, folder, original, configs=False)
    assert open_video(path).latent_shape == (4, 14, 96, 96)
    assert "by its name 14" in capsys.readouterr().err
    assert open_video(path.rename(tmp_path / "my_svd_XT_1.1.safetensors")).latent_shape == (4, 25, 96, 96)
    first, ids = f"{UNET}input_blocks.0.0.weight", f"{UNET}label_emb.0.0.weight"
    (tmp_path / "sv3d").mkdir()
    other = write_file(
        tmp_path / "sv3d",
        folder,
        {**original, first: torch.zeros(320, 8, 3, 3), ids: torch.zeros(1280, 1280)},
        configs=False,
    )
    with pytest.raises(UserError, match="its ids are 1280 and not 768 numbers"):
        open_video(other)
