"""Scorers as plug-ins, and several of them together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align.rank import paired
from align.scoring import open_judge, together
from backbone.console import UserError

RED, BLUE = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))


def scorer(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(body)
    return str(path)


def test_a_function_of_one_s_own_scores(tmp_path: Path) -> None:
    judge = open_judge(
        scorer(tmp_path, "def score(images, prompts):\n    return [len(p) for p in prompts]\n")
    )
    assert judge([RED, BLUE], ["a", "abc"]).tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("x = 1\n", "has no function `score"),
        ("def score(images, prompts):\n    return [1.0]\n", "a finite number for each of 2"),
        ("def score(images, prompts):\n    return [1.0, float('nan')]\n", "a finite number"),
    ],
    ids=["none", "too few", "nan"],
)
def test_a_function_that_is_none_is_named(tmp_path: Path, body: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        open_judge(scorer(tmp_path, body))([RED, BLUE], ["a", "b"])


@pytest.mark.parametrize("name", ["nobody", "missing.py", "like:nowhere"])
def test_a_scorer_that_is_not_there_is_a_mistake(name: str) -> None:
    with pytest.raises((UserError, FileNotFoundError)):
        open_judge(name)


def test_likeness_prefers_the_pictures_that_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    RED.save(tmp_path / "own" / "red.png")
    scores = open_judge(f"like:{tmp_path / 'own'}")([RED, BLUE], ["", ""])
    assert float(scores[0]) == pytest.approx(1.0, abs=1e-4)
    assert scores[0] > scores[1]


def test_scores_of_different_scales_are_brought_to_one() -> None:
    one, other = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([200.0, 100.0, 0.0])
    assert together([one, other], [1.0, 1.0]).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert together([one, other], [2.0, 1.0]).argmax() == 2
    assert (
        together([one, torch.ones(3)], [1.0, 5.0]).argmax() == 2
    )  # a scorer that sees no difference says nothing
    with pytest.raises(UserError, match="one each"):
        together([one, other], [1.0])


FILES = [(0, "a"), (0, "b"), (0, "c"), (1, "d"), (1, "e")]


def test_of_each_prompt_the_best_meets_the_worst() -> None:
    pairs = list(paired(FILES, torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0])))
    assert [(pair.prompt, pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [(0, "b", "a", 2.0)]


def test_all_pairs_beyond_the_margin() -> None:
    pairs = list(paired(FILES, torch.tensor([1.0, 3.0, 2.0, 5.0, 5.5]), rule="all", margin=0.9))
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("b", "c"), ("b", "a"), ("c", "a")}


def test_only_pairs_on_which_all_agree() -> None:
    one, other = torch.tensor([1.0, 3.0, 2.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 9.0, 2.0, 1.0])
    pairs = list(paired(FILES, one + other, [one, other], rule="all"))
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("b", "a"), ("c", "a")}


def test_warmth_is_red_minus_blue() -> None:
    from recipes.align.warm import score

    assert score([RED, BLUE], ["", ""]) == pytest.approx([1.0, -1.0])
    grey = Image.fromarray(np.full((8, 8, 3), 77, dtype=np.uint8))
    assert score([grey], [""]) == [0.0]
