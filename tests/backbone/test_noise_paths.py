"""The noise path that a scheduler's config says: what diffusers makes of it, or one sentence."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from backbone.families.base import NoisePath
from backbone.families.components.noise_paths import flow_path, vp_path
from backbone.families.location import Location
from backbone.io.console import UserError

PUBLISHED = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@dataclass
class WithScheduler:
    """As much of a `Location` as a noise path is read from."""

    scheduler: dict[str, Any]
    name: str = "a model"

    def config(self, part: str) -> dict[str, Any]:
        return self.scheduler


FLOW = cast(Location, WithScheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}))


def path_of(**settings: Any) -> NoisePath:
    return vp_path(cast(Location, WithScheduler({**PUBLISHED, **settings})))


@pytest.mark.parametrize(
    "settings",
    [
        {"trained_betas": [1e-4] * 1000},
        {"trained_betas": [1e-4 * (1 + k % 7) for k in range(500)], "num_train_timesteps": 500},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_levels_are_those_that_diffusers_makes_of_the_same_file(settings: dict[str, Any]) -> None:
    path, scheduler = path_of(**settings), DDIMScheduler.from_config({**PUBLISHED, **settings})
    torch.testing.assert_close(path.levels.a.float() ** 2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    scheduler.set_timesteps(10)
    time = path.schedule(10, (8, 8)).time
    assert time is not None and torch.equal(time[:-1].long(), scheduler.timesteps)


@pytest.mark.parametrize(
    ("path", "pipeline"),
    [
        (path_of(), StableDiffusionImg2ImgPipeline),
        (flow_path(FLOW, size=(8, 8)), StableDiffusion3Img2ImgPipeline),
    ],
)
def test_a_strength_counts_the_steps_that_diffusers_img2img_takes(path: NoisePath, pipeline: Any) -> None:
    for steps in (1, 2, 4, 8, 20, 28, 50):
        diffusers = SimpleNamespace(scheduler=SimpleNamespace(timesteps=range(steps), order=1))
        for strength in [percent / 100 for percent in range(101)]:
            _, count = pipeline.get_timesteps(diffusers, steps, strength, "cpu")
            assert path.count_noised_steps(steps, strength) == count, (steps, strength)


def test_betas_of_its_own_end_where_they_lead_to() -> None:
    assert float(path_of(trained_betas=[1e-4] * 1000).levels.a[-1] ** 2) == pytest.approx(0.9048, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "ends in noise alone"),
        ({"rescale_betas_zero_snr": True}, "ends in noise alone"),
        ({"trained_betas": [1e-4] * 10}, "10 trained_betas for 1000"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing 'karras'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
    ],
)
def test_a_scheduler_that_is_not_understood_is_one_sentence(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        path_of(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_a_scheduler_that_diffusers_has_with_another_package_is_read_without_it(name: str) -> None:
    """Their steps lie as Euler's do: `linspace`, where nothing is said."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs, euler = (
        vp_path(cast(Location, WithScheduler({"_class_name": each, **betas}))).schedule(8, (8, 8))
        for each in (name, "EulerDiscreteScheduler")
    )
    assert theirs.time is not None and euler.time is not None
    assert torch.equal(theirs.time, euler.time) and torch.equal(theirs.a, euler.a)


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_a_spacing_that_is_not_used_is_said_with_and_without_scipy(
    setting: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_discrete.is_scipy_available", lambda: False)
    model = WithScheduler({"_class_name": "EulerDiscreteScheduler", setting: True}, f"a model of {setting}")
    assert len(vp_path(cast(Location, model)).schedule(8, (8, 8))) == 9
    assert f"{setting} true, which is not used here" in capsys.readouterr().err


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_single_step_begins_at_the_end_of_the_path_whatever_the_spacing(spacing: str) -> None:
    schedule = path_of(timestep_spacing=spacing).schedule(1, (8, 8))
    assert schedule.time is not None and int(schedule.time[0]) == 999
    assert float(schedule.a[0]) < 0.1 < float(schedule.b[0])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (EulerDiscreteScheduler, {}),
        (DDIMParallelScheduler, {"set_alpha_to_one": False, "steps_offset": 1}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (TCDScheduler, {}),
        (LCMScheduler, {"original_inference_steps": 100}),
        (LCMScheduler, {"original_inference_steps": 40, "num_train_timesteps": 500}),
    ],
)
def test_what_a_config_leaves_out_is_the_default_of_its_own_class(
    kind: Any, settings: dict[str, Any]
) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = kind(**betas, **settings)
    scheduler.set_timesteps(8)
    path = vp_path(cast(Location, WithScheduler({"_class_name": kind.__name__, **betas, **settings})))
    levels = path.schedule(8, (8, 8))
    assert levels.time is not None
    theirs = scheduler.timesteps.float().unique().flip(0)  # PNDM has one twice
    torch.testing.assert_close(levels.time[:-1].float(), theirs, rtol=1e-6, atol=0)
    if kind in (DDIMParallelScheduler, PNDMScheduler, TCDScheduler):
        assert float(levels.a[-1] ** 2) == pytest.approx(float(scheduler.final_alpha_cumprod))
    else:
        assert float(levels.a[-1]) == 1


@pytest.mark.parametrize(
    "kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, SASolverScheduler]
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", None])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_levels_of_a_solver_are_its_own(kind: Any, spacing: str | None, final: str) -> None:
    """They are not DDIM's of the same spacing: of S + 1 timesteps the cleanest is left out."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    settings |= {"timestep_spacing": spacing} if spacing else {}
    own = (
        {"final_sigmas_type": final} if kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler) else {}
    )
    scheduler = kind(**settings, **own)
    path = vp_path(cast(Location, WithScheduler({"_class_name": kind.__name__, **settings, **own})))
    for steps in (2, 7, 20, 25):
        scheduler.set_timesteps(steps)
        levels = path.schedule(steps, (8, 8))
        assert levels.time is not None and torch.equal(levels.time[:-1].long(), scheduler.timesteps)
        torch.testing.assert_close(
            (levels.b / levels.a).float(), scheduler.sigmas.float(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler]
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", None])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_levels_of_a_sampler_in_sigma_are_its_own(kind: Any, spacing: str | None, final: str) -> None:
    """Of `linspace`, their default, they lie between timesteps, where DDIM's are rounded."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    settings |= {"timestep_spacing": spacing} if spacing else {}
    own = {"final_sigmas_type": final} if kind is EulerDiscreteScheduler else {}
    for steps in (2, 7, 20, 25):
        scheduler = kind(**settings, **own)
        scheduler.set_timesteps(steps)
        given = {"_class_name": kind.__name__, **settings, **own}
        levels = vp_path(cast(Location, WithScheduler(given))).schedule(steps, (8, 8))
        first = (
            slice(None, None, 2) if kind is HeunDiscreteScheduler else slice(None)
        )  # the others are met twice
        assert levels.time is not None
        torch.testing.assert_close(
            levels.time[:-1].float(), scheduler.timesteps[first].float(), rtol=1e-6, atol=0
        )
        theirs = torch.cat([scheduler.sigmas[:-1][first], scheduler.sigmas[-1:]])
        torch.testing.assert_close((levels.b / levels.a).float(), theirs.float(), rtol=1e-5, atol=1e-6)


def test_between_timesteps_a_path_without_signal_at_its_end_is_finite() -> None:
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule = path_of(
        _class_name="EulerDiscreteScheduler", timestep_spacing="linspace", **settings
    ).schedule(7, (8, 8))
    assert schedule.a[0] == 0 and bool(schedule.a.isfinite().all()) and bool(schedule.b.isfinite().all())


def test_a_solver_without_a_spacing_of_its_own_has_its_one() -> None:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DPMSolverSinglestepScheduler(**settings)
    left = {"timestep_spacing": "leading"}  # of the class that the folder had before
    config = {"_class_name": "DPMSolverSinglestepScheduler", **settings, **left}
    for steps in (2, 20, 25):
        scheduler.set_timesteps(steps)
        time = vp_path(cast(Location, WithScheduler(config))).schedule(steps, (8, 8)).time
        assert time is not None and torch.equal(time[:-1].long(), scheduler.timesteps)


def test_a_solver_has_one_step_less_than_there_are_levels() -> None:
    path = path_of(_class_name="UniPCMultistepScheduler", timestep_spacing="linspace")
    assert len(path.schedule(999, (8, 8))) == 1000
    with pytest.raises(UserError, match="takes 1 to 999 steps, not 1000"):
        path.schedule(1000, (8, 8))


def test_a_first_generation_solver_that_ends_above_zero_is_read() -> None:
    """diffusers has `dpmsolver` with `sigma_min` alone."""
    settings = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    path = path_of(_class_name="DPMSolverMultistepScheduler", **settings)
    assert float(path.schedule(8, (8, 8)).b[-1]) > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"_class_name": "CogVideoXDDIMScheduler"},
            "is a CogVideoXDDIMScheduler, which is not of its family",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "x"}, "final_sigmas_type 'x'"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "is a CMStochasticIterativeScheduler"),
        ({"_class_name": "FancyScheduler"}, "is a FancyScheduler, which is not of its family"),
        ({"steps_offset": -5}, "steps_offset -5"),
        ({"steps_offset": "x"}, "steps_offset 'x'"),
        ({"beta_end": 1.5}, "βs that are not between 0 and 1"),
        ({"beta_start": 0.0}, "βs that are not between 0 and 1"),
        ({"trained_betas": [-0.1] * 1000}, "βs that are not between 0 and 1"),
        ({"trained_betas": [1e-4] * 999 + [1.0]}, "The last β of the scheduler of a model is 1"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type 'continuous'",
        ),
    ],
)
def test_a_scheduler_that_says_no_levels_is_refused_in_one_sentence(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        path_of(**settings)


def test_spacings_that_are_not_used_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    path_of(_class_name="EulerDiscreteScheduler", use_karras_sigmas=True)
    path_of(_class_name="EulerDiscreteScheduler", use_karras_sigmas=False)
    path_of(
        _class_name="LCMScheduler", use_beta_sigmas=True, timestep_type="continuous"
    )  # left over from another
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("use_karras_sigmas true, which is not used here") == said.count("not used here") == 1


def test_what_is_beside_the_levels_of_a_solver_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    solver = {"_class_name": "DPMSolverMultistepScheduler"}
    path_of(**solver, use_lu_lambdas=True, lambda_min_clipped=-5.1, thresholding=True)
    path_of(clip_sample=True, timestep_spacing="linspace")
    said = " ".join(capsys.readouterr().err.split())
    for setting in (
        "use_lu_lambdas true",
        "lambda_min_clipped -5.1",
        "thresholding true",
        "clip_sample true",
    ):
        assert said.count(f"{setting}, which is not used here") == 1
    path_of(**solver, lambda_min_clipped=float("-inf"), thresholding=False, final_sigmas_type="sigma_min")
    path_of()  # where nothing is said of it
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_image_seq_len": 256, "use_dynamic_shifting": True}, "max_image_seq_len 256"),
        ({"max_image_seq_len": "x"}, "max_image_seq_len 'x'"),
        ({"shift": 0.0}, "shift 0.0"),
        ({"shift": -1.0}, "shift -1.0"),
        ({"shift_terminal": 1.0}, "shift_terminal 1.0"),
        ({"shift_terminal": "0.1"}, "shift_terminal '0.1'"),
        ({"base_shift": 1000.0, "use_dynamic_shifting": True}, r"by exp\("),
    ],
)
def test_a_flow_s_shift_that_leaves_no_levels_is_refused(settings: dict[str, Any], says: str) -> None:
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", **settings}
    with pytest.raises(UserError, match=says):
        flow_path(cast(Location, WithScheduler(scheduler)), size=(8, 8)).schedule(4, (8, 8))


def test_a_solver_in_a_flow_s_folder_is_refused_with_the_sampler_that_has_its_steps() -> None:
    scheduler = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    with pytest.raises(UserError, match=r"Restore scheduler/; its steps are those of --sampler unipc\.$"):
        flow_path(cast(Location, WithScheduler(scheduler)), size=(8, 8))
