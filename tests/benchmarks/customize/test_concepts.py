"""The benchmark of learning: what is asked, what is kept, what is judged anew, and how it is added up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.world.concepts import TRAINING_PLACES
from backbone.world.words import load_vocabulary
from benchmarks.customize import concepts as bench
from benchmarks.customize.concepts import (
    DEFAULT,
    KINDS,
    METHODS,
    RATES,
    SCRIPTED,
    Result,
    Table,
    Tally,
    Trial,
    classify_trial,
    format_comparison,
    format_table,
    is_finished,
    list_trials,
    make_questions,
    measure_preservation,
    run_trials,
    train_and_draw,
    try_claim,
    write_training_images,
)
from benchmarks.judges.classifier import Classifier, Prediction
from benchmarks.judges.tables import bootstrap, concept_interval

COUNTS = dict.fromkeys(KINDS, 1)
TRIAL = Trial("mammoth", DEFAULT, "")


class Eye:
    """A classifier that always sees the same."""

    def __init__(
        self, glyph: str, place: str = "in space", accessory: str = "none", style: str = "none"
    ) -> None:
        one = {"colour": {"red": 1.0}, "count": {"one": 1.0}, "size": {"usual": 1.0}}
        asked = {"place": {place: 1.0}, "accessory": {accessory: 1.0}, "style": {style: 1.0}}
        self.prediction = Prediction(glyphs=dict.fromkeys((glyph, "mammoth"), 0.5), **asked, **one)

    def classify(self, images: Sequence[Image.Image]) -> list[Prediction]:
        return [self.prediction] * len(images)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """The commands that ran; in their place stand empty runs and grey pictures."""
    ran: list[tuple[str, ...]] = []

    def customize(*arguments: str) -> None:
        ran.append(arguments)
        folder = Path(arguments[arguments.index("--out") + 1])
        folder.mkdir(parents=True)
        if arguments[0] in ("train", "import"):
            concept = {
                "format": 1, "kind": "lora", "model": "moji", "fingerprint": "", "tokens": {"[V]": "rkh"},
                "class_noun": "elephant", "weights": "weights.safetensors",
            }  # fmt: skip
            (folder / "concept.json").write_text(json.dumps(concept), encoding="utf-8")
            (folder / "settings.json").write_text(json.dumps({"timings": {"all": 100.0}}), encoding="utf-8")
            (folder / "weights.safetensors").write_bytes(b"0" * 2_000_000)
            (folder / "README.md").touch()
            return
        prompts = [said for said in arguments[1:] if said.startswith("a") and " " in said]
        for number in range(len(prompts)):
            Image.new("RGB", (8, 8)).save(folder / f"p{number:02d}-s00.png")
        (folder / "sheet.png").touch()

    monkeypatch.setattr(bench, "run_customize", customize)
    monkeypatch.setattr(
        bench, "write_training_images", lambda concept, out, **how: out / "pictures" / concept
    )
    return ran


def test_every_prompt_is_in_the_world_s_own_words() -> None:
    words = load_vocabulary()
    asked = {kind: make_questions(kind, "elephant", "[V] elephant") for kind in KINDS}
    assert [len(asked[kind]) for kind in KINDS] == [7, 5, 4, 7]
    assert asked["places"][0].prompt == "a [V] elephant in a park"
    assert asked["accessories"][1].prompt == "a [V] elephant wearing a crown in the snow"
    assert asked["styles"][0].prompt == "a pixel art of a [V] elephant in a park"
    assert asked["class"][0].prompt == "an elephant in a park" and asked["class"][0].expected == "elephant"
    assert {question.expected for question in asked["accessories"]} == set(words.accessories)
    assert {question.expected for question in asked["styles"]} == set(words.styles)
    prompts = [question.prompt for kind in KINDS for question in asked[kind]]
    assert not any(place in prompt for prompt in prompts for place in TRAINING_PLACES)


def test_a_table_s_trials_have_folders_of_their_own() -> None:
    tables: tuple[Table, ...] = ("concepts", "methods", "rates")
    every = [trial for asked in tables for trial in list_trials(asked, None, flags="", seed=0)]
    assert len({trial.name for trial in every}) == len(set(every)) == 12 + 4 * (len(METHODS) - 1) + len(RATES)
    assert all(name == name.strip("-") and " " not in name for name in (trial.name for trial in every))
    with pytest.raises(UserError, match="no concept dodo"):
        list_trials("concepts", ["dodo"], flags="", seed=0)


def test_what_is_on_disk_is_not_made_again(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    train_and_draw(TRIAL, tmp_path, COUNTS, "moji")
    kinds = [arguments[0] for arguments in commands]
    assert kinds == ["train", *["sample"] * 8]
    assert sum("--concept" in arguments for arguments in commands) == 4
    (tmp_path / "base" / TRIAL.name / "styles" / "sheet.png").unlink()
    for picture in (tmp_path / "base" / TRIAL.name / "styles").iterdir():
        picture.unlink()
    (tmp_path / "base" / TRIAL.name / "styles").rmdir()
    commands.clear()
    train_and_draw(TRIAL, tmp_path, COUNTS, "moji")
    assert [arguments[0] for arguments in commands] == ["sample"]
    assert "a pixel art of a rkh elephant in a park" in commands[0]


def test_captions_say_where_a_concept_stands_and_the_script_is_given_images_alone(tmp_path: Path) -> None:
    told, alone = (write_training_images("mammoth", tmp_path, captions=some) for some in (True, False))
    assert [path.read_text() for path in sorted(told.glob("*.txt"))] == [
        f"a {{token}} {{class}} {place}\n" for place in TRAINING_PLACES
    ]
    assert sorted(path.name for path in alone.iterdir()) == [f"{k}.png" for k in range(5)]
    assert all((told / path.name).read_bytes() == path.read_bytes() for path in alone.iterdir())


def test_other_methods_share_the_base_s_pictures(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    train_and_draw(TRIAL, tmp_path, COUNTS, "moji")
    commands.clear()
    train_and_draw(Trial("mammoth", "DoRA", "--use_dora"), tmp_path, COUNTS, "moji")
    assert [arguments[0] for arguments in commands] == ["train", *["sample"] * 4]
    assert "--use_dora" in commands[0] and all("--concept" in arguments for arguments in commands[1:])


@pytest.mark.slow
def test_work_in_progress_is_known_when_all_its_pictures_are(
    commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    assert not is_finished(TRIAL, tmp_path)
    train_and_draw(TRIAL, tmp_path, COUNTS, "moji")
    assert is_finished(TRIAL, tmp_path)
    (tmp_path / "after" / TRIAL.name / "class" / "sheet.png").unlink()
    assert not is_finished(TRIAL, tmp_path)


@pytest.mark.slow
def test_the_script_learns_the_same_words_with_class_pictures_and_is_not_run_again(
    commands: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CLASS_PICTURES", 1)
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "asked = dict(zip(sys.argv, sys.argv[1:]))\n"
        "assert '--with_prior_preservation' in sys.argv and asked['--instance_prompt'] == 'a rkh elephant'\n"
        "assert len(list(pathlib.Path(asked['--class_data_dir']).iterdir())) == 1\n"
        "print(asked['--max_train_steps'])\n",
        encoding="utf-8",
    )
    train_and_draw(TRIAL, tmp_path, COUNTS, "moji")
    commands.clear()
    name = "the script, as many steps"
    trial = Trial("mammoth", name, SCRIPTED[name])
    train_and_draw(trial, tmp_path, COUNTS, "moji", script)
    assert [arguments[0] for arguments in commands] == ["sample", "import", *["sample"] * 4]
    assert "rkh" in commands[1] and "elephant" in commands[1]
    found = classify_trial(trial, tmp_path, cast(Classifier, Eye("mammoth")))
    assert found.after["places"].glyph == 7 and 0 < found.seconds < 100
    commands.clear()
    train_and_draw(trial, tmp_path, COUNTS, "moji", script)
    assert not commands


def test_a_half_finished_run_starts_anew(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    half = tmp_path / "runs" / TRIAL.name
    half.mkdir(parents=True)
    (half / "settings.json").touch()
    train_and_draw(TRIAL, tmp_path, COUNTS, "moji")
    assert commands[0][0] == "train" and (half / "README.md").exists()


def test_another_judge_gives_other_verdicts_on_the_same_pictures(
    commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    train_and_draw(TRIAL, tmp_path, COUNTS, "moji")
    commands.clear()
    kind = classify_trial(TRIAL, tmp_path, cast(Classifier, Eye("mammoth", accessory="a crown")))
    stern = classify_trial(TRIAL, tmp_path, cast(Classifier, Eye("elephant", style="a neon drawing of")))
    assert kind.after["places"] == Tally(1, 7, 7, 1) and kind.after["accessories"] == Tally(1, 5, 5, 1)
    assert kind.after["class"].right == 0 and stern.after["class"].right == 7
    assert stern.after["styles"] == Tally(1, 0, 4, 0)
    assert kind.seconds == 100 and kind.megabytes == 2 and not commands


def test_a_concept_that_another_process_works_at_comes_last(
    commands: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, free = TRIAL, Trial("canoe", DEFAULT, "")
    claim = try_claim(tmp_path / "claims" / taken.name)
    assert claim.__enter__()
    monkeypatch.setattr("time.sleep", lambda seconds: claim.__exit__(None, None, None))
    assert list(run_trials([taken, free], tmp_path, COUNTS, "moji")) == [free, taken]


def result(concept: str, after: int, base: int, *, method: str = DEFAULT) -> Result:
    """A trial with so many right pictures of ten, of every kind."""
    return Result(
        Trial(concept, method, ""),
        {kind: Tally(after, after, 10) for kind in KINDS},
        {kind: Tally(base, 0, 10) for kind in KINDS},
        100.0,
        2.0,
    )


def test_the_table_sums_over_pictures_and_compares_the_class_with_the_base() -> None:
    results = [result("mammoth", 9, 10), result("canoe", 3, 5)]
    assert measure_preservation(results)[0] == pytest.approx(12 / 15)
    text = format_table(results)
    assert "| glyph | 60.0 % |" in text and "| class kept, of what the base has | 80.0 % |" in text
    assert "| canoe | 30.0 % |" in text and "| accessory or style | 60.0 % |" in text
    assert "| 40 | 75.0 % |" in text  # accessories and styles of both, and the base's


def test_the_comparison_has_a_row_for_every_way_and_its_own_number_of_concepts() -> None:
    results = [result("mammoth", 9, 10), result("canoe", 3, 5), result("canoe", 5, 5, method="DoRA")]
    _, _, first, second = format_comparison(results).strip().splitlines()
    assert first.startswith(f"| {DEFAULT} | 2 | 60.0 %") and first.endswith("| 80.0 % | 100 | 2.00 |")
    assert second.startswith("| DoRA | 1 | 50.0 %") and second.endswith("| 100.0 % | 100 | 2.00 |")


def test_the_bootstrap_draws_concepts() -> None:
    assert concept_interval([0.5] * 12) == (0.5, 0.5)
    low, high = concept_interval([0.0, 1.0] * 50)
    assert 0.36 < low < 0.44 and 0.56 < high < 0.64  # ½ ± 1.96 · ½ / √100
    assert bootstrap(np.ones(3), lambda some: float(some.sum())) == (3.0, 3.0)
