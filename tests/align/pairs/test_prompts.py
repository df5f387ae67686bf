"""Prompt files, and prompts as scorers read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.pairs.prompts import group_by_category, strip_tokens
from backbone.io.console import UserError
from backbone.io.prompts import Prompt, drop_invisible, load_prompts, read_lines, read_prompts
from tests.align.conftest import picture

DOG = [{"tokens": {"[V]": "bcd"}, "class": "dog", "folder": "runs/dog"}]


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a [V] dog in the snow", "a dog in the snow"),
        ("a [V] in the snow", "a dog in the snow"),
        ("a photo of [V] dog and a cat", "a photo of dog and a cat"),
        ("a cat", "a cat"),
    ],
)
def test_a_scorer_reads_the_class_where_the_prompt_has_a_token(prompt: str, read: str) -> None:
    assert strip_tokens(prompt, DOG) == read


def test_a_concept_without_tokens_changes_no_prompt() -> None:
    assert strip_tokens("a [V] dog", [{"tokens": {}, "class": ""}]) == "a [V] dog"


def test_lines_and_json_lines_say_the_same(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("# a comment\nanimals\ta  dog\n\na cat\na cat\n")
    lines.write_text('{"prompt": "a dog", "category": "animals"}\n{"prompt": "a cat"}\n')
    assert read_prompts(text) == read_prompts(lines) == [Prompt("a dog", "animals"), Prompt("a cat")]
    assert group_by_category(read_prompts(text)) == {"animals": [0], "": [1]}


def test_a_soft_line_break_of_a_text_program_stands_within_a_prompt(tmp_path: Path) -> None:
    text = "a dog\u2028in the snow\x0bat\x85night\r\na cat\u2029asleep\ra bird\n"
    (tmp_path / "p.txt").write_bytes(text.encode())
    found = [prompt.text for prompt in read_prompts(tmp_path / "p.txt")]
    assert found == ["a dog in the snow at night", "a cat asleep", "a bird"]


def test_a_prompt_that_stands_in_a_file_again_is_said_and_is_another_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("brighter\na cat\nbrighter\n")
    assert [one.text for one in load_prompts([str(tmp_path / "p.txt")])] == ["brighter", "a cat"]
    assert f"{tmp_path}/p.txt repeats 1 prompt" in capsys.readouterr().err
    each = load_prompts([str(tmp_path / "p.txt")], read=read_lines)
    assert [one.text for one in each] == ["brighter", "a cat", "brighter"]
    assert not capsys.readouterr().err


def test_marks_that_nobody_sees_are_no_part_of_a_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a [V]\u200b dog\na family \U0001f468\u200d\U0001f469\u200d\U0001f467\n")
    assert [one.text for one in read_prompts(tmp_path / "p.txt")] == [
        "a [V] dog",
        "a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    ]
    assert "zero-width characters" in capsys.readouterr().err
    assert load_prompts(["\ufeffa  dog", "a  cat"]) == [Prompt("a dog"), Prompt("a  cat")]
    with pytest.raises(UserError, match="A prompt is empty"):
        load_prompts("\u200b \u2060")


@pytest.mark.parametrize("gap", ["\n", "\r\n", "\t", " \n  ", "\x0b", "\u2028", "\x85", "\n\n"])
def test_a_prompt_of_several_lines_is_one_line_of_whole_words(
    gap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_prompts(f"a dog{gap}in the snow{gap}") == [Prompt("a dog in the snow")]
    assert drop_invisible(f"a dog{gap}in the snow{gap}") == "a dog in the snow"
    assert not capsys.readouterr().err


def test_a_letter_and_its_mark_are_one_character(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a cafe\u0301\n")
    assert load_prompts([str(tmp_path / "p.txt"), "a cafe\u0301"]) == [Prompt("a café")] * 2
    assert not capsys.readouterr().err


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a dog"}\nnot json\n{"prompt": ""}\n')
    with pytest.raises(UserError, match="2 bad lines") as caught:
        read_prompts(lines)
    assert "line 2" in str(caught.value) and "line 3" in str(caught.value)
    for negative in ("", " ", "\u200b", "\ufeff \u200e"):  # which nobody sees
        lines.write_text(json.dumps({"prompt": "a dog", "hard_negatives": ["a cat", negative]}))
        with pytest.raises(UserError, match="line 1 holds no prompt"):
            read_prompts(lines)
    for name, text in (("p.txt", "a dog\na \x1b[31mred dog\n"), ("p.json", '["a dog", "a \\u001b[31mdog"]')):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=r"1 bad line:\n  (line|entry) 2 holds no prompt"):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "text", ['["a dog", "a cat"]', '[\n  {"prompt": "a dog"},\n  {"prompt": "a  cat"}\n]\n']
)
def test_a_json_list_says_what_json_lines_say(tmp_path: Path, text: str) -> None:
    for name in ("p.json", "p.JSONL") if "prompt" in text else ("p.json",):
        (tmp_path / name).write_text(f"\ufeff{text}")
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["a dog", "a cat"], name
    (tmp_path / "p.json").write_text(text.replace('"a dog"', "7"))
    with pytest.raises(UserError, match="1 bad line:\n  entry 1 holds no prompt"):
        read_prompts(tmp_path / "p.json")
    (tmp_path / "p.json").write_text(text[:-3])
    with pytest.raises(UserError, match=r"p.json is not JSON .*Repair"):
        read_prompts(tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{\n  "prompts": ["a dog"]\n}')
    with pytest.raises(UserError, match=r"p\.json is one object, and a list is wanted"):
        read_prompts(tmp_path / "p.json")


def test_a_prompt_file_is_found_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a dog\n")
    assert load_prompts(["~/p.txt"]) == [Prompt("a dog")]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".yaml"])
def test_a_table_or_a_record_is_no_list_of_prompts(tmp_path: Path, suffix: str) -> None:
    """Its lines would be drawn as they are: brackets, quotes and the head of the table."""
    (tmp_path / f"p{suffix}").write_text('["a dog"]\n')
    with pytest.raises(UserError, match=rf"not read from {suffix} files.*\.txt"):
        read_prompts(tmp_path / f"p{suffix}")
    (tmp_path / "p.txt").write_bytes(b"a dog\na\0cat\n")
    with pytest.raises(UserError, match=r"1 bad line.*\n.*line 2"):
        read_prompts(tmp_path / "p.txt")


def test_a_folder_called_as_a_file_of_prompts_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "p.txt").mkdir()
    with pytest.raises(UserError, match=r"p\.txt is a folder\. Name a file"):
        load_prompts([str(tmp_path / "p.txt")])


def test_a_run_or_a_hyphen_in_a_prompt_s_place_is_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/dog", "dog", "plain"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dog" / "concept.json").touch()
    for name in ("runs/dog", "dog", "plain/"):
        with pytest.raises(UserError, match=rf"{name} is a folder, and no prompt\. .*--concept of its own"):
            load_prompts(["a dog", name])
    with pytest.raises(UserError, match="nothing is read from a pipe"):
        load_prompts("-")
    assert load_prompts(["plain", "a dog/cat"]) == [Prompt("plain"), Prompt("a dog/cat")]


def test_what_a_list_says_of_drawing_is_said_to_have_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"prompt": "a dog", "id": 1, "seed": 5},
        {"prompt": "a cat", "negative_prompt": "b", "seed": None},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert len(read_prompts(tmp_path / "p.jsonl")) == 2
    assert (
        "p.jsonl sets seed and negative_prompt for single prompts, which has no effect"
        in capsys.readouterr().err
    )


def test_a_file_without_prompts_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(tmp_path / "p.txt")


def test_an_image_in_a_prompt_s_place_is_no_text(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "dog.png")
    with pytest.raises(UserError, match=r"dog\.png is no text\. Give words"):
        load_prompts(str(tmp_path / "dog.png"))
    (tmp_path / "p.txt").write_text("a naïve dog\nein Hund", encoding="utf-16")
    assert [one.text for one in load_prompts(str(tmp_path / "p.txt"))] == ["a naïve dog", "ein Hund"]
    (tmp_path / "p.txt").write_text("a naïve dog", encoding="latin-1")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_prompts(str(tmp_path / "p.txt"))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.yaml"])
def test_the_name_of_a_list_that_is_not_there_is_no_prompt(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} does not exist"):
        load_prompts(name)
