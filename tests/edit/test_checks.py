"""What Python gives an edit: one sentence where it is of another kind than an edit takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from backbone.io.console import UserError
from edit.checks import (
    check_prompts,
    check_strength,
    check_weighted,
    map_words,
    parse_weight,
    parse_weights,
    parse_window,
    refuse_composed_twice,
    refuse_unopened,
    say_far_weights,
)
from edit.settings import (
    ClipOptions,
    ComposeOptions,
    FlowEditOptions,
    InstructOptions,
    InterpolateOptions,
    InvertOptions,
    PaintOptions,
    RemoveOptions,
    ReplaceOptions,
    SDEditOptions,
    draws_noise,
)


def test_a_text_is_one_prompt_and_not_its_letters() -> None:
    assert check_prompts("make it snow", "instruction") == ("make it snow",)
    assert check_prompts(["a dog", "a cat"], "target prompt") == ("a dog", "a cat")


@pytest.mark.parametrize("texts", [5, None, [], [""], ["a dog", 5], {"a dog": 1}])
def test_what_is_no_prompt_is_said(texts: Any) -> None:
    with pytest.raises(UserError, match="target prompt"):
        check_prompts(texts, "target prompt")


def test_prompts_with_weights_are_pairs_or_a_dict() -> None:
    pairs = [("a painting", 1.0), ("a photo", -0.5)]
    assert check_weighted(pairs, "prompt") == check_weighted(dict(pairs), "prompt") == pairs
    for said in (["a painting"], {"a painting": "much"}, [("a painting", None)], []):
        with pytest.raises(UserError, match="prompt"):
            check_weighted(said, "prompt")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "meant"), [("dog:2", "dog=2"), ("a dog", "'a dog=2'"), ("dog=", "word=2"), ("dog=x", "word=2")]
)
def test_a_word_without_its_number_is_told_how_it_has_one(said: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"Write --toward {re.escape(meant)}"):
        parse_weight(said, "--toward")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "2,5", ""])
def test_a_weight_is_a_number(number: str) -> None:
    with pytest.raises(UserError, match="is not a word and a number"):
        parse_weight(f"a cat={number}", "--toward")
    if number in ("nan", "inf", "-inf"):
        with pytest.raises(UserError, match="is a number, as in"):
            check_weighted({"a cat": float(number)}, "prompt")


def test_a_prompt_is_composed_with_once() -> None:
    refuse_composed_twice([("a painting", 1.0), ("a photo", -1.0)])
    with pytest.raises(
        UserError, match="“a painting” is composed with 2 times, by 1 and -1, which is 0 in all"
    ):
        refuse_composed_twice([("a painting", 1.0), ("a photo", 2.0), ("a  painting", -1.0)])


def test_a_weight_that_nobody_means_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    parse_weights(["dog=3"])
    say_far_weights("Composing with", [("a painting", 3.0), ("a photo", -2.0)])
    assert capsys.readouterr().err == ""
    parse_weights(["dog=150"])
    assert (
        "--reweight “dog” by 150 breaks the image: 10 is much already. Was 1.5 meant?"
        in capsys.readouterr().err
    )
    say_far_weights("Composing with", [("a painting", -35.0)])
    assert "Was -3.5 meant?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "given", "random"),
    [
        (InvertOptions, {"image": "x", "prompt": "a"}, False),
        (InvertOptions, {"image": "x", "prompt": "a", "method": "edit-friendly"}, True),
        (ReplaceOptions, {"targets": ("a",)}, False),
        (ReplaceOptions, {"targets": ("a",), "method": "edit-friendly"}, True),
        (PaintOptions, {"image": "x"}, False),
        (ComposeOptions, {}, False),
        (InterpolateOptions, {"first": "x", "second": "y", "prompts": ("a", "b")}, False),
        (RemoveOptions, {"strength": 0.0}, False),
        (RemoveOptions, {}, True),
        (SDEditOptions, {"image": "x", "prompt": "a"}, True),
        (FlowEditOptions, {"image": "x", "source": "a", "targets": ("b",)}, True),
        (InstructOptions, {"image": "x", "instruction": "a"}, True),
        (ClipOptions, {"clip": "x"}, True),
        (ClipOptions, {"clip": "x", "source": "a"}, False),
        (ClipOptions, {"clip": "x", "source": "a", "method": "edit-friendly"}, True),
        (ClipOptions, {"clip": "x", "source": "a", "method": "flow-edit"}, True),
        (ClipOptions, {"inversion": "x"}, False),
    ],
)
def test_a_seed_has_an_effect_where_noise_is_drawn(kind: Any, given: dict[str, Any], random: bool) -> None:
    assert draws_noise(kind(seed=3, **given)) is random


def test_a_window_that_ends_before_it_begins_is_refused() -> None:
    assert parse_window("cat=0.2:0.8", "--window") == ("cat", (0.2, 0.8))
    with pytest.raises(UserError, match=r"--window cat begins at 0\.8 and ends before, at 0\.2"):
        parse_window("cat=0.8:0.2", "--window")


@pytest.mark.parametrize("name", ["moji", Path("my/model")])
def test_the_name_of_a_model_is_answered_with_how_it_is_opened(name: Any) -> None:
    with pytest.raises(UserError, match=r"Open it first: backbone\.open\('"):
        refuse_unopened(name)
    with pytest.raises(UserError, match=r"object is no open model\. Open one first: backbone\.open"):
        refuse_unopened(object())


def test_a_word_has_one_weight_and_one_window_and_a_weight_of_one_is_said_to_be_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parse_weights(["dog=2", "cat=3"]) == {"dog": 2, "cat": 3}
    assert capsys.readouterr().err == ""
    assert parse_weights(["dog=1"]) == {"dog": 1}
    assert "--reweight dog=1 changes nothing" in capsys.readouterr().err
    with pytest.raises(UserError, match="--reweight is given twice for “Dog”"):
        parse_weights(["dog=2", "Dog=3"])
    with pytest.raises(UserError, match="--window is given twice for “dog”"):
        map_words([("dog", (0.0, 0.5)), ("dog", (0.0, 0.8))], "--window")


def test_that_a_strength_of_zero_changes_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_strength(0.5, 50) == 0.5
    assert capsys.readouterr().err == ""
    assert check_strength(0, 50) == 0
    assert "nothing is changed" in capsys.readouterr().err
