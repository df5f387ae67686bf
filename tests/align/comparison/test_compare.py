"""Comparisons: how wins are counted, by scorers and by a person who does not know whose picture is whose."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from align.collect.label import server
from align.collect.label.session import Session
from align.comparison.blind import (
    format_blind_result,
    iterate_blind_pairs,
    summarize_choices,
    write_blind_result,
)
from align.comparison.compare import OpenedSide, _claim_folder, count_wins
from align.comparison.sides import Side, find_training_scorers
from align.pairs.choices import CHOICES, Choice, append_entry
from align.settings import Settings
from backbone.adapters.concept import Concept
from backbone.cli.sampling import SamplingSettings
from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors, write_json, write_tensors
from backbone.io.prompts import Prompt
from backbone.models.model import Backbone
from tests.align.conftest import align, refused

ALIGNED = {"command": "align train pairs"}  # of a run's record
KEYS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_ties_count_half_and_are_stated() -> None:
    wins = count_wins(torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([2.0, 0.5, 1.0, 1.0]), KEYS)
    assert (wins.wins, wins.ties, wins.losses) == (1, 2, 1)
    assert wins.rate.value == 0.5
    assert wins.gain.value == pytest.approx(0.125)


def test_a_difference_within_the_tie_is_none() -> None:
    wins = count_wins(torch.zeros(4), torch.tensor([0.1, 0.1, -0.1, 0.3]), KEYS, tie=0.15)
    assert (wins.wins, wins.ties, wins.losses) == (1, 3, 0)


def test_models_that_draw_the_same_are_even() -> None:
    wins = count_wins(torch.ones(4), torch.ones(4), KEYS)
    assert wins.rate.value == 0.5 and wins.gain == (0.0, 0.0, 0.0)


def test_images_drawn_with_another_early_scale_of_the_model_are_not_gone_on_with(
    tiny: Backbone, tmp_path: Path
) -> None:
    side = Side(str(tmp_path / "run"), tiny.location.name, (tmp_path / "run",))
    concept = Concept("lora", tiny.location.name, tiny.fingerprint, {}, "", folder=tmp_path / "run")
    sampling = SamplingSettings(steps=2, guidance=2.0, sampler="ddim")
    tiny.defaults = {**tiny.defaults, "early_scale": 0.5}
    opened = OpenedSide(side, tiny, [concept])
    for _ in range(2):
        _claim_folder(tmp_path / "tuned", opened, [Prompt("a dog")], sampling)
    tiny.defaults = {**tiny.defaults, "early_scale": 1.0}
    with pytest.raises(UserError, match="drawn in another way"):
        _claim_folder(tmp_path / "tuned", opened, [Prompt("a dog")], sampling)


def test_a_run_stands_on_the_concepts_that_it_was_trained_on(tmp_path: Path) -> None:
    below, taste = tmp_path / "dog", tmp_path / "taste"
    for folder in (below, taste):
        Concept("lora", "moji", "f", {}, "").write(folder)
    write_json(taste / "settings.json", {**ALIGNED, "settings": Settings(pairs="p", concepts=(str(below),))})
    assert Side.from_name(str(taste)).concepts == (below, taste)
    assert Side.from_name(str(below)).concepts == (below,)
    assert Side.from_name("moji").concepts == ()
    moved = Side.from_name(str(taste), "there")
    assert (moved.model, moved.concepts) == ("there", (below, taste))


def test_a_run_of_customize_that_has_evaluated_is_a_side_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "dog"
    for folder in (run, run / "best"):
        Concept("lora", "moji", "f", {"[V]": "bcd"}, "dog").write(folder)
    write_json(
        run / "settings.json", {"command": "customize train --images dog", "settings": {"images": "dog"}}
    )
    (run / "evaluations.jsonl").write_text('{"step": 0}\n')
    side = Side.from_name(str(run))
    assert (side.model, side.concepts) == ("moji", (run,))
    assert find_training_scorers(side) == set()
    assert f"its best checkpoint is {run / 'best'}" in capsys.readouterr().err


def test_a_taken_port_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, out = taken.getsockname()[1], tmp_path / "out"
        words = ("--prompts", "a dog", "--blind", "--port", port, "--out", out)
        assert f"Port {port} cannot be used" in refused("compare", "moji", "moji", *words)
    assert not out.exists()


def test_a_scorer_that_chose_the_pairs_is_named(tmp_path: Path) -> None:
    pairs, taste = tmp_path / "pairs", tmp_path / "taste"
    pairs.mkdir()
    Concept("preference", "moji", "f", {}, "").write(taste)
    write_json(taste / "settings.json", {**ALIGNED, "settings": Settings(pairs=str(pairs))})
    assert find_training_scorers(Side.from_name(str(taste))) == set()
    write_json(pairs / "scores.json", {"scorers": ["moji"], "scores": {}})
    assert find_training_scorers(Side.from_name(str(taste))) == {"moji"}
    online = Settings(pairs="", online="mine.py", reference="live", prompts="p.txt")
    write_json(taste / "settings.json", {**ALIGNED, "settings": online})
    assert find_training_scorers(Side.from_name(str(taste))) == {"mine.py"}
    assert find_training_scorers(Side.from_name("moji")) == set()


def test_a_person_s_choices_are_counted_for_the_tuned_side(tmp_path: Path) -> None:
    pairs = list(iterate_blind_pairs([Prompt("a dog"), Prompt("a cat")], 2))
    assert len(pairs) == 4
    for number, ((name, prompt, base, tuned), verdict) in enumerate(
        zip(pairs, ("left", "right", "tie", "both_bad"), strict=True)
    ):
        left, right = (tuned, base) if number % 2 == 0 else (base, tuned)
        append_entry(tmp_path / CHOICES, Choice(number, name, prompt, left, right, verdict))
    found = summarize_choices(tmp_path)
    assert (found["wins"], found["losses"], found["ties"], found["both_bad"]) == (2, 0, 1, 1)
    assert found["rate"]["value"] == 0.75
    assert "tuned wins 75.0%" in format_blind_result(write_blind_result(tmp_path))
    assert read_json(tmp_path / "blind.json")["wins"] == 2


def answers_everything(session: Session, *, port: int, browser: bool) -> None:
    """In the place of the page: somebody who always prefers the left picture."""
    while (question := session.question) is not None:
        session.answer(question.number, "left")


def test_labels_from_the_door_are_pairs_to_train_on(
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    from align.pairs.read import read_preferences

    folder = tmp_path / "pairs"
    shutil.copytree(drawn, folder, ignore=shutil.ignore_patterns("ranking.jsonl", "scores.json"))
    assert "no preferences yet" in refused("check", folder)
    monkeypatch.setattr(server, "serve", answers_everything)
    align("label", folder, "--user", "ann")
    assert len(read_preferences(folder, user="ann").pairs) == 5
    align("check", folder)


def test_a_blind_comparison_from_the_door(
    run: Path,
    tiny_folder: Path,
    prompts: Path,
    bright: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "serve", answers_everything)
    how = ("--prompts", prompts, "--count", 1, "--steps", 2, "--device", "cpu", "--precision", "fp32")
    said = align("compare", tiny_folder, run, *how, "--scorer", bright, "--out", tmp_path / "c", "--blind")
    assert "blind: tuned wins" in said and "of 5 pictures" in said
    both = ("--out", tmp_path / "c2", "--blind", "--json")
    found = json.loads(align("compare", tiny_folder, run, *how, "--scorer", bright, *both))
    stored = {name: read_json(tmp_path / "c2" / f"{name}.json") for name in ("compare", "blind")}
    assert found == {**stored["compare"], "blind": stored["blind"]} and found["blind"]["rate"]["value"] >= 0


def test_training_on_top_of_a_run_and_comparing_with_it(
    run: Path,
    ranked: Path,
    prompts: Path,
    bright: Path,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "second"
    where = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--held-out", 0.3)
    align("train", ranked, "--concept", run, "--out", out, *where, "--steps", 2, "--rank", 2, "--draws", 2)
    how = ("--prompts", prompts, "--count", 1, "--steps", 2, "--device", "cpu", "--precision", "fp32")
    said = align("compare", run, out, *how, "--scorer", bright, "--out", tmp_path / "c")
    assert "tuned wins" in said
    assert "accuracy" in align("evaluate", out, "--draws", 1)
    assert "strength is not one number" in refused(
        "compare", run, out, *how, "--scorer", bright, "--scale", 0.5, "--out", tmp_path / "d"
    )


def test_all_weights_are_trained_kept_and_measured(
    ranked: Path,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "full"
    where = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--held-out", 0.3, "--full")
    align("train", ranked, "--out", out, *where, "--steps", 2, "--draws", 2, "--learning-rate", 1e-4)
    before = read_json(out / "summary.json")["held_out"]["winner_change"]
    align("evaluate", out, "--draws", 4)
    after = read_json(out / "evaluation.json")["winner_change"]
    assert before != 0 and after != 0

    # Images of these weights are not taken for those of others, which have the run's name later on
    how = ("--prompts", "a red dog", "--count", 2, "--steps", 1, *where[2:6])
    compared = ("compare", tiny_folder, out, *how, "--out", tmp_path / "compared")
    sampled = ("sample", *how, "--concept", out, "--out", tmp_path / "sampled")
    for command in (compared, sampled):
        align(*command)
        align(*command)
    (changed,) = out.glob("weights_change*.safetensors")
    tensors, metadata = read_tensors(changed)
    write_tensors(changed, {name: 2 * value for name, value in tensors.items()}, metadata)
    assert "drawn in another way" in refused(*compared)
    assert "begun with another concepts" in refused(*sampled)


def test_a_scorer_that_is_none_is_refused_before_anything_is_drawn(
    run: Path,
    tiny_folder: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    said = refused(
        "compare", tiny_folder, run, "--prompts", prompts, "--scorer", "nobody", "--out", tmp_path / "c"
    )
    assert "no scorer nobody" in said
    assert not (tmp_path / "c").exists()


def test_a_comparison_that_was_drawn_in_another_way_is_not_gone_on_with(tmp_path: Path) -> None:
    write_json(tmp_path / "base" / "drawn.json", {"model": "other"})
    from align.comparison.compare import compare_models
    from align.settings import ComparisonSettings

    with pytest.raises(UserError, match="another --out"):
        compare_models(
            Side("moji", "moji"),
            Side("moji", "moji", guidance=2.0),
            [Prompt("a dog")],
            tmp_path,
            ComparisonSettings(),
        )


def test_a_side_is_not_compared_with_itself(tmp_path: Path) -> None:
    from align.comparison.compare import compare_models
    from align.settings import ComparisonSettings

    usual = Backbone.open("moji", device="cpu").defaults["guidance"]
    for guidance in (None, usual):
        tuned = Side("moji", "moji", guidance=guidance)
        with pytest.raises(UserError, match=r"Both sides are moji .* every image would be a tie"):
            compare_models(Side("moji", "moji"), tuned, [Prompt("a dog")], tmp_path, ComparisonSettings())
    assert not list(tmp_path.iterdir())


def test_a_run_beside_another_model_than_it_was_trained_from_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from align.comparison.compare import OpenedSide, _say_of_another_model

    moji, flow = (Backbone.open(name, device="cpu") for name in ("moji", "moji-flow"))
    concept = Concept("lora", "moji", moji.fingerprint, {}, "")
    tuned = OpenedSide(Side("run", "moji", (tmp_path,)), moji, [concept])
    _say_of_another_model(OpenedSide(Side("moji", "moji"), moji, []), tuned)
    assert not capsys.readouterr().err
    _say_of_another_model(OpenedSide(Side("moji-flow", "moji-flow"), flow, []), tuned)
    assert "run was trained from moji, and moji-flow is another model" in capsys.readouterr().err


def test_each_side_can_have_its_own_guidance(
    run: Path, tiny_folder: Path, prompts: Path, bright: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    how = ("--prompts", prompts, "--count", 1, "--steps", 2, "--device", "cpu", "--precision", "fp32")
    align(
        "compare", tiny_folder, run, *how, "--scorer", bright, "--guidance", 3, "--tuned-guidance", 1.5, "--out", out
    )  # fmt: skip
    drawn = {side: read_json(out / side / "drawn.json")["sampling"]["guidance"] for side in ("base", "tuned")}
    assert drawn == {"base": 3.0, "tuned": 1.5}
    assert read_json(out / "compare.json")["tuned"]["guidance"] == 1.5
    assert "guidance 3 (the tuned side 1.5)" in (out / "report.html").read_text()


def test_a_side_can_follow_its_guidance_in_some_steps_only(
    run: Path, tiny_folder: Path, prompts: Path, bright: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    how = ("--prompts", prompts, "--count", 1, "--steps", 2, "--device", "cpu", "--precision", "fp32")
    asked = ("compare", tiny_folder, run, *how, "--scorer", bright, "--guidance", 3, "--out", out)
    align(*asked, "--tuned-guidance-start", 0.5)
    drawn = {side: read_json(out / side / "drawn.json")["sampling"] for side in ("base", "tuned")}
    assert "guidance_start" not in drawn["base"], "guidance in all steps goes without saying"
    assert (drawn["tuned"]["guidance_start"], drawn["tuned"]["guidance_stop"]) == (0.5, 1.0)
    assert "guidance 3 (the tuned side 3 from 50% to 100% of the steps)" in (out / "report.html").read_text()
    assert "another --out" in refused(*asked, "--guidance-start", 0.5, "--tuned-guidance-start", 0)
    nowhere = tmp_path / "nowhere"
    said = refused(
        "sample", "--prompts", prompts, "--guidance-start", 0.5, "--guidance-stop", 0.2, "--out", nowhere
    )
    assert "no share of them" in said and not nowhere.exists()


def test_a_comparison_replaces_no_other_folder_s_report(tmp_path: Path) -> None:
    from align.comparison.compare import compare_models
    from align.settings import ComparisonSettings

    (tmp_path / "report.html").write_text("of a run")
    with pytest.raises(UserError, match="is not empty"):
        compare_models(
            Side("moji", "moji"),
            Side("moji", "moji", guidance=2.0),
            [Prompt("a dog")],
            tmp_path,
            ComparisonSettings(),
        )


def test_a_comparison_goes_on_where_one_side_alone_was_drawn(tmp_path: Path) -> None:
    """As where images of the tuned side are taken over from another comparison: a recipe does so."""
    from align.comparison.compare import compare_models
    from align.settings import ComparisonSettings

    write_json(tmp_path / "tuned" / "drawn.json", {"model": "other"})
    sides = (Side("moji", "moji"), Side("moji", "moji", guidance=2.0))
    with pytest.raises(UserError, match="drawn in another way"):  # and not: is not empty
        compare_models(*sides, [Prompt("a dog")], tmp_path, ComparisonSettings())
