"""One value of a setting: its type, its range, its choices, its paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.cli.options import list_fields
from backbone.cli.sampling import SamplingSettings
from backbone.cli.values.convert import convert_value
from backbone.io.console import UserError
from backbone.training.settings import RunOptions
from tests.backbone.cli.small_command import parse


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--steps", "many"), "--steps is many, which is not a whole number or auto"),
        (("--steps", "2.5"), "--steps is 2.5"),
        (("--steps", "0"), "at least 1"),
        (("--learning-rate", "2"), "at most 1"),
        (("--learning-rate", "nan"), "not a number"),
        (("--prior", "bas"), "Did you mean base"),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_answered_with_its_flag(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse(*words)


def test_a_seed_that_means_any_elsewhere_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    seed = list_fields(SamplingSettings)["seed"]
    assert convert_value(seed, "-1", "--seed") == -1
    assert "--seed is -1, which is a seed like any other here" in capsys.readouterr().err
    assert convert_value(seed, "-2", "--seed") == -2 and capsys.readouterr().err == ""


def test_choices_may_be_written_in_any_case() -> None:
    assert parse("--prior", "Drawn") == {"prior": "drawn"}


def test_a_home_is_found_where_no_shell_looks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert_value(list_fields(RunOptions)["out"], "~/runs/dog", "--out") == tmp_path / "runs" / "dog"
