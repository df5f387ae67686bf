"""The loss on true pictures of a concept that its run has not seen."""

from __future__ import annotations

import pytest
import torch

from backbone.models.model import Backbone
from backbone.world.concepts import TRAINING_PLACES
from backbone.world.rendering.render import render
from benchmarks.customize.concepts import training_scenes
from benchmarks.judges.unseen import (
    KINDS,
    Loss,
    format_markdown,
    hold_thing,
    list_near_training_images,
    list_true_pictures,
    mean_loss,
    measure,
)


def test_what_is_unseen_leaves_out_the_training_s_places_and_names_what_it_shows() -> None:
    found = list_true_pictures("peacock", 2)
    assert {one.kind for one in found} == {"place", "accessory", "style"}
    assert not {one.scene.place for one in found} & set(TRAINING_PLACES)
    assert len({one.scene.seed for one in found}) == len(found)
    for one in found:
        assert one.scene.place in one.prompt
        assert all(thing.noun == "peacock" for thing in one.scene.things)
        assert one.kind != "accessory" or str(one.scene.things[0].accessory) in one.prompt
        assert one.kind != "style" or str(one.scene.style) in one.prompt


@pytest.mark.font
def test_what_is_near_the_training_images_differs_from_them_in_one_respect() -> None:
    found = list_near_training_images("peacock")
    assert {one.kind for one in found} | {"place", "accessory", "style"} == set(KINDS)
    trained = training_scenes("peacock")
    images = [render(scene).image.tobytes() for scene in trained]
    learned = [render(one.scene).image.tobytes() for one in found if one.kind == "learned"]
    assert learned == images
    poses = {scene.seed: hold_thing(scene).poses for scene in trained}
    for one in found:
        assert "{}" in one.prompt and one.scene.place in one.prompt
        stays = one.kind in ("learned", "elsewhere")
        assert (one.scene.poses == poses[one.scene.seed]) == stays
        assert (one.scene.place in TRAINING_PLACES) == (one.kind != "elsewhere")


def test_the_loss_in_the_thing_is_weighted_by_how_much_of_it_is_there() -> None:
    error = torch.tensor([[[1.0, 3.0]], [[5.0, 9.0]], [[100.0, 100.0]]])
    weight = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]], [[1.0, 1.0]]])
    assert mean_loss(error, weight, [True, True, False]) == Loss(4.5, 4.0)


@pytest.mark.font
def test_the_same_noise_meets_every_run_and_a_known_noun_is_foretold_better_than_another() -> None:
    model = Backbone.open("moji", device="cpu", precision="fp32")
    some = [one for one in list_true_pictures("peacock", 1) if one.kind != "place"][::3]
    some = [*some, list_true_pictures("peacock", 1)[0]]
    right, again, wrong = (measure(model, some, called) for called in ("bird", "bird", "tractor"))
    assert right == again
    assert right["place"].in_the_thing < wrong["place"].in_the_thing
    assert format_markdown({"the base": right}).count("|") == 3 * 8
