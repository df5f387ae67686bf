"""Noise paths from a scheduler's config: variance preserving from a schedule of βs, and rectified flow."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from backbone.diffusion.noise import PredictionType, Schedule, vp
from backbone.diffusion.schedules import (
    Spacing,
    alphas_cumprod,
    flow_schedule,
    logit_normal_levels,
    vp_schedule,
    zero_terminal_snr,
)
from backbone.families.base import NoisePath
from backbone.families.location import Location
from backbone.io.console import UserError, notify_once
from backbone.io.weights import refuse_damaged

UNSUPPORTED_FLOW_SETTINGS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("invert_sigmas", "scale_factors"),
)
VP_SETTINGS: Mapping[str, tuple[str, ...]] = {  # of a β scheduler
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
# Settings that condition a network on other times than timesteps
OTHER_TIMES = ("use_flow_sigmas", "timestep_type")
OTHER_SPACINGS = (  # of the samplers in σ: steps at other levels than trained timesteps
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("interpolation_type", "lambda_min_clipped"),
)
CLIPPING = ("thresholding", "clip_sample")  # of the clean estimate, for models of pixels
# Classes that need another package in diffusers (scipy, torchsde) → one with the same defaults that does not
NEEDS_NO_PACKAGE = {
    "LMSDiscreteScheduler": "EulerDiscreteScheduler",
    "DPMSolverSDEScheduler": "KDPM2DiscreteScheduler",
}
BY_ALPHA = (
    *("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "TCDScheduler"),
    *("DDPMScheduler", "DDPMParallelScheduler"),
)
SOLVERS = (  # their S steps are the first of S + 1 in diffusers, except with trailing spacing
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
)
DPM_SOLVERS = SOLVERS[:2]
ENDS_AT_FIRST = SOLVERS[-2:]  # end at the cleanest trained level, never at σ = 0
# Schedulers whose steps are a subset of those of a consistency distillation
DISTILLING = ("LCMScheduler", "TCDScheduler")
DISTILLED_SAMPLERS: Mapping[str, str] = {  # drawn in few steps (Luo et al. 2023, Zheng et al. 2024)
    "LCMScheduler": "consistency",
    "TCDScheduler": "ddim",
    "FlowMatchLCMScheduler": "consistency",
}
SAMPLERS_OF: Mapping[str, str] = {  # other schedulers whose steps are not Euler's along the ODE
    "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "UniPCMultistepScheduler": "unipc",
    "EulerAncestralDiscreteScheduler": "ancestral",
    "DDPMScheduler": "ancestral",
}
# Settings under which a solver takes other steps than its sampler here
OTHER_STEPS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver",),
        "solver_order": (3,),
        "solver_type": ("heun",),
        "euler_at_final": (True,),
        "lower_order_final": (False,),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (1, 3),
        "solver_type": ("bh1",),
        "predict_x0": (False,),
        "lower_order_final": (False,),
    },
}
# Of DPM-Solver++, which ends a clean schedule at first order
ENDINGS = ("euler_at_final", "lower_order_final")
NEAREST: Mapping[str, str] = {  # schedulers whose steps no sampler here takes → the nearest sampler
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "ancestral",
    **dict.fromkeys(("DEISMultistepScheduler", "DPMSolverSinglestepScheduler"), "dpmpp-2m"),
    # PNDM's guided images are equally far from those of all samplers here (on `moji`, 30 steps: .32 of their deviation
    # from ddim's, .31 from unipc's); ddim also inverts images
    **dict.fromkeys(("PNDMScheduler", "LMSDiscreteScheduler"), "ddim"),
    **dict.fromkeys(("DPMSolverSDEScheduler", "SASolverScheduler"), "ancestral"),
}
EMBEDDED_GUIDANCE = 8.5  # as diffusers' pipeline of latent consistency models
# Of the logarithm of a flow's shift, far above the last that leaves a level between 0 and 1
MOST_SHIFT = 50.0
FLOW_QUANTILES = 1000  # quantiles that stand for a flow's continuous density of levels


def vp_path(location: Location, *, steps_offset: int | None = None) -> NoisePath:
    """The noise path of a model trained on a β schedule, from its scheduler's config.

    Where the config leaves a setting out, its class's default counts. Schedulers that sample in σ (Euler, DPM-Solver …)
    end where `final_sigmas_type` says and ignore `set_alpha_to_one`. `steps_offset` replaces the config's, as in some
    pipelines. Raises `UserError`, and so does its schedule for more steps than the scheduler has.
    """
    config = _read_vp_config(location)
    name = config["_class_name"]
    alpha_bar = _read_alphas_cumprod(location.name, config)

    # Sampling ends at ᾱ = 1 or at the first trained ᾱ, by the rules of diffusers' classes
    at_first = name in ENDS_AT_FIRST or config["final_sigmas_type"] == "sigma_min"
    by_alpha = name in BY_ALPHA and not config.get("set_alpha_to_one", True)
    final: Literal["one", "first"] = "first" if at_first or by_alpha else "one"
    distilled = int(config.get("original_inference_steps") or len(alpha_bar))
    offset = int(config.get("steps_offset", 0)) if steps_offset is None else steps_offset

    def schedule(steps: int, size: tuple[int, int]) -> Schedule:
        # With leading spacing a single step would be the cleanest, which samples nothing: it begins at the end instead
        spacing: Spacing = "trailing" if steps == 1 else config["timestep_spacing"]
        if name in DISTILLING:
            spacing = "distilled"
        elif spacing == "linspace" and name not in (*BY_ALPHA, *SOLVERS):
            spacing = "between"
        extra = int(name in SOLVERS and spacing != "trailing")  # a step that is left out
        limit = distilled if name in DISTILLING else len(alpha_bar) - extra
        if steps > limit and (extra or name in DISTILLING):
            raise UserError(f"{location.name} takes 1 to {limit} steps, not {steps}.")
        # Solvers space one step more and leave out the last but one level
        levels = vp_schedule(
            alpha_bar, steps + extra, spacing=spacing, steps_offset=offset, final=final, distilled=distilled
        )
        return levels[torch.cat([torch.arange(steps), torch.tensor([steps + extra])])]

    kind = cast(PredictionType, config["prediction_type"])
    return NoisePath(kind, vp(alpha_bar, torch.arange(len(alpha_bar))), schedule)


def _read_vp_config(location: Location) -> dict[str, Any]:
    """Read a β scheduler's config with the defaults of its class; `UserError` for one that this path cannot follow.

    Unknown ways to space the steps change no level that the model was trained at: a line says that they are not used.
    """
    import diffusers

    scheduler = location.config("scheduler")
    name = scheduler.get("_class_name") or "DDIMScheduler"
    kind = getattr(diffusers, NEEDS_NO_PACKAGE.get(name, name), None)
    parameters = {} if kind is None else inspect.signature(kind.__init__).parameters
    defaults = {key: value.default for key, value in parameters.items()}
    # CogVideoX's schedulers, which have that scale, shift every level
    if kind is None or "beta_schedule" not in defaults or "snr_shift_scale" in defaults:
        raise UserError(
            f"The scheduler of {location.name} is a {name}, which is not of its family. Restore scheduler/."
        )

    # Settings that change the levels the model was trained at must be understood
    for setting, supported in VP_SETTINGS.items():
        if scheduler.get(setting, supported[0]) not in supported:
            raise UserError(
                f"The scheduler of {location.name} has {setting} {scheduler[setting]!r}, and supported are "
                f"{', '.join(supported)}. Restore scheduler/."
            )
    # A config also keeps settings of other classes
    settings = {key: value for key, value in scheduler.items() if key in defaults}
    with refuse_damaged(location.name, "scheduler"):
        # Without other spacings, some of which need scipy
        kind(**{key: value for key, value in settings.items() if key not in OTHER_SPACINGS})

    # The class's defaults, then what the config says of its own settings
    fallbacks = {key: supported[0] for key, supported in VP_SETTINGS.items()}
    if name in SOLVERS:
        fallbacks["timestep_spacing"] = "linspace"  # also for the solver that has no such setting
    config = fallbacks | defaults | settings | {"_class_name": name}
    # How the model was trained, independent of the scheduler's class
    config["rescale_betas_zero_snr"] = bool(scheduler.get("rescale_betas_zero_snr"))
    unsupported = {
        key: config[key]
        for key in (*OTHER_TIMES, *OTHER_SPACINGS)
        if config.get(key) not in (defaults.get(key), None)
    }
    if other_times := [key for key in unsupported if key in OTHER_TIMES]:
        raise UserError(
            f"The scheduler of {location.name} has {other_times[0]} {config[other_times[0]]!r}, under which a network "
            "is told other times than the timesteps that are understood here. Restore scheduler/."
        )
    _say_unused(location.name, config, unsupported, [key for key in CLIPPING if settings.get(key)])
    offset = config.get("steps_offset", 0)
    if not isinstance(offset, int) or not 0 <= offset < config["num_train_timesteps"]:
        raise UserError(
            f"The scheduler of {location.name} has the steps_offset {offset!r}, and it is a number of timesteps. "
            "Restore scheduler/."
        )
    return config


def _say_unused(name: str, config: Mapping[str, Any], spacings: Mapping[str, Any], clips: list[str]) -> None:
    """Say which settings of a scheduler, apart from its levels, are not used."""
    for key, value in spacings.items():
        notify_once(
            f"The scheduler of {name} has {key} {json.dumps(value)}, which is not used here: steps are spaced "
            f"by its timestep_spacing, {config['timestep_spacing']}."
        )
    for key in clips:
        notify_once(
            f"The scheduler of {name} has {key} {json.dumps(config[key])}, which is not used here: it limits the clean "
            "estimate to the values of pixels, and latents have others."
        )


def _read_alphas_cumprod(name: str, config: Mapping[str, Any]) -> Tensor:
    """ᾱ [train steps] of a β scheduler's config, from its own `trained_betas` where it has them.

    Raises `UserError` for another number of betas, and for a last level without signal at which ε is predicted.
    """
    train_steps, betas = int(config["num_train_timesteps"]), config.get("trained_betas")
    if betas is None:
        alpha_bar = alphas_cumprod(
            config["beta_schedule"], config["beta_start"], config["beta_end"], train_steps
        )
    else:
        alpha_bar = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), 0)
        if len(alpha_bar) != train_steps:
            raise UserError(
                f"The scheduler of {name} has {len(alpha_bar)} trained_betas for {train_steps} num_train_timesteps. "
                "Restore scheduler/."
            )

    # Noise grows at every step, and ε says nothing of the image at ᾱ = 0
    falling = torch.cat([alpha_bar.new_ones(1), alpha_bar])
    if not bool((falling[1:] < falling[:-1]).all()) or not bool(alpha_bar[-1] >= 0):
        raise UserError(
            f"The scheduler of {name} has βs that are not between 0 and 1 (beta_start, beta_end or trained_betas), so "
            "noise would not grow. Restore scheduler/."
        )
    if config["rescale_betas_zero_snr"]:
        alpha_bar = zero_terminal_snr(alpha_bar)
    if config["prediction_type"] == "epsilon" and not alpha_bar[-1] > 0:
        if not config["rescale_betas_zero_snr"]:
            raise UserError(
                f"The last β of the scheduler of {name} is 1, where a prediction of ε says nothing of the image. "
                "Restore scheduler/."
            )
        raise UserError(
            f"The scheduler of {name} ends in noise alone (rescale_betas_zero_snr), where a prediction of ε says "
            "nothing of the image. In scheduler/ set prediction_type to v_prediction if the model was trained so, else "
            "rescale_betas_zero_snr to false."
        )
    return alpha_bar


def flow_path(
    location: Location,
    *,
    size: tuple[int, int],
    patch: int = 2,
    lowest: Callable[[int], float] | None = None,
    shift: Callable[..., float] | None = None,
) -> NoisePath:
    """The noise path of a rectified flow, from its FlowMatchEulerDiscreteScheduler's config.

    `size` (H, W) is that of the model's own latents, and `patch` × `patch` of them make a token: dynamic shifting
    depends on the number of tokens. `lowest(S)` is the last level above 0 before shifting; None takes the scheduler's
    own. `shift(tokens, S)` is the log of the dynamic shift, and without S of training's; None takes the scheduler's
    line.
    """
    config = _read_flow_config(location)
    train_steps = int(config["num_train_timesteps"])

    def dynamic(size: tuple[int, int], *steps: int) -> float | None:
        """log of the shift for latents of this size; None without dynamic shifting."""
        if not config["use_dynamic_shifting"]:
            return None
        tokens = (size[0] // patch) * (size[1] // patch)
        if shift is not None:
            return shift(tokens, *steps)
        mu = _linear_shift(config, tokens)
        if abs(mu) > MOST_SHIFT:
            raise UserError(
                f"The scheduler of {location.name} shifts latents of {size[0]} × {size[1]} by exp({mu:g}), which "
                "leaves no levels between. Restore scheduler/, or take another size."
            )
        return mu

    def schedule(steps: int, size: tuple[int, int]) -> Schedule:
        return flow_schedule(
            steps,
            config["shift"],
            mu=dynamic(size, steps),
            lowest=lowest(steps) if lowest else None,
            terminal=config["shift_terminal"] or None,
            train_steps=train_steps,
        )

    # Trained at the shift of the model's own size
    mu = dynamic(size)
    usual = float(config["shift"]) if mu is None else math.exp(mu)
    return NoisePath("flow", logit_normal_levels(FLOW_QUANTILES, usual, train_steps=train_steps), schedule)


def read_sampling(location: Location) -> dict[str, Any]:
    """Sampling settings from a scheduler that is a distillation's, or takes other steps than Euler's and DDIM's.

    {} for other schedulers. Distilled models sample without guidance by a second call; a network that takes the
    guidance scale as an input keeps its own.
    """
    if location.file is not None:
        return {}  # its scheduler is a published one, and none of these
    scheduler = location.config("scheduler")
    name = scheduler.get("_class_name", "")
    if name in DISTILLED_SAMPLERS:
        denoiser = location.config("transformer" if "transformer" in location.index else "unet")
        guidance = {"guidance": EMBEDDED_GUIDANCE if denoiser.get("time_cond_proj_dim") else 1.0}
        takes_guidance = denoiser.get("guidance_embeds")  # the family says how strongly
        return {"steps": 4, "sampler": DISTILLED_SAMPLERS[name]} | ({} if takes_guidance else guidance)
    if name == "FlowMatchEulerDiscreteScheduler" and scheduler.get("stochastic_sampling"):
        return {"sampler": "consistency"}  # the same step: fresh noise on each clean estimate
    sampler, _ = _find_nearest_sampler(scheduler)
    return {} if sampler is None else {"sampler": sampler}


def say_nearest_sampler(location: Location, sampler: str) -> None:
    """Say where a folder's scheduler takes other steps than the `sampler` that is used."""
    if location.file is not None:
        return
    if description := _find_nearest_sampler(location.config("scheduler"))[1]:
        notify_once(
            f"The scheduler of {location.name} is a {description}, whose steps no sampler here takes: images are drawn "
            f"by {sampler} at its timesteps, where --sampler names no other."
        )


def _find_nearest_sampler(scheduler: Mapping[str, Any]) -> tuple[str | None, str]:
    """The sampler nearest to a scheduler's steps (None for DDIM and Euler), and the scheduler in words.

    The words are empty where the sampler takes the same steps.
    """
    name, kind = scheduler.get("_class_name", ""), str(scheduler.get("algorithm_type"))
    first_order = scheduler.get("solver_order") == 1
    if name in DPM_SOLVERS and kind.startswith("sde-"):
        return "ancestral", "" if first_order else f"{name} with algorithm_type {kind}"
    if first_order and name in (*DPM_SOLVERS, "DEISMultistepScheduler"):
        return None, ""  # DDIM is the first-order step of them all
    if name in NEAREST:
        return NEAREST[name], name
    differing = [key for key, values in OTHER_STEPS.get(name, {}).items() if scheduler.get(key) in values]
    if name in DPM_SOLVERS and scheduler.get("final_sigmas_type") != "sigma_min":
        differing = [key for key in differing if key not in ENDINGS]
    if name == "UniPCMultistepScheduler" and scheduler.get("disable_corrector"):
        differing.append("disable_corrector")
    description = f"{name} with {differing[0]} {json.dumps(scheduler[differing[0]])}" if differing else ""
    return SAMPLERS_OF.get(name), description


def _read_flow_config(location: Location) -> dict[str, Any]:
    """Read a flow scheduler's config with diffusers' defaults; `UserError` for one that this path cannot follow."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = location.config("scheduler")
    name = scheduler.get("_class_name", "")
    with refuse_damaged(location.name, "scheduler"):
        config = (
            dict(FlowMatchEulerDiscreteScheduler.from_config(scheduler).config) if "FlowMatch" in name else {}
        )
    unsupported = [setting for setting in UNSUPPORTED_FLOW_SETTINGS if {**scheduler, **config}.get(setting)]
    if not config or unsupported or config["time_shift_type"] != "exponential":
        reason = ", ".join(unsupported) or config.get("time_shift_type") or name or "of unknown kind"
        raise UserError(
            f"The scheduler of {location.name} ({reason}) is not the FlowMatchEulerDiscreteScheduler that this family "
            f"was published with. Restore scheduler/{_suggest_sampler(name)}."
        )
    _refuse_other_shifts(location.name, config)
    return config


def _suggest_sampler(name: str) -> str:
    """The end of “Restore scheduler/…” for a flow whose scheduler/ names a solver: the sampler that takes its steps."""
    sampler = SAMPLERS_OF.get(name, "") if name in SOLVERS else ""
    return sampler and f"; its steps are those of --sampler {sampler}"


def _linear_shift(config: Mapping[str, Any], tokens: int) -> float:
    """log of a dynamic shift: linear in the number of tokens, through the scheduler's two points."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(config["base_shift"] + slope * (tokens - low))


def _refuse_other_shifts(name: str, config: Mapping[str, Any]) -> None:
    """`UserError` for a flow's shifts that leave no levels between 0 and 1."""
    numbers = {
        key: config[key]
        for key in ("shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    }
    numbers["shift_terminal"] = config["shift_terminal"] or 0.0
    problems = [
        key
        for key, value in numbers.items()
        if not isinstance(value, (int, float)) or not math.isfinite(value)
    ]
    if not problems and config["shift"] <= 0:
        problems = ["shift"]
    if not problems and not 0 <= numbers["shift_terminal"] < 1:
        problems = ["shift_terminal"]
    if not problems and config["use_dynamic_shifting"]:
        problems = ["max_image_seq_len"] * (config["max_image_seq_len"] == config["base_image_seq_len"])
    if problems:
        raise UserError(
            f"The scheduler of {name} has {problems[0]} {config[problems[0]]!r}, which leaves no levels of noise "
            "between 0 and 1. Restore scheduler/."
        )
