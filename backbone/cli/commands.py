"""The programs of the command line: `customize`, `edit`, `align`, and `limner`, which groups the three.

    app = command_group("Change what the words say of an image, and nothing else.")

    @app.command()
    def example(folder: Annotated[Path, typer.Argument(help="The folder to write.")]) -> None: ...

A command with many options, or with options that others have too, declares them as a dataclass
(`backbone.cli.command_line`). All programs accept hyphens and underscores alike, have `--version` and shell completion,
and show their help in panels (`backbone.cli.help`).
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, NamedTuple, NoReturn

import typer

from backbone.cli.help import Command, Group
from backbone.cli.options import hyphenate
from backbone.cli.other_names import find_command
from backbone.io.console import run_app

SPELLING: dict[str, Any] = {"token_normalize_func": hyphenate, "help_option_names": ["--help", "-h"]}


def command_group(help: str, *, cls: type[Group] | None = None) -> typer.Typer:
    """An application of several commands, with `--version` and completion beside them."""
    app = Application(
        cls=cls or Group,
        help=help,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=SPELLING,
    )
    app.callback()(_version)
    return app


def script_app(help: str | None = None) -> typer.Typer:
    """The application of a script, without `--version` and completion."""
    return Application(
        cls=Group,
        help=help,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=SPELLING,
    )


def run_main(main: Callable[..., None]) -> NoReturn:
    """Run a script that is one function of typer's options, with the help and the errors of the programs."""
    app = script_app()
    app.command()(main)
    run_app(app)


def program_words(program: str) -> list[str]:
    """The command line as `program` sees it: `limner edit sdedit …` becomes `edit sdedit …`."""
    words = sys.argv[1:]
    return [program, *(words[1:] if words[:1] == [program] else words)]


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout, for `--json`. NaN and infinities are null."""
    from backbone.io.files import json_text

    text = json_text(value)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2)  # with escapes for every character that is not ASCII
    typer.echo(text)


class Application(typer.Typer):
    """A typer application whose commands show their help in panels."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command, as `typer.Typer.command` does."""
        defaults: dict[str, Any] = {"cls": Command, "context_settings": SPELLING}
        return super().command(name, **(defaults | settings))


class LazyProgram(NamedTuple):
    """A program that is a command of another one: the module whose `app` it is, and its line in the help."""

    module: str
    help: str


class Programs(Group):
    """Applications under one name, each imported when it is called."""

    programs: ClassVar[Mapping[str, LazyProgram]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """The programs' names, in their order."""
        return list(self.programs)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The program of this name; None if there is none."""
        if cmd_name in self.programs and cmd_name not in self.commands:
            module = import_module(self.programs[cmd_name].module)
            self.commands[cmd_name] = typer.main.get_group(module.app)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The named program. A command of one of the programs, or a misspelled name, gets a suggestion."""
        if args and args[0] not in self.programs:
            commands_of = {name: self.get_command(ctx, name).commands for name in self.programs}
            names = {*self.programs, *(command for commands in commands_of.values() for command in commands)}
            alias = find_command(args[0], names)
            matches = [args[0]] if args[0] in names else [alias] if alias else []
            matches = matches or difflib.get_close_matches(args[0], sorted(names), 1)
            suggestions = [name for name in matches if name in self.programs]
            suggestions += [
                f"{ctx.info_name} {name} {match}"
                for match in matches
                for name in commands_of
                if match in commands_of[name]
            ]
            if suggestions:
                ctx.fail(f"No such command '{args[0]}'. Did you mean {' or '.join(suggestions)}?")
        return super().resolve_command(ctx, args)


def _print_version(requested: bool) -> None:
    if requested:
        from backbone import __version__

        typer.echo(f"limner {__version__}")
        raise typer.Exit


def _version(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version.",
            rich_help_panel="Other",
        ),
    ] = False,
) -> None:
    """Hold the options of a group itself."""
