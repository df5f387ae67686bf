"""The classifier reads in the order of its labels, and what the benchmark counts is what was asked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.evaluation.statistics import wilson_interval
from backbone.io.console import UserError
from backbone.io.files import json_text, write_json, write_tensors
from backbone.models.model import Backbone
from backbone.world.scene import BENCHMARK_SEEDS, Scene, is_fair, sample_scene
from backbone.world.words import Thing, load_vocabulary
from benchmarks.judges.classifier import (
    FACTS,
    NONE,
    ONE,
    TWO_DIFFERENT,
    TWO_OF_A_KIND,
    WEIGHTS,
    Classifier,
    Network,
    Prediction,
    is_top_glyph,
    list_labels,
    load_classifier,
    most_likely,
    prepare_images,
)
from benchmarks.moji import (
    QUESTIONS,
    Gallery,
    Row,
    Setting,
    format_markdown,
    log_likelihood,
    parse_setting,
    read_sampler,
    score_predictions,
    select_scenes,
    write_card,
)
from recipes.moji.classifier import (
    UNKNOWN,
    classification_loss,
    encode_labels,
    list_true_labels,
    make_scene,
    measure_accuracies,
)

Images = list[Image.Image]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    labels = list_labels()
    network = Network(
        {head: len(names) for head, names in labels.items()}, stem=8, widths=(8, 8), blocks=(1, 1)
    )
    return Classifier(network.eval(), labels)


@pytest.fixture
def images() -> Images:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (128, 128, 3), dtype=np.uint8)) for _ in range(5)]


def certain(scene: Scene) -> Prediction:
    """What a perfect classifier says of a scene's picture."""
    expected = list_true_labels(scene)
    kinds = expected.pop("glyphs")
    assert isinstance(kinds, frozenset)
    readings = {"glyphs": dict.fromkeys(sorted(kinds), 1 / len(kinds))}
    readings |= {head: {str(label or NONE): 1.0} for head, label in expected.items()}
    for head, names in list_labels().items():
        readings[head] |= {name: 0.0 for name in names if name not in readings[head]}
    return Prediction(**readings)


def test_every_head_gives_a_distribution_over_its_labels_best_first(
    classifier: Classifier, images: Images
) -> None:
    for prediction in classifier.classify(images):
        for head, names in classifier.labels.items():
            reading = getattr(prediction, head)
            assert set(reading) == set(names)
            assert sum(reading.values()) == pytest.approx(1, abs=1e-4)
            assert list(reading.values()) == sorted(reading.values(), reverse=True)
            assert most_likely(reading) == max(reading, key=reading.__getitem__)


def test_labels_stand_in_the_order_of_the_logits(classifier: Classifier, images: Images) -> None:
    logits = classifier.network(prepare_images(images[:1]))
    (prediction,) = classifier.classify(images[:1])
    for head, names in classifier.labels.items():
        assert most_likely(getattr(prediction, head)) == names[int(logits[head].argmax())]


def test_a_verdict_does_not_depend_on_the_batch(classifier: Classifier, images: Images) -> None:
    order = [3, 0, 4, 1, 2]
    straight = classifier.classify(images)
    shuffled = classifier.classify([images[index] for index in order], batch=2)
    for place, index in enumerate(order):
        assert dict(shuffled[place].glyphs) == pytest.approx(dict(straight[index].glyphs), abs=1e-5)


def test_no_pictures_have_no_verdicts(classifier: Classifier) -> None:
    assert classifier.classify([]) == []


def test_the_judge_knows_the_nouns_and_the_concepts_and_no_other_glyph() -> None:
    words = load_vocabulary()
    known = list_labels()["glyphs"]
    assert set(known) == {*words.nouns, *words.development_concepts, *words.demo_concept}
    assert len(known) == len(set(known)) == 84


def test_a_glyph_that_it_does_not_know_is_no_question(classifier: Classifier, images: Images) -> None:
    (prediction,) = classifier.classify(images[:1])
    assert is_top_glyph(prediction, prediction.glyph)
    with pytest.raises(UserError, match="does not know 'wizard'"):
        is_top_glyph(prediction, "wizard")


def test_saving_then_loading_gives_the_same_verdicts(images: Images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = list_labels()
    network = Network({head: len(names) for head, names in labels.items()}).eval()
    kept = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
    write_tensors(tmp_path / WEIGHTS, {n: v.half() if v.ndim > 1 else v for n, v in kept.items()})
    write_json(tmp_path / FACTS, {"labels": labels})
    assert (tmp_path / WEIGHTS).stat().st_size < 6e6
    before, after = (
        read.classify(images[:1])[0] for read in (Classifier(network, labels), load_classifier(tmp_path))
    )
    for head in labels:
        assert dict(getattr(before, head)) == pytest.approx(dict(getattr(after, head)), abs=2e-3)


def test_weights_and_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Train the classifier"):
        load_classifier(tmp_path)
    write_tensors(tmp_path / WEIGHTS, Network({"place": 3}).state_dict())
    write_json(tmp_path / FACTS, {"labels": {"place": ["here", "there"]}})
    with pytest.raises(UserError, match="does not fit"):
        load_classifier(tmp_path)


# --- what it learns from


def test_the_judge_trains_on_none_of_the_benchmarks_questions() -> None:
    scenes = [make_scene(seed) for seed in range(400_000, 401_000)]
    assert all(is_fair(scene) for scene in scenes)
    nouns = {thing.noun for scene in scenes for thing in scene.things}
    assert nouns == set(list_labels()["glyphs"])


def test_answers_say_what_the_scene_says() -> None:
    dressed = Scene((Thing("dog", colour="red", accessory="a crown", small=True),), "in space", seed=1)
    assert list_true_labels(dressed) == {
        "glyphs": {"dog"}, "place": "in space", "colour": "red", "accessory": "a crown", "style": NONE,
        "count": ONE, "size": "small",
    }  # fmt: skip
    both = list_true_labels(Scene((Thing("dog"), Thing("cat")), "at night"))
    assert (both["glyphs"], both["count"]) == (frozenset({"dog", "cat"}), TWO_DIFFERENT)
    assert list_true_labels(Scene((Thing("dog"),), "at night", pair=True))["count"] == TWO_OF_A_KIND


def test_the_colour_of_a_pencil_sketch_is_not_asked_for() -> None:
    grey = Scene((Thing("dog", colour="red"),), "at night", "a pencil sketch of")
    assert list_true_labels(grey)["colour"] is None
    assert encode_labels([grey])["colour"].tolist() == [UNKNOWN]


def test_a_perfect_judge_has_no_loss_and_no_mistakes() -> None:
    scenes = [make_scene(seed) for seed in range(400_000, 400_200)]
    truth = encode_labels(scenes)
    assert truth["glyphs"].sum(1).tolist() == [1.0] * len(scenes)
    logits = {"glyphs": (truth["glyphs"] + 1e-9).log()}
    for head, names in list_labels().items():
        if head != "glyphs":
            logits[head] = 50 * torch.nn.functional.one_hot(truth[head].clamp(min=0), len(names)).float()
    entropy = -torch.special.xlogy(truth["glyphs"], truth["glyphs"]).sum(1).mean()
    assert float(classification_loss(logits, truth)) == pytest.approx(float(entropy), abs=1e-4)
    shares = measure_accuracies(scenes, [certain(scene) for scene in scenes])
    assert set(shares["accuracy"].values()) == {1.0}
    assert shares["confused"] == []


def test_an_unknown_label_pulls_at_nothing() -> None:
    logits = {"colour": torch.randn(1, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)}
    classification_loss(logits, {"colour": torch.tensor([UNKNOWN])}).backward()
    assert logits["colour"].grad is not None
    assert logits["colour"].grad.abs().sum() == 0


# --- what the benchmark counts


def test_benchmark_scenes_are_fair_held_out_and_always_the_same() -> None:
    scenes = select_scenes(300)
    assert scenes == select_scenes(301)[:300]
    assert all(is_fair(scene) and scene.seed in BENCHMARK_SEEDS for scene in scenes)
    assert {thing.noun for scene in scenes for thing in scene.things} <= set(load_vocabulary().nouns)


def test_a_perfect_model_passes_every_question() -> None:
    scenes = select_scenes(300)
    for row in score_predictions(scenes, [certain(scene) for scene in scenes]):
        assert row.n > 20
        assert row.right == row.n


def test_pictures_of_other_scenes_pass_hardly_any_question() -> None:
    scenes = select_scenes(300)
    rows = score_predictions(scenes, [certain(scene) for scene in scenes[1:] + scenes[:1]])
    assert all(row.share < 0.2 for row in rows if row.name != "style")


def test_one_of_two_things_is_not_both() -> None:
    asked = Scene((Thing("dog"), Thing("cat")), "at night")
    for seen in (Scene((Thing("dog"),), "at night"), Scene((Thing("dog"), Thing("fox")), "at night")):
        rows = {row.name: row for row in score_predictions([asked], [certain(seen)])}
        assert (rows["two different, both right"].right, rows["two different, both right"].n) == (0, 1)


def test_two_of_another_kind_are_not_two_of_a_kind() -> None:
    asked = Scene((Thing("dog"),), "at night", pair=True)
    for seen in (Scene((Thing("dog"),), "at night"), Scene((Thing("fox"),), "at night", pair=True)):
        rows = {row.name: row for row in score_predictions([asked], [certain(seen)])}
        assert (rows["two of a kind"].right, rows["two of a kind"].n) == (0, 1)


def test_the_table_prints_every_row_also_an_empty_one() -> None:
    rows = [Row("noun", 3, 4, *wilson_interval(3, 4)[1:]), Row("colour", 0, 0, *wilson_interval(0, 0)[1:])]
    facts = {
        "model": "m", "prompts": 4, "steps": 25, "guidance": 3.0, "sampler": "heun",
        "guided": [0.0, 0.6], "gradient": 0.93,
        "rows": rows, "true_pictures": [], "psnr_db": {"textures": {"db": 24.5, "n": 2}},
        "seconds_per_picture": {"one at a time": 1.25}, "machine": "cpu",
    }  # fmt: skip
    table = format_markdown(facts)
    assert "4 held-out prompts, 25 steps (heun), guidance 3 from 0% to 60% of the steps" in table
    assert "| noun | 75.0 % | 30.1–95.4 % | 4 | – |" in table
    assert "| colour | – | 0.0–100.0 % | 0 | – |" in table
    assert "| textures | 24.50 | 2 |" in table
    assert "0.93 × the gradient" in table
    assert math.isnan(rows[1].share)
    assert '"name": "noun"' in json_text(facts)


def test_questions_are_asked_where_the_prompt_speaks_of_them() -> None:
    scenes = [sample_scene(seed) for seed in BENCHMARK_SEEDS[:500]]
    count = {question.name: sum(question.applies(scene) for scene in scenes) for question in QUESTIONS}
    assert count["noun"] + count["two different, both right"] == count["place"] == 500
    assert count["two of a kind"] == sum(scene.pair for scene in scenes)


def test_the_worst_picture_is_the_one_that_shows_least_of_what_was_asked() -> None:
    scene = Scene((Thing("cat", colour="red"),), "in space", None, seed=1)
    elsewhere = replace(scene, place="at night")
    other = replace(elsewhere, things=(Thing("dog", accessory="a crown"),))
    whole, part, nothing = (log_likelihood(scene, certain(shown)) for shown in (scene, elsewhere, other))
    assert whole > part > nothing
    assert whole == pytest.approx(0, abs=1e-6)


def test_a_setting_is_read_from_steps_and_guidance() -> None:
    assert parse_setting("15:2.5") == Setting(15, 2.5)
    assert parse_setting("15:2.5:heun") == Setting(15, 2.5, "heun")
    assert parse_setting("15:2.5:Euler a") == Setting(15, 2.5, "ancestral")
    with pytest.raises(UserError, match="There is no sampler '2'"):
        parse_setting("15:4:2")
    for wrong in ("15", "a:b"):
        with pytest.raises(UserError, match="STEPS:GUIDANCE"):
            parse_setting(wrong)


def test_a_benchmark_takes_every_name_of_a_sampler_that_the_doors_take() -> None:
    assert read_sampler(None) is None
    assert [read_sampler(said) for said in ("ddim", "k_euler_a", "LCMScheduler")] == [
        "ddim",
        "ancestral",
        "consistency",
    ]
    with pytest.raises(UserError, match="There is no sampler 'best'"):
        read_sampler("best")
    with pytest.raises(UserError, match="Write dpmpp-2m"):
        read_sampler("DPM++ 2M Karras")


def test_the_gallery_draws_a_picture_once(tiny: Backbone, tmp_path: Path) -> None:
    scenes, setting, gallery = select_scenes(2), Setting(2, 1.0), Gallery(tmp_path, 2)
    first = gallery.load_or_draw(tiny, scenes, setting)
    gone, kept = sorted(tmp_path.rglob("*.png"))
    written = kept.stat().st_mtime_ns
    gone.unlink()
    again = gallery.load_or_draw(tiny, scenes, setting)
    for now, before in zip(again, first, strict=True):  # alone in its batch, and in one of two
        np.testing.assert_allclose(np.asarray(now, dtype=int), np.asarray(before, dtype=int), atol=1)
    assert kept.stat().st_mtime_ns == written


def test_training_scenes_of_the_judge_are_styled_more_often_and_otherwise_the_same() -> None:
    plain = [make_scene(seed) for seed in range(400_000, 400_400)]
    more = [make_scene(seed, styled=0.4) for seed in range(400_000, 400_400)]
    assert [scene.plain() for scene in more] == [scene.plain() for scene in plain]
    changed = [after for before, after in zip(plain, more, strict=True) if before.style != after.style]
    assert 0.2 < len(changed) / len(plain) < 0.36
    assert all(before.style in (None, after.style) for before, after in zip(plain, more, strict=True))


def test_a_card_s_figures_are_renewed_and_its_text_stays(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "sheet.png")
    (tmp_path / "README.md").write_text("# a model\n\n- of something\n")
    for table in ("| first |\n", "| second |\n"):
        write_card(tmp_path, table, tmp_path / "sheet.png")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# a model\n\n- of something\n\n## Figures")
    assert "| second |" in text
    assert "| first |" not in text
    assert (tmp_path / "worst.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
