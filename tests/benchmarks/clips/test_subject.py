"""The benchmark of learned subjects in clips: what is asked, what is counted, and what is drawn once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.world.concepts import TRAINING_PLACES
from backbone.world.motions import find_moves
from benchmarks.clips import subject as bench
from benchmarks.clips.subject import (
    MOVES,
    PLANNED,
    STILLS,
    ClipReading,
    ClipRequest,
    SubjectClipSettings,
    format_table,
    list_clips,
    read_clip,
)
from benchmarks.customize.concepts import DEFAULT, Trial
from tests.benchmarks.clips.test_words import moved_blobs
from tests.benchmarks.control.test_subject import write_run
from tests.benchmarks.customize.test_concepts import Eye
from tests.tiny import tiny_moji, tiny_motion_adapter

TRIAL = Trial("mammoth", DEFAULT, "")


def test_every_concept_goes_through_the_places_with_another_motion_in_each() -> None:
    asked, next_ones = list_clips(TRIAL, 7, first=0), list_clips(TRIAL, 7, first=1)
    assert len({one.place for one in asked}) == 7 and not {one.place for one in asked} & set(TRAINING_PLACES)
    assert [one.move for one in asked] == list(MOVES[:7]) != [one.move for one in next_ones]
    assert asked[0].still_prompt == "a [V] elephant in a park"
    assert all(
        find_moves(one.prompt)[0] == one.move and one.prompt.startswith(one.still_prompt) for one in asked
    )


def test_a_clip_s_frames_are_counted_apart_and_its_motion_by_its_words() -> None:
    right = ClipRequest("a [V] elephant in space", "right", "in space")
    seen = read_clip(TRIAL, right, moved_blobs(4, x=3.0), Eye("mammoth"))  # type: ignore[arg-type]
    assert seen.frames == (True,) * 4 and seen.places == 1.0 and seen.right is True
    left = read_clip(TRIAL, ClipRequest("", "left", "at night"), moved_blobs(4, x=3.0), Eye("dog"))  # type: ignore[arg-type]
    assert left.glyph == 0.0 and left.places == 0.0 and left.right is False
    still = read_clip(TRIAL, right, moved_blobs(1), Eye("mammoth"))  # type: ignore[arg-type]
    assert still.right is None and still.flicker is None


def test_the_table_has_shares_of_frames_over_clips_and_over_concepts() -> None:
    clips = [
        ClipReading("mammoth", (True, True), 1.0, True, 2.0),
        ClipReading("canoe", (True, False), 0.5, False, 4.0),
    ]
    found = {
        STILLS: [ClipReading("mammoth", (True,), 1.0), ClipReading("canoe", (True,), 1.0)],
        PLANNED: clips,
    }
    rows = format_table(found).splitlines()
    planned = [cell.strip() for cell in next(row for row in rows if PLANNED in row).split("|")]
    assert planned[2].startswith("75.0 %") and planned[3] == "50.0–100.0 %"
    assert planned[4].startswith("50.0 %") and planned[5].startswith("75.0 %")
    assert planned[6].startswith("50.0 %") and planned[7].startswith("3.0")
    assert next(row for row in rows if STILLS in row).endswith("| – | – |")
    assert "| canoe | 100.0 % | 50.0 % |" in rows


def test_a_concept_that_is_none_and_a_clip_of_one_frame_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no concept dodo"):
        bench.main(SubjectClipSettings(concepts=("dodo",), out=tmp_path))
    with pytest.raises(UserError, match="frames"):
        SubjectClipSettings(frames=1)


@pytest.mark.slow
def test_the_benchmark_draws_stills_and_clips_once_and_a_strip_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_motion_adapter().save_pretrained(tmp_path / "motion")
    model = tiny_moji(tmp_path / "moji")
    write_run(tmp_path / "out" / "runs" / TRIAL.name, model)
    monkeypatch.setattr(bench, "load_classifier", lambda folder: Eye("mammoth"))
    asked: dict[str, Any] = {"concepts": ("mammoth",), "count": 2, "frames": 3, "steps": 1}
    settings = SubjectClipSettings(
        **asked, model=str(model), motion=str(tmp_path / "motion"), out=tmp_path / "out"
    )
    bench.main(settings)
    found = read_json(tmp_path / "out" / "clips.json")["clips"]
    assert list(found) == [STILLS, PLANNED, "motion"] and all(len(some) == 2 for some in found.values())
    assert [len(some[0]["frames"]) for some in found.values()] == [1, 3, 3]
    assert found[PLANNED] != found["motion"] and "| mammoth |" in capsys.readouterr().out
    clips = sorted((tmp_path / "out" / "clips").rglob("p*.webp"))
    assert len(clips) == 4
    before = [path.stat().st_mtime_ns for path in clips]
    bench.main(settings)
    assert [path.stat().st_mtime_ns for path in clips] == before
    assert Image.open(tmp_path / "out" / "clips.png").height > 6 * 64  # a row for each clip and still
