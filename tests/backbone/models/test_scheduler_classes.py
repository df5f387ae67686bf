"""A model folder's scheduler by its class: the one that model_index.json says, and of a flow the step that it takes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor

from backbone.cli.sampling import SamplingSettings
from backbone.diffusion.noise import generator
from backbone.io.console import UserError
from backbone.models import sample as sampling
from backbone.models.few_step.model import get_sampling_defaults
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, resolve_sampling, sample_latents
from tests.tiny import tiny_flux, tiny_pixart, tiny_stable_diffusion_3

PROMPT = "a dog in the snow"
WITHOUT = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")


def opened(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def change_json(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def with_scheduler(folder: Path, kind: Any, **settings: Any) -> Path:
    """The same folder with another scheduler, as diffusers saves it."""
    (folder / "limner.json").unlink(missing_ok=True)  # quick settings of the tiny models
    shutil.rmtree(folder / "scheduler")
    scheduler = kind(**settings)
    scheduler.save_pretrained(folder / "scheduler")
    change_json(folder / "model_index.json", scheduler=["diffusers", scheduler.__class__.__name__])
    return folder


def draw_both(
    model: Backbone, pipeline: Any, monkeypatch: pytest.MonkeyPatch, *, steps: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """Latents from one noise, ours and those of diffusers' pipeline, with one generator's noise in the steps."""
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_initial_noise(model, 0, 0, 0)
    torch.manual_seed(7)  # theirs is not told the generator by the pipeline
    expected = pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise[None].clone(),
        output_type="latent",
    ).images
    monkeypatch.setattr(
        sampling, "generator", lambda *key: generator(*key) if "steps" not in key else torch.manual_seed(7)
    )
    (latents,) = sample_latents(model, [Request(PROMPT, (0, 0))], steps=steps, guidance=guidance, seed=0)
    return latents, expected


@pytest.mark.parametrize(
    ("kind", "settings", "sampler"),
    [
        (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}, "heun"),
        (FlowMatchLCMScheduler, {"shift": 3.0}, "consistency"),
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "stochastic_sampling": True}, "consistency"),
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, "ddim"),
    ],
)
def test_a_flow_is_drawn_by_its_scheduler_s_own_steps(
    tmp_path: Path, kind: Any, settings: dict[str, Any], sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_scheduler(tiny_stable_diffusion_3(tmp_path / "model", t5=False), kind, **settings)
    model = opened(folder)
    drawing = get_sampling_defaults(model)
    assert drawing.sampler == sampler
    assert ((drawing.steps, drawing.guidance) == (4, 1.0)) == (kind is FlowMatchLCMScheduler)
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folder, **dict.fromkeys(WITHOUT))
    latents, expected = draw_both(model, pipeline, monkeypatch, steps=5, guidance=1.0)
    assert (latents - expected).abs().max() < 1e-4


def test_a_flow_that_is_told_the_guidance_keeps_its_own_under_a_consistency_scheduler(tmp_path: Path) -> None:
    folder = with_scheduler(tiny_flux(tmp_path / "model"), FlowMatchLCMScheduler, use_dynamic_shifting=True)
    drawing = get_sampling_defaults(opened(folder))
    assert (drawing.steps, drawing.guidance, drawing.sampler) == (4, 3.5, "consistency")


def test_a_transformer_with_the_scheduler_of_a_distillation_is_drawn_in_few_steps(tmp_path: Path) -> None:
    folder = with_scheduler(tiny_pixart(tmp_path / "model"), LCMScheduler, beta_schedule="linear")
    drawing = get_sampling_defaults(opened(folder))
    assert (drawing.steps, drawing.guidance, drawing.sampler) == (4, 1.0, "consistency")


def test_a_flow_that_grows_between_its_steps_is_refused(tmp_path: Path) -> None:
    folder = with_scheduler(
        tiny_stable_diffusion_3(tmp_path / "model", t5=False), FlowMatchLCMScheduler, scale_factors=[0.5]
    )
    with pytest.raises(UserError, match="scale_factors"):
        _ = opened(folder).path


@pytest.mark.parametrize(
    ("kind", "spacing"),
    [
        *((DPMSolverMultistepScheduler, spacing) for spacing in ("linspace", "leading", "trailing")),
        *((UniPCMultistepScheduler, spacing) for spacing in ("linspace", "leading", "trailing")),
        (EulerAncestralDiscreteScheduler, "leading"),
        (partial(DDPMScheduler, clip_sample=False), "leading"),
    ],
)
def test_a_folder_with_another_solver_is_drawn_as_diffusers_draws_it(
    tiny_folder: Path, tmp_path: Path, kind: Any, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with_scheduler(folder, kind, **betas, timestep_spacing=spacing, steps_offset=1)
    model = opened(folder)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    latents, expected = draw_both(model, pipeline, monkeypatch, steps=7, guidance=3.0)
    assert (latents - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("kind", "settings", "sampler", "other"),
    [
        (DPMSolverMultistepScheduler, {}, "dpmpp-2m", None),
        (DPMSolverMultistepScheduler, {"solver_order": 1}, "ddim", None),
        (DPMSolverMultistepScheduler, {"solver_order": 3}, "dpmpp-2m", "with solver_order 3"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "ancestral", "sde-dpmsolver++"),
        (UniPCMultistepScheduler, {"solver_type": "midpoint"}, "unipc", None),  # read as bh2
        (UniPCMultistepScheduler, {"solver_type": "bh1"}, "unipc", 'with solver_type "bh1"'),
        (UniPCMultistepScheduler, {"disable_corrector": [0]}, "unipc", "with disable_corrector [0]"),
        (UniPCMultistepScheduler, {"lower_order_final": False}, "unipc", "with lower_order_final false"),
        (DPMSolverMultistepScheduler, {"euler_at_final": True}, "dpmpp-2m", None),  # as it ends anyway
        (
            DPMSolverMultistepScheduler,
            {"final_sigmas_type": "sigma_min", "lower_order_final": False},
            "dpmpp-2m",
            "with lower_order_final false",
        ),
        (DEISMultistepScheduler, {}, "dpmpp-2m", "a DEISMultistepScheduler"),
        (HeunDiscreteScheduler, {}, "heun", "a HeunDiscreteScheduler"),
        (PNDMScheduler, {}, "ddim", "a PNDMScheduler"),
        (EulerDiscreteScheduler, {}, "ddim", None),
    ],
)
def test_a_scheduler_whose_steps_no_sampler_takes_is_told_of(
    tiny_folder: Path,
    tmp_path: Path,
    kind: Any,
    settings: dict[str, Any],
    sampler: str,
    other: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = with_scheduler(Path(shutil.copytree(tiny_folder, tmp_path / "model")), kind, **settings)
    assert get_sampling_defaults(opened(folder)).sampler == sampler
    told = " ".join(capsys.readouterr().err.split())
    if other is None:
        assert "whose steps" not in told
    else:
        assert f"{other}, whose steps no sampler here takes" in told
        assert f"drawn by {sampler} at its timesteps" in told


def test_another_sampler_s_steps_are_told_of_where_images_are_drawn_by_it_and_once(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_scheduler(Path(shutil.copytree(tiny_folder, tmp_path / "model")), PNDMScheduler)
    model = opened(folder)
    assert model.defaults["steps"]
    resolve_sampling(SamplingSettings(sampler="unipc"), model)
    list(sample_latents(model, [Request("a dog", (0, 0))], steps=2, guidance=2.0, seed=0, sampler="heun"))
    assert "whose steps" not in capsys.readouterr().err
    asked = resolve_sampling(SamplingSettings(steps=2), model)
    list(sample_latents(model, [Request("a dog", (0, 0))], **asked.for_sampler()))
    list(sample_latents(model, [Request("a dog", (0, 0))], steps=2, guidance=2.0, seed=0))
    assert capsys.readouterr().err.count("whose steps") == 1


def test_a_model_that_names_its_sampler_is_told_nothing_of_its_scheduler_s_steps(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_scheduler(Path(shutil.copytree(tiny_folder, tmp_path / "model")), PNDMScheduler)
    (folder / "limner.json").write_text('{"sampler": "heun"}')
    assert get_sampling_defaults(opened(folder)).sampler == "heun"
    assert "whose steps" not in capsys.readouterr().err


@pytest.mark.parametrize("said", ["LCMScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_the_class_in_model_index_stands_above_the_scheduler_s_own(
    tiny_folder: Path, tmp_path: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    change_json(folder / "model_index.json", scheduler=["diffusers", said])
    change_json(folder / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler")
    scheduler: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).scheduler
    assert type(scheduler).__name__ == said
    scheduler.set_timesteps(7)
    model = opened(folder)
    schedule = model.schedule(7)
    assert schedule.time is not None
    torch.testing.assert_close(
        schedule.time[:-1].float(), scheduler.timesteps.float().round(), rtol=0, atol=0.5
    )
    told = " ".join(capsys.readouterr().err.split())
    assert told.count(f"names the {said} and its scheduler/ a PNDMScheduler: the first is followed") == 1
    assert get_sampling_defaults(model).sampler == ("consistency" if said == "LCMScheduler" else "ddim")


def test_a_class_that_is_none_of_diffusers_leaves_the_scheduler_s_own(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    for entry in ([None, None], ["my_scheduler", "MyScheduler"]):
        change_json(folder / "model_index.json", scheduler=entry)
        assert torch.equal(opened(folder).schedule(7).a, opened(tiny_folder).schedule(7).a)
