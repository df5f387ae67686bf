"""Images beside a prompt are read as diffusers reads them, at every door, and never by a model that reads none."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor
from transformers import (
    BatchFeature,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from typer.testing import CliRunner

import edit.cli
from backbone.families.flux.family import pack_latents
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json
from backbone.media.transforms import to_image
from backbone.models.model import Backbone
from backbone.models.references import encode_references, refuse_too_many
from backbone.models.sample import Request, draw_initial_noise, sample_latents
from customize.cli import app
from edit.methods.instruct import instruct
from tests import tiny
from tests.backbone.media.test_registration import picture

HERE = ("--precision", "fp32", "--device", "cpu")


def shown(seed: int) -> Image.Image:
    return to_image(picture(seed, 64, 64))


def tiny_kontext(folder: Path) -> Path:
    """FLUX.1 Kontext: dev's parts, and an index that names another pipeline."""
    tiny.tiny_flux(folder)
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", {**index, "_class_name": "FluxKontextPipeline"})
    return folder


def said_by_kontext(
    folder: Path, latents: Tensor, images: list[Image.Image], steps: int, lora: Path | None = None
) -> Tensor:
    pipeline: Any = FluxKontextPipeline.from_pretrained(folder)
    return called(
        pipeline, lora, image=images[0], latents=pack_latents(latents), max_area=64 * 64, _auto_resize=False,
        guidance_scale=3.0, num_inference_steps=steps,
    )  # fmt: skip


def said_by_flux2(
    folder: Path, latents: Tensor, images: list[Image.Image], steps: int, lora: Path | None = None
) -> Tensor:
    kind: Any = Flux2Pipeline if "dev" in folder.name else Flux2KleinPipeline
    pipeline: Any = kind.from_pretrained(folder)
    return called(
        pipeline, lora, image=images, latents=latents, guidance_scale=3.0, num_inference_steps=steps
    )


class Processor:
    """Qwen2-VL's processor without its side of videos, which needs another package."""

    def __init__(self, tokenizer: Any, images: Any) -> None:
        self.tokenizer, self.images = tokenizer, images

    def __call__(self, *, text: list[str], images: Any, padding_side: Any = None, **more: Any) -> Any:
        patches = self.images(images=images, return_tensors="pt")
        for grid in patches["image_grid_thw"]:
            count = int(grid.prod()) // self.images.merge_size**2
            text = [words.replace("<|image_pad|>", "<|looked|>" * count, 1) for words in text]
        text = [words.replace("<|looked|>", "<|image_pad|>") for words in text]
        tokens = self.tokenizer(text, padding=True, padding_side=padding_side, return_tensors="pt")
        return BatchFeature({**tokens, **patches})

    def apply_chat_template(self, messages: Any, **more: Any) -> list[list[int]]:
        return [
            self.tokenizer(f"<|im_start|>system\n{messages[0]['content'][0]['text']}<|im_end|>\n")[
                "input_ids"
            ]
        ]


def said_by_qwen(
    folder: Path, latents: Tensor, images: list[Image.Image], steps: int, lora: Path | None = None
) -> Tensor:
    """diffusers' pipeline, with the kinds of tokens that it leaves out (its issue 14194), at 64 × 64 pixels."""
    plus = "plus" in folder.name
    kind: Any = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    parts = {
        "vae": AutoencoderKLQwenImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
        "transformer": QwenImageTransformer2DModel,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    found = {name: kind.from_pretrained(folder, subfolder=name) for name, kind in parts.items()}
    looking = Processor(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"))
    pipeline: Any = kind(tokenizer=tokenizer, processor=looking, **found)
    encoder = pipeline.text_encoder
    plain, mark = encoder.forward, encoder.config.image_token_id

    def forward(input_ids: Tensor, **more: Any) -> Any:
        return plain(input_ids=input_ids, mm_token_type_ids=(input_ids == mark).int(), **more)

    encoder.forward = forward
    with pytest.MonkeyPatch.context() as patch:
        if plus:
            patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
        else:
            patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))
        return called(
            pipeline, lora, image=images if plus else images[0], latents=pack_latents(latents), negative_prompt="",
            true_cfg_scale=3.0, num_inference_steps=steps,
        )  # fmt: skip


def said_by_qwen21(
    folder: Path, latents: Tensor, images: list[Image.Image], steps: int, lora: Path | None = None
) -> Tensor:
    """diffusers' pipeline at 64 × 64 pixels, which compresses 8 times here and not 16; its latents decoded by ours."""
    parts = {
        "vae": AutoencoderKLQwenImage21,
        "text_encoder": Qwen3VLForConditionalGeneration,
        "transformer": QwenImage21Transformer2DModel,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    found: dict[str, Any] = {
        name: cast(Any, kind).from_pretrained(folder, subfolder=name) for name, kind in parts.items()
    }
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "processor")
    eye = Qwen2VLImageProcessorPil.from_pretrained(
        folder / "processor", size={"shortest_edge": 16, "longest_edge": 1 << 20}
    )
    pipeline: Any = QwenImage21Pipeline(processor=Processor(tokenizer, eye), **found)
    pipeline.vae_scale_factor = 8
    encoder = pipeline.text_encoder
    plain, mark = encoder.forward, encoder.config.image_token_id

    def forward(input_ids: Tensor, **more: Any) -> Any:
        return plain(input_ids=input_ids, mm_token_type_ids=(input_ids == mark).int(), **more)

    encoder.forward = forward
    drawn = called(
        pipeline, lora, image=images, latents=latents.flatten(2).transpose(1, 2), negative_prompt="",
        true_cfg_scale=3.0, num_inference_steps=steps, output_resolution=64, output_type="latent",
    )  # fmt: skip
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    return (model.decode(drawn.transpose(1, 2).unflatten(2, (8, 8))) + 1) / 2


def called(pipeline: Any, lora: Path | None, **asked: Any) -> Tensor:
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"output_type": "pt"} | asked
    return torch.as_tensor(pipeline(prompt="a red dog", height=64, width=64, **asked).images)


Said = Callable[..., Tensor]
READERS: dict[
    str, tuple[Callable[[Path], Path], Said, int, int]
] = {  # and images, and calls of one guided step
    "kontext": (tiny_kontext, said_by_kontext, 1, 1),
    "klein": (tiny.tiny_flux2_klein, said_by_flux2, 4, 2),
    "dev": (tiny.tiny_flux2_dev, said_by_flux2, 6, 1),
    "qwen-edit": (tiny.tiny_qwen_edit, said_by_qwen, 1, 2),
    "qwen-edit-plus": (partial(tiny.tiny_qwen_edit, plus=True), said_by_qwen, 3, 2),
    "qwen-image-2.1": (tiny.tiny_qwen_image21, said_by_qwen21, 4, 2),
}


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = request.param
    return name, READERS[name][0](tmp_path_factory.mktemp(name))


@pytest.mark.parametrize(("steps", "within"), [(2, 1e-5), pytest.param(20, 1e-4, marks=pytest.mark.slow)])
def test_references_are_read_as_diffusers_reads_them(
    reader: tuple[str, Path], steps: int, within: float
) -> None:
    name, folder = reader
    _, said, most, _ = READERS[name]
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    assert model.most_references == most and not model.reads_as_channels
    assert model.text_sees_images == ("qwen" in name)
    images = [shown(seed) for seed in range(min(2, most))]
    theirs = said(folder, draw_initial_noise(model, 0, 0, 0)[None], images, steps)

    def ours(some: list[Image.Image]) -> Tensor:
        (latents,) = sample_latents(
            model, [Request("a red dog", (0, 0))], steps=steps, guidance=3.0, seed=0,
            references=encode_references(model, some),
        )  # fmt: skip
        return (model.decode(latents) + 1) / 2

    assert float((ours(images) - theirs).abs().max()) < within
    if len(images) > 1:
        assert float((ours(images[::-1]) - theirs).abs().max()) > 3e-5, "they have an order"
    assert float((ours([]) - theirs).abs().max()) > 1e-4


def test_an_instruction_is_told_of_the_image_and_too_many_are_refused(reader: tuple[str, Path]) -> None:
    name, folder = reader
    _, _, most, calls = READERS[name]
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    images = [shown(seed) for seed in range(min(2, most))]
    edited = instruct(
        model, images[0], ["a red dog"], references=images[1:], steps=2, guidance=3.0, keep="none"
    )
    assert edited.nfe == 2 * calls and edited.latents.shape[1:] == model.latent_shape
    with pytest.raises(UserError, match=rf"reads {most} images? beside the prompt, and {most + 1} are given"):
        refuse_too_many(model, most + 1)
    with pytest.raises(UserError, match="not guided by it"):
        instruct(model, images[0], ["a red dog"], image_guidance=2.0, steps=1)


def test_both_programs_take_references(reader: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = reader
    shown(0).save(tmp_path / "a.png")
    words = ["sample", "a red dog", "--reference", tmp_path / "a.png", "--model", folder, "--steps", 1, *HERE]
    done = CliRunner().invoke(
        app, [str(word) for word in (*words, "--out", tmp_path / "s")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["references"] == [
        str(tmp_path / "a.png")
    ]


def test_an_edit_with_a_second_reference_is_repeated_exactly(tmp_path: Path) -> None:
    folder = tiny.tiny_flux2_klein(tmp_path / "klein")
    for seed in (0, 1):
        shown(seed).save(tmp_path / f"{seed}.png")
    words = (
        *("instruct", tmp_path / "0.png", "--instruction", "a red dog", "--reference", tmp_path / "1.png"),
        *(
            "--model",
            folder,
            "--steps",
            1,
            "--background",
            "none",
            "--no-metrics",
            *HERE,
            "--out",
            tmp_path / "e",
        ),
    )
    for asked in (words, ("replay", tmp_path / "e", "--out", tmp_path / "again")):
        done = CliRunner().invoke(edit.cli.app, [str(word) for word in asked], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    first, second = (Image.open(tmp_path / name / "edit_0.png").tobytes() for name in ("e", "again"))
    assert first == second
    record = read_json(tmp_path / "e" / "run.json")
    assert record["settings"]["references"] == [str(tmp_path / "1.png")]
    assert str(tmp_path / "1.png") in record["files"]
    (tmp_path / "1.png").unlink()
    done = CliRunner().invoke(edit.cli.app, ["replay", str(tmp_path / "e"), "--out", str(tmp_path / "no")])
    assert "1.png is missing" in str(done.exception)


def test_a_model_that_reads_none_refuses_them(tiny_folder: Path, tmp_path: Path) -> None:
    shown(0).save(tmp_path / "a.png")
    words = [
        "sample",
        "a dog",
        "--reference",
        tmp_path / "a.png",
        "--model",
        tiny_folder,
        "--out",
        tmp_path / "s",
    ]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert "reads no image beside the prompt" in str(done.exception) and not (tmp_path / "s").exists()
