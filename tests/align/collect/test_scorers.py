"""Scorers as plug-ins, and several of them together."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align.collect.rank import RankedPair, Rule, order_pairs, pair_within_prompts, rank_samples, select_rows
from align.collect.scorers import combine_scores, hash_scorer, open_scorer
from align.pairs.samples import image_name, prompt_and_noise
from backbone.io.console import UserError
from backbone.io.files import read_jsonl, write_json
from backbone.io.prompts import Prompt
from backbone.models.locate import EMBEDDED

RED, BLUE = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))


def scorer(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(body)
    return str(path)


def test_a_function_of_one_s_own_scores(tmp_path: Path) -> None:
    judge = open_scorer(
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
        open_scorer(scorer(tmp_path, body))([RED, BLUE], ["a", "b"])


@pytest.mark.parametrize("name", ["nobody", "missing.py", "like:nowhere"])
def test_a_scorer_that_is_not_there_is_a_mistake(name: str) -> None:
    with pytest.raises((UserError, FileNotFoundError)):
        open_scorer(name)


def test_a_scorer_that_changes_under_its_name_has_another_hash(tmp_path: Path) -> None:
    clip, images, code = tmp_path / "clip", tmp_path / "images", tmp_path / "score.py"
    shutil.copytree(EMBEDDED / "scorer", clip)
    images.mkdir()
    Image.new("RGB", (16, 16), "red").save(images / "a.png")
    code.write_text("def score(images, prompts):\n    return [0.0] * len(images)\n")
    names = ("moji", str(clip), f"like:{images}", f"like:{images}:{clip}", str(code))
    before = {name: hash_scorer(name) for name in names}
    assert len(set(before.values())) == len(names) - 2  # the copied CLIP is moji's
    assert {name: hash_scorer(name) for name in names} == before
    Image.new("RGB", (16, 16), "blue").save(images / "b.png")
    settings = clip / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "image_mean": [0.4, 0.4, 0.4]}))
    code.write_text(code.read_text() + "# another\n")
    assert [name for name in names if hash_scorer(name) == before[name]] == ["moji"]


def test_likeness_prefers_the_pictures_that_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    RED.save(tmp_path / "own" / "red.png")
    scores = open_scorer(f"like:{tmp_path / 'own'}")([RED, BLUE], ["", ""])
    assert float(scores[0]) == pytest.approx(1.0, abs=1e-4)
    assert scores[0] > scores[1]


class Blind:
    """A CLIP whose weights are damaged."""

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.full((len(images), 4), float("nan"))

    embed_texts = embed_images


def test_scores_that_are_no_numbers_are_said_to_be_the_scorer_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.collect.scorers.load_scorer", lambda folder: Blind())
    with pytest.raises(UserError, match="moji gives scores that are not finite numbers"):
        open_scorer("moji")([RED, BLUE], ["a", "b"])


def test_a_full_disk_leaves_the_scores_and_pairs_that_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [{"prompt": "a dog", "category": ""}]
    write_json(tmp_path / "samples.json", {"format": 1, "per_prompt": 2, "prompts": prompts})
    (tmp_path / "pictures").mkdir()
    for j, image in enumerate((RED, BLUE)):
        image.save(tmp_path / image_name(0, j))
    rank_samples(tmp_path, [scorer(tmp_path, "def score(images, prompts):\n    return [0, 1]\n")])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("align.collect.rank.write_text", full)
    with pytest.raises(OSError, match="No space") as raised:
        rank_samples(tmp_path, [scorer(tmp_path, "def score(images, prompts):\n    return [1, 0]\n")])
    (tmp_path / "mine.py").write_bytes(before[tmp_path / "mine.py"])
    assert raised.value.filename == str(tmp_path / "ranking.jsonl")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_scores_of_different_scales_are_brought_to_one() -> None:
    one, other = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([200.0, 100.0, 0.0])
    assert combine_scores([one, other], [1.0, 1.0]).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert combine_scores([one, other], [2.0, 1.0]).argmax() == 2
    # A scorer that sees no difference says nothing
    assert combine_scores([one, torch.ones(3)], [1.0, 5.0]).argmax() == 2
    with pytest.raises(UserError, match="one each"):
        combine_scores([one, other], [1.0])
    for weights in ([float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0]):
        with pytest.raises(UserError, match="Give finite numbers, not all 0"):
            combine_scores([one, other], weights)


FILES = [(0, "a"), (0, "b"), (0, "c"), (1, "d"), (1, "e")]


def paired(
    total: torch.Tensor, each: Sequence[torch.Tensor] = (), *, rule: Rule = "best-worst", margin: float = 0.0
) -> list[RankedPair]:
    return list(
        order_pairs(
            FILES,
            list(pair_within_prompts(range(len(FILES)), FILES, total, rule)),
            total,
            each,
            margin=margin,
        )
    )


def test_of_each_prompt_the_best_meets_the_worst() -> None:
    pairs = paired(torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0]))
    assert [(pair.prompt, pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [(0, "b", "a", 2.0)]


def test_all_pairs_beyond_the_margin() -> None:
    pairs = paired(torch.tensor([1.0, 3.0, 2.0, 5.0, 5.5]), rule="all", margin=0.9)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("b", "c"), ("b", "a"), ("c", "a")}


def test_only_pairs_on_which_all_agree() -> None:
    one, other = torch.tensor([1.0, 3.0, 2.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 9.0, 2.0, 1.0])
    pairs = paired(one + other, [one, other], rule="all")
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("b", "a"), ("c", "a")}


def test_a_near_miss_meets_the_prompt_s_own_picture_from_the_same_noise(tmp_path: Path) -> None:
    prompts = [Prompt("a dog", hard_negatives=("a cat", "an owl", "a cow")), Prompt("a fox")]
    write_json(tmp_path / "samples.json", {"per_prompt": 2, "prompts": []})
    assert [prompt_and_noise(prompts[0], j, 2) for j in range(5)] == [
        ("a dog", 0), ("a dog", 1), ("a cat", 0), ("an owl", 1), ("a cow", 0),
    ]  # fmt: skip
    files = [(0, image_name(0, j)) for j in (0, 1, 2, 3)] + [(1, image_name(1, j)) for j in (0, 1)]
    total = torch.tensor([3.0, 1.0, 2.0, 4.0, 0.0, 9.0])
    met_here = list(select_rows("same-noise", prompts, files, tmp_path, total))
    assert met_here == [(0, 2), (1, 3)]  # the fifth picture is not drawn yet
    pairs = list(order_pairs(files, met_here, total))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (image_name(0, 0), image_name(0, 2)),
        (image_name(0, 3), image_name(0, 1)),  # the scorer has the last word
    ]
    with pytest.raises(UserError, match="without hard negatives"):
        select_rows("same-noise", prompts[1:], files, tmp_path, total)


def test_near_misses_meet_the_prompt_s_best_pictures(tmp_path: Path) -> None:
    write_json(tmp_path / "samples.json", {"per_prompt": 3, "prompts": []})
    prompts = [Prompt("a dog", hard_negatives=("a cat", "an owl")), Prompt("a horse")]
    files = [(0, image_name(0, j)) for j in range(5)] + [(1, image_name(1, j)) for j in range(3)]
    total = torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0, 7.0, 8.0, 9.0])
    found = list(select_rows("best-hard-negative", prompts, files, tmp_path, total))
    assert found == [(1, 3), (2, 4)]
    chosen = [(pair.chosen, pair.rejected) for pair in order_pairs(files, found, total)]
    assert chosen[1] == (image_name(0, 4), image_name(0, 2))  # the scorer has the last word
    with pytest.raises(UserError, match="without hard negatives"):
        select_rows("best-hard-negative", prompts[1:], files, tmp_path, total)


def test_several_rules_put_their_pairs_together_each_once(tmp_path: Path) -> None:
    prompts = [{"prompt": "a dog", "category": "", "hard_negatives": ["a cat"]}]
    write_json(tmp_path / "samples.json", {"format": 1, "per_prompt": 3, "prompts": prompts})
    (tmp_path / "pictures").mkdir()
    for j, red in enumerate((255, 155, 55, 5)):
        Image.new("RGB", (16, 16), (red, 0, 0)).save(tmp_path / image_name(0, j))
    mine = scorer(
        tmp_path, "def score(images, prompts):\n    return [i.getpixel((0, 0))[0] for i in images]\n"
    )

    def pairs(*rules: Rule, margin: float = 0.0) -> set[tuple[int, int]]:
        count = rank_samples(tmp_path, [mine], rules=rules, margin=margin)
        lines = read_jsonl(tmp_path / "ranking.jsonl")
        assert len(lines) == count
        numbers = {image_name(0, j): j for j in range(4)}
        return {(numbers[line["chosen"]], numbers[line["rejected"]]) for line in lines}

    assert pairs("own") == {(0, 1), (0, 2), (1, 2)}
    assert pairs("same-noise") == {(0, 3)}
    assert pairs("own", "same-noise") == {(0, 1), (0, 2), (1, 2), (0, 3)}
    assert pairs("all", "own", "same-noise", "best-worst") == {(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)}
    assert pairs("own", "same-noise", margin=150) == {(0, 2), (0, 3)}


def test_warmth_is_red_minus_blue() -> None:
    from backbone.examples.warm import score

    assert score([RED, BLUE], ["", ""]) == pytest.approx([1.0, -1.0])
    grey = Image.fromarray(np.full((8, 8, 3), 77, dtype=np.uint8))
    assert score([grey], [""]) == [0.0]


def test_a_scorer_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--scorer moji is named twice"):
        rank_samples(tmp_path, ["moji", "like:dog", "moji"], weights=[1, 1, 5])


def test_a_scorer_that_tells_no_images_apart_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "samples.json", {"format": 1, "per_prompt": 2, "prompts": [{"prompt": "a dog"}]})
    (tmp_path / "pictures").mkdir()
    for j, image in enumerate((RED, BLUE)):
        image.save(tmp_path / image_name(0, j))
    for name, score in (("same", "7.0"), ("red", "one.getpixel((0, 0))[0]")):
        (tmp_path / f"{name}.py").write_text(
            f"def score(images, prompts):\n    return [{score} for one in images]"
        )
    same, red = (str(tmp_path / f"{name}.py") for name in ("same", "red"))
    assert rank_samples(tmp_path, [same, red]) == 1
    assert f"{same} gives every image the same number, 7, so it decides nothing" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"differ in score\. Take a scorer that tells them apart"):
        rank_samples(tmp_path, [same])
    with pytest.raises(UserError, match=r"by more than 999\. Lower --margin"):
        rank_samples(tmp_path, [red], margin=999)
