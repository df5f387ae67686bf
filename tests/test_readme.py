"""The README is short, and its two commands are where `.ci/run` and a reader look for them."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^<!-- command: (\w+) -->\n+```sh\n([^\n]+)\n```$", README, flags=re.MULTILINE))
LONGEST = 120  # lines


def test_both_commands_for_a_bare_machine_are_one_line_each() -> None:
    assert set(COMMANDS) == {"try", "test"}
    assert all(command.startswith("python3 -m venv ") for command in COMMANDS.values())


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.splitlines()) <= LONGEST
