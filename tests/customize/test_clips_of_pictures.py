"""`customize clip --image`: a picture that begins to move, by a model that reads it alone."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffSparseControlNetPipeline,
    MotionAdapter,
    SparseControlNetModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.animatediff import pipeline_animatediff_sparsectrl
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from typer.testing import CliRunner

from backbone.adapters.config import CONFIG_KEY
from backbone.adapters.lora import activate_adapters
from backbone.adapters.motion import Moves, set_in_motion
from backbone.conditions.conditions import Conditions
from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors, write_json, write_tensors
from backbone.media.clips import read_film
from backbone.media.control.maps import find_numbered_maps
from backbone.memory.clips import ClipChoice, ClipEstimator, plan_clip
from backbone.models.clips.sparse import build_sparsectrl
from backbone.models.model import Backbone
from backbone.models.placement import Placement
from backbone.models.sample import Frames, Request, draw_initial_noise, sample_latents
from customize.cli import app
from customize.clips.picture_lora import load_loras, read_loras
from customize.clips.settings import ClipOptions
from customize.clips.sparse import open_sparse_condition, place_frames, split_controls
from customize.formats.convert import export_adapter, import_adapter, inspect_adapter
from customize.formats.read import read_adapter
from customize.formats.write import compare_updates
from tests.backbone.test_control import controlnet
from tests.tiny import tiny_motion_adapter, tiny_stable_video, tiny_unet

GIB = 2**30


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_video(tmp_path_factory.mktemp("video") / "svd")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((120, 60)).save(path)
    return path


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["clip", *map(str, words), "--device", "cpu"])


def refusal(answer: Any) -> str:
    assert answer.exit_code != 0
    return str(answer.exception) if isinstance(answer.exception, UserError) else str(answer.output)


def test_a_picture_moves_in_its_own_shape_and_the_command_repeats_it(
    video_folder: Path, photo: Path, tmp_path: Path
) -> None:
    usual = ("--image", photo, "--model", video_folder, "--precision", "fp32", "--steps", "1", "--count", "2")
    answer = call(*usual, "--out", tmp_path / "one", "--motion-bucket-id", "80")
    assert answer.exit_code == 0, answer.exception
    record, film = read_json(tmp_path / "one" / "run.json"), read_film(tmp_path / "one" / "p00-s01.webp")
    assert (len(film.frames), round(film.fps)) == (4, 7) and film.size == (96, 48)
    assert (
        record["motion_bucket_id"] == 80 and [one["prompt"] for one in record["clips"]] == ["photo.png"] * 2
    )
    again = shlex.split(record["command"])[2:]
    assert CliRunner().invoke(app, ["clip", *again, "--out", str(tmp_path / "two")]).exit_code == 0
    second = read_film(tmp_path / "two" / "p00-s01.webp")
    assert [one.tobytes() for one in second.frames] == [one.tobytes() for one in film.frames]
    assert film.frames[1].tobytes() != read_film(tmp_path / "one" / "p00-s00.webp").frames[1].tobytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a dog",), "The words beside the picture say nothing that moves in it"),
        (("--model", "moji"), "is told in words what to draw"),
        (("--motion", "some"), "moves by itself, so --motion would change nothing"),
        (("--negative", "blurry"), "reads no words to stay away from"),
        (("--image-at", "3"), "begins with its picture"),
        (("--image-at", "3", "--image-at", "4"), "1 --image and 2 --image-at"),
        (("--frames", "1"), "must lie between 2"),
        (("--width", "60"), "multiples of 16 pixels, and the width is 60"),
        (("--min-guidance", "5"), "Give a first one that is not above the last"),
        (("--image", "{folder}/none.png"), "none.png"),
        (("--motion-bucket-id", "-1"), "motion-bucket-id"),
    ],
)
def test_what_a_picture_alone_cannot_become_is_said_and_nothing_is_written(
    words: tuple[str, ...], said: str, video_folder: Path, photo: Path, tmp_path: Path
) -> None:
    given = [word.format(folder=tmp_path) for word in words]
    model = () if "--model" in words else ("--model", video_folder)
    out = tmp_path / "out"
    answer = call(*given, "--image", photo, *model, "--out", out)
    assert said in refusal(answer) and not out.exists()


def test_of_an_animated_file_it_is_said_that_its_first_frame_begins_to_move(
    video_folder: Path, photo: Path, tmp_path: Path
) -> None:
    still = Image.open(photo)
    still.save(tmp_path / "a.gif", save_all=True, append_images=[still.rotate(90)])
    usual = ("--model", video_folder, "--steps", "1", "--frames", "2", "--out", tmp_path / "out")
    answer = call("--image", tmp_path / "a.gif", *usual)
    assert answer.exit_code == 0 and "a.gif has 2 frames or pages, of which the first counts" in answer.output


def test_what_belongs_to_pictures_alone_is_refused_beside_words(video_folder: Path, photo: Path) -> None:
    assert "read a picture and no words (SVD)" in refusal(call("a dog", "--min-guidance", "2"))
    told = ("a dog", "--image", photo, "--sparsectrl", "x", "--noise-aug-strength", "1")
    assert "read a picture and no words (SVD)" in refusal(call(*told))
    assert "reads no words, so it cannot be used here" in refusal(
        call("a dog", "--motion", "x", "--model", video_folder)
    )


@pytest.mark.slow
def test_a_clip_is_drawn_as_it_was_planned(video_folder: Path, photo: Path, tmp_path: Path) -> None:
    usual = ("--image", photo, "--model", video_folder, "--steps", "1", "--out", tmp_path / "out")
    answer = call(*usual, "--vram", "1", "--precision", "bf16")
    assert answer.exit_code == 0 and "the clip needs 0.0" in answer.output
    assert "--decode-chunk-size 4" in read_json(tmp_path / "out" / "run.json")["command"]


@pytest.mark.slow
def test_a_device_is_planned_for_with_the_cheapest_savings(
    video_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Backbone.open(str(video_folder), device="cpu", precision="fp32", task="image-to-video")
    estimator = ClipEstimator(model, frames=4, places=(16, 16), device="cpu")
    start = ClipChoice(4)
    needs = {name: phase.total_bytes for name, phase in estimator.phases(start).items()}
    assert needs["decoding"] > needs["drawing"]
    roomy = plan_clip(estimator, 2.0, start)
    assert roomy.choice == start and "nothing changed" in roomy.lines()[0]
    tight = plan_clip(estimator, (needs["decoding"] - 1) / GIB / 0.95, start).choice
    assert tight.chunk < 4 and not tight.placement.one_by_one
    halved = estimator.phases(replace(start, placement=Placement(one_by_one=True)))["drawing"].total_bytes
    for name in ("decoding_bytes", "encoding_bytes"):
        monkeypatch.setattr(estimator, name, lambda rows: 0)
    assert plan_clip(estimator, halved / GIB / 0.95, start).choice.placement == Placement(one_by_one=True)
    with pytest.raises(
        UserError, match=r"4 frames does not fit in 0.001 GiB: with every saving it needs 0\.\d"
    ):
        plan_clip(estimator, 0.001, start)


@pytest.fixture(scope="module")
def networks(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A motion adapter and a SparseCtrl of the tiny picture model."""
    folder = tmp_path_factory.mktemp("networks")
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    tiny_motion_adapter().save_pretrained(folder / "motion")
    pixels: dict[str, Any] = {
        "conditioning_channels": 3,
        "use_simplified_condition_embedding": False,
        "conditioning_embedding_out_channels": (4, 4, 8, 8),
    }
    for name, settings in {"sparse": {}, "scribble": pixels}.items():
        sparse: Any = build_sparsectrl(model.denoiser, motion_max_seq_length=6, **settings)
        for value in sparse.controlnet_cond_embedding.parameters():
            torch.nn.init.normal_(value, std=0.3)
        for block in (*sparse.controlnet_down_blocks, sparse.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.3)
        sparse.save_pretrained(folder / name)
    return {name: folder / name for name in ("motion", "sparse", "scribble")}


def tell(tiny_folder: Path, networks: dict[str, Path], out: Path, *words: str | Path) -> Any:
    usual = ("--model", tiny_folder, "--motion", networks["motion"], "--precision", "fp32", "--out", out)
    named = () if "--sparsectrl" in words else ("--sparsectrl", networks["sparse"])
    frames = () if "--frames" in words else ("--frames", "4")
    return call("a dog", *usual, *named, "--steps", "2", *frames, *words)


def test_beside_words_pictures_are_frames_of_the_clip(
    tiny_folder: Path, networks: dict[str, Path], photo: Path, tmp_path: Path
) -> None:
    both = ("--image", photo, "--image", photo)
    answer = tell(tiny_folder, networks, tmp_path / "both", *both)
    assert answer.exit_code == 0, answer.exception
    assert "at its edges is cropped off" in answer.output
    record = read_json(tmp_path / "both" / "run.json")
    assert record["image_at"] == [0, 3] and record["sparsectrl"] == str(networks["sparse"])
    none = ("--image-at", "0", "--image-at", "-1", "--sparsectrl-scale", "0")
    assert tell(tiny_folder, networks, tmp_path / "off", *both, *none).exit_code == 0
    on, off = (read_film(tmp_path / name / "p00-s00.webp").frames[1].tobytes() for name in ("both", "off"))
    assert on != off


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--image-at", "4"), "none of number 4: the first is 0, the last 3 or -1"),
        (("--frames", "7"), "has positions for 6 frames, and 7"),
        (("--frames", "7", "--context-length", "6"), "Leave it out, and ask for no more --frames"),
        (("--sparsectrl", "some.ckpt"), "is a pickle"),
        (("--motion-bucket-id", "4"), "Leave it out"),
    ],
)
def test_frames_that_cannot_be_given_are_said_and_nothing_is_written(
    words: tuple[str, ...],
    said: str,
    tiny_folder: Path,
    networks: dict[str, Path],
    photo: Path,
    tmp_path: Path,
) -> None:
    answer = tell(tiny_folder, networks, tmp_path / "out", "--image", photo, *words)
    assert said in refusal(answer) and not (tmp_path / "out").exists()


def test_pictures_without_a_place_are_spread_from_the_first_frame_to_the_last() -> None:
    assert place_frames((), 1, 16) == [0] and place_frames((), 3, 16) == [0, 8, 15]
    assert place_frames((-1, 2), 2, 16) == [15, 2]
    with pytest.raises(UserError, match="Two pictures are at one frame"):
        place_frames((3, -1), 2, 4)


def draw_maps(folder: Path, *names: str, size: tuple[int, int] = (64, 64)) -> Path:
    """White bars on black, each at another place."""
    folder.mkdir()
    for number, name in enumerate(names):
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), (8 * number + 6, 10, 8 * number + 10, 50))
        image.save(folder / name)
    return folder


@pytest.mark.parametrize(("kind", "network"), [("sketch", "scribble"), ("rgb", "sparse")])
def test_maps_of_some_frames_hold_as_in_diffusers_pipeline(
    kind: str,
    network: str,
    tiny_folder: Path,
    networks: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = draw_maps(tmp_path / "maps", "bar_0003.png", "bar_0001.png")
    asked = ClipOptions(
        prompts=("a dog",),
        frames=4,
        motion=str(networks["motion"]),
        condition=(f"{kind}={maps}",),
        sparsectrl=str(networks[network]),
        sparsectrl_scale=0.7,
    )
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    set_in_motion(model, Moves(asked.motion))
    dense, sparse = split_controls(asked)
    (condition,) = open_sparse_condition(model, sparse, asked)
    assert dense == () and condition.facts["frames"] == [1, 3] and len(condition.maps) == 4
    (ours,) = sample_latents(
        model,
        [Request("a dog", (0, 0))],
        steps=2,
        guidance=3.0,
        seed=0,
        frames=Frames(4),
        controls=(condition.control,),
    )
    pipeline = AnimateDiffSparseControlNetPipeline.from_pretrained(
        tiny_folder,
        motion_adapter=MotionAdapter.from_pretrained(networks["motion"]),
        controlnet=SparseControlNetModel.from_pretrained(networks[network]),
    )
    pipeline.set_progress_bar_config(disable=True)
    # diffusers draws the latents of the given frames at random; here they are the posterior's mean
    monkeypatch.setattr(
        pipeline_animatediff_sparsectrl, "retrieve_latents", lambda encoded: encoded.latent_dist.mode()
    )
    theirs = pipeline(
        "a dog",
        latents=draw_initial_noise(model, 0, 0, 0, frames=Frames(4))[None],
        num_frames=4,
        num_inference_steps=2,
        guidance_scale=3.0,
        conditioning_frames=[Image.open(maps / f"bar_000{number}.png") for number in (1, 3)],
        controlnet_frame_indices=[1, 3],
        controlnet_conditioning_scale=0.7,
        output_type="latent",
    ).frames
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_maps_are_named_with_their_frames(tmp_path: Path) -> None:
    maps = draw_maps(tmp_path / "maps", "first,one.png", "last.png")
    said = f"0={maps}/first,one.png,-1={maps}/last.png"
    assert find_numbered_maps(said, 16) == {0: maps / "first,one.png", 15: maps / "last.png"}
    for wrong, answer in (
        (f"4={maps}/last.png", "none of that number"),
        (f"{said},3={maps}/a.png", "both of frame 3"),
    ):
        with pytest.raises(UserError, match=answer):
            find_numbered_maps(wrong, 4)


def test_maps_of_some_frames_stand_in_the_record_beside_maps_of_all(
    tiny_folder: Path, networks: dict[str, Path], tmp_path: Path
) -> None:
    some = draw_maps(tmp_path / "some", "0.png", "2.png")
    every = draw_maps(tmp_path / "every", *(f"{number}.png" for number in range(4)))
    controlnet(tiny_unet(), tmp_path / "net", 0)
    both = (
        "--condition",
        f"sketch={some}",
        "--condition",
        f"lines={every}",
        "--controlnet",
        tmp_path / "net",
    )
    usual = ("--sparsectrl", networks["scribble"])
    answer = tell(tiny_folder, networks, tmp_path / "both", *both, *usual)
    assert answer.exit_code == 0, answer.exception
    lines, sketch = read_json(tmp_path / "both" / "run.json")["conditions"]
    assert (lines["kind"], sketch["kind"], sketch["frames"]) == ("lines", "sketch", [0, 2])
    shown = read_film(tmp_path / "both" / "condition-1-sketch.webp").frames
    assert [frame.getbbox() is not None for frame in shown] == [True, False, True, False]
    off = tell(tiny_folder, networks, tmp_path / "off", *both[:2], *usual, "--sparsectrl-scale", "0")
    plain = call(*("a dog", "--model", tiny_folder, "--motion", networks["motion"], "--frames", "4", "--steps", "2"),
                 "--precision", "fp32", "--out", tmp_path / "plain")  # fmt: skip
    assert off.exit_code == plain.exit_code == 0
    frames = [
        read_film(tmp_path / name / "p00-s00.webp").frames[1].tobytes() for name in ("off", "plain", "both")
    ]
    assert frames[0] == frames[1] != frames[2]


@pytest.mark.parametrize(
    ("names", "words", "said"),
    [
        (
            ("0.png", "4.png"),
            (),
            "4.png is the map of frame 4, and a clip of 4 frames has none of that number",
        ),
        ((), (), "holds no images"),
        (("one.png",), (), "one.png has no number in its name"),
        (("1.png", "a_01.png"), (), "are both maps of frame 1"),
        (("1.png", "wide.2.png"), (), "differ in size: 64 × 64 and 96 × 64 pixels"),
        (("1.png",), ("--sparsectrl", "{sparse}"), "reads pictures (rgb=FOLDER)"),
        (("1.png",), ("--condition", "rgb={maps}"), "here are 2 such"),
        (("1.png",), ("--condition-scale", "0.5", "--sparsectrl-scale", "0.5"), "Give one of them"),
        (("1.png",), ("--guess-mode",), "has no guess mode"),
        (("1.png",), ("--condition", "rgb=auto"), "names no pictures. Give rgb=FOLDER"),
        (("1.png",), ("--condition", "rgb={maps}:auto"), "Leave :auto out"),
        (("1.png",), ("--frames", "7"), "has positions for 6 frames, and 7"),
        (("1.png",), ("--frames", "7", "--context-length", "6"), "draws them in windows"),
        (("1.png",), ("--image", "{maps}/1.png"), "and both are given. Leave one out"),
    ],
)
def test_maps_of_some_frames_that_cannot_be_read_are_said_and_nothing_is_written(
    names: tuple[str, ...],
    words: tuple[str, ...],
    said: str,
    tiny_folder: Path,
    networks: dict[str, Path],
    tmp_path: Path,
) -> None:
    maps = draw_maps(tmp_path / "maps", *names)
    if any(name.startswith("wide") for name in names):
        Image.new("RGB", (96, 64), "white").save(maps / "wide.2.png")
    given = [word.format(maps=maps, sparse=networks["sparse"]) for word in words]
    network = () if "--sparsectrl" in words else ("--sparsectrl", networks["scribble"])
    answer = tell(tiny_folder, networks, tmp_path / "out", "--condition", f"sketch={maps}", *network, *given)
    assert said in refusal(answer) and not (tmp_path / "out").exists()


def test_pictures_at_frames_without_their_network_are_refused(
    tiny_folder: Path, networks: dict[str, Path], tmp_path: Path
) -> None:
    maps = draw_maps(tmp_path / "maps", "0.png")
    usual = ("a dog", "--model", tiny_folder, "--motion", networks["motion"], "--frames", "4")
    assert "Name its network with --sparsectrl" in refusal(call(*usual, "--condition", f"rgb={maps}"))
    assert "customize clip --sparsectrl" in refusal(
        call(
            *usual,
            "--condition",
            f"sketch={maps}",
            "--controlnet",
            controlnet(tiny_unet(), tmp_path / "net", 0),
        )
    )


LAYERS = (  # of Stable Video Diffusion's network: over space, over time, between the blocks
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q",
    "up_blocks.1.attentions.1.temporal_transformer_blocks.0.attn1.to_out.0",
    "mid_block.attentions.0.proj_in",
)


def write_video_lora(folder: Path, video_folder: Path, style: str, layers: tuple[str, ...] = LAYERS) -> Path:
    """A LoRA of rank 2 and α 3 in another tool's names."""
    network: Any = Backbone.open(
        str(video_folder), device="cpu", precision="fp32", task="image-to-video"
    ).denoiser
    random, tensors = torch.Generator().manual_seed(0), {}
    name = {
        "diffusers": "unet.{}.lora_{}.weight",
        "peft": "base_model.model.{}.lora_{}.weight",
        "kohya": "lora_unet_{}.lora_{}.weight",
    }[style]
    for layer in layers:
        rows, columns = network.get_submodule(layer).weight.shape
        written = layer.replace(".", "_") if style == "kohya" else layer
        down, up = ("down", "up") if style == "kohya" else ("A", "B")
        tensors[name.format(written, down)] = torch.randn(2, columns, generator=random)
        tensors[name.format(written, up)] = torch.randn(rows, 2, generator=random)
        if style == "kohya":
            tensors[f"lora_unet_{written}.alpha"] = torch.tensor(3.0)
    folder.mkdir()
    if style == "peft":
        write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 3})
    config = {"unet.r": 2, "unet.lora_alpha": 3, "unet.target_modules": list(layers)}
    header = {CONFIG_KEY: json.dumps(config)} if style == "diffusers" else {}
    path = folder / ("adapter_model.safetensors" if style == "peft" else "one.safetensors")
    write_tensors(path, tensors, header)
    return folder if style == "peft" else path


@pytest.mark.parametrize("style", ["diffusers", "peft", "kohya"])
def test_a_lora_of_every_tool_changes_a_prediction_as_peft_does_in_diffusers_network(
    style: str, video_folder: Path, tmp_path: Path
) -> None:
    path = write_video_lora(tmp_path / style, video_folder, style)
    model = Backbone.open(str(video_folder), device="cpu", precision="fp32", task="image-to-video")
    assert set(load_loras(model.denoiser, read_loras(model, [path]), scale=0.5)) == {"lora_0"}
    theirs: Any = UNetSpatioTemporalConditionModel.from_pretrained(video_folder / "unet")
    known = read_tensors(write_video_lora(tmp_path / "known", video_folder, "diffusers"))[0]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=list(LAYERS)), theirs, "one")
    set_peft_model_state_dict(
        theirs, {name.removeprefix("unet."): value for name, value in known.items()}, "one"
    )
    for module in theirs.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 0.5)
    noisy, picture = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 4, 8, 8)
    conditions = Conditions(
        {"hidden": torch.randn(1, 1, 16), "ids": torch.tensor([[6.0, 127.0, 0.02]])}, references=(picture,)
    )
    index = torch.tensor([500])
    time = 0.25 * model.path.levels[index].sigma.float().log()
    given = torch.cat([noisy, picture[:, :, None].expand_as(noisy)], 1).transpose(1, 2)
    wanted = theirs(given, time, conditions.text["hidden"], added_time_ids=conditions.text["ids"]).sample
    found = model.predict(noisy, index, conditions)
    torch.testing.assert_close(found, wanted.transpose(1, 2), atol=1e-5, rtol=0)
    activate_adapters(model.denoiser, [])
    assert (model.predict(noisy, index, conditions) - found).abs().max() > 1e-3


def test_a_clip_is_drawn_with_a_lora_at_its_strength(video_folder: Path, photo: Path, tmp_path: Path) -> None:
    path = write_video_lora(tmp_path / "lora", video_folder, "kohya")
    usual = ("--image", photo, "--model", video_folder, "--precision", "fp32", "--steps", "1")
    films = {}
    for name, more in {
        "without": (),
        "half": ("--lora", path, "--scale", "0.5"),
        "none": ("--lora", path, "--lora-scale", "0"),
    }.items():
        answer = call(*usual, *more, "--out", tmp_path / name)
        assert answer.exit_code == 0, answer.exception
        films[name] = read_film(tmp_path / name / "p00-s00.webp").frames[1].tobytes()
    assert films["none"] == films["without"] != films["half"]
    record = read_json(tmp_path / "half" / "run.json")
    assert record["lora"] == [str(path)] and record["scale"] == 0.5 and "--scale 0.5" in record["command"]


@pytest.mark.parametrize(
    ("layer", "shape", "said"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", (64, 64), "is a LoRA of"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (32, 768), "Stable Diffusion 1.x"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (32, 8), "is 32 × 8 there and 32 × 16"),
        ("unet.down_blocks.3.resnets.0.spatial_res_block.conv1", (8, 8), "does not have"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", (8, 8), "of a model that reads words"),
        ("unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q", (8, 8), "is a motion LoRA"),
        ("", (8, 8), "named twice"),
    ],
)  # fmt: skip
def test_a_lora_of_another_model_is_refused_before_anything_is_written(
    layer: str, shape: tuple[int, int], said: str, video_folder: Path, photo: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    if layer:
        tensors = {
            f"{layer}.lora_A.weight": torch.ones(2, shape[1]),
            f"{layer}.lora_B.weight": torch.ones(shape[0], 2),
        }
        write_tensors(path, tensors)
    else:
        path = write_video_lora(tmp_path / "lora", video_folder, "kohya")
    twice = () if layer else ("--lora", path)
    answer = call("--image", photo, "--model", video_folder, "--lora", path, *twice, "--out", tmp_path / "o")
    assert said in refusal(answer) and not (tmp_path / "o").exists()


def test_the_strength_of_loras_that_there_are_not_is_refused(photo: Path) -> None:
    assert "Give --scale" in refusal(call("--image", photo, "--lora", "x", "--motion-scale", "2"))
    told = ("a dog", "--image", photo, "--sparsectrl", "x", "--motion", "y", "--lora", "z", "--scale", "2")
    assert "Give --motion-scale" in refusal(call(*told))


def test_a_lora_of_svd_is_described_and_written_for_diffusers_alone(
    video_folder: Path, tmp_path: Path
) -> None:
    path = write_video_lora(tmp_path / "lora", video_folder, "kohya")
    assert inspect_adapter(path)["base"] == "Stable Video Diffusion"
    export_adapter(path, tmp_path / "out.safetensors", "diffusers")
    assert compare_updates(read_adapter(path), read_adapter(tmp_path / "out.safetensors"))[0] < 1e-6
    with pytest.raises(UserError, match="no names for layers over time"):
        export_adapter(path, tmp_path / "k.safetensors", "kohya")
    with pytest.raises(UserError, match="reads no words, so no run is made of it"):
        import_adapter(path, tmp_path / "run", model=str(video_folder), token_words="sks")
