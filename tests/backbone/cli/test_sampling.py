"""Samplers by the names that other tools have for them."""

from __future__ import annotations

import pytest

from backbone.cli.options import list_fields
from backbone.cli.sampling import SamplingSettings, name_sampler
from backbone.cli.values.convert import convert_value
from backbone.io.console import UserError
from backbone.media.parameters import SAMPLERS


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *(("Euler a", "ancestral"), ("euler_ancestral", "ancestral"), ("k_euler_a", "ancestral")),
        *(("DPM++ 2M", "dpmpp-2m"), ("dpmpp_2m", "dpmpp-2m"), ("DPMSolverMultistepScheduler", "dpmpp-2m")),
        *(
            ("Euler", "ddim"),
            ("DDIM", "ddim"),
            ("DPMPP-2M", "dpmpp-2m"),
            ("Heun", "heun"),
            ("lcm", "consistency"),
            ("uni_pc_bh2", "unipc"),
        ),
    ],
)
def test_samplers_are_understood_as_other_tools_call_them(said: str, meant: str) -> None:
    assert SamplingSettings(sampler=said).sampler == meant  # type: ignore[arg-type]
    assert convert_value(list_fields(SamplingSettings)["sampler"], said, "--sampler") == meant


def test_what_our_pictures_say_of_their_sampler_is_understood() -> None:
    assert {name_sampler(said) for said in SAMPLERS.values()} == set(SAMPLERS)
    assert [name_sampler(said) for said in SAMPLERS.values()] == list(SAMPLERS)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("PLMS", "sampler is PLMS, which is none of ddim, heun, dpmpp-2m, unipc, ancestral, consistency"),
        ("DPM++ 2M SDE", "which is none of ddim"),
        ("DPM++ SDE Karras", "which is none of ddim"),
        ("DPM++ 2M Karras", "asks for another spacing of the steps.* Write dpmpp-2m"),
        ("dpmpp_2m_sgm_uniform", "Write dpmpp-2m"),
    ],
)
def test_samplers_that_are_not_here_are_refused_with_those_that_are(said: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        SamplingSettings(sampler=said)  # type: ignore[arg-type]
