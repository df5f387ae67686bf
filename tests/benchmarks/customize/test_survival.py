"""The benchmark of survival: which commands it runs, and what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.io.files import write_json
from benchmarks.customize import concepts as learning
from benchmarks.customize import survival
from benchmarks.customize.concepts import DEFAULT, Trial, make_questions
from benchmarks.customize.survival import SIDES, SurvivalSettings, classify_concept, format_table, make_images
from tests.benchmarks.customize.test_concepts import Eye

TRIAL = Trial("mammoth", DEFAULT, "")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """The commands that ran; in their place stand empty runs and grey images."""
    ran: list[tuple[str, ...]] = []

    def customize(*arguments: str) -> None:
        ran.append(arguments)
        folder = Path(arguments[arguments.index("--out") + 1])
        folder.mkdir(parents=True)
        if arguments[0] != "sample":
            (folder / "README.md").touch()
            return
        for number in range(len(make_questions("places", "elephant", ""))):
            Image.new("RGB", (8, 8)).save(folder / f"p{number:02d}-s00.png")
        write_json(folder / "samples.json", {"seconds": 14.0})
        (folder / "sheet.png").touch()

    monkeypatch.setattr(learning, "run_customize", customize)
    monkeypatch.setattr(learning, "write_training_images", lambda concept, out, **how: out / concept)
    return ran


def test_a_concept_is_learned_once_and_drawn_on_three_sides(
    commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    make_images(TRIAL, tmp_path, count=1, model="moji", few_step="few", fit="--steps 4")
    assert [one[0] for one in commands] == ["train", "transfer", *["sample"] * 6]
    assert commands[1][2:4] == ("--to", "few") and commands[1][-2:] == ("--steps", "4")
    drawn = [(one[one.index("--model") + 1], "--on" in one) for one in commands[2:]]
    assert drawn == [("moji", False)] * 2 + [("moji", True)] * 2 + [("few", False)] * 2
    commands.clear()
    make_images(TRIAL, tmp_path, count=1, model="moji", few_step="few", fit="")
    assert commands == []


def test_the_table_gives_every_side_its_share_of_the_base_s(
    commands: list[tuple[str, ...]], tmp_path: Path
) -> None:
    make_images(TRIAL, tmp_path, count=1, model="moji", few_step="few", fit="")
    found = classify_concept(TRIAL, tmp_path, Eye("mammoth"))  # type: ignore[arg-type]
    assert found.seconds == dict.fromkeys(SIDES, 2.0)
    text = format_table([found])
    rows = [line for line in text.splitlines() if line.startswith("| few steps, transferred")]
    assert [cell.strip() for cell in rows[0].split("|")[2:5]] == ["100.0 %", "14.3 %", "14.3 %"]
    assert "100.0 %" in rows[0].split("|")[7] and "| mammoth | 14.3 % | 14.3 % | 14.3 % |" in text


def test_a_base_without_a_few_step_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipes\.moji\.adapters\.turbo"):
        survival.main(SurvivalSettings(concepts=("mammoth",), model="sd15", out=tmp_path))
