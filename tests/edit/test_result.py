"""What every method gives back, and what the package exports."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

import edit
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level
from backbone.diffusion.schedules import flow_schedule
from backbone.io.console import UserError
from backbone.models.model import Backbone
from backbone.models.placement import Placement
from edit.inversion.inversion import Inversion, invert
from edit.methods.compose import compose
from edit.methods.interpolate import interpolate
from edit.methods.prompt_to_prompt.replace import replace
from edit.methods.prompt_to_prompt.settings import PRESETS, ReplaceSettings
from edit.methods.sdedit import sdedit
from edit.pictures import read_image
from tests.edit.models import photo

SOURCE, TARGET = "a cat in the snow", "a dog in the snow"


def test_every_exported_name_loads() -> None:
    assert set(edit.__all__) == {name for names in edit._MODULES.values() for name in names}
    assert all(getattr(edit, name) is not None for name in edit.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = edit.nothing


def test_a_notebook_shows_the_source_and_the_edits_side_by_side(tiny: Backbone) -> None:
    two = sdedit(tiny, photo(), "a red dog", steps=2, count=2)
    one = sdedit(tiny, photo(), "a red dog", steps=2)
    pages = [Image.open(io.BytesIO(result._repr_png_())) for result in (one, two)]
    assert pages[0].width < pages[1].width and pages[0].height == pages[1].height
    assert repr(one) == "Result('a red dog'; 64 × 64, NFE 2)"


def test_an_inversion_says_in_a_line_what_it_is(tiny: Backbone) -> None:
    assert repr(invert(tiny, photo(), SOURCE, steps=2)) == (
        "Inversion(an image, 'a cat in the snow', direct, 2 steps, NFE 2)"
    )


def test_an_image_that_was_read_is_not_read_again() -> None:
    source = read_image(photo())
    assert read_image(source) is source


def test_settings_say_what_the_caller_left_to_the_model(tiny: Backbone) -> None:
    tiny.__dict__["defaults"] = {**tiny.defaults, "edit": {"cross": 0.0, "colour_self_attention": 0.5}}
    left = ReplaceSettings().resolve(tiny)
    assert (left.cross, left.self_attention, left.colour_self_attention) == (0.0, 0.4, 0.5)
    asked = ReplaceSettings(cross=0.3, self_attention=0.2).resolve(tiny)
    assert (asked.cross, asked.self_attention, asked.colour_self_attention) == (0.3, 0.2, None)
    assert asked.resolve(tiny) == asked
    assert PRESETS["masactrl"].resolve(tiny) == PRESETS["masactrl"]


def test_attention_that_is_never_computed_cannot_be_shown(tiny: Backbone) -> None:
    inversion = invert(tiny, photo(), SOURCE, steps=2)
    with pytest.raises(UserError, match="--heatmap"):
        replace(inversion, TARGET, ReplaceSettings(strength=0.0, heatmaps=["snow"]))


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> list[Inversion]:
    """Two inversions whose latents have frames, [C, F, H, W], of a model that any latent pleases."""

    def predict(noisy: Tensor, level: Level) -> Estimate:
        return Estimate(noisy / 2, noisy.flip(-1))

    def encoded(model: Backbone, prompts: list[str]) -> Conditions:
        return Conditions({"hidden": torch.zeros(len(prompts), 2, 3)})

    for method in ("compose", "interpolate"):
        monkeypatch.setattr(f"edit.methods.{method}.encode_prompts_cached", encoded)
    random = torch.Generator().manual_seed(0)
    return [
        Inversion(
            model=cast(Any, SimpleNamespace(predictor=lambda text: predict, placement=Placement())),
            method="direct",
            prompt=SOURCE,
            schedule=flow_schedule(3),
            states=torch.randn(4, 2, 5, 8, 8, generator=random),
            image=torch.zeros(3, 64, 64),
            identity="clips",
            nfe=0,
        )
        for _ in range(2)
    ]


def test_latents_with_frames_are_interpolated_and_composed(clips: list[Inversion]) -> None:
    first, second = clips
    between = interpolate(first, second, count=3).latents
    assert between.shape == (3, 2, 5, 8, 8)
    assert torch.equal(between[0], first.clean) and torch.equal(between[2], second.clean)
    still = compose(first, [("red", 0.0), ("a dog", 0.0)])
    assert torch.allclose(still.latents[0], first.clean, atol=1e-5)
