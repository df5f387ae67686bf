"""The console script `align`, from prompts to a comparison, on a random tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from align.cli import app
from align.pairs.read import read_preferences
from align.pairs.samples import image_name
from align.settings import WITH_BETA, read_settings
from align.training.memory import fit_to_vram
from backbone.adapters.concept import read_concept
from backbone.cli.options import list_fields
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json
from backbone.media.sources.decode import open_rgb
from backbone.models.model import Backbone
from tests.align.conftest import BRIGHT, FIVE, TRAIN, align, invoked, picture, refused, write_lines

# The journey ------------------------------------------------------------------------------------------------


def test_sampling_again_draws_nothing_new(drawn: Path, tiny_folder: Path, prompts: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.glob("pictures/*.png")}
    assert len(before) == 10
    with Image.open(drawn / "pictures/p00001-s01.png") as image:
        texts: Any = image.info
    assert texts["parameters"].startswith(f"{FIVE[1]}\nSteps: 2, Sampler: DDIM, CFG scale: ")
    assert (texts["seed"], texts["sample"], json.loads(texts["limner"])["prompt_number"]) == ("0", "1", 1)
    model = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu")
    align("sample", "--prompts", prompts, "--count", 2, "--out", drawn, "--steps", 2, *model)
    assert {path: path.stat().st_mtime_ns for path in drawn.glob("pictures/*.png")} == before


def test_a_lost_picture_is_drawn_again_and_the_others_are_left_alone(
    drawn: Path, tiny_folder: Path, prompts: Path
) -> None:
    path = drawn / "pictures/p00002-s01.png"
    others = {file: file.read_bytes() for file in path.parent.iterdir() if file != path}
    before = open_rgb(path)
    path.unlink()
    model = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu")
    align("sample", "--prompts", prompts, "--count", 2, "--out", drawn, "--steps", 2, *model)
    # It is alone in its batch now, where a processor's libraries may sum in another order
    np.testing.assert_allclose(np.asarray(open_rgb(path), dtype=int), np.asarray(before, dtype=int), atol=1)
    assert others == {file: file.read_bytes() for file in others}


def test_a_scorer_s_pairs_prefer_what_it_scores_higher(ranked: Path) -> None:
    scores = read_json(ranked / "scores.json")["scores"]
    found = read_preferences(ranked)
    assert 1 <= len(found.pairs) <= len(FIVE)
    for pair in found.pairs:
        better, worse = (next(iter(scores[f"pictures/{p.path.name}"].values())) for p in pair.pictures)
        assert better > worse


def test_a_run_is_a_concept_with_its_summary_and_its_report(run: Path, tiny_folder: Path) -> None:
    concept = read_concept(run)
    assert (concept.kind, concept.weights) == ("preference", "pytorch_lora_weights.safetensors")
    assert concept.tokens == {}
    assert (run / concept.weights).is_file()
    summary = read_json(run / "summary.json")
    assert set(summary["held_out"]) >= {"accuracy", "by_level", "winner_change", "loser_change"}
    assert summary["steps"] == 4 and summary["seconds"]["train"] > 0
    page = (run / "report.html").read_text()
    assert (
        "Accuracy, held out" in page
        and "Seen/unseen-noise gap" in page
        and "://" not in page.split("<pre>")[0]
    )
    assert read_settings(run).model == str(tiny_folder)


def test_a_run_shows_the_same_prompts_before_and_after(run: Path) -> None:
    page = (run / "report.html").read_text()
    title = page[page.index("<h1>") : page.index("</h1>")]
    assert "Diffusion-DPO on" in title and "4 steps" in title and "refresh" not in page
    before = {path.name[7:]: path.read_bytes() for path in (run / "before-and-after").glob("before-*")}
    after = {path.name[6:]: path.read_bytes() for path in (run / "before-and-after").glob("after-*")}
    assert before.keys() == after.keys() and 1 <= len(before) <= 4 and before != after
    assert page.count("<img") == 2 * len(before) and "After" not in before
    assert Image.open(run / "sheet.png").width > 256


def test_the_run_loads_in_diffusers(run: Path, tiny_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(run)
    assert pipeline.get_active_adapters()


def test_a_run_is_measured_on_its_held_out_pairs_and_on_others(run: Path, ranked: Path) -> None:
    own = align("evaluate", run, "--draws", 2)
    assert "accuracy" in own and "2 draws each" in own
    other = align("evaluate", run, ranked, "--draws", 1)
    said = invoked("evaluate", run, ranked, "--draws", 1).stderr
    assert "has learned from these" in said and f"held-out ones alone: align evaluate {run}" in said
    assert "1 draw each" in other
    assert read_json(run / "evaluation.json")["source"] == str(ranked)


def test_a_run_whose_model_was_moved_is_measured_on_pairs_of_another_which_is_said(
    run: Path, ranked: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    moved, taste, others = tmp_path / "moved", tmp_path / "taste", tmp_path / "others"
    for folder, copy in ((tiny_folder, moved), (run, taste), (ranked, others)):
        shutil.copytree(folder, copy)
    record = read_json(taste / "settings.json")
    record["settings"]["model"] = str(tmp_path / "gone")
    write_json(taste / "settings.json", record)
    drawn = read_json(others / "samples.json")
    write_json(others / "samples.json", {**drawn, "model": "sd15", "fingerprint": "0123"})
    done = invoked("evaluate", taste, others, "--draws", 1, "--model", moved)
    assert done.exit_code == 0 and "1 draw each" in done.stdout
    err = " ".join(done.stderr.split())
    assert "was drawn by sd15" in err and "say little of what it has learned" in err


def test_a_comparison_counts_wins_and_shows_pictures(
    run: Path, tiny_folder: Path, prompts: Path, bright: Path, tmp_path: Path
) -> None:
    out = tmp_path / "compare"
    same = ("--prompts", prompts, "--count", 2, "--steps", 2, "--device", "cpu", "--precision", "fp32")
    said = align(
        "compare", tiny_folder, run, *same, "--scorer", bright, "--scale", 1, "--scale", 0, "--out", out
    )
    result = read_json(out / "compare.json")
    wins = result["wins"][str(bright)]
    assert wins["tuned"]["wins"] + wins["tuned"]["ties"] + wins["tuned"]["losses"] == 10
    # Without strength: the base
    assert wins["tuned-0"]["ties"] == 10 and wins["tuned-0"]["rate"]["value"] == 0.5
    assert set(result["categories"][str(bright)]) == {"a", "the"}
    assert set(result["diversity"]) == {"base", "tuned", "tuned-0"}
    assert f"{bright}: tuned wins" in said
    assert (out / "report.html").read_text().count("<img") == len(FIVE)
    again = align(
        "compare", tiny_folder, run, *same, "--scorer", bright, "--scale", 1, "--scale", 0, "--out", out
    )
    assert again.splitlines()[0] == said.splitlines()[0]
    align("compare", tiny_folder, run, *same, "--scorer", bright, "--scale", 0, "--out", out)
    weak = read_json(out / "compare.json")
    assert weak["wins"][str(bright)] == {"tuned-0": wins["tuned-0"]}, "the same pictures, and no others"
    assert set(weak["categories"][str(bright)]) == {"a", "the"}
    assert "no strength to vary. Leave out --scale" in refused(
        "compare", run, tiny_folder, *same, "--scale", 0.5, "--out", tmp_path / "other"
    )


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.jsonl"])
def test_an_export_holds_the_same_pairs(ranked: Path, tmp_path: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in ranked.rglob("*") if path.is_file()}
    align("export", ranked, tmp_path / name)
    one, other = read_preferences(ranked), read_preferences(tmp_path / name)
    assert [pair.prompt for pair in one.pairs] == [pair.prompt for pair in other.pairs]
    assert [pair.ordered.first.read() for pair in one.pairs] == [p.ordered.first.read() for p in other.pairs]
    assert {path: path.read_bytes() for path in ranked.rglob("*") if path.is_file()} == before


def test_a_run_for_a_small_device_says_its_plan_and_one_that_fits_nowhere_is_refused(
    ranked: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    asked = ("train", ranked, "--model", tiny_folder, "--device", "cpu", *TRAIN)
    small = ("--vram", "8", "--cpu-offload", "0.5", "--text-on-cpu", "--out", tmp_path / "small")
    done = CliRunner().invoke(app, [str(word) for word in (*asked, *small)], catch_exceptions=False)
    assert done.exit_code == 0 and "8 GiB" in done.output
    kept = read_settings(tmp_path / "small")
    assert kept.cpu_offload == 0.5 and kept.text_on_cpu and (tmp_path / "small" / "summary.json").is_file()
    with pytest.raises(UserError, match="a device of"):
        fit_to_vram(Backbone.open(str(tiny_folder), device="cpu"), kept, 1e-4)


def test_several_scorers_are_weighed_or_must_agree(drawn: Path, bright: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "pairs"
    shutil.copytree(drawn, folder)
    dark = tmp_path / "dark.py"
    dark.write_text(BRIGHT.replace("return [sum", "return [-sum"))
    align("rank", folder, "--scorer", bright, "--scorer", dark, "--weight", 3, "--weight", 1, "--rule", "all")
    by_both = (folder / "ranking.jsonl").read_text()
    align("rank", folder, "--scorer", bright, "--rule", "all")
    assert [json.loads(line)["chosen"] for line in by_both.splitlines()] == [
        json.loads(line)["chosen"] for line in (folder / "ranking.jsonl").read_text().splitlines()
    ]
    assert "No two pictures" in refused("rank", folder, "--scorer", bright, "--scorer", dark, "--pareto")


def test_near_misses_are_drawn_from_the_prompt_s_own_noise_and_meet_it(
    tmp_path: Path, tiny_folder: Path, bright: Path, drawn: Path
) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pairs"
    lines = [{"prompt": "a red dog", "hard_negatives": ["a red dog", "a dog"]}, {"prompt": "a cat"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--steps", 2)
    align("sample", "--prompts", prompts, "--count", 1, "--out", folder, *model)
    own, same, other = (open_rgb(folder / image_name(0, j)).tobytes() for j in range(3))
    assert same == own  # who says the same thing draws the same picture
    assert other != own
    assert not (folder / image_name(1, 1)).exists()
    align("rank", folder, "--scorer", bright, "--pairs", "same-noise")  # as it was called
    (pair,) = read_preferences(folder).pairs
    assert {picture.path.name for picture in pair.pictures} == {"p00000-s00.png", "p00000-s02.png"}
    assert "without hard negatives" in refused("rank", drawn, "--scorer", bright, "--pairs", "same-noise")
    assert "no rule nearest" in refused("rank", drawn, "--scorer", bright, "--rule", "nearest")


def test_pictures_drawn_anew_share_the_first_one_s_layout(
    tmp_path: Path, tiny_folder: Path, prompts: Path, drawn: Path
) -> None:
    """The less is drawn anew, the nearer they stay; the first one is nobody's, and a lost one comes back as it was."""
    model = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--prompts", prompts)
    two = (*model, "--count", 2, "--steps", 10)
    distances = []
    for share in (0.1, 0.5, 1):
        folder = tmp_path / f"{share}"
        align("sample", *two, "--redraw", share, "--out", folder)
        first, second = (np.asarray(open_rgb(folder / image_name(0, j)), float) for j in (0, 1))
        distances.append(float(np.abs(first - second).mean()))
    assert 0 < distances[0] < distances[1] < distances[2]
    align("sample", *two, "--out", tmp_path / "own")
    alone = (tmp_path / "own" / image_name(0, 0)).read_bytes()
    assert (tmp_path / "0.5" / image_name(0, 0)).read_bytes() == alone
    before = (tmp_path / "0.5" / image_name(3, 1)).read_bytes()
    (tmp_path / "0.5" / image_name(3, 1)).unlink()
    align("sample", *two, "--redraw", 0.5, "--out", tmp_path / "0.5")
    assert (tmp_path / "0.5" / image_name(3, 1)).read_bytes() == before
    assert "another redraw" in refused("sample", *two, "--redraw", 0.6, "--out", tmp_path / "0.5")
    assert "redraw" not in read_json(drawn / "samples.json")["sampling"]
    few = (*model, "--steps", 2, "--redraw", 0.1, "--out", tmp_path / "few")
    assert (
        "0.1 of 2 steps is less than one step" in refused("sample", *few) and not (tmp_path / "few").exists()
    )
    single = (*model, "--count", 1, "--redraw", 0.5, "--out", tmp_path / "few")
    assert "with --count 1 there are none" in refused("sample", *single)


def test_a_near_miss_of_a_picture_drawn_anew_starts_where_that_does(
    tmp_path: Path, tiny_folder: Path
) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pairs"
    prompts.write_text(
        json.dumps({"prompt": "a red dog", "hard_negatives": ["a red dog", "a red dog", "a dog"]}) + "\n"
    )
    model = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--steps", 4)
    align("sample", "--prompts", prompts, "--count", 3, "--redraw", 0.5, "--out", folder, *model)
    pictures = [open_rgb(folder / image_name(0, j)).tobytes() for j in range(6)]
    assert pictures[3:5] == pictures[:2]  # who says the same thing draws the same picture
    assert len(set(pictures)) == 4


def test_underscores_serve_as_hyphens() -> None:
    said = refused("train", "nowhere", "--beta_dpo", 500, "--train_batch_size", 2, "--max_train_steps", 3)
    assert "nowhere does not exist" in said


# Rounds -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_what_the_model_draws_itself_goes_on_bit_for_bit(
    tmp_path: Path, tiny_folder: Path, prompts: Path, bright: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--prompts", prompts)
    how = ("--online", bright, "--rounds", 2, "--per-prompt", 2, "--sample-steps", 2, "--held-out", 0.3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    align("train", "--out", whole, *where, *how, *TRAIN)
    assert len(list((whole / "rounds").glob("*/pictures/*.png"))) == 20
    assert len(read_json(whole / "summary.json")["rewards"]) == 2

    from backbone.training import run as training_run

    steps = training_run.take_steps

    def stop_in_round_two(objective: training_run.Objective, *, until: int | None = None) -> object:
        for report in steps(objective, until=until):
            if report.step == 3:
                raise RuntimeError("killed")
            yield report

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "take_steps", stop_in_round_two)
        with pytest.raises(RuntimeError, match="killed"):
            align("train", "--out", broken, *where, *how, *TRAIN)
    align("train", "--resume", broken, "--online", bright)
    assert "accuracy" in align("evaluate", whole, "--draws", 1)  # on the last round's held-out prompts
    name = "pytorch_lora_weights.safetensors"
    assert (whole / name).read_bytes()[-4096:] == (broken / name).read_bytes()[-4096:]


@pytest.mark.parametrize("loss", ["ddpo"])
def test_a_reward_trains_without_pairs(
    tmp_path: Path, tiny_folder: Path, prompts: Path, bright: Path, loss: str
) -> None:
    out = tmp_path / "run"
    where = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--prompts", prompts)
    how = ("--online", bright, "--rounds", 2, "--per-prompt", 2, "--sample-steps", 2, "--loss-type", loss)
    done = invoked("train", "--out", out, *where, *how, "--steps", 4, "--train-batch-size", 2, "--rank", 2)
    assert f"Next: align compare {tiny_folder} {out} --prompts FILE" in done.stderr
    assert read_concept(out).weights
    assert read_json(out / "summary.json")["kind"] == "reward"
    assert "trained without pairs" in refused("evaluate", out)
    page = (out / "report.html").read_text()
    assert "Reward" in page and "DDPO on" in page and page.count("<img") == 8


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("train",), "Say what to learn from"),
        (("train", "x", "--online", "moji", "--prompts", "p.txt"), "takes no source"),
        (("train", "--online", "moji"), "Add --prompts"),
        (("train", "x", "--loss-type", "ddpo"), "Add --online"),
        (("train", "x", "--full", "--reference", "live"), "base is gone"),
        (("train", "--resume", "nowhere"), "There is no run folder nowhere"),
        (("evaluate", "nowhere"), "There is no run folder nowhere"),
        (("label", "nowhere"), "There is no folder nowhere"),
        (("rank", "nowhere"), "There is no folder nowhere"),
        (("check", "nowhere"), "does not exist"),
        (("export", "nowhere", "out.csv"), r"\.parquet or a \.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_answered_by_a_sentence(arguments: tuple[str, ...], complaint: str) -> None:
    import re

    assert re.search(complaint, refused(*arguments))


def bad_sources(folder: Path) -> dict[str, tuple[Path, str]]:
    """Sources that cannot be learned from, and a word of the answer."""
    for name in ("a.png", "b.png", "c.png", "d.png"):
        picture(ord(name[0])).save(folder / name)
    picture(9, (64, 96)).save(folder / "tall.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    good: dict[str, object] = {"prompt": "a dog", "chosen": "a.png", "rejected": "b.png"}
    tie: dict[str, object] = {"prompt": "a dog", "image_0": "a.png", "image_1": "b.png", "label_0": 0.5}
    rows: dict[str, tuple[list[dict[str, object]], str]] = {
        "missing": ([good, {**good, "rejected": "gone.png"}], "gone.png"),
        "corrupt": ([good, {**good, "chosen": "broken.png"}], "broken.png"),
        "ties": ([tie, {**tie, "prompt": "a cat"}], "are ties"),
        "one label": ([{"prompt": "a dog", "image": "a.png", "label": 1}], "labelled good"),
        "empty caption": ([good, {**good, "prompt": "  "}], "has no prompt"),
        "sizes": ([good, {**good, "rejected": "tall.png"}], "different sizes"),
    }
    found = {}
    for name, (lines, word) in rows.items():
        found[name] = (write_lines(folder / f"{name}.jsonl", lines), word)
    import pyarrow
    import pyarrow.parquet

    table = folder / "columns.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a"], "jpg_0": [b""]}), table)
    found["columns"] = (table, "has the columns")
    return found


@pytest.mark.parametrize("loss", WITH_BETA)
def test_what_would_learn_nothing_is_refused(tmp_path: Path, loss: str) -> None:
    assert f"With --beta 0 {loss} compares nothing" in refused("train", tmp_path, "--loss", loss, "--beta", 0)
    assert "--lora-alpha is 0" in refused("train", tmp_path, "--loss", loss, "--lora-alpha", 0)


def test_check_says_what_train_learns_from(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three choices, a tie and a row without a label, of five prompts."""
    rows: list[dict[str, object]] = []
    for number, label in enumerate((1, 0, 1, 0.5, 0.5)):
        for side in range(2):
            picture(2 * number + side).save(tmp_path / f"{2 * number + side}.png")
        images = {"image_0": f"{2 * number}.png", "image_1": f"{2 * number + 1}.png"}
        rows.append({"prompt": FIVE[number], **images, "label_0": label, "has_label": number < 4})
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    done = CliRunner().invoke(app, ["check", str(pairs), "--json"])
    said = json.loads(done.stdout)
    assert (said["train"], said["held_out"], said["without_label"]) == (2, 1, 1)
    assert "train on 2 pairs of 2 prompts and hold out 1 pair of 1 prompt." in done.stderr
    where = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--out", tmp_path / "run")
    done = CliRunner().invoke(app, list(map(str, ("train", pairs, *where, "--steps", 1, *TRAIN[2:]))))
    assert "Learning from 2 pairs of 2 prompts; held out: 1 pair of 1 prompt." in done.stderr


@pytest.mark.parametrize(
    "name", ["missing", "corrupt", "ties", "one label", "empty caption", "sizes", "columns"]
)
def test_bad_pairs_are_refused_before_any_model_is_opened_and_never_touched(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*arguments: object, **named: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(Backbone, "open", no)
    source, word = bad_sources(tmp_path)[name]
    before = source.read_bytes()
    for command in (("train", source, "--out", tmp_path / "run"), ("check", source)):
        assert word in refused(*command)
    assert source.read_bytes() == before
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    bad_sources(tmp_path)
    good: dict[str, object] = {"prompt": "a dog", "chosen": "a.png", "rejected": "b.png"}
    rows: list[dict[str, object]] = [good, {**good, "chosen": "gone.png"}, {**good, "prompt": ""}]
    said = refused("check", write_lines(tmp_path / "many.jsonl", rows))
    assert "gone.png" in said and "line 3" in said and "2 problems" in said


def test_pairs_of_another_model_are_refused(ranked: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_pipeline

    other = tiny_pipeline(tmp_path / "other", seed=5)
    said = refused("train", ranked, "--model", other, "--out", tmp_path / "run", *TRAIN)
    assert "other weights" in said and "--any-model" in said
    assert not (tmp_path / "run").exists()


def test_a_taken_run_folder_is_kept(run: Path, ranked: Path, tiny_folder: Path) -> None:
    before = (run / "settings.json").read_bytes()
    assert "--resume" in refused("train", ranked, "--model", tiny_folder, "--out", run)
    assert (run / "settings.json").read_bytes() == before


def test_pictures_drawn_in_another_way_are_not_mixed(drawn: Path, tiny_folder: Path, prompts: Path) -> None:
    model = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu")
    said = refused(
        "sample", "--prompts", prompts, "--count", 2, "--out", drawn, "--steps", 2, "--seed", 9, *model
    )
    assert "another seed" in said


def test_a_mistake_ends_the_script_with_exit_code_2_and_without_torch(tmp_path: Path) -> None:
    source = bad_sources(tmp_path)["missing"][0]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "align.cli", "train", str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said[0].startswith("Error:") and "Traceback" not in done.stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "torch" not in imported


def test_every_setting_can_be_said_on_the_command_line() -> None:
    """So that the command which a run writes down repeats it."""
    import dataclasses

    import typer

    from align.settings import Settings

    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    for field in dataclasses.fields(Settings):
        flag = list_fields(Settings)[field.name].flag
        assert {field.name, flag} & known, field.name


# Results as JSON ----------------------------------------------------------------------------------------------


def test_results_are_json_and_nothing_else_is_on_stdout(
    run: Path, ranked: Path, tiny_folder: Path, prompts: Path, bright: Path, tmp_path: Path
) -> None:
    checked = json.loads(align("check", ranked, "--json"))
    assert checked["records"] == checked["pairs"] == checked["train"] + checked["held_out"] > 0
    evaluated = json.loads(align("evaluate", run, "--draws", 1, "--json"))
    assert evaluated["source"] == "held out" and "value" in evaluated["accuracy"]
    model = ("--steps", 2, "--precision", "fp32", "--device", "cpu")
    words = ("--prompts", "a red dog", "--prompts", "the cat", "--prompts", "a red dog", "--count", 1)
    out = tmp_path / "drawn"
    drawn = json.loads(align("sample", *words, "--model", tiny_folder, *model, "--out", out, "--json"))
    assert (drawn["images"], drawn["new"]) == (2, 2), "a prompt that is given twice is drawn once"
    assert [one["prompt"] for one in drawn["prompts"]] == ["a red dog", "the cat"]
    sides = ("compare", tiny_folder, run, *words, *model, "--scorer", bright, "--out", tmp_path / "c")
    compared = json.loads(align(*sides, "--json"))
    assert compared["wins"][str(bright)]["tuned"]["gain"]["value"] is not None
    assert compared == {**read_json(tmp_path / "c" / "compare.json")}


def test_one_image_of_a_prompt_and_a_token_of_no_concept_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    how = ("--prompts", "a [V] dog", "--model", tiny_folder, "--steps", 1, "--device", "cpu")
    said = invoked("sample", *how, "--count", 1, "--out", tmp_path / "one").output
    assert "“[V]” in a prompt is read as plain text: no --concept is given" in said
    assert "there is nothing to choose between: draw more with --count" in said and "Next:" not in said
    for other in (("--count", 2), ("--count", 1, "--seed", 3)):
        name = str(other[-2])[2:]
        assert f"begun with another {name}." in refused("sample", *how, *other, "--out", tmp_path / "one")


def test_a_comparison_in_another_size_and_with_words_for_prompts(
    run: Path, tiny_folder: Path, bright: Path, tmp_path: Path
) -> None:
    how = ("--prompts", "a red dog", "--count", 1, "--steps", 2, "--device", "cpu", "--precision", "fp32")
    sides = ("compare", tiny_folder, run, *how, "--scorer", bright)
    align(*sides, "--width", 96, "--out", tmp_path / "c")
    assert open_rgb(tmp_path / "c/base/p00000-s00.png").size == (96, 64)
    assert "drawn in another way" in refused(*sides, "--out", tmp_path / "c")
    assert "--model has no effect where two models" in refused(
        "compare", tiny_folder, tiny_folder, *how, "--model", tiny_folder, "--out", tmp_path / "d"
    )
    assert "the width is 90" in refused(*sides, "--width", 90, "--out", tmp_path / "d")
    assert "--user has no effect without --blind" in refused(*sides, "--user", "me", "--out", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_folder_knows_how_strong_its_concepts_were(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    how = ("--prompts", "a red dog", "--count", 1, "--steps", 2, "--device", "cpu", "--precision", "fp32")
    ours = ("sample", *how, "--concept", run, "--out", tmp_path / "drawn")
    align(*ours, "--scale", 0.5)
    assert "another concepts" in refused(*ours)
    assert "--scale has no effect without --concept" in refused(
        "sample", *how, "--scale", 2, "--out", tmp_path / "d"
    )


def test_a_run_s_record_is_a_config_of_it(run: Path, tmp_path: Path) -> None:
    align("train", "--config", run / "settings.json", "--out", tmp_path / "again")
    kept, again = (read_settings(folder) for folder in (run, tmp_path / "again"))
    assert kept == again
