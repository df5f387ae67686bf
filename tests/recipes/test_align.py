"""The preference recipes' prompts, and how they read the classifier."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

from align.pairs.records import normalize_prompt
from align.pairs.samples import image_name
from backbone.evaluation.statistics import Interval
from backbone.io.console import UserError
from backbone.io.files import write_json
from backbone.io.prompts import read_prompts
from backbone.world.rendering.render import render
from backbone.world.scene import Scene
from backbone.world.words import Thing, load_vocabulary
from benchmarks.judges.classifier import ONE, TWO_DIFFERENT, Classifier, Prediction, load_classifier
from recipes.align import experiment
from recipes.align.experiment import (
    Comparison,
    format_table,
    is_all_right,
    measure_kept_diversity,
    measure_ranking,
    measure_upper_bound,
)
from recipes.align.prompts import (
    HELD_OUT_PROMPTS,
    TRAINING_PROMPTS,
    categorize,
    is_crowded,
    is_hard,
    is_unstyled,
    make_hard_negatives,
    replace_noun,
    select_scenes,
    write_prompts,
)


def prediction(
    glyphs: dict[str, float], *, place: str = "in the snow", colour: str = "none", count: str = ONE
) -> Prediction:
    return Prediction(
        glyphs, {place: 1.0}, {colour: 1.0}, {"none": 1.0}, {"none": 1.0}, {count: 1.0}, {"usual": 1.0}
    )


def test_held_out_prompts_are_other_sentences() -> None:
    learn = select_scenes(TRAINING_PROMPTS, 300, is_hard)
    test = select_scenes(HELD_OUT_PROMPTS, 200, is_hard, excluded=learn)
    assert (len(learn), len(test)) == (300, 200)
    sentences = [normalize_prompt(scene.caption()) for scene in [*learn, *test]]
    assert len(set(sentences)) == 500


def test_prompts_are_written_with_their_categories(tmp_path: Path) -> None:
    chosen = select_scenes(TRAINING_PROMPTS, 100, is_hard)
    assert {categorize(scene) for scene in chosen} == set(load_vocabulary().accessories)
    path = write_prompts(tmp_path / "prompts.jsonl", chosen)
    assert [prompt.text for prompt in read_prompts(path)] == [scene.caption() for scene in chosen]
    assert all(scene.style is None for scene in select_scenes(TRAINING_PROMPTS, 100, is_unstyled))


def test_all_right_is_everything_that_was_asked_for() -> None:
    red = Scene((Thing("dog", colour="red"),), "in the snow")
    assert is_all_right(red, prediction({"dog": 0.9, "cat": 0.1}, colour="red"))
    assert not is_all_right(red, prediction({"dog": 0.9, "cat": 0.1}, colour="blue"))
    assert not is_all_right(red, prediction({"cat": 0.9, "dog": 0.1}, colour="red"))
    assert not is_all_right(red, prediction({"dog": 0.9, "cat": 0.1}, colour="red", place="at night"))
    two = Scene((Thing("dog"), Thing("cat")), "in the snow")
    assert is_all_right(two, prediction({"cat": 0.5, "dog": 0.5}, count=TWO_DIFFERENT))
    assert not is_all_right(two, prediction({"cat": 0.5, "owl": 0.5}, count=TWO_DIFFERENT))
    assert not is_all_right(two, prediction({"cat": 0.5, "dog": 0.5}))


def test_the_table_has_a_row_for_each_run() -> None:
    found = Comparison(
        n=20,
        base=Interval(0.5, 0.4, 0.6),
        tuned=Interval(0.6, 0.5, 0.7),
        difference=Interval(0.1, 0.02, 0.18),
        wins={"moji": Interval(0.8, 0.7, 0.9)},
        diversity=0.95,
    )
    lines = format_table([("dpo", found, {"sampling": 12.0, "training": 30.0})]).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "+10.0 (+2.0 to +18.0) points" in lines[2] and "12 s" in lines[2] and "n = 20" in lines[-1]


def test_the_variety_of_right_pictures_is_counted_where_both_sides_are_right() -> None:
    keys = [(i, j) for i in range(3) for j in range(2)]
    tuned, base = [1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]
    assert (
        measure_kept_diversity(tuned, base, {0: 0.1, 1: 9.0, 2: 9.0}, {0: 0.2, 1: 9.0, 2: 9.0}, keys) == 0.5
    )
    assert math.isnan(measure_kept_diversity(tuned, [0] * 6, {}, {}, keys))


@pytest.mark.font
def test_the_bound_is_what_the_world_s_own_pictures_come_to(tmp_path: Path) -> None:
    chosen = select_scenes(HELD_OUT_PROMPTS, 4, is_hard)
    (tmp_path / "base").mkdir()
    for i, scene in enumerate(chosen):
        for j in range(2):
            render(replace(scene, seed=j)).image.save(tmp_path / "base" / f"p{i:05d}-s{j:02d}.png")
    said = measure_upper_bound(chosen, load_classifier(), "moji", tmp_path)
    assert re.search(
        r"autoencoder: (100|8\d|9\d)\.?\d*% .* all right, diversity 0\.0\d+, \d\.\d\d of the base's 0\.", said
    )
    assert "2 right: 0." in said


@pytest.mark.parametrize("recipe", ["prompt_fidelity", "reward", "preference"])
def test_a_recipe_opens_with_its_command(recipe: str) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "align" / f"{recipe}.py").read_text()
    assert f"    python -m recipes.align.{recipe}" in text.split('"""')[1]


def test_a_table_can_be_written(tmp_path: Path) -> None:
    found = Comparison(2, *(Interval(0.5, 0.4, 0.6),) * 3, wins={}, diversity=float("nan"))
    write_json(tmp_path / "table.json", {"rows": [("dpo", found, {"sampling": 1.0})]})
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0][1]["n"] == 2


def test_a_step_runs_once_and_again_only_where_it_was_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[object, ...]] = []
    record, product = tmp_path / "steps" / "training.json", tmp_path / "summary.json"

    def killed(*arguments: object) -> None:
        ran.append(arguments)
        raise KeyboardInterrupt

    def whole(*arguments: object) -> None:
        ran.append(arguments)
        product.write_text("{}")

    monkeypatch.setattr(experiment, "run_align", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.run_once(record, product, "train", "pairs")
    monkeypatch.setattr(experiment, "run_align", whole)
    experiment.run_once(record, product, "train", "pairs", resume=("train", "--resume", "run"))
    seconds = experiment.run_once(record, product, "train", "pairs")
    assert ran == [("train", "pairs"), ("train", "--resume", "run")]
    assert json.loads(record.read_text()) == {
        "arguments": ["train", "pairs"],
        "seconds": seconds,
        "finished": True,
    }
    product.unlink()
    experiment.run_once(record, product, "train", "pairs")
    assert ran[-1] == ("train", "pairs")
    with pytest.raises(UserError, match="another run: align train pairs"):
        experiment.run_once(record, product, "train", "others")


def test_a_comparison_begins_in_a_folder_that_holds_nothing_or_another_s_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`align compare` takes no folder that holds other files."""
    found: list[list[str]] = []

    def began(*words: object) -> None:
        out = Path(str(words[-1]))
        found.append(sorted(path.name for path in out.iterdir()) if out.exists() else [])
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_align", began)
    drawn = tmp_path / "earlier"
    drawn.mkdir()
    how, scenes = (
        experiment.ComparisonSettings(model="moji", scorers=["moji"]),
        select_scenes(TRAINING_PROMPTS, 2, is_hard),
    )
    for images in (None, drawn):
        with pytest.raises(KeyboardInterrupt):
            experiment.compare_with_base(
                tmp_path / "run", scenes, cast(Classifier, None), how, out=tmp_path / f"of-{images is None}",
                base_images=images,
            )  # fmt: skip
    assert found == [[], ["base"]]


def test_hard_prompts_ask_for_a_colour_and_an_accessory() -> None:
    dog, worn = Thing("dog", colour="red"), Thing("dog", colour="red", accessory="a crown")
    assert is_hard(Scene((worn,), "in the snow"))
    assert not is_hard(Scene((dog,), "in the snow")) and not is_hard(
        Scene((worn,), "in the snow", "a neon drawing of")
    )
    assert is_crowded(Scene((dog, Thing("cat")), "in the snow"))
    assert not is_crowded(Scene((Thing("dog"), Thing("cat")), "in the snow"))


def test_near_misses_say_less_or_give_the_colour_away_or_name_another_thing() -> None:
    other = replace_noun("dog")
    scene = Scene((Thing("dog", colour="red"), Thing("cat")), "in the snow")
    assert make_hard_negatives(scene) == (
        "a dog next to a cat in the snow",
        "a red dog in the snow",
        "a dog next to a red cat in the snow",
        f"a red {other} next to a cat in the snow",
    )
    scene = Scene((Thing("dog", colour="red", accessory="a crown"),), "in the snow")
    assert make_hard_negatives(scene) == (
        "a dog wearing a crown in the snow",
        "a red dog in the snow",
        f"a red {other} wearing a crown in the snow",
    )


def test_every_noun_is_another_s_other() -> None:
    nouns = load_vocabulary().nouns
    assert sorted(map(replace_noun, nouns)) == sorted(nouns)
    assert all(replace_noun(noun) != noun for noun in nouns)


def test_near_misses_are_written_where_they_are_drawn(tmp_path: Path) -> None:
    (scene,) = select_scenes(TRAINING_PROMPTS, 1, is_hard)
    plainly, nearly = (
        write_prompts(tmp_path / f"{near}.jsonl", [scene], hard_negatives=near) for near in (False, True)
    )
    assert read_prompts(plainly)[0].hard_negatives == ()
    assert read_prompts(nearly)[0].hard_negatives == make_hard_negatives(scene)


def test_the_order_of_a_folder_is_held_against_the_judge(tmp_path: Path) -> None:
    """Three red dogs, of which the classifier sees two; the scorer ranks one of the two first and the other one
    last."""

    class Seeing:
        def classify(self, images: Sequence[Image.Image]) -> list[Prediction]:
            reds = [image.getpixel((0, 0)) == (255, 0, 0) for image in images]
            return [prediction({"dog": 1.0}, colour="red" if red else "blue") for red in reds]

    names = [image_name(0, j) for j in range(3)]
    (tmp_path / "pictures").mkdir()
    for name, colour in zip(names, ("red", "blue", "red"), strict=True):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    write_json(
        tmp_path / "samples.json", {"format": 1, "per_prompt": 3, "prompts": [{"prompt": "a red dog"}]}
    )
    scores = dict(zip(names, (0.9, 0.5, 0.1), strict=True))
    write_json(
        tmp_path / "scores.json", {"scores": {name: {"moji": value} for name, value in scores.items()}}
    )
    lines = [{"chosen": names[0], "rejected": names[1]}, {"chosen": names[1], "rejected": names[2]}]
    (tmp_path / "ranking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scene = Scene((Thing("dog", colour="red"),), "in the snow")
    found = measure_ranking(tmp_path, [scene], cast(Classifier, Seeing()))
    assert (found.n, found.pairs, found.any_right) == (3, 2, 1.0)
    assert found.right.value == pytest.approx(2 / 3)
    assert found.agreement.value == 0.5
    assert (found.best, found.worst, found.good, found.bad) == (1.0, 1.0, 0.5, 0.5)
    assert "50%" in str(found)
