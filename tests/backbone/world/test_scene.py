"""The world: scenes are values, sentences say them, and one changed word changes only what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops

from backbone.world.edits import OF_ONE, OF_TWO, WORDINGS, sample_edits, write_instruction
from backbone.world.rendering.render import place_figures
from backbone.world.rendering.render import render as draw
from backbone.world.scene import Scene, is_fair, sample_scene
from backbone.world.words import Thing, choose_article, load_vocabulary, pluralize

PLAIN = Scene((Thing("dog"),), "in the snow", seed=5)


def test_a_seed_gives_the_same_scene() -> None:
    assert sample_scene(17) == sample_scene(17)
    assert len({sample_scene(seed).caption() for seed in range(50)}) > 45


def test_no_concept_occurs_in_training_scenes() -> None:
    words = load_vocabulary()
    kept_apart = {*words.development_concepts, *words.demo_concept, *words.example_concept}
    seen = {thing.noun for seed in range(3000) for thing in sample_scene(seed).things}
    assert seen == set(words.nouns)
    assert not seen & kept_apart


def test_the_mixture_is_as_specified() -> None:
    scenes = [sample_scene(seed) for seed in range(4000)]
    assert np.mean([s.pair for s in scenes]) == pytest.approx(0.18, abs=0.02)
    assert np.mean([len(s.things) == 2 for s in scenes]) == pytest.approx(0.20, abs=0.02)
    assert np.mean([s.style is not None for s in scenes]) == pytest.approx(0.30, abs=0.02)


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (PLAIN, "a dog in the snow"),
        (replace(PLAIN, style="a neon drawing of", pair=True), "a neon drawing of two dogs in the snow"),
        (
            replace(PLAIN, things=(Thing("elephant", "red", "a crown", True),)),
            "a small red elephant wearing a crown in the snow",
        ),
        (replace(PLAIN, things=(Thing("owl"), Thing("cat"))), "an owl next to a cat in the snow"),
    ],
)
def test_the_canonical_caption_says_the_scene(scene: Scene, caption: str) -> None:
    assert scene.caption() == caption


def test_a_concept_is_called_by_its_token() -> None:
    assert PLAIN.caption(name="[V] dog") == "a [V] dog in the snow"


def test_paraphrases_name_the_same_things() -> None:
    for seed in range(300):
        scene = sample_scene(seed)
        said = scene.caption_for_training()
        noun = scene.things[0].noun
        assert (pluralize(noun) if scene.pair else noun) in said
        assert scene.things[0].colour is None or scene.things[0].colour in said


def test_articles_and_plurals_are_english() -> None:
    assert [choose_article(word) for word in ("owl", "dog", "unicorn")] == ["an", "a", "a"]
    assert [pluralize(word) for word in ("butterfly", "snowman", "fox", "dog")] == [
        "butterflies",
        "snowmen",
        "foxes",
        "dogs",
    ]


def test_no_benchmark_asks_for_a_tree_where_trees_are_drawn() -> None:
    assert not is_fair(Scene((Thing("tree"),), "in a forest"))
    assert is_fair(Scene((Thing("tree"),), "in the snow"))


def drawn(scene: Scene) -> np.ndarray:
    from backbone.world.rendering.render import render, to_array

    return to_array(render(scene).image)


@pytest.mark.font
def test_a_scene_is_drawn_the_same_every_time() -> None:
    assert np.array_equal(drawn(PLAIN), drawn(PLAIN))
    assert drawn(PLAIN).shape == (128, 128, 3)


def test_things_look_the_way_that_the_font_draws_them() -> None:
    scenes = [sample_scene(seed) for seed in range(50)]
    assert not any(figure.mirrored for scene in scenes for figure in place_figures(scene, 80.0))


@pytest.mark.font
def test_another_colour_changes_pixels_of_the_thing_alone() -> None:
    from backbone.world.rendering.render import render

    red = replace(PLAIN, things=(Thing("dog", colour="red"),))
    changed = np.abs(drawn(red).astype(int) - drawn(PLAIN)).max(-1) > 2
    mask = np.asarray(render(PLAIN).masks[0]) > 0
    assert changed.any()
    assert not (changed & ~mask).any()


@pytest.mark.font
def test_another_place_keeps_the_thing_where_it_stands() -> None:
    from backbone.world.rendering.render import render

    here, there = render(PLAIN), render(replace(PLAIN, place="on a white background"))
    assert here.image.tobytes() != there.image.tobytes()
    edges = [mask.getbbox() for mask in (here.masks[0], there.masks[0])]
    assert edges[0] is not None and edges[1] is not None
    assert abs(edges[0][0] - edges[1][0]) <= 1


@pytest.mark.font
def test_every_place_style_and_accessory_draws() -> None:
    words = load_vocabulary()
    for place in words.places:
        assert drawn(replace(PLAIN, place=place)).std() > 5
    for style in words.styles:
        assert not np.array_equal(drawn(replace(PLAIN, style=style)), drawn(PLAIN))
    for accessory in words.accessories:
        assert not np.array_equal(
            drawn(replace(PLAIN, things=(Thing("dog", accessory=accessory),))), drawn(PLAIN)
        )


@pytest.mark.font
def test_masks_lie_inside_the_picture_and_pairs_have_two() -> None:
    from backbone.world.rendering.render import render

    masks = render(replace(PLAIN, pair=True)).masks
    assert len(masks) == 2
    assert all(mask.size == (128, 128) and mask.getbbox() for mask in masks)


def test_a_missing_font_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from backbone.io.console import UserError
    from backbone.world.rendering import render

    monkeypatch.setattr(render, "FONT_PATHS", ())
    monkeypatch.delenv(render.FONT_VARIABLE, raising=False)
    with pytest.raises(UserError, match="fonts-noto-color-emoji"):
        render.find_font()


def test_pixel_art_is_made_of_squares() -> None:
    from backbone.world.rendering.styles import pixel_art

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    squares = np.asarray(pixel_art(image)).reshape(32, 4, 32, 4, 3)
    assert (squares == squares[:, :1, :, :1]).all()


def test_every_kind_of_edit_says_what_it_does_and_changes_nothing_else() -> None:
    edits = sample_edits(range(400), 150)
    assert {edit.kind for edit in edits} == {*OF_ONE, *OF_TWO} == {*WORDINGS}
    for edit in edits:
        before, after = edit.before.things, edit.after.things
        words = edit.instruction
        match edit.kind:
            case "colour":
                assert (
                    str(after[0].colour) in words and replace(after[0], colour=before[0].colour) == before[0]
                )
            case "accessory added":
                assert str(after[0].accessory).split()[-1] in words and before[0].accessory is None
            case "accessory removed":
                assert str(before[0].accessory).split()[-1] in words and after[0].accessory is None
            case "place":
                assert edit.after.place in words
                assert replace(edit.after, place=edit.before.place, poses=None) == edit.before
            case "style":
                assert str(edit.after.style).split()[1] in words and edit.before.style is None
            case "thing removed":
                assert before[edit.hidden_after or 0].noun in words and edit.after == edit.before
            case "thing added":
                assert before[edit.hidden_before or 0].noun in words and edit.after == edit.before
            case _:
                (old, new) = next((b, a) for b, a in zip(before, after, strict=True) if b != a)
                assert new.noun in words and replace(new, noun=old.noun) == old
    assert write_instruction("noun", edits[0].before, edits[0].after).startswith("turn the ")


def test_another_place_leaves_things_where_they_are() -> None:
    places = [edit for edit in sample_edits(range(2000), 400) if edit.kind == "place"]
    assert len(places) > 20
    for edit in places:
        (before, after) = (draw(scene).masks for scene in (edit.before, edit.after))
        assert [mask.getbbox() for mask in before] == [mask.getbbox() for mask in after]


@pytest.mark.font
def test_an_edit_is_drawn_before_and_after_from_one_layout() -> None:
    edit = next(one for one in sample_edits(range(400), 150) if one.kind == "thing removed")
    before, after = edit.rendered()
    changed = ImageChops.difference(before, after).convert("L").point(lambda value: 255 if value > 8 else 0)
    place = draw(edit.before).masks[edit.hidden_after or 0]
    assert changed.getbbox() is not None
    left, top, right, bottom = changed.getbbox() or (0, 0, 0, 0)
    box = place.getbbox() or (0, 0, 0, 0)
    assert left >= box[0] - 12 and right <= box[2] + 12 and bottom <= box[3] + 12 and top >= box[1] - 12
