"""MojiEdit: its cases are true edits, its classifier is read rightly, and a small one runs through."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from backbone.io.console import UserError
from backbone.io.files import write_json, write_tensors
from backbone.models.model import Backbone
from backbone.world.scene import BENCHMARK_SEEDS, is_fair
from benchmarks.edit import scenes as benchmark
from benchmarks.edit.scenes import KINDS, Case, EditBenchmark, compare_paired, is_success, make_cases
from benchmarks.judges.classifier import FACTS, TWO_DIFFERENT, WEIGHTS, Network, Prediction, list_labels


def of_kind(kind: str) -> Case:
    return next(case for case in make_cases(len(KINDS)) if case.kind == kind)


def reading(label: str, head: str, *, share: float = 0.9) -> dict[str, float]:
    """A head that says this label first."""
    return {label: share} | {other: 0.0 for other in list_labels()[head] if other != label}


def seen(case: Case, **other: dict[str, float]) -> Prediction:
    """What a perfect classifier sees in the true edit."""
    scene, thing = case.after, case.after.things[case.thing or 0]
    nouns = [one.noun for one in scene.things]
    glyphs = {noun: 1 / len(nouns) for noun in nouns} | {
        label: 0.0 for label in list_labels()["glyphs"] if label not in nouns
    }
    heads = {
        "glyphs": glyphs,
        "place": reading(scene.place, "place"),
        "colour": reading(thing.colour or "none", "colour"),
        "accessory": reading(thing.accessory or "none", "accessory"),
        "style": reading(scene.style or "none", "style"),
        "count": reading(TWO_DIFFERENT if len(nouns) == 2 else "one", "count"),
        "size": reading("usual", "size"),
    }
    return Prediction(**{**heads, **other})


def test_every_kind_comes_in_turn_from_seeds_that_nothing_was_trained_on() -> None:
    cases = list(make_cases(24))
    assert [case.kind for case in cases] == list(KINDS) * 3
    assert len({case.before.seed for case in cases}) == 24
    for case in cases:
        assert case.before.seed in BENCHMARK_SEEDS and is_fair(case.before) and is_fair(case.after)
        assert (case.source == case.target) is (case.kind == "reweight")


def test_an_edit_changes_its_own_aspect_alone() -> None:
    for case in make_cases(40):
        before, after = case.before, case.after
        if case.kind == "place":
            assert after == replace(before, place=after.place)
        elif case.kind == "style":
            assert before.style is None and after == replace(before, style=after.style)
        else:
            assert after == replace(before, things=after.things)
            assert case.thing is not None
            kept = [thing for k, thing in enumerate(before.things) if k != case.thing]
            assert kept == [thing for k, thing in enumerate(after.things) if k != case.thing]


@pytest.mark.font
def test_outside_the_mask_the_true_edit_is_the_source() -> None:
    for case in islice(make_cases(40), 40):
        before, after, changed = case.rendered()
        assert (changed is None) is (case.kind == "style")
        if changed is not None and case.kind != "place":
            kept = np.asarray(changed) == 0
            assert kept.mean() > 0.2
            difference = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int)).max(-1)
            assert difference[kept].max() <= 24
        if case.kind == "place":
            assert changed is not None
            assert 0.01 < (np.asarray(changed) == 0).mean() < 0.6, "the thing is what must stay"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reweight"])
def test_the_true_edit_succeeds_and_the_source_does_not(kind: str) -> None:
    case = of_kind(kind)
    untouched = replace(case, after=case.before)
    assert is_success(case, [seen(case)])
    assert not is_success(case, [seen(untouched)])


def test_a_reweight_succeeds_when_the_colour_grows() -> None:
    case = of_kind("reweight")
    colour = case.after.things[0].colour
    assert colour is not None

    def with_shares(*shares: float) -> list[Prediction]:
        return [
            seen(case, colour={**dict.fromkeys(list_labels()["colour"], 0.0), colour: share})
            for share in shares
        ]

    assert is_success(case, with_shares(0.1, 0.5, 0.9))
    assert not is_success(case, with_shares(0.1, 0.1, 0.9))
    assert not is_success(case, with_shares(0.9, 0.5, 0.1))


def test_pairs_are_compared_on_the_same_scenes() -> None:
    def row(method: str, number: int, success: bool, decibels: float | None) -> dict[str, Any]:
        return {
            "method": method,
            "number": number,
            "success": success,
            "kind": "noun",
            "background_psnr_db": decibels,
        }

    rows = [row("a", k, True, 20.0 + k) for k in range(4)] + [row("b", k, k < 2, 18.0 + k) for k in range(4)]
    found = compare_paired([*rows, row("a", 9, False, 0.0)], "a", "b")
    assert found is not None and found["n"] == 4
    assert found["success"][0] == 0.5
    assert found["background_psnr_db"] == (2.0, 2.0, 2.0)
    assert compare_paired(rows, "a", "c") is None


@pytest.mark.font
def test_a_small_one_runs_through(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = list_labels()
    torch.manual_seed(0)
    network = Network({head: len(names) for head, names in labels.items()})
    kept = {name: value for name, value in network.state_dict().items() if not name.endswith("_tracked")}
    write_tensors(tmp_path / "classifier" / WEIGHTS, kept)
    write_json(tmp_path / "classifier" / FACTS, {"labels": labels})
    options: dict[str, Any] = {
        "count": 8, "model": str(tiny_folder), "steps": 2, "guidance": 2.0, "identity": 1, "device": "cpu",
        "precision": "fp32", "classifier": tmp_path / "classifier", "out": tmp_path / "out",
    }  # fmt: skip
    benchmark.main(EditBenchmark(methods=("the default", "DDIM + P2P", "no edit"), **options))
    assert "| the default | all | 8 |" in capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {line["kind"] for line in table["summary"]} == {*KINDS, "all"}
    still = next(line for line in table["summary"] if (line["method"], line["kind"]) == ("no edit", "noun"))
    assert still["background_psnr_db"] == pytest.approx(100) and still["structure_distance"] is None
    assert table["identity_edit"].keys() == {*benchmark.IDENTITY, "the autoencoder alone"}
    assert (tmp_path / "out" / "sheet.png").exists()
    pictures = tmp_path / "out" / "pictures"
    made = {file: file.stat().st_mtime_ns for file in pictures.rglob("*.png")}
    (pictures / "ddim-p2p" / "003.json").unlink()  # as if it had been killed there
    again = pictures / "ddim-p2p" / "003-0.png"
    before = again.read_bytes()
    again.unlink()
    benchmark.main(EditBenchmark(methods=("DDIM + P2P",), **options))
    now = {file: file.stat().st_mtime_ns for file in pictures.rglob("*.png")}
    assert {file for file in made if now[file] != made[file]} == {again} and again.read_bytes() == before
    renewed = json.loads((tmp_path / "out" / "table.json").read_text())
    figures = [[{**line, "seconds": 0} for line in found["summary"]] for found in (table, renewed)]
    assert figures[0] == figures[1], "every method on disk is in the tables"
    changed = benchmark.Work(
        tmp_path / "out", Backbone.open(str(tiny_folder)), benchmark.SharedSettings(3, 2.0)
    )
    assert changed.read("DDIM + P2P", 3, list(make_cases(8))[3]) is None, "made for other steps"
    with pytest.raises(UserError, match="no method other"):
        benchmark.main(EditBenchmark(methods=("other",), **options))


@pytest.mark.font
@pytest.mark.parametrize("count", [1, 3])
def test_an_odd_number_of_scenes_fits_on_a_sheet_of_pairs(tiny: Backbone, tmp_path: Path, count: int) -> None:
    work = benchmark.Work(tmp_path, tiny, benchmark.SharedSettings(2, None))
    cases = list(make_cases(count))
    benchmark.save_sheet(tmp_path / "sheet.png", work, cases, [], [benchmark.DEFAULT])
    assert (tmp_path / "sheet.png").exists()


def test_the_published_method_changes_the_edited_things_place() -> None:
    assert benchmark.blend_words(of_kind("place")) == benchmark.blend_words(of_kind("style")) == ()
    noun, colour = of_kind("noun"), of_kind("colour")
    assert benchmark.blend_words(noun) == (noun.before.things[0].noun, noun.after.things[0].noun)
    assert benchmark.blend_words(colour) == (colour.before.things[0].noun,)


def test_every_method_of_the_benchmark_has_a_name_once(tiny: Backbone) -> None:
    names = list(benchmark.list_methods())
    assert names[0] == benchmark.DEFAULT and set(benchmark.RIVALS) | {"no edit", "resample"} <= set(names)


@pytest.mark.font
def test_an_instruction_in_place_of_the_prompts_costs_three_evaluations_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tiny import tiny_instruct_pix2pix

    monkeypatch.setattr(benchmark, "INSTRUCTED_STEPS", 2)
    methods = benchmark.list_instructed(str(tiny_instruct_pix2pix(tmp_path / "editor")), "cpu", "fp32")
    assert [*methods] == ["by instruction", "by instruction, as drawn"]
    work = benchmark.Work(tmp_path, cast(Backbone, None), benchmark.SharedSettings(50, None))
    cases = [of_kind(kind) for kind in ("colour", "style", "reweight")]
    colour, style, reweight = methods["by instruction"](work, cases)
    assert colour is not None and style is not None and reweight is None
    assert colour.evaluations == style.evaluations == 6 and len(colour.pictures) == 1
