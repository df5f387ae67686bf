"""Preferences through every door, and all that can be wrong with them, told together."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align.pairs.choices import (
    CHOICES,
    Choice,
    Undo,
    append_entry,
    measure_consistency,
    read_choices,
    standing_choices,
)
from align.pairs.export import write_jsonl as export_lines
from align.pairs.export import write_parquet
from align.pairs.read import read_preferences
from align.pairs.records import (
    Pair,
    Preferences,
    Record,
    Records,
    Single,
    check_preferences,
    describe_contradictions,
    describe_records,
    describe_repeats,
    describe_shared_images,
    find_contradictions,
    format_problems,
    normalize_prompt,
    refuse_another_model,
    split_held_out,
    to_singles,
)
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json
from backbone.models.fingerprint import earlier_fingerprint
from backbone.models.model import Backbone
from tests.align.conftest import PROMPTS, encoded, picture, write_lines

Rows = list[dict[str, Any]]


def pick_a_pic(rows: int = 6) -> Rows:
    """Rows as Pick-a-Pic has them: two wins, a loss, a tie, and so on; the last has no label."""
    labels = (1.0, 1.0, 0.0, 0.5)
    return [
        {
            "jpg_0": encoded(2 * i, "JPEG"),
            "jpg_1": encoded(2 * i + 1, "JPEG"),
            "label_0": labels[i % 4],
            "label_1": 1 - labels[i % 4],
            "caption": PROMPTS[i % 4],
            "has_label": i != rows - 1,
            "user_id": 7 + i % 2,
            "are_different": True,
        }
        for i in range(rows)
    ]


def parquet(path: Path, rows: Rows, **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


# Doors ------------------------------------------------------------------------------------------------------


def test_pick_a_pic_is_read_as_it_is(tmp_path: Path) -> None:
    found = check_preferences(
        read_preferences(parquet(tmp_path / "train.parquet", pick_a_pic(), row_group_size=2))
    )
    assert [pair.label for pair in found.pairs] == [1.0, 1.0, 0.0, 0.5, 1.0]
    assert [pair.prompt for pair in found.pairs] == [*PROMPTS, PROMPTS[0]]
    assert found.skipped == 1
    assert found.pairs[2].second.read() == encoded(5, "JPEG")
    assert describe_records(found.pairs) == "5 pairs (1 tie) of 4 prompts"


def test_a_table_is_read_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "train.parquet", pick_a_pic(8), row_group_size=2)
    asked: list[list[str]] = []
    original = pq.ParquetFile.read_row_group

    def watched(self: pq.ParquetFile, number: int, columns: list[str]) -> pa.Table:
        asked.append(columns)
        return original(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    found = read_preferences(path)
    assert all({"jpg_0", "jpg_1"}.isdisjoint(columns) for columns in asked)
    asked.clear()
    for pair in found.pairs:
        pair.first.read()
    assert asked == [["jpg_0"]] * 4


def test_prompt_chosen_rejected_are_read_from_a_table_of_structs(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "a dog",
            "chosen": {"bytes": encoded(0), "path": None},
            "rejected": {"bytes": encoded(1), "path": None},
        }
    ]
    (pair,) = check_preferences(read_preferences(parquet(tmp_path / "t.parquet", rows))).pairs
    assert pair.label == 1.0 and pair.first.read() == encoded(0)


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    import datasets

    rows = [{**row, "jpg_0": row["jpg_0"]} for row in pick_a_pic(3)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    found = check_preferences(read_preferences(tmp_path / "saved"))
    assert [pair.label for pair in found.pairs] == [1.0, 1.0]
    assert found.pairs[0].first.read() == encoded(0, "JPEG")


def test_splits_to_measure_with_are_not_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    rows = [{"prompt": "a dog", "chosen": encoded(i), "rejected": encoded(i + 1)} for i in (0, 2)]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name, row in zip(("train", "validation_unique"), rows, strict=True):
        parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet", [row])
    tables = {
        name: datasets.Dataset.from_list([row]) for name, row in zip(("test", "train"), rows, strict=True)
    }
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(test=tables["test"]).save_to_disk(str(tmp_path / "one"))
    for name, row in zip(("train", "test"), rows, strict=True):
        write_lines(tmp_path / f"{name}.jsonl", [{**row, "chosen": f"{name}.png", "rejected": "2.png"}])
    said = {
        "hub": "validation_unique-00000-of-00001.parquet, of other splits than train",
        "saved": "The split train of .*saved is learned from; left out: test .1 rows.",
        "one": "The split test of .*one is learned from",
        ".": "test.jsonl, of other splits than train",
    }
    firsts = {"hub": encoded(0), "saved": encoded(2), "one": encoded(0)}
    for name, words in said.items():
        (pair,) = read_preferences(tmp_path / name).pairs
        assert name == "." or pair.first.read() == firsts[name]
        assert re.search(words, capsys.readouterr().err)


def test_arrow_files_are_read_as_datasets_wrote_them(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(pick_a_pic(3)).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    (tmp_path / "cache").mkdir()
    shutil.copy(file, tmp_path / "cache" / "pickapic-train.arrow")
    for source in (file, tmp_path / "cache"):
        found = check_preferences(read_preferences(source))
        assert [pair.label for pair in found.pairs] == [1.0, 1.0]
        assert found.pairs[0].first.read() == encoded(0, "JPEG")
    (tmp_path / "cut.arrow").write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut\.arrow is not a readable Arrow file"):
        read_preferences(tmp_path / "cut.arrow")


@pytest.mark.parametrize("name", ["weighted_results_image{}_preference", "votes_image{}"])
def test_rapidata_s_image_with_more_votes_is_preferred(tmp_path: Path, name: str) -> None:
    counts = [(0.7, 0.3), (1, 4), (0.5, 0.5), (float("nan"), 1)]
    rows = [
        {"prompt": PROMPTS[i], "image1": encoded(2 * i), "image2": encoded(2 * i + 1)}
        | {name.format(1): float(first), name.format(2): float(second)}
        for i, (first, second) in enumerate(counts)
    ]
    found = read_preferences(parquet(tmp_path / "r.parquet", rows))
    assert [pair.label for pair in found.pairs] == [1.0, 0.0, 0.5]
    assert found.pairs[1].ordered.first.read() == encoded(3)
    assert len(found.problems) == 1 and "row 3" in found.problems[0] and "no numbers" in found.problems[0]
    with pytest.raises(UserError, match=r"votes_image1 and votes_image2 \(Rapidata\)"):
        read_preferences(parquet(tmp_path / "x.parquet", [{"prompt": "a", "image1": b"", "image2": b""}]))


def test_images_for_which_nobody_voted_are_no_tie(tmp_path: Path) -> None:
    votes = [(0, 0), (2, 2), (-1, 0)]
    file = write_lines(
        tmp_path / "v.jsonl",
        [
            {"prompt": "a", "image1": "a.png", "image2": "b.png", "votes_image1": one, "votes_image2": other}
            for one, other in votes
        ],
    )
    found = read_preferences(file)
    assert [pair.label for pair in found.pairs] == [0.5] and found.skipped == 1
    assert len(found.problems) == 1 and "votes_image1 = -1" in found.problems[0]


UIDS = {"image_0_uid": "x", "image_1_uid": "y"}


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ({"label_1": 1}, 0.0),
        ({"label_1": 0.5}, 0.5),
        ({**UIDS, "best_image_uid": "y"}, 0.0),
        ({**UIDS, "best_image_uid": "x", "label_0": None}, 1.0),
        ({**UIDS, "best_image_uid": "tie"}, None),
        ({**UIDS, "best_image_uid": "x", "label_0": 0}, 0.0),
    ],
)
def test_one_label_is_enough_or_the_name_of_the_better_image(
    said: dict[str, Any], label: float | None, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "image_0": encoded(0), "image_1": encoded(1), **said}]
    (tmp_path / "a.png").write_bytes(encoded(0))
    names = {**rows[0], "image_0": "a.png", "image_1": "b.png"}
    for file in (parquet(tmp_path / "t.parquet", rows), write_lines(tmp_path / "t.jsonl", [names])):
        found = read_preferences(file)
        assert [pair.label for pair in found.pairs] == ([] if label is None else [label])
        assert len(found.problems) == (label is None)


def test_a_user_s_number_is_the_same_in_a_column_in_which_some_are_missing(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": encoded(0), "rejected": encoded(1), "user_id": user}
        for user in (5.0, float("nan"))
    ]
    file = parquet(tmp_path / "u.parquet", rows)
    assert [pair.user for pair in read_preferences(file).pairs] == ["5", ""]
    assert len(read_preferences(file, user="5").pairs) == 1


def test_addresses_are_said_to_be_no_files(tmp_path: Path) -> None:
    address = "https://example.org/a.png"
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": address, "rejected": "b.png"}])
    (problem,) = read_preferences(file).problems
    assert f"names {address}, an address. Download it" in problem


@pytest.mark.parametrize(
    "start", ["data:image/png;base64,iVBORw0KGgo", "/9j/4AAQSkZJRgABAQ" * 300, "x" * 300]
)
def test_an_image_that_is_written_in_place_of_a_file_s_name_is_one_bad_line(
    tmp_path: Path, start: str
) -> None:
    lines = [{"prompt": "a", "chosen": name, "rejected": "b.png"} for name in (start, "a.png")]
    found = read_preferences(write_lines(tmp_path / "a.jsonl", lines))
    (problem,) = found.problems
    assert problem.startswith("line 1 ") and len(found.pairs) == 1
    assert "for the name of a file, which is none. Write what it holds, as an image in base64" in problem


@pytest.mark.parametrize(
    ("better", "worse"), [("chosen", "rejected"), ("w", "l"), ("win", "lose"), ("good", "bad")]
)
def test_two_folders_of_equal_names_are_pairs(tmp_path: Path, better: str, worse: str) -> None:
    for side, seed in ((better, 0), (worse, 10)):
        (tmp_path / side).mkdir()
        for number in range(2):
            picture(seed + number).save(tmp_path / side / f"{number}.png")
            (tmp_path / side / f"{number}.txt").write_text(PROMPTS[number])
    found = check_preferences(read_preferences(tmp_path))
    assert [pair.prompt for pair in found.pairs] == list(PROMPTS[:2])
    assert found.pairs[0].first.path == tmp_path / better / "0.png"
    (tmp_path / worse / "1.png").unlink()
    if better == "good":  # which are no pairs then
        assert [one.good for one in read_preferences(tmp_path).singles] == [True, False, True]
        return
    with pytest.raises(UserError, match=f"has no picture of that name in {worse}/"):
        check_preferences(read_preferences(tmp_path))


@pytest.mark.parametrize(
    ("good", "bad"), [("good", "bad"), ("Desirable", "undesirable"), ("positive", "negative")]
)
def test_two_folders_of_judged_images_are_single_ones(tmp_path: Path, good: str, bad: str) -> None:
    for side, seed, count in ((good, 0, 3), (bad, 10, 2)):
        (tmp_path / side).mkdir()
        for number in range(count):
            picture(seed + number).save(tmp_path / side / f"{number}.png")
            (tmp_path / side / f"{number}.txt").write_text(f"a {side} prompt")
    found = check_preferences(read_preferences(tmp_path))
    assert not found.pairs
    assert [single.good for single in found.singles] == [True, False, True, False, True]
    assert {(single.prompt, single.good) for single in found.singles} == {
        (f"a {good} prompt", True),
        (f"a {bad} prompt", False),
    }
    assert [single.good for single in read_preferences(tmp_path, limit=2).singles] == [True, False]


@pytest.mark.parametrize("door", ["saved", "parquet"])
@pytest.mark.parametrize("names", [["desirable", "undesirable"], ["bad", "good"]])
def test_a_numbered_class_is_what_its_name_says(tmp_path: Path, door: str, names: list[str]) -> None:
    import datasets

    kind = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=names),
        }
    )
    rows = [{"prompt": f"a {n}", "image": encoded(n, "PNG"), "label": n % 2} for n in range(4)]
    table = datasets.Dataset.from_list(rows, features=kind)
    if door == "saved":
        table.save_to_disk(str(tmp_path / "saved"))
    else:
        table.to_parquet(str(tmp_path / "t.parquet"))
    found = check_preferences(read_preferences(tmp_path / ("saved" if door == "saved" else "t.parquet")))
    is_good = [name in ("good", "desirable") for name in names]
    assert [single.good for single in found.singles] == is_good * 2


def test_folders_are_paired_by_the_whole_name_of_their_images(tmp_path: Path) -> None:
    for side, seed in (("Chosen", 0), ("Rejected", 10)):
        for number, folder in enumerate("ab"):
            (tmp_path / side / folder).mkdir(parents=True)
            # one é, and e with its accent behind it
            name = "\u00e9" if side == "Chosen" else "e\u0301"
            picture(seed + number).save(tmp_path / side / folder / f"{name}.png")
            (tmp_path / side / folder / f"{name}.txt").write_text(PROMPTS[number])
    found = check_preferences(read_preferences(tmp_path))
    assert [pair.prompt for pair in found.pairs] == list(PROMPTS[:2])
    assert [pair.second.path.parent.name for pair in found.pairs] == ["a", "b"]
    picture(20).save(tmp_path / "Rejected" / "b" / "e\u0301.jpg")
    with pytest.raises(UserError, match="have one name"):
        read_preferences(tmp_path)


def test_an_unlabelled_row_is_none_however_its_no_is_written(tmp_path: Path) -> None:
    rows = pick_a_pic(3)
    for number, no in enumerate((0, 1, 0)):
        rows[number]["has_label"] = no
    found = read_preferences(parquet(tmp_path / "t.parquet", rows))
    assert (len(found.pairs), found.skipped) == (1, 2)
    for row, word in zip(rows, ("False", "true", "0"), strict=True):
        row["has_label"] = word
    found = read_preferences(parquet(tmp_path / "t.parquet", rows))
    assert (len(found.pairs), found.skipped) == (1, 2)


def test_a_spreadsheet_s_true_and_false_are_labels_and_unseen_marks_no_part_of_a_prompt(
    tmp_path: Path,
) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    rows = ("a dog,0.png,1.png,TRUE", "\ufeffa dog,0.png,1.png,FALSE", "a\u200b dog,0.png,1.png,perhaps")
    (tmp_path / "p.csv").write_text("\n".join(["prompt,image_0,image_1,label_0", *rows]))
    found = read_preferences(tmp_path / "p.csv")
    assert [(pair.prompt, pair.label) for pair in found.pairs] == [("a dog", 1.0), ("a dog", 0.0)]
    assert "label_0 = perhaps" in found.problems[0]


def test_labels_of_databases_and_other_countries_are_numbers(tmp_path: Path) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [f"a dog;0.png;1.png;{label}" for label in ("1,0", "0,5", "0", "1,5")]
    (tmp_path / "p.csv").write_text("\n".join(["sep=;", "prompt;image_0;image_1;label_0", *rows]))
    found = read_preferences(tmp_path / "p.csv")
    assert [pair.label for pair in found.pairs] == [1.0, 0.5, 0.0]
    assert (
        len(found.problems) == 1 and "ine 6 of" in found.problems[0] and "label_0 = 1,5" in found.problems[0]
    )
    row = {"prompt": "a dog", "image_0": "0.png", "image_1": "1.png"}
    table = [
        {**row, "label_0": Decimal("1.0"), "label_1": None},
        {**row, "label_0": Decimal(0), "label_1": math.nan},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "p.parquet")
    assert [pair.label for pair in read_preferences(tmp_path / "p.parquet").pairs] == [1.0, 0.0]
    single = [{"prompt": "a dog", "image": "0.png", "label": Decimal(label)} for label in (1, 0)]
    pq.write_table(pa.Table.from_pylist(single), tmp_path / "s.parquet")
    assert [one.good for one in read_preferences(tmp_path / "s.parquet").singles] == [True, False]


def test_without_a_connection_a_dataset_is_asked_for_once_and_a_file_s_name_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("backbone.media.sources.tables.hub_answers", lambda name, kind: asked.append(name))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="some/pairs is nothing here, and no dataset of that name"):
        read_preferences("some/pairs")
    assert asked == ["some/pairs"] and not datasets.config.HF_HUB_OFFLINE
    with pytest.raises(UserError, match=r"p/pairs\.jsonl does not exist"):
        read_preferences("p/pairs.jsonl")
    assert len(asked) == 1


def test_columns_that_nothing_reads_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    row = {
        "prompt": "a dog",
        "chosen": "1.png",
        "rejected": "0.png",
        "user": "a",
        "created_at": "2026",
        "uid": 3,
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    read_preferences(tmp_path / "p.jsonl")
    assert not capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text(json.dumps({**row, "Margin": 0.1, "weight": 3}) + "\n")
    read_preferences(tmp_path / "p.jsonl")
    assert f"Not used from {tmp_path}/p.jsonl: margin, weight. Every choice" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text(json.dumps({**row, "label_0": 0, "caption": "a cat", "split": "test"}))
    read_preferences(tmp_path / "p.jsonl")
    assert f"Not used from {tmp_path}/p.jsonl: label_0, caption, split. Every" in capsys.readouterr().err
    (tmp_path / "q.csv").write_text("prompt,chosen,rejected\n")
    read_preferences(tmp_path)
    assert f"Not used in {tmp_path}: q.csv.\n" in capsys.readouterr().err


def test_what_lies_beside_chosen_and_rejected_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        picture(len(side)).save(tmp_path / side / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\n1.png,a dog\n")
    (tmp_path / "rejected" / "notes.md").write_text("")
    read_preferences(tmp_path)
    said = capsys.readouterr().err
    assert f"Not used in {tmp_path}: metadata.csv." in said
    assert f"Not used in {tmp_path}/rejected: notes.md." in said


def test_a_spreadsheet_says_what_json_lines_say(tmp_path: Path) -> None:
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "c.csv").write_text("prompt,chosen_file_name,Rejected_File_Name\na dog,1.png,0.png\n")
    (named,) = read_preferences(tmp_path / "c.csv").pairs  # as an imagefolder of `datasets` calls them
    assert (named.first.path.name, named.label) == ("1.png", 1)
    (tmp_path / "c.csv").unlink()
    (tmp_path / "p.csv").write_text(
        "\ufeffPrompt;image_0;image_1;label_0;label_1\na dog;0.png;1.png;1;0\na cat;2.png;3.png;0.0;1.0\n"
        "a cow;0.png;2.png;0.5;\na pig;0.png;3.png;left;\n",
        encoding="utf-8",
    )
    found = read_preferences(tmp_path / "p.csv")
    assert [(pair.prompt, pair.label) for pair in found.pairs] == [("a dog", 1), ("a cat", 0), ("a cow", 0.5)]
    assert [problem.partition(" has ")[2] for problem in found.problems] == [
        "labels that are no choice (label_0 = left, label_1 = None)"
    ]
    assert found.problems[0].startswith(f"line 5 of {tmp_path / 'p.csv'}")
    ranks = "prompt\timage_path\trank\na dog\t0.png\t2\na dog\t1.png\t1\n"
    (tmp_path / "p.csv").unlink()
    (tmp_path / "r.tsv").write_text(ranks)
    (pair,) = check_preferences(read_preferences(tmp_path)).pairs
    assert (pair.first.path.name, pair.second.path.name, pair.label) == ("1.png", "0.png", 1.0)


@pytest.mark.parametrize(
    ("label", "good"),
    [
        *(("true", True), ("No", False), ("-1", False), ("1.0", True), (" bad ", False), ("perhaps", None)),
        *(("desirable", True), ("Undesirable", False), ("like", True), ("thumbs-down", False)),
    ],
)
def test_a_label_is_good_or_bad_however_it_is_written(tmp_path: Path, label: str, good: bool | None) -> None:
    row = {"prompt": "a dog", "image": "0.png", "label": label}
    found = read_preferences(write_lines(tmp_path / "p.jsonl", [row]))
    assert [single.good for single in found.singles] == ([] if good is None else [good])
    assert len(found.problems) == (good is None)


def test_a_choice_under_another_name_is_told_what_is_missing(tmp_path: Path) -> None:
    rows = [{"prompt": "a dog", "image_0": "0.png", "image_1": "1.png", "preference": 1}]
    rows += [{"prompt": "a dog", "image": "0.png", "score": 0.7}]
    found = read_preferences(write_lines(tmp_path / "p.jsonl", rows))
    assert "has prompt, image_0, image_1, preference, and no label_0 that says which" in found.problems[0]
    assert "has prompt, image, score, and no label that says whether" in found.problems[1]


def test_a_tie_that_is_neither_yes_nor_no_is_no_choice(tmp_path: Path) -> None:
    row = {"prompt": "a dog", "chosen": "0.png", "rejected": "1.png"}
    found = read_preferences(
        write_lines(tmp_path / "p.jsonl", [row | {"tie": "maybe"}, row | {"tie": "yes"}])
    )
    assert [pair.label for pair in found.pairs] == [0.5]
    assert found.problems == [
        f"line 1 of {tmp_path / 'p.jsonl'} has tie = 'maybe', which is neither yes nor no"
    ]


@pytest.mark.parametrize("key", ["tie", "both_bad"])
def test_a_tie_is_no_choice_whatever_columns_its_images_are_in(key: str, tmp_path: Path) -> None:
    row = {"prompt": "a dog", "image_0": "0.png", "image_1": "1.png", key: True}
    lines = [row | {"label_0": 0.5}, row, row | {"label_0": 0, "label_1": 0}, row | {"label_0": 1}]
    found = read_preferences(write_lines(tmp_path / "p.jsonl", [*lines, row | {key: "maybe"}]))
    assert [(pair.label, pair.both_bad) for pair in found.pairs] == [(0.5, key == "both_bad")] * 3
    assert [problem.split(".jsonl ")[-1] for problem in found.problems] == [
        f"says {key}, and that one of the images is preferred",
        f"has {key} = 'maybe', which is neither yes nor no",
    ]


def test_a_line_is_counted_with_the_empty_and_bad_ones_before_it(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('\n{"prompt": \n{"prompt": "", "caption": "a dog", "chosen": "a.png"}\n')
    found = read_preferences(path)
    assert [problem.split(" of ")[0] for problem in found.problems] == ["line 2", "line 3"]
    path.write_text('{"prompt": "", "caption": "a dog", "chosen": "a.png", "rejected": "b.png"}\n')
    assert read_preferences(path).pairs[0].prompt == "a dog"


def test_json_lines_are_read(pairs_file: Path) -> None:
    found = check_preferences(read_preferences(pairs_file))
    assert len(found.pairs) == 8
    assert {pair.label for pair in found.pairs} == {1.0}
    assert len(read_preferences(pairs_file, limit=3).pairs) == 3


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_a_json_list_is_read_as_json_lines_are(pairs_file: Path, name: str) -> None:
    wanted = [(pair.prompt, pair.first.path, pair.user) for pair in read_preferences(pairs_file).pairs]
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    for text in (json.dumps(rows), json.dumps(rows, indent=2).replace("\n", "\r\n")):
        path = pairs_file.with_name(name)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        found = check_preferences(read_preferences(path))
        assert [(pair.prompt, pair.first.path, pair.user) for pair in found.pairs] == wanted
        assert found.pairs[2].name == f"entry 3 of {path}"
    path.write_text(json.dumps([*rows, 7]))
    assert read_preferences(path).problems == [f"entry {len(rows) + 1} of {path} is not a JSON object"]
    path.write_text(text[:-3])
    with pytest.raises(UserError, match=rf"{name} is not JSON"):
        read_preferences(path)
    path.write_text(json.dumps({"pairs": rows}, indent=1))
    with pytest.raises(UserError, match=rf"{name} is one object, and a list is wanted"):
        read_preferences(path)
    for listed in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        path.write_bytes(listed.encode("utf-16"))
        assert [(pair.prompt, pair.first.path, pair.user) for pair in read_preferences(path).pairs] == wanted
    path.write_bytes(listed.encode("utf-16")[:-1])
    with pytest.raises(UserError, match=rf"{name} is not whole UTF-16 text\. Save it as UTF-8"):
        read_preferences(path)


def test_hpdv2_s_preferences_and_ranks_are_read_as_pairs_of_a_prompt_s_images(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / "train" / f"{number}.png")
    rows = [
        {"prompt": "a dog", "file_path": ["0.png", "1.png"], "human_preference": [0, 1]},
        {"prompt": "a cat", "file_path": ["2.png", "3.png"], "human_preference": [0, 0]},
        {
            "prompt": "a fox",
            "image_path": ["0.png", "1.png", "2.png", "3.png"],
            "human_preference": [1, 0, 0, 0],
        },
        {
            "prompt": "a cow",
            "image_path": ["0.png", "1.png", "2.png"],
            "rank": [2, 1, 2],
            "raw_annotations": [],
        },
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    expected = [("a dog", "1", "0", 1.0), ("a cat", "2", "3", 0.5)]
    expected += [("a fox", "0", other, 1.0) for other in "123"]
    expected += [("a cow", "1", "0", 1.0), ("a cow", "0", "2", 0.5), ("a cow", "1", "2", 1.0)]
    sources = [tmp_path / "train.json", write_lines(tmp_path / "train.jsonl", rows)]
    every = dict.fromkeys(["prompt", "file_path", "image_path", "human_preference", "rank"])
    parquet(tmp_path / "train.parquet", [every | {name: row.get(name) for name in every} for row in rows])
    for source in [*sources, tmp_path / "train.parquet"]:
        found = check_preferences(read_preferences(source))
        assert [
            (pair.prompt, pair.first.path.stem, pair.second.path.stem, pair.label) for pair in found.pairs
        ] == expected, source
    assert "8 pairs (2 ties) of 4 prompts" in describe_records(found.records)


@pytest.mark.parametrize("marked", [False, True])
def test_images_in_lists_inside_of_a_table_are_ranked_as_files_are(tmp_path: Path, marked: bool) -> None:
    rows: Rows = [
        {"prompt": "a dog", "images": [inside(0), inside(1)], "human_preference": [0, 1]},
        {"prompt": "a fox", "images": [inside(2), inside(3), inside(0)], "human_preference": [1, 0, 0]},
        {"prompt": "a cow", "images": [inside(2)], "human_preference": [1, 0]},
    ]
    saved = parquet(tmp_path / "a.parquet", [{**row, "image_path": ["x", "y"]} for row in rows])
    if marked:
        import datasets

        table = datasets.Dataset.from_parquet(str(saved))
        table.cast_column("images", datasets.List(datasets.Image())).to_parquet(str(saved))
    found = read_preferences(saved)
    assert [(pair.prompt, pair.label) for pair in found.pairs[:3]] == [("a dog", 1.0), *[("a fox", 1.0)] * 2]
    first, second, third, cow = found.pairs
    assert [one.read() for one in first.pictures] == [encoded(1), encoded(0)]
    assert [one.read() for one in (*second.pictures, *third.pictures)] == [encoded(n) for n in (2, 3, 2, 0)]
    with pytest.raises(UserError, match=r"Row 2 has 1 image in its column 'images', and 2 are expected"):
        cow.first.read()


def inside(number: int) -> dict[str, object]:
    """An image as tables hold it."""
    return {"bytes": encoded(number), "path": f"{number}.png"}


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "held"])
def test_hpdv3_s_first_image_is_the_preferred_one(tmp_path: Path, kind: str) -> None:
    (tmp_path / "images").mkdir()
    for number in range(2):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    more = {"prompt": "a dog", "confidence": 0.9, "model1": "flux", "model2": "kolors"}
    rows: Rows = [{**more, "path1": "images/1.png", "path2": "images/0.png"}]
    path = tmp_path / f"train.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        write_lines(path, rows)
    else:
        held = [{**more, "path1": inside(1), "path2": inside(0)}]
        path = parquet(tmp_path / "train.parquet", rows if kind == "parquet" else held)
    (pair,) = check_preferences(read_preferences(path)).pairs
    assert (pair.prompt, pair.label) == ("a dog", 1.0)
    assert [one.read() for one in pair.pictures] == [encoded(1), encoded(0)]


@pytest.mark.parametrize(
    "columns", [("chosen", "rejected"), ("winner", "loser"), ("preferred", "rejected"), ("better", "worse")]
)
def test_columns_that_say_which_image_is_the_better_one_are_read(
    tmp_path: Path, columns: tuple[str, str]
) -> None:
    row = {"prompt": "a dog", columns[0]: inside(1), columns[1]: inside(0)}
    (pair,) = check_preferences(read_preferences(parquet(tmp_path / "train.parquet", [row]))).pairs
    assert [one.read() for one in pair.pictures] == [encoded(1), encoded(0)] and pair.label == 1.0


def test_imagereward_s_rows_of_a_prompt_are_read_as_its_pairs(tmp_path: Path) -> None:
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    ranks = [("d", "a dog", 0, 3), ("c", "a cat", 3, 1), ("d", "a dog", 1, 1), ("d", "a dog", 2, 1)]
    rows: Rows = [
        {"prompt_id": key, "prompt": prompt, "image_path": f"{number}.png", "rank": rank, "overall_rating": 9}
        for key, prompt, number, rank in ranks
    ]
    held = [
        {"prompt": row["prompt"], "image": encoded(int(row["image_path"][0])), "rank": row["rank"]}
        for row in rows
    ]
    as_text = [{**row, "rank": f"{row['rank']}.0"} for row in rows]
    as_decimals = [{**row, "rank": Decimal(row["rank"])} for row in rows]
    sources = [
        write_lines(tmp_path / "a.jsonl", rows),
        write_lines(tmp_path / "t.jsonl", as_text),
        parquet(tmp_path / "d.parquet", as_decimals),
        parquet(tmp_path / "a.parquet", rows),
        parquet(tmp_path / "b.parquet", held),
    ]
    for source in sources:
        found = check_preferences(read_preferences(source))
        assert [(pair.prompt, pair.label) for pair in found.pairs] == [
            ("a dog", 1.0),
            ("a dog", 1.0),
            ("a dog", 0.5),
        ]
        assert found.skipped == 1  # the cat has nothing to be compared with
        hashes = [picture.content_hash for picture in found.pairs[0].pictures]
        assert hashes == [found.pairs[2].first.content_hash, found.pairs[1].second.content_hash], source
    as_lists = {"prompt": "a dog", "generations": ["0.png", "1.png"], "ranking": [2, 1]}
    (pair,) = read_preferences(write_lines(tmp_path / "c.jsonl", [as_lists])).pairs
    assert (pair.first.path.name, pair.second.path.name) == ("1.png", "0.png")


def test_each_person_s_ranks_are_compared_with_their_own(tmp_path: Path) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    said = [("ann", 1, 2), ("bob", 2, 1)]
    rows = [
        {"Prompt": "a dog", "image_path": f"{number}.png", "Rank": ranks[number], "user": user}
        for user, *ranks in said
        for number in range(2)
    ]
    found = check_preferences(read_preferences(write_lines(tmp_path / "p.jsonl", rows)))
    assert [(pair.user, pair.first.path.stem) for pair in found.pairs] == [("ann", "0"), ("bob", "1")]


@pytest.mark.parametrize("yes", [True, 1, "true", "True", "1"])
def test_a_tie_is_one_however_its_yes_is_written(tmp_path: Path, yes: Any) -> None:
    row = {"prompt": "a dog", "chosen": "0.png", "rejected": "1.png"}
    rows = [row | {"tie": yes}, row | {"both_bad": yes}, row | {"tie": None, "both_bad": "false"}]
    found = read_preferences(write_lines(tmp_path / "p.jsonl", rows)).pairs
    assert [(pair.label, pair.both_bad) for pair in found] == [(0.5, False), (0.5, True), (1.0, False)]


def test_columns_of_another_layout_are_named_with_those_that_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "a dog", "win": "0.png", "lose": "1.png"}]
    (problem,) = read_preferences(write_lines(tmp_path / "p.jsonl", rows)).problems
    assert "line 1" in problem and "has prompt, win, lose" in problem and "chosen and rejected" in problem


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rank": [1]}, "has 2 images in image_path and not as many places in rank"),
        ({"rank": 1}, "not as many places"),
        ({"rank": ["first", "second"]}, "has 'first' in rank, and a number"),
        ({"human_preference": [1, 2]}, "has 2 in human_preference, and 0 or 1"),
        ({"image_path": ["../0.png", "1.png"]}, "lies outside the folder"),
        ({"image_path": ["", "1.png"]}, "names no picture"),
    ],
)
def test_a_ranking_that_does_not_fit_its_images_is_named(tmp_path: Path, changed: Any, words: str) -> None:
    row = {"prompt": "a dog", "image_path": ["0.png", "1.png"], "rank": [1, 2]}
    (problem,) = read_preferences(write_lines(tmp_path / "p.jsonl", [row | changed])).problems
    assert words in problem and "line 1" in problem


def test_a_name_is_found_however_it_is_spelled(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "caf\u00e9.PNG")
    picture(1).save(tmp_path / "1.png")
    rows = [{"prompt": "a dog", "chosen": "cafe\u0301.png", "rejected": ".\\1.PNG"}]
    (pair,) = check_preferences(read_preferences(write_lines(tmp_path / "p.jsonl", rows))).pairs
    assert [one.path.name for one in pair.pictures] == ["caf\u00e9.PNG", "1.png"]
    picture(2).save(tmp_path / "1.Png")  # which of them is meant is not known
    with pytest.raises(UserError, match="does not exist"):
        check_preferences(read_preferences(tmp_path / "p.jsonl"))


def test_pairs_of_parquet_may_name_the_files_of_their_images(tmp_path: Path) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    row = {"prompt": "a dog", "chosen": "1.png", "rejected": "0.png"}
    (pair,) = check_preferences(read_preferences(parquet(tmp_path / "p.parquet", [row]))).pairs
    assert pair.first.path == tmp_path / "1.png"
    (problem,) = read_preferences(parquet(tmp_path / "q.parquet", [row | {"chosen": "../1.png"}])).problems
    assert "lies outside" in problem


def test_classifierd_single_pictures_are_read(tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [{"prompt": "a dog", "image": f"{number}.png", "label": number != 1} for number in range(3)]
    found = check_preferences(read_preferences(write_lines(tmp_path / "kto.jsonl", rows)))
    assert [single.good for single in found.singles] == [True, False, True]
    assert not found.pairs


def test_one_person_s_choices_can_be_taken_alone(pairs_file: Path) -> None:
    assert len(read_preferences(pairs_file, user="bob").pairs) == 2
    with pytest.raises(UserError, match=r"no choices by eve\. It has ann, bob"):
        read_preferences(pairs_file, user="eve")


def test_a_labelled_folder_is_read_through_its_record(tmp_path: Path) -> None:
    folder = labelled_folder(tmp_path)
    found = check_preferences(read_preferences(folder))
    assert [(pair.label, pair.both_bad) for pair in found.pairs] == [(1.0, False), (0.0, False), (0.5, True)]
    assert found.skipped == 1
    assert found.provenance["fingerprint"] == "abc"


def labelled_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "labelled"
    (folder / "pictures").mkdir(parents=True)
    write_json(folder / "samples.json", {"model": "tiny", "fingerprint": "abc", "prompts": []})
    for number in range(4):
        for side in "ab":
            picture(10 * number + (side == "b")).save(folder / "pictures" / f"{number}{side}.png")
    for number, verdict in enumerate(("left", "right", "both_bad", "skip")):
        append_entry(
            folder / CHOICES,
            Choice(
                number,
                f"p{number}",
                PROMPTS[number],
                f"pictures/{number}a.png",
                f"pictures/{number}b.png",
                verdict,
            ),
        )
    return folder


# Choices ----------------------------------------------------------------------------------------------------


def contents(pair: Pair) -> tuple[str, bytes, bytes]:
    return pair.prompt, pair.first.read(), pair.second.read()


def choice(number: int, pair: str, verdict: str, *, repeat: bool = False, flipped: bool = False) -> Choice:
    sides = ("b.png", "a.png") if flipped else ("a.png", "b.png")
    return Choice(number, pair, "a dog", *sides, verdict, repeat)


def test_what_was_taken_back_does_not_count() -> None:
    entries: list[Choice | Undo] = [
        choice(0, "x", "left"),
        choice(1, "y", "left"),
        Undo(1),
        choice(2, "y", "right"),
    ]
    assert [(c.pair, c.verdict) for c in standing_choices(entries)] == [("x", "left"), ("y", "right")]


def test_of_two_answers_the_last_counts() -> None:
    assert [c.verdict for c in standing_choices([choice(0, "x", "left"), choice(1, "x", "tie")])] == ["tie"]


def test_consistency_looks_at_pictures_not_at_sides() -> None:
    choices = [
        choice(0, "x", "left"),
        choice(1, "y", "left"),
        choice(2, "z", "tie"),
        choice(3, "x", "right", repeat=True, flipped=True),  # the same picture
        choice(4, "y", "right", repeat=True),  # the other one
        choice(5, "z", "skip", repeat=True),  # says nothing
    ]
    assert measure_consistency(choices).agreed == 1
    assert measure_consistency(choices).repeats == 2


def test_each_person_s_answers_stand_beside_the_others() -> None:
    ann, bob = (replace(choice(number, "x", "left"), user=user) for number, user in enumerate(("ann", "bob")))
    again = replace(choice(2, "x", "right"), user="bob")
    hidden = replace(choice(3, "x", "left", repeat=True), user="ann")
    standing = standing_choices([ann, bob, again, hidden])
    assert [(c.user, c.verdict) for c in standing] == [("ann", "left"), ("bob", "right"), ("ann", "left")]
    assert measure_consistency(standing).agreed == measure_consistency(standing).repeats == 1


def test_a_line_that_a_crash_cut_off_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / CHOICES
    append_entry(path, choice(0, "x", "left"))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    append_entry(path, choice(1, "y", "right"))
    assert [c.pair for c in standing_choices(read_choices(path))] == ["x", "y"]


def test_answers_of_two_files_that_were_joined_all_stand(tmp_path: Path) -> None:
    path = tmp_path / CHOICES
    for user, verdict in (("ann", "left"), ("bob", "right")):
        for number, pair in enumerate("xy"):
            append_entry(path, replace(choice(number, pair, verdict), user=user))
    standing = standing_choices(read_choices(path))
    assert [(c.user, c.pair) for c in standing] == [("ann", "x"), ("ann", "y"), ("bob", "x"), ("bob", "y")]
    append_entry(path, Undo(1, user="ann"))
    append_entry(path, Undo(0))
    left = standing_choices(read_choices(path))
    assert [(c.user, c.pair) for c in left] == [("ann", "x"), ("bob", "y")]


def test_answers_that_an_editor_broke_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / CHOICES
    line = json.dumps(asdict(choice(0, "x", "left")))
    path.write_text(f"{line},\n{line}\n{{\n")
    assert len(read_choices(path)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "line 1, line 3, incomplete answers" in said
    path.write_text(f"[{line}]")
    assert len(read_choices(path)) == 1


def test_a_repeat_is_not_a_second_pair(tmp_path: Path) -> None:
    folder = labelled_folder(tmp_path)
    append_entry(
        folder / CHOICES, Choice(9, "p0", PROMPTS[0], "pictures/0b.png", "pictures/0a.png", "right", True)
    )
    assert len(read_preferences(folder).pairs) == 3


# Held out ---------------------------------------------------------------------------------------------------


def test_no_prompt_is_on_both_sides(pairs_file: Path) -> None:
    found = read_preferences(pairs_file)
    for seed in range(10):
        train, out = split_held_out(found.pairs, share=0.3, seed=seed)
        assert len(train) + len(out) == 8
        assert train and out
        assert {normalize_prompt(pair.prompt) for pair in train}.isdisjoint(
            normalize_prompt(pair.prompt) for pair in out
        )


def test_spelling_does_not_carry_a_prompt_across(pairs_file: Path) -> None:
    (pair, *rest) = read_preferences(pairs_file).pairs
    twin = Pair("  A red  DOG. ", pair.first, pair.second, 1.0, "twin")
    for seed in range(10):
        train, _ = split_held_out([pair, twin, *rest], share=0.5, seed=seed)
        assert (pair in train) == (twin in train)


def test_more_prompts_do_not_move_the_others() -> None:
    def records(count: int) -> list[Pair]:
        one = picture_record()
        return [Pair(f"prompt {number}", one, one, 1.0, str(number)) for number in range(count)]

    few = {record.prompt for record in split_held_out(records(40), share=0.2, seed=0)[1]}
    many = {record.prompt for record in split_held_out(records(80), share=0.2, seed=0)[1]}
    assert few <= many
    assert 0.1 < len(many) / 80 < 0.3


def picture_record() -> Any:
    from backbone.media.sources.record import ImageRecord

    return ImageRecord(Path("none.png"))


def test_of_single_images_both_classes_are_learned_from() -> None:
    for seed in range(12):
        singles: list[Record] = [
            Single("a cat" if good else "a dog", picture_record(), good, f"{good} {number}")
            for good in (True, False)
            for number in range(4)
        ]
        train, out = split_held_out(singles, share=0.1, seed=seed)
        assert len(train) == 8 and not out  # each prompt has one class
        more: list[Record] = [
            Single(f"{number}", picture_record(), number % 2 == 0, "") for number in range(8)
        ]
        train, out = split_held_out([*singles, *more], share=0.5, seed=seed)
        assert {record.good for record in train if isinstance(record, Single)} == {True, False}
        assert out


def test_one_prompt_cannot_be_held_out(pairs_file: Path) -> None:
    same = [pair for pair in read_preferences(pairs_file).pairs if pair.prompt == PROMPTS[0]]
    assert split_held_out(same, share=0.5, seed=0) == (same, [])


def test_nothing_is_held_out_when_none_is_asked_for(pairs_file: Path) -> None:
    found = read_preferences(pairs_file)
    assert split_held_out(found.pairs, share=0.0, seed=0)[1] == []


# One record as another --------------------------------------------------------------------------------------


def test_pairs_become_single_judgements_and_ties_say_nothing(tmp_path: Path) -> None:
    singles = to_singles(read_preferences(labelled_folder(tmp_path)))
    assert [(single.picture.path.name, single.good) for single in singles] == [
        ("0a.png", True),
        ("0b.png", False),
        ("1b.png", True),
        ("1a.png", False),
        ("2a.png", False),
        ("2b.png", False),
    ]


@pytest.mark.parametrize("write", [write_parquet, export_lines])
def test_what_is_exported_is_read_back(
    tmp_path: Path, pairs_file: Path, write: Callable[[Preferences, Path], Path]
) -> None:
    found = check_preferences(read_preferences(parquet(tmp_path / "train.parquet", pick_a_pic())))
    ending = "parquet" if write is write_parquet else "jsonl"
    again = check_preferences(read_preferences(write(found, tmp_path / "out" / f"pairs.{ending}")))
    assert [contents(pair) for pair in again.pairs] == [contents(pair) for pair in found.pairs]
    assert [pair.label for pair in again.pairs] == [pair.label for pair in found.pairs]
    assert [pair.user for pair in again.pairs] == [pair.user for pair in found.pairs]


def test_the_exported_columns_are_pick_a_pic_s(tmp_path: Path, pairs_file: Path) -> None:
    table = pq.read_table(
        write_parquet(check_preferences(read_preferences(pairs_file)), tmp_path / "pairs.parquet")
    )
    assert set(table.column_names) == {
        "are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid", "image_0_url",
        "image_1_uid", "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1", "ranking_id",
        "user_id", "num_example_per_prompt", "__index_level_0__",
    }  # fmt: skip
    assert table.schema.field("jpg_0").type == pa.binary()
    assert table.schema.field("label_0").type == pa.float64()
    first = table.to_pylist()[0]
    assert first["best_image_uid"] == first["image_0_uid"]
    assert first["num_example_per_prompt"] == 2


@pytest.mark.parametrize("write", [write_parquet, export_lines])
def test_both_bad_is_still_both_bad_after_an_export(
    tmp_path: Path, write: Callable[[Preferences, Path], Path]
) -> None:
    found = read_preferences(labelled_folder(tmp_path))
    ending = "parquet" if write is write_parquet else "jsonl"
    again = check_preferences(read_preferences(write(found, tmp_path / "out" / f"pairs.{ending}")))
    assert [pair.both_bad for pair in again.pairs] == [False, False, True]
    assert [single.good for single in to_singles(again)] == [single.good for single in to_singles(found)]


@pytest.mark.parametrize(
    ("users", "kind"),
    [
        (["7", "12", ""], pa.int64()),
        (["9" * 30, "7"], pa.string()),
        (["007", "7"], pa.string()),
        (["ann", "", "٣", "5" * 5000], pa.string()),
    ],
)
def test_users_are_text_unless_all_are_whole_numbers(
    tmp_path: Path, users: list[str], kind: pa.DataType
) -> None:
    for number in range(len(users) + 1):
        picture(number).save(tmp_path / f"{number}.png")
    rows: Rows = [
        {"prompt": "a dog", "chosen": "0.png", "rejected": f"{number + 1}.png", "user": user}
        for number, user in enumerate(users)
    ]
    found = read_preferences(write_lines(tmp_path / "pairs.jsonl", rows))
    path = write_parquet(found, tmp_path / "out.parquet")
    assert pq.read_schema(path).field("user_id").type == kind
    assert [pair.user for pair in read_preferences(path).pairs] == users


def test_an_export_to_lines_needs_no_source(tmp_path: Path, pairs_file: Path) -> None:
    written = export_lines(check_preferences(read_preferences(pairs_file)), tmp_path / "out" / "pairs.jsonl")
    shutil.rmtree(pairs_file.parent)
    assert len(check_preferences(read_preferences(written)).pairs) == 8


# What is wrong ----------------------------------------------------------------------------------------------


def test_all_bad_records_are_reported_together(tmp_path: Path, pairs_file: Path) -> None:
    folder = pairs_file.parent
    (folder / "0.png").unlink()
    (folder / "3.png").write_bytes(b"no picture")
    Image.new("RGB", (80, 64)).save(folder / "4.png")
    lines = pairs_file.read_text().splitlines()
    lines[3] = lines[3].replace('"prompt": "the cat"', '"prompt": "  "')
    lines.append("{broken")
    pairs_file.write_text("\n".join(lines))
    before = pairs_file.read_bytes()
    with pytest.raises(UserError) as caught:
        check_preferences(read_preferences(pairs_file))
    said = str(caught.value).splitlines()
    assert said[0].endswith("has 5 problems in 9 records:")
    assert "line 9" in said[1] and "is not JSON" in said[1]
    assert "line 1 " in said[2] and "does not exist" in said[2]
    assert "line 2 " in said[3] and "text, not a picture" in said[3]
    assert "line 3 " in said[4] and "different sizes, 80 × 64 and 64 × 64" in said[4]
    assert "line 4 " in said[5] and "has no prompt" in said[5]
    assert pairs_file.read_bytes() == before
    assert len(check_preferences(read_preferences(pairs_file), skip_bad=True).pairs) == 4


@pytest.mark.parametrize("second", ["JPEG", "copy"])
def test_a_pair_of_the_same_picture_twice_is_named(tmp_path: Path, second: str) -> None:
    same = {"jpg_0": encoded(0, "JPEG"), "jpg_1": encoded(0, "JPEG"), "label_0": 1.0, "label_1": 0.0}
    if second == "copy":  # other bytes, the same pixels
        Image.open(io.BytesIO(encoded(0))).save(tmp_path / "other.png", compress_level=1)
        same |= {"jpg_0": encoded(0), "jpg_1": (tmp_path / "other.png").read_bytes()}
    with pytest.raises(UserError, match=r"row 0 .* has the same picture twice"):
        check_preferences(read_preferences(parquet(tmp_path / "t.parquet", [{**same, "caption": "a dog"}])))


def test_the_same_images_judged_both_ways_are_told(tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    rows: Rows = [
        {"prompt": "A dog in a park.", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "a dog in a park", "chosen": "1.png", "rejected": "0.png"},
        {"prompt": "a cat", "chosen": "1.png", "rejected": "0.png"},
        {"prompt": "a dog in a park", "chosen": "0.png", "rejected": "2.png"},
        {"prompt": "a dog in a park", "image_0": "1.png", "image_1": "0.png", "label_0": 0.5},
        {"prompt": "a dog in a park", "image_0": "1.png", "image_1": "0.png", "label_0": 0},
        {"prompt": "a dog", "image": "0.png", "label": 1},
        {"prompt": "a dog", "image": "0.png", "label": 0},
    ]
    found = check_preferences(read_preferences(write_lines(tmp_path / "pairs.jsonl", rows)))
    said = find_contradictions(found.records)
    assert [" ".join(line.split()[:2]) for line in said] == ["line 2", "line 8"]
    assert "line 1 of" in said[0] and "line 7 of" in said[1]
    assert "judged both ways" in describe_contradictions(found.records)
    assert describe_contradictions(found.records[:1]) == ""


def test_images_on_both_sides_and_single_ones_beside_pairs_are_told(tmp_path: Path) -> None:
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [
        {"prompt": "a dog", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "a dog, 4k", "chosen": "0.png", "rejected": "2.png"},
        {"prompt": "a cat", "chosen": "3.png", "rejected": "2.png"},
        {"prompt": "a cow", "image": "3.png", "label": "good"},
    ]
    found = read_preferences(write_lines(tmp_path / "a.jsonl", rows))
    first, second, third = found.pairs
    assert describe_shared_images([first, third], [second]).startswith("1 held-out record (line 2 of")
    assert describe_shared_images([first], [third]) == ""
    said = found.describe_left_out(by_pairs=True, ties=False)
    assert said.endswith(": 1 labelled picture beside the pairs, which --loss kto learns from.")
    assert found.describe_left_out(by_pairs=False, ties=False) == ""


def test_the_same_choice_twice_is_told_and_two_people_s_is_not(tmp_path: Path) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
        shutil.copy(tmp_path / f"{number}.png", tmp_path / f"{number}-copy.png")
    one: dict[str, object] = {"prompt": "a dog", "chosen": "0.png", "rejected": "1.png"}
    same: dict[str, object] = {
        "prompt": "A dog.",
        "image_0": "1-copy.png",
        "image_1": "0-copy.png",
        "label_0": 0,
    }
    rows = [one | {"user": "ann"}, same | {"user": "ann"}, one | {"user": "bob"}, one | {"prompt": "a cat"}]
    said = describe_repeats(read_preferences(write_lines(tmp_path / "a.jsonl", rows)).records)
    assert said.startswith("The same choice is there more than once") and "line 2" in said
    assert "line 3" not in said and "line 4" not in said
    assert describe_repeats(read_preferences(write_lines(tmp_path / "b.jsonl", rows[1:])).records) == ""


def test_two_captions_of_one_pair_are_told(tmp_path: Path) -> None:
    for number, side in enumerate(("w", "l")):
        (tmp_path / side).mkdir()
        picture(number).save(tmp_path / side / "1.png")
        (tmp_path / side / "1.txt").write_text(("a cat", "a dog")[number])
    with pytest.raises(UserError, match="w/1 says “a cat” and l/1 “a dog”"):
        check_preferences(read_preferences(tmp_path))


def test_nothing_but_ties_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "label_0": 0.5, "label_1": 0.5} for row in pick_a_pic(3)]
    with pytest.raises(UserError, match=r"All 2 pairs .* are ties"):
        check_preferences(read_preferences(parquet(tmp_path / "t.parquet", rows)))


def test_one_label_only_is_refused(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    rows: Rows = [{"prompt": "a dog", "image": "0.png", "label": 1}]
    with pytest.raises(UserError, match="labelled good, so nothing is preferred"):
        check_preferences(read_preferences(write_lines(tmp_path / "kto.jsonl", rows)))


def test_a_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the columns a, caption\. Pairs need"):
        read_preferences(parquet(tmp_path / "t.parquet", [{"a": 1, "caption": "x"}]))


def test_another_choice_or_prompt_is_another_source_of_a_run(tmp_path: Path) -> None:
    def choices(change: dict[str, Any]) -> tuple[str, str]:
        rows = pick_a_pic(3)
        rows[0] |= change
        found = Records(read_preferences(parquet(tmp_path / "t.parquet", rows)).pairs)
        return found.fingerprint(), found.choices()

    images, said = choices({})
    assert choices({}) == (images, said)
    for change in ({"label_0": 0.0, "label_1": 1.0}, {"caption": "another"}):
        other_images, other = choices(change)
        assert other_images == images and other != said


def test_labels_that_are_no_choice_are_named(tmp_path: Path) -> None:
    rows = pick_a_pic(3)
    rows[0]["label_1"] = 1.0
    with pytest.raises(UserError, match=r"row 0 .*label_0 = 1.0, label_1 = 1.0"):
        check_preferences(read_preferences(parquet(tmp_path / "t.parquet", rows)))


def test_a_folder_without_preferences_says_what_to_do(tmp_path: Path) -> None:
    write_json(tmp_path / "samples.json", {})
    with pytest.raises(UserError, match="align label"):
        read_preferences(tmp_path)


def test_choices_and_a_ranking_must_be_told_apart(tmp_path: Path) -> None:
    folder = labelled_folder(tmp_path)
    (folder / "ranking.jsonl").write_text("")
    with pytest.raises(UserError, match="Name the one to learn from"):
        read_preferences(folder)
    assert len(read_preferences(folder / CHOICES).pairs) == 3


def test_pictures_of_another_model_are_refused(tmp_path: Path, tiny: Backbone) -> None:
    folder = labelled_folder(tmp_path)
    samples = read_json(folder / "samples.json")
    write_json(folder / "samples.json", {**samples, "fingerprint": tiny.fingerprint})
    refuse_another_model(read_preferences(folder), tiny)
    write_json(folder / "samples.json", {**samples, "fingerprint": earlier_fingerprint(tiny.location)})
    refuse_another_model(read_preferences(folder), tiny)
    write_json(folder / "samples.json", {**samples, "fingerprint": "abc"})
    with pytest.raises(UserError, match=f"other weights than {tiny.location.name} has"):
        refuse_another_model(read_preferences(folder), tiny)


@pytest.mark.parametrize("name", ["nothing", "broken.parquet", "odd.txt"])
def test_a_source_that_is_none_is_one_sentence(tmp_path: Path, name: str) -> None:
    if name != "nothing":
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=name):
        read_preferences(tmp_path / name)


def test_a_list_that_lies_a_folder_deeper_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(
        UserError, match=r"holds no pairs, but folders in which some may be: train/\. Name one"
    ):
        read_preferences(tmp_path)


def test_a_line_that_cannot_be_read_counts_among_the_records(tmp_path: Path) -> None:
    good, bad = (
        {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "label_0": label} for label in (1, 2)
    )
    with pytest.raises(UserError, match="3 problems in 2 records"):  # neither image of the good one is there
        check_preferences(read_preferences(write_lines(tmp_path / "p.jsonl", [good, bad])))


def test_a_problem_is_one_line_whatever_a_file_is_called() -> None:
    assert format_problems("here", 2, ["a\nb.png is bad"]).split("\n")[1] == "  a\\nb.png is bad"


def test_a_prompt_that_is_no_text_is_said_and_columns_of_rows_that_fit_no_layout_are_not_called_unused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        Image.new("RGB", (8, 8), (90 * number, 9, 9)).save(tmp_path / f"{number}.png")
    chat = {"prompt": [{"role": "user", "content": "a dog"}], "chosen": "0.png", "rejected": "1.png"}
    for row, problem in (
        (chat, "line 1 of .* has a prompt that is no text, but a list"),
        (chat | {"prompt": 5}, "line 1 of .* has a prompt that is no text, but a whole number"),
        (
            {"prompt": "a", "chosen": ["0.png"], "rejected": "1.png"},
            "line 1 of .* has a list where the name of one",
        ),
        (
            {"prompt": "a", "chosen": {"path": "0.png"}, "rejected": "1.png"},
            "has an object where the name of one",
        ),
        ({"prompt": "a dog", "win": "0.png", "lose": "1.png"}, "none of the columns of pairs"),
    ):
        (tmp_path / "p.jsonl").write_text(json.dumps(row))
        (said,) = read_preferences(tmp_path / "p.jsonl").problems
        assert re.search(problem, said)
    assert "Every choice counts the same" not in capsys.readouterr().err
