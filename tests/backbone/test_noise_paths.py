"""The noise path that a scheduler's config says: what diffusers makes of it, or one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler

from backbone.families.base import NoisePath
from backbone.families.components.noise_paths import vp_path
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


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_single_step_begins_at_the_end_of_the_path_whatever_the_spacing(spacing: str) -> None:
    schedule = path_of(timestep_spacing=spacing).schedule(1, (8, 8))
    assert schedule.time is not None and int(schedule.time[0]) == 999
    assert float(schedule.a[0]) < 0.1 < float(schedule.b[0])
