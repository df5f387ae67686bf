"""Glyph fidelity: a true rendering has all of it, another thing little, and what begins near the truth stays nearer."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.io.console import UserError
from backbone.models.model import Backbone
from backbone.world.rendering.render import render
from benchmarks.judges.classifier import prepare_images
from benchmarks.judges.fidelity import (
    FidelitySettings,
    decode_renderings,
    find_things,
    measure,
    measure_all,
    measure_from_true,
)
from benchmarks.moji import select_scenes

pytestmark = pytest.mark.font
SCENES = [
    scene for scene in select_scenes(20) if len(scene.things) == 1 and not scene.pair and not scene.style
]


def test_a_true_rendering_has_nearly_all_of_it_and_another_thing_little() -> None:
    whole = [scene for scene in SCENES if not scene.things[0].small and scene.things[0].noun != "balloon"]
    assert len(whole) > 3  # a small thing has few pixels, and a balloon one colour
    for scene in whole:
        picture = (prepare_images([render(scene).image])[0] + 1) / 2
        assert measure(scene, picture).correlation > 0.9
        assert all(measure(other, picture).correlation < 0.5 for other in whole if other is not scene)


def test_a_glyph_is_found_where_it_stands() -> None:
    scene = SCENES[0]
    rendering = render(scene)
    (fit,) = find_things(scene, (prepare_images([rendering.image])[0] + 1) / 2)
    left, _, right, bottom = rendering.masks[0].getbbox() or (0, 0, 0, 0)
    assert abs(fit.left - left) <= 3 and abs(fit.left + fit.template.opacity.shape[1] - right) <= 3
    assert abs(fit.top + fit.template.opacity.shape[0] - bottom) <= 3  # a hat may stand above it


@pytest.mark.slow
def test_what_begins_nearer_to_the_truth_ends_nearer_to_it() -> None:
    model = Backbone.open("moji", device="cpu", precision="fp32")
    settings = FidelitySettings(steps=10, batch=4)
    late, early = (measure_from_true(model, SCENES[:4], settings, share) for share in (0.2, 0.7))
    bound = measure_all(SCENES[:4], decode_renderings(model, SCENES[:4]), "bound")
    assert early["correlation"] < late["correlation"] < sum(one.correlation for one in bound) / 4


def test_a_share_that_leaves_no_step_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="share of the steps to draw anew"):
        measure_from_true(tiny, SCENES[:1], FidelitySettings(steps=2, out=tmp_path), 0.0)
