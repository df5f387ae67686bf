"""What a UNet reads beside noisy latents and texts: a guidance scale, or nothing that is known here."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, TCDScheduler, UNet2DConditionModel

from backbone.io.console import UserError
from backbone.models.few_step.model import get_sampling_defaults
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, guide_steps, sample_latents
from tests import tiny

PROMPT = "a dog in the snow"


def opened(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def rebuilt(folder: Path, out: Path, **settings: Any) -> Path:
    """A copy of a tiny model with another random UNet."""
    shutil.copytree(folder, out)
    torch.manual_seed(3)
    config = {**UNet2DConditionModel.load_config(folder / "unet"), **settings}
    UNet2DConditionModel.from_config(config).save_pretrained(out / "unet")
    return out


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_stable_diffusion_xl(tmp_path_factory.mktemp("xl") / "model")


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_a_unet_that_is_told_the_guidance_draws_as_diffusers_does(
    family: str, tiny_folder: Path, xl: Path, tmp_path: Path
) -> None:
    folder = rebuilt(tiny_folder if family == "sd" else xl, tmp_path / "told", time_cond_proj_dim=9)
    model = opened(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for guidance in (1.0, 6.5):
        theirs = pipeline(
            prompt=PROMPT,
            latents=draw_initial_noise(model, 3, 0, 0)[None],
            num_inference_steps=4,
            height=model.resolution,
            width=model.resolution,
            output_type="latent",
            guidance_scale=guidance,
        ).images
        (ours,) = sample_latents(model, [Request(PROMPT, (0, 0))], steps=4, guidance=guidance, seed=3)
        torch.testing.assert_close(ours[None] if ours.ndim == 3 else ours, theirs, rtol=0, atol=1e-4)


def test_outside_of_the_guided_steps_a_unet_that_is_told_the_guidance_is_told_that_there_is_none(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model = opened(rebuilt(tiny_folder, tmp_path / "told", time_cond_proj_dim=9))
    text, schedule = model.encode_prompts([PROMPT]), model.schedule(4)
    share = (0.0, 0.5)
    predict = guide_steps(model, text, empty=text, guidance=6.5, guided=share, schedule=schedule)
    noisy = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    for step, guidance in enumerate((6.5, 6.5, 1.0, 1.0)):
        expected = model.guided_predictor(text, text, guidance)(noisy, schedule[step])
        torch.testing.assert_close(predict(noisy, schedule[step]).noise, expected.noise)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cross_attention_dim": 24}, "texts of the width 24, and its encoders' are 16 wide"),
        ({"class_embed_type": "timestep"}, "more than the prompt .class_embed_type"),
        ({"num_class_embeds": 4}, "num_class_embeds 4"),
        ({"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        ({"out_channels": 8}, "predicts 8 channels and its latents have 4"),
    ],
)
def test_a_unet_that_reads_something_else_is_refused(
    settings: dict[str, Any], says: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        _ = opened(rebuilt(tiny_folder, tmp_path / "model", **settings)).denoiser


def test_a_unet_of_xl_with_sizes_of_the_refiner_is_refused(xl: Path, tmp_path: Path) -> None:
    folder = rebuilt(xl, tmp_path / "model", projection_class_embeddings_input_dim=5 * 8 + 12)
    with pytest.raises(UserError, match="of the width 52, and is given 60"):
        _ = opened(folder).denoiser


def test_a_size_of_two_sides_is_read_where_both_are_one(tiny_folder: Path, tmp_path: Path) -> None:
    assert opened(rebuilt(tiny_folder, tmp_path / "square", sample_size=[8, 8])).latent_shape == (4, 8, 8)
    for number, size in enumerate(([8, 16], None)):
        with pytest.raises(UserError, match="sample_size is"):
            _ = opened(rebuilt(tiny_folder, tmp_path / str(number), sample_size=size)).latent_shape


@pytest.mark.parametrize(("kind", "sampler"), [(LCMScheduler, "consistency"), (TCDScheduler, "ddim")])
def test_a_folder_with_the_scheduler_of_a_distillation_is_drawn_in_few_steps(
    kind: Any, sampler: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = rebuilt(tiny_folder, tmp_path / "model")
    (folder / "limner.json").unlink()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kind.from_config(config).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", kind.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    drawing = get_sampling_defaults(opened(folder))
    assert (drawing.steps, drawing.guidance, drawing.sampler) == (4, 1.0, sampler)
    told = get_sampling_defaults(opened(rebuilt(folder, tmp_path / "told", time_cond_proj_dim=8)))
    assert told.guidance == 8.5


def test_an_old_offset_is_one_as_in_diffusers_pipeline(tiny_folder: Path, tmp_path: Path) -> None:
    folder = rebuilt(tiny_folder, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps_offset": 0}))
    time, usual = opened(folder).schedule(5).time, opened(tiny_folder).schedule(5).time
    assert time is not None and usual is not None and time.tolist() == usual.tolist()


@pytest.mark.parametrize(
    "pipeline",
    ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline"],
)
def test_the_same_parts_saved_as_another_pipeline_are_the_same_model(
    pipeline: str, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": pipeline}))
    found, usual = (
        next(sample_latents(opened(folder), [Request(PROMPT, (0, 0))], steps=2, guidance=2.0, seed=0))
        for folder in (tmp_path / "model", tiny_folder)
    )
    assert torch.equal(found, usual)


def test_a_refiner_and_an_inpainting_unet_are_told_so(xl: Path, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(xl, tmp_path / "refiner")
    file = tmp_path / "refiner" / "model_index.json"
    said = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **said, "text_encoder": [None, None]}))
    with pytest.raises(UserError, match="is a refiner"):
        _ = opened(tmp_path / "refiner").denoiser
    folder = rebuilt(tiny_folder, tmp_path / "inpaint", in_channels=9)
    file = folder / "model_index.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "_class_name": "StableDiffusionInpaintPipeline"})
    )
    with pytest.raises(UserError, match="it is an inpainting model"):
        opened(folder)
