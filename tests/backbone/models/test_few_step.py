"""Few-step models: opened beside their base, refused where they are no pair, and those that are a LoRA on the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from backbone.adapters.lora import LORA_WEIGHTS, add_lora, load_lora, lora_parameters, save_lora
from backbone.diffusion.noise import generator
from backbone.diffusion.schedules import spaced_timesteps
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.models import sample as sampling
from backbone.models.few_step.model import get_sampling_defaults, name_few_step, open_few_step
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, sample_latents
from tests.tiny import tiny_flux, tiny_unet

PROMPT = "a dog in the snow"


@pytest.fixture(scope="module")
def adapted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few-step model that is a LoRA on the tiny base, with a scheduler of latent consistency models."""
    folder = tmp_path_factory.mktemp("few") / "lcm"
    denoiser = Backbone.open(str(tiny_folder), device="cpu", precision="fp32").denoiser
    add_lora(denoiser, "few", rank=3, alpha=6.0, targets=("to_q", "to_v", "conv1"))
    for number, value in enumerate(lora_parameters(denoiser, "few").values()):
        value.data = 0.2 * torch.randn(value.shape, generator=generator("few", number))
    save_lora(folder / LORA_WEIGHTS, denoiser, "few")
    base = json.loads((tiny_folder / "scheduler" / "scheduler_config.json").read_text())
    kept = {key: base[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
    LCMScheduler(**kept).save_pretrained(folder / "scheduler")
    record = {"base": str(tiny_folder), "steps": 4, "guidance": 1.0, "sampler": "consistency"}
    (folder / "few_step.json").write_text(json.dumps(record))
    return folder


def opened(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def test_an_adapter_s_folder_is_a_model_with_the_adapter_in_its_weights(
    tiny: Backbone, adapted: Path
) -> None:
    few = open_few_step(tiny, str(adapted))
    assert few.fingerprint != tiny.fingerprint
    drawing = get_sampling_defaults(few)
    assert (drawing.steps, drawing.guidance, drawing.sampler) == (4, 1.0, "consistency")
    noisy = torch.randn((2, *tiny.latent_shape), generator=generator(1))
    conditions, index = tiny.encode_prompts([PROMPT] * 2), torch.tensor([999, 259])
    plain = tiny.predict(noisy, index, conditions)
    load_lora(adapted / LORA_WEIGHTS, tiny.denoiser, "few")
    assert (few.predict(noisy, index, conditions) - tiny.predict(noisy, index, conditions)).abs().max() < 1e-5
    assert (few.predict(noisy, index, conditions) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [4, 3])
def test_four_steps_are_those_of_diffusers_lcm_scheduler(
    tiny_folder: Path, adapted: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = opened(adapted)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.load_lora_weights(adapted)
    pipeline.scheduler = LCMScheduler.from_pretrained(adapted / "scheduler")
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_initial_noise(few, 0, 0, 0)
    expected = pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=noise[None].clone(),
        generator=generator(7),
        output_type="latent",
    ).images
    monkeypatch.setattr(
        sampling, "generator", lambda *key: generator(7) if "steps" in key else generator(*key)
    )
    (latents,) = sample_latents(
        few, [Request(PROMPT, (0, 0))], steps=steps, guidance=1.0, seed=0, sampler="consistency"
    )
    assert (latents - expected).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 8, 50])
def test_distilled_timesteps_are_those_of_lcm_scheduler(steps: int) -> None:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps)
    assert spaced_timesteps(steps, "distilled").tolist() == scheduler.timesteps.tolist()


def test_more_steps_than_were_distilled_are_refused(adapted: Path) -> None:
    with pytest.raises(UserError, match="1 to 50 steps, not 60"):
        opened(adapted).schedule(60)


def test_what_is_no_pair_is_refused(tiny: Backbone, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model itself"):
        open_few_step(tiny, str(tiny_folder))
    with pytest.raises(UserError, match="same family"):
        open_few_step(tiny, str(tiny_flux(tmp_path / "flux")))
    shutil.copytree(tiny_folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "unet")
    tiny_unet(block_out_channels=(16, 48)).save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(UserError, match="is not built as"):
        open_few_step(tiny, str(tmp_path / "other"))
    with pytest.raises(UserError, match="--on"):
        name_few_step("sd15")
    assert name_few_step("z-image") == "z-image-turbo"
    assert name_few_step("moji") == "moji-turbo"


@pytest.mark.parametrize("damage", ["record", "adapter", "shape", "factor"])
def test_a_damaged_few_step_folder_is_refused_by_name(adapted: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "few"
    shutil.copytree(adapted, folder)
    file = folder / LORA_WEIGHTS
    tensors, header = read_tensors(file)
    some = next(name for name in tensors if name.endswith("lora_B.weight"))
    match damage:
        case "record":
            (folder / "few_step.json").write_text('{"steps": 4}')
        case "adapter":
            file.unlink()
        case "shape":
            write_tensors(file, tensors | {some: torch.zeros(5, 3)}, header)
        case "factor":
            write_tensors(file, {key: value for key, value in tensors.items() if key != some}, header)
    with pytest.raises(UserError, match=r"damaged|lacks|another model|no LoRA"):
        _ = opened(folder).denoiser
