"""The scorer's training data: which captions suit, what is wrong in a wrong one, where the figures stand."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbone.world.rendering.render import draw_place
from backbone.world.scene import Scene, sample_scene
from backbone.world.words import Thing, load_vocabulary
from recipes.moji.data.rendered import roughen, shift
from recipes.moji.scorer import (
    Heads,
    build,
    change_one_fact,
    contrastive_loss,
    group_parameters,
    locate_figures,
    make_caption,
    match_captions,
    patch_nouns,
)
from tests.tiny import tiny_tokenizer

SCENES = [sample_scene(seed) for seed in range(300)]


@pytest.mark.parametrize("place", ["on a white background", "on a wooden table"])
def test_the_horizon_is_the_one_that_is_drawn(place: str) -> None:
    for seed in range(3):
        scene = Scene((Thing("dog"),), place, seed=seed)
        assert scene.horizon == draw_place(scene)[1]


def test_every_figure_has_a_circle_in_the_picture() -> None:
    for scene in SCENES:
        circles = locate_figures(scene)
        assert len(circles) == (2 if scene.pair else len(scene.things))
        assert all(10 < x < 118 and 10 < y < 118 and 14 < radius < 42 for _, x, y, radius in circles)


def test_a_wrong_caption_is_wrong_in_one_fact_of_the_same_place() -> None:
    random = Random(0)
    for scene in SCENES:
        wrong = change_one_fact(scene, random)
        assert wrong.place == scene.place
        assert wrong.caption() != scene.caption()
        facts = [wrong.things != scene.things, wrong.pair != scene.pair, wrong.style != scene.style]
        assert facts.count(True) == 1
        assert {thing.noun for thing in wrong.things} <= set(load_vocabulary().nouns)


def test_own_captions_suit_and_so_do_those_that_leave_the_place_out() -> None:
    dog, snow = Scene((Thing("dog"),), "in space", seed=1), Scene((Thing("dog"),), "in the snow", seed=2)
    cat = Scene((Thing("cat"),), "in space", seed=3)
    again = replace(dog, seed=9)
    right = match_captions([dog, snow, cat, again], ["in space", None, "in space", "in space"])
    assert right.int().tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]


def test_a_caption_says_its_place_or_leaves_it_out() -> None:
    for scene in SCENES:
        assert scene.place not in make_caption(scene, None, Random(scene.seed))


def test_sure_and_right_costs_nothing_and_sure_and_wrong_much() -> None:
    right = torch.eye(3, dtype=torch.bool)
    logits = F.pad(50 * torch.eye(3), (0, 3))
    assert contrastive_loss(logits, right) < 1e-6
    assert contrastive_loss(logits.roll(1, 0), right) > 40


def test_indifference_costs_the_logarithm_of_the_choices() -> None:
    loss = contrastive_loss(torch.zeros(4, 8), torch.eye(4, dtype=torch.bool))
    assert float(loss) == pytest.approx(0.5 * (np.log(8) + np.log(4)), abs=1e-5)


def test_the_contrastive_loss_does_not_depend_on_the_order_of_the_pairs() -> None:
    source = torch.Generator().manual_seed(0)
    logits, order = torch.randn(4, 4, generator=source), torch.tensor([2, 0, 3, 1])
    right = torch.eye(4, dtype=torch.bool)
    right[0, 1] = right[1, 0] = True
    shuffled = contrastive_loss(logits[order][:, order], right[order][:, order])
    torch.testing.assert_close(shuffled, contrastive_loss(logits, right))


def test_patches_are_named_by_the_circle_that_covers_them() -> None:
    nouns = torch.tensor([[5, -1], [5, 7]])
    circles = torch.tensor([[[24.0, 24.0, 20.0], [0, 0, 0]], [[24.0, 24.0, 20.0], [104.0, 104.0, 20.0]]])
    one, two = patch_nouns(nouns, circles, 8, ground=71).unflatten(1, (8, 8))
    assert (one[1, 1], one[6, 6], one[1, 6]) == (5, 71, 71)
    assert (two[1, 1], two[6, 6], two[1, 6]) == (5, 7, 71)


@pytest.mark.parametrize(("right", "down"), [(3, -4), (-8, 0), (0, 8), (0, 0)])
def test_moving_a_picture_moves_its_pixels_and_repeats_its_edges(right: int, down: int) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for source, mirrored in ((picture, False), (picture[:, ::-1], True)):
        result = shift(picture, right=right, down=down, mirrored=mirrored)
        assert (result[10 + down, 10 + right] == source[10, 10]).all()
        rows, columns = np.clip(np.arange(32) - down, 0, 31), np.clip(np.arange(32) - right, 0, 31)
        np.testing.assert_array_equal(result, source[rows][:, columns])


def test_roughened_pictures_stay_pictures_and_depend_on_the_key_alone() -> None:
    pictures = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = pictures.clone()
    result = roughen(pictures, Random(1))
    assert result.abs().max() <= 1
    assert (result - pictures).abs().mean() < 0.3
    torch.testing.assert_close(result, roughen(pictures, Random(1)), rtol=0, atol=0)
    torch.testing.assert_close(pictures, before, rtol=0, atol=0)


def test_the_scorer_knows_the_tokenizer_s_ids_and_fits_the_wheel() -> None:
    tokenizer = tiny_tokenizer()
    model = build(tokenizer)
    text = model.text_model.config
    assert (text.bos_token_id, text.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = tokenizer(["a dog", "a red cat in the snow"], padding=True, return_tensors="pt")["input_ids"]
    first, second = model.eval().get_text_features(ids).pooler_output
    assert (first - second).norm() > 1e-4
    assert 2 * model.num_parameters() < 12e6


def test_every_parameter_is_trained_once_and_vectors_are_not_decayed() -> None:
    model = build(tiny_tokenizer())
    parameters = dict(model.named_parameters()) | dict(Heads(8).named_parameters())
    inner, other, vectors = (group["params"] for group in group_parameters(parameters, 1e-3))
    assert sorted(map(id, [*inner, *other, *vectors])) == sorted(map(id, parameters.values()))
    assert group_parameters(parameters, 1e-3)[2]["weight_decay"] == 0.0
    assert {id(value) for value in vectors} == {id(v) for v in parameters.values() if v.ndim <= 1}
    assert {id(value) for value in inner} <= {id(v) for n, v in parameters.items() if ".layers." in n}
