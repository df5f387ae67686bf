"""What the README and the pages in docs/ tell people to type is what the project understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

import align.cli
import customize.cli
import edit.cli
from backbone.io.commands import hyphens

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = dict(re.findall(r"^<!-- command: (\w+) -->\n+```sh\n([^\n]+)\n```$", README, flags=re.MULTILINE))


APPS = {"customize": customize.cli.app, "edit": edit.cli.app, "align": align.cli.app}
PAGES = {
    name: (Path(__file__).parents[1] / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in APPS
}


def lines_calling() -> list[list[str]]:
    """Every call of one of our programs in a shell block of the README or of a page."""
    blocks = [
        block
        for text in (README, *PAGES.values())
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    ]
    lines = [line for block in blocks for line in block.splitlines()]
    calls = [shlex.split(call, comments=True) for line in lines for call in line.split("&&")]
    return [[Path(call[0]).name, *call[1:]] for call in calls if call and Path(call[0]).name in APPS]


def test_both_commands_for_a_bare_machine_are_one_line_each() -> None:
    assert set(COMMANDS) == {"try", "test"}
    assert all(command.startswith("python3 -m venv ") for command in COMMANDS.values())


@pytest.mark.parametrize("arguments", lines_calling(), ids=" ".join)
def test_every_call_is_understood(arguments: list[str]) -> None:
    program, name, *rest = arguments
    group = typer.main.get_group(APPS[program])
    group.commands[name].make_context(name, rest).close()


@pytest.mark.parametrize("program", APPS)
def test_every_flag_that_is_named_exists(program: str) -> None:
    commands = [c for app in APPS.values() for c in typer.main.get_group(app).commands.values()]
    params = [parameter for command in commands for parameter in command.params]
    known = {hyphens(flag) for one in params for flag in (*one.opts, *one.secondary_opts)}
    text = re.sub(r"`python\s+-m[^`]*`", "", PAGES[program])  # recipes and benchmarks have flags of their own
    text = re.sub(r"accelerate launch .*? -m ", "", text)  # and so has the launcher
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)) - {"--help"}
    assert {hyphens(flag) for flag in named} - known == set()


def test_the_example_of_the_floor_of_numbers_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for language, block in BLOCKS if language == "python" and "karras_ladder" in block]
    exec(compile(example, "README.md", "exec"), {})
    said = re.fullmatch(r"tensor\((\d\.\d+)\)\n", capsys.readouterr().out)
    assert said
    assert abs(float(said[1]) - 1) < 0.05
