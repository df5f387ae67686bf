"""What the README tells people to type is what the project understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from customize.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = dict(re.findall(r"^<!-- command: (\w+) -->\n+```sh\n([^\n]+)\n```$", README, flags=re.MULTILINE))


def lines_calling(program: str) -> list[list[str]]:
    """The arguments of every call of a program in the README's shell blocks."""
    shell = "\n".join(block for language, block in BLOCKS if language == "sh")
    calls = [shlex.split(call, comments=True) for line in shell.splitlines() for call in line.split("&&")]
    return [call[1:] for call in calls if call and Path(call[0]).name == program]


def test_both_commands_for_a_bare_machine_are_one_line_each() -> None:
    assert set(COMMANDS) == {"try", "test"}
    assert all(command.startswith("python3 -m venv ") for command in COMMANDS.values())


@pytest.mark.parametrize("arguments", lines_calling("customize"), ids=" ".join)
def test_every_call_of_customize_is_understood(arguments: list[str]) -> None:
    group = typer.main.get_group(app)
    name, *rest = arguments
    group.commands[name].make_context(name, rest).close()


def test_every_flag_that_is_named_exists() -> None:
    commands = typer.main.get_group(app).commands.values()
    known = {flag for command in commands for parameter in command.params for flag in parameter.opts}
    section = README[README.index("## `customize` in depth") : README.index("## From Python")]
    named = set(re.findall(r"--[a-z][a-z_-]+", section)) - {"--help"}
    assert named - known == set()


def test_the_example_of_the_floor_of_numbers_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for language, block in BLOCKS if language == "python" and "karras_ladder" in block]
    exec(compile(example, "README.md", "exec"), {})
    said = re.fullmatch(r"tensor\((\d\.\d+)\)\n", capsys.readouterr().out)
    assert said
    assert abs(float(said[1]) - 1) < 0.05
