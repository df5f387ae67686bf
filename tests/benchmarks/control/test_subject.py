"""The benchmark of learned subjects under maps: what is drawn, and how it is added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backbone.adapters.concept import Concept
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.models.model import Backbone
from backbone.world.concepts import TRAINING_PLACES
from backbone.world.rendering.render import SIZE
from backbone.world.scene import sample_posed_scene
from benchmarks.control import subject as bench
from benchmarks.control.scenes import BOUND, FLOOR, PoseError
from benchmarks.control.subject import (
    FIRST_SEED,
    ImageReading,
    SubjectSettings,
    format_table,
    is_whole,
    make_cases,
)
from benchmarks.customize.concepts import DEFAULT, Trial
from customize.formats.write import write_adapter
from tests.benchmarks.customize.test_concepts import Eye
from tests.customize.adapters import modules_of, random_adapter, whole_pipeline
from tests.tiny import tiny_moji

TRIAL = Trial("mammoth", DEFAULT, "")
HELD = PoseError(2.0, 0.05, 4.0, True, False)


def write_run(folder: Path, model: Path) -> Path:
    """A run with random weights, as `customize train` leaves one."""
    modules = {name: one for name, one in modules_of(whole_pipeline(model)).items() if "attn2.to_q" in name}
    folder.mkdir(parents=True)
    write_adapter(folder / LORA_WEIGHTS, random_adapter(modules, seed=0), "peft", metadata={})
    fingerprint = Backbone.open(str(model)).fingerprint
    Concept("lora", str(model), fingerprint, {"[V]": "bcd"}, "elephant", LORA_WEIGHTS).write(folder)
    (folder / "README.md").touch()
    return folder


def of(concept: str, *glyphs: bool, edges: float | None = 0.5) -> list[ImageReading]:
    return [ImageReading(concept, glyph, True, edges, HELD) for glyph in glyphs]


def test_the_table_pairs_every_image_with_the_one_without_a_map() -> None:
    found = {
        FLOOR: [*of("mammoth", True, True, edges=0.25), *of("canoe", True, False, edges=0.25)],
        "sketch": [*of("mammoth", True, False), *of("canoe", False, False)],
        "sketch of the class": [*of("mammoth", True, True, edges=None), *of("canoe", True, True, edges=None)],
        BOUND: [*of("mammoth", True, True), *of("canoe", True, True)],
    }
    lines = format_table(found).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "| sketch | -50.0 (-100.0 to +0.0) | +0.0 (+0.0 to +0.0) | +0.25 (+0.25 to +0.25) |" in lines
    assert any(line.startswith("| sketch of the class | +25.0") and line.endswith("| – |") for line in lines)
    assert not any(line.startswith((f"| {FLOOR} | +", f"| {BOUND} | +")) for line in lines)
    assert rows["mammoth"] == "| mammoth | 100.0 % | 50.0 % | 100.0 % | 100.0 % |"
    sketch = next(line for line in lines if line.startswith("| sketch |")).split("|")
    assert sketch[2].strip().startswith("25.0 %") and sketch[3].strip() == "0.0–50.0 %"
    assert [cell.strip() for cell in sketch[7:10]] == ["2.0", "5%", "4°"]


def test_things_that_reach_beyond_the_picture_or_are_small_are_left_out() -> None:
    scenes = list(filter(is_whole, map(sample_posed_scene, range(FIRST_SEED, FIRST_SEED + 200))))
    assert 20 < len(scenes) < 150
    for scene in scenes:
        (pose,) = scene.poses or ()
        assert pose.size > 45 and pose.x - pose.size / 2 >= 0 and pose.foot <= SIZE


def test_a_concept_that_is_none_and_a_kind_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no concept dodo"):
        bench.main(SubjectSettings(concepts=("dodo",), out=tmp_path))
    with pytest.raises(UserError, match="scribble"):
        SubjectSettings(kinds=("scribble",))


@pytest.mark.font
def test_concepts_stand_where_they_were_not_learned_and_each_is_held_otherwise() -> None:
    cases, others = make_cases(TRIAL, 8), make_cases(Trial("canoe", DEFAULT, ""), 2)
    assert not {case.scene.place for case in cases} & set(TRAINING_PLACES)
    assert cases[0].scene.place == cases[7].scene.place != cases[1].scene.place
    poses = {case.scene.poses for case in (*cases, *others)}
    assert len(poses) == 10 and all(case.scene.things[0].noun == "mammoth" for case in cases)
    assert np.asarray(cases[0].maps["sketch"]).any() and cases[0].scene.seed >= FIRST_SEED


@pytest.mark.font
@pytest.mark.slow
def test_the_benchmark_draws_under_every_map_and_once_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_moji(tmp_path / "moji")
    write_run(tmp_path / "out" / "runs" / TRIAL.name, model)
    monkeypatch.setattr(bench, "load_classifier", lambda folder: Eye("mammoth"))
    (pose,) = make_cases(TRIAL, 1)[0].scene.poses or ()
    monkeypatch.setattr(bench, "find_pose", lambda picture, thing, style: pose)
    asked: dict[str, Any] = {"concepts": ("mammoth",), "count": 1, "model": str(model), "steps": 1}
    settings = SubjectSettings(**asked, kinds=("sketch", "pose"), of_class=True, out=tmp_path / "out")
    bench.main(settings)
    found = read_json(tmp_path / "out" / "under-maps.json")["images"]
    ways = ["sketch", "pose", "sketch of the class", "pose of the class"]
    assert list(found) == [FLOOR, *ways, BOUND]
    assert all(row[0]["glyph"] and row[0]["pose"]["place"] == 0 for row in found.values())
    assert (
        found["pose of the class"][0]["edges"] is None and found[BOUND][0]["edges"] > found[FLOOR][0]["edges"]
    )
    drawn = sorted((tmp_path / "out" / "under-maps" / TRIAL.name).rglob("*.png"))
    assert len(drawn) == len({path.read_bytes() for path in drawn}) == 5
    assert (tmp_path / "out" / "under-maps.png").exists() and "| mammoth |" in capsys.readouterr().out
    before = [path.stat().st_mtime_ns for path in drawn]
    bench.main(settings)
    assert [path.stat().st_mtime_ns for path in drawn] == before
