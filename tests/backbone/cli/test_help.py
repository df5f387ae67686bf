"""`--help` of the training commands: every option, 80 columns, and in no time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import align.settings
import customize.settings
from backbone.cli.options import list_fields
from backbone.training.settings import PANELS, RunOptions
from tests.backbone.cli.train_commands import TRAINS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("program", TRAINS)
def test_every_option_is_whole_at_80_columns_with_a_text_and_a_panel(program: str) -> None:
    shown = CliRunner().invoke(TRAINS[program], ["train", "--help"], env={"COLUMNS": "80"}).output
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    declared = {"customize": customize.settings.Settings, "align": align.settings.Settings}[program]
    for one in [*list_fields(declared).values(), *list_fields(RunOptions).values()]:
        assert one.option.help and one.option.panel in PANELS, one.name
        name = one.option.metavar if one.option.argument else one.flag
        if not one.option.hidden:
            assert any(re.match(rf"  {re.escape(name)}($|[ /])", line) for line in lines), name
    headings = [line.split()[1] for line in lines if line.startswith("── ")]
    assert [name for name in headings if name in PANELS] == [name for name in PANELS if name in headings]


def test_help_of_train_answers_in_less_than_two_fifths_of_a_second(tmp_path: Path) -> None:
    # As installed: bytecode is written once, by the first run, whatever this machine's environment forbids.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)

    def seconds(program: str) -> float:
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", f"{program}.cli", "train", "--help"],
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    for program in TRAINS:
        seconds(program)
        assert any(seconds(program) < 0.4 for _ in range(5))
