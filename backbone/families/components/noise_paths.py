"""Noise paths from a scheduler's config: variance preserving from a schedule of βs, and rectified flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from backbone.diffusion.noise import PredictionType, Schedule, vp
from backbone.diffusion.schedules import (
    DISTILLED,
    Spacing,
    alphas_cumprod,
    flow_schedule,
    logit_normal_levels,
    vp_schedule,
    zero_terminal_snr,
)
from backbone.families.base import NoisePath
from backbone.families.location import Location
from backbone.io.console import UserError
from backbone.io.weights import refuse_damaged

UNSUPPORTED_FLOW_SETTINGS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("invert_sigmas", "stochastic_sampling"),
)
VP_SETTINGS: Mapping[str, tuple[str, ...]] = {  # of a β scheduler, diffusers' default first
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
}
FLOW_QUANTILES = 1000  # quantiles that stand for a flow's continuous density of levels


def vp_path(location: Location) -> NoisePath:
    """The noise path of a model trained on a β schedule, from its scheduler's config.

    Schedulers that sample in σ (Euler, DPM-Solver …) end at σ = 0 whatever `set_alpha_to_one` says.
    """
    from diffusers import DDIMScheduler

    scheduler = location.config("scheduler")
    name = scheduler.get("_class_name", "")
    if "FlowMatch" in name or name.startswith("EDM"):
        raise UserError(
            f"The scheduler of {location.name} is a {name}, which is not of its family. Restore scheduler/."
        )
    for setting, known in VP_SETTINGS.items():
        if scheduler.get(setting, known[0]) not in known:
            raise UserError(
                f"The scheduler of {location.name} has {setting} {scheduler[setting]!r}, and understood are "
                f"{', '.join(known)}. Restore scheduler/."
            )
    with refuse_damaged(location.name, "scheduler"):
        config = dict(DDIMScheduler.from_config(scheduler).config)
    alpha_bar = _read_alphas_cumprod(location.name, config)
    by_alpha = name in ("", "DDIMScheduler", "PNDMScheduler", "DDPMScheduler")
    final: Literal["one", "first"] = "one" if config["set_alpha_to_one"] or not by_alpha else "first"

    def schedule(steps: int, size: tuple[int, int]) -> Schedule:
        # Of a leading spacing a single step is the cleanest, which samples nothing: it begins at the end instead
        spacing: Spacing = "trailing" if steps == 1 else config["timestep_spacing"]
        if name == "LCMScheduler":
            spacing = "distilled"
            if steps > DISTILLED:
                raise UserError(f"{location.name} is drawn with in 1 to {DISTILLED} steps, not {steps}.")
        offset = int(config["steps_offset"])
        return vp_schedule(alpha_bar, steps, spacing=spacing, steps_offset=offset, final=final)

    kind = cast(PredictionType, config["prediction_type"])
    return NoisePath(kind, vp(alpha_bar, torch.arange(len(alpha_bar))), schedule)


def _read_alphas_cumprod(name: str, config: Mapping[str, Any]) -> Tensor:
    """ᾱ [train steps] of a β scheduler's config, from its own `trained_betas` where it has them.

    Raises `UserError` for betas of another number, and for a last level without signal at which ε is predicted.
    """
    train_steps, betas = int(config["num_train_timesteps"]), config["trained_betas"]
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
    if config["rescale_betas_zero_snr"]:
        alpha_bar = zero_terminal_snr(alpha_bar)
    if config["prediction_type"] == "epsilon" and not alpha_bar[-1] > 0:
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

    `size` (H, W) is that of the model's own latents, of which `patch` × `patch` make a token: dynamic shifting depends
    on the number of tokens. `lowest(S)` is the last level above 0 before shifting; None takes the scheduler's own.
    `shift(tokens, S)` is the log of the dynamic shift, and of training's without S; None takes the scheduler's line.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = location.config("scheduler")
    name = scheduler.get("_class_name", "")
    with refuse_damaged(location.name, "scheduler"):
        config = (
            dict(FlowMatchEulerDiscreteScheduler.from_config(scheduler).config) if "FlowMatch" in name else {}
        )
    strange = [setting for setting in UNSUPPORTED_FLOW_SETTINGS if config.get(setting)]
    if not config or strange or config["time_shift_type"] != "exponential":
        what = ", ".join(strange) or config.get("time_shift_type") or name or "of unknown kind"
        raise UserError(
            f"The scheduler of {location.name} ({what}) is not the FlowMatchEulerDiscreteScheduler that this family "
            "was published with. Restore scheduler/."
        )
    train_steps = int(config["num_train_timesteps"])

    def dynamic(size: tuple[int, int], *steps: int) -> float | None:
        """log of the shift for latents of this size, linear in the number of tokens; None without dynamic shifting."""
        if not config["use_dynamic_shifting"]:
            return None
        tokens = (size[0] // patch) * (size[1] // patch)
        if shift is not None:
            return shift(tokens, *steps)
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (many - few)
        return float(config["base_shift"] + slope * (tokens - few))

    def schedule(steps: int, size: tuple[int, int]) -> Schedule:
        return flow_schedule(
            steps,
            config["shift"],
            mu=dynamic(size, steps),
            lowest=lowest(steps) if lowest else None,
            terminal=config["shift_terminal"] or None,
            train_steps=train_steps,
        )

    mu = dynamic(size)
    usual = float(config["shift"]) if mu is None else math.exp(mu)
    return NoisePath("flow", logit_normal_levels(FLOW_QUANTILES, usual, train_steps=train_steps), schedule)
