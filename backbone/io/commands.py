"""The doors of the command line: `customize`, `edit`, `align`, and `limner`, which holds the three.

    app = command_group("Change what the words say of an image, and nothing else.")

    @app.command()
    def sdedit(image: Annotated[Path, typer.Argument(help="The image.")], steps: flags.Steps = None) -> None: ...

All doors understand hyphens and underscores alike, have `--version` and shell completion, and answer `--help` in one
form: an option under its first name (its further names are other tools' spellings, understood and not listed), in the
section that its `rich_help_panel` names. The form is plain text, because importing rich and its Markdown parser takes
longer than everything else that `--help` does.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, ClassVar, TypeAlias

import typer
from typer.core import TyperCommand, TyperGroup

from backbone.io.flags import MODEL, OUTPUT

WIDEST = 100  # columns of the help
NAMES = 28  # columns of the names; a longer one has a line of its own
LONGEST_CHOICES = 16  # characters of choices that stand beside the name; more are listed in the help text
ARGUMENTS, COMMANDS, OTHER = "Arguments", "Commands", "Other"
KINDS = {"str": "TEXT", "int": "INT", "float": "FLOAT", "bool": ""}
DEFAULT = re.compile(r"\[default: \(([^()]*)\)")  # as typer writes one that is said in words

Row: TypeAlias = tuple[str, str]
"""What stands on the left, and what is said of it."""


def command_group(help: str, *, cls: type[Group] | None = None) -> typer.Typer:
    """An application of several commands, with `--version` and completion beside them."""
    app = Application(
        cls=cls or Group,
        help=help,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={
            "token_normalize_func": hyphens,
            "help_option_names": ["--help", "-h"],
            "max_content_width": WIDEST,
        },
    )
    app.callback()(_version)
    return app


def hyphens(name: str) -> str:
    """An option's name with hyphens, so that the spelling with underscores serves too."""
    return name.replace("_", "-")


def typed(program: str) -> list[str]:
    """The command line as `program` reads it: `limner edit sdedit …` is `edit sdedit …`."""
    words = sys.argv[1:]
    return [program, *(words[1:] if words[:1] == [program] else words)]


def print_json(value: Any) -> None:
    """Prints a value as JSON on stdout: what `--json` promises. NaN and infinities are null."""
    from backbone.files import json_text

    typer.echo(json_text(value))


class Application(typer.Typer):
    """A typer application whose commands show their help in sections."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:  # type: ignore[override]
        """Registers a command, as `typer.Typer.command` does."""
        return super().command(name, **{"cls": Command, **settings})


class Command(TyperCommand):
    """A command whose help has sections."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, then every section of options in the order in which they first appear."""
        write_sections(formatter, sections(self.get_params(ctx), ctx))


class Group(TyperGroup):
    """Commands under one name. Those of `elsewhere` are other applications, imported when they are called.

    `elsewhere` maps a command's name to the module that has its `app`, and to what the group's help says of it.
    """

    elsewhere: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of registration."""
        return list(dict.fromkeys([*super().list_commands(ctx), *self.elsewhere]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; None where there is none."""
        if cmd_name in self.elsewhere and cmd_name not in self.commands:
            module, _ = self.elsewhere[cmd_name]
            self.commands[cmd_name] = typer.main.get_group(import_module(module).app)
        return super().get_command(ctx, cmd_name)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands by section, then the group's own options."""
        found: dict[str, list[Row]] = {}
        for name in self.list_commands(ctx):
            if name in self.elsewhere:
                found.setdefault(COMMANDS, []).append((name, self.elsewhere[name][1]))
                continue
            command = self.get_command(ctx, name)
            if not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                first = (command.help or "").strip().split("\n\n")[0]
                found.setdefault(panel if isinstance(panel, str) else COMMANDS, []).append((name, first))
        write_sections(formatter, found)
        write_sections(formatter, sections(self.get_params(ctx), ctx))


def sections(params: Sequence[Any], ctx: Any) -> dict[str, list[Row]]:
    """What the help says of a command's parameters, by section: arguments, the command's own, the common ones."""
    found: dict[str, list[Row]] = {}
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None:
            panel = getattr(param, "rich_help_panel", None)
            usual = ARGUMENTS if param.param_type_name == "argument" else OTHER
            found.setdefault(panel or usual, []).append(row(param, *record))
    ends = {ARGUMENTS: -1, MODEL: 1, OUTPUT: 2, OTHER: 3}
    return dict(sorted(found.items(), key=lambda section: ends.get(section[0], 0)))


def row(param: Any, names: str, help: str) -> Row:
    """What stands on the left of a parameter (`--steps INT`), and what is said of it.

    `names` and `help` are typer's own record: all spellings with the kind behind them, and the text with the default.
    """
    help = DEFAULT.sub(r"[default: \1", help)
    if param.param_type_name == "argument":
        return param.metavar or param.name.upper(), help
    name = next((name for name in param.opts if name.startswith("--")), param.opts[0])
    if param.secondary_opts:
        name = f"{name}/{param.secondary_opts[0]}"
    if param.is_flag:
        return name, help
    words = [word for word in names.replace(",", " ").split() if not word.startswith(("-", "/"))]
    kind = param.metavar or " ".join(words).strip("<>")
    kind = kind.removesuffix(" range").removeprefix("list[").removesuffix("]")
    if "|" in kind and len(kind) > LONGEST_CHOICES:
        choices = ", ".join(kind.strip("<>[]").split("|"))
        help, kind = f"{help.partition('  [')[0]} One of {choices}.{_extra(help)}", "NAME"
    return f"{name} {KINDS.get(kind, kind if '|' in kind else kind.upper())}".rstrip(), help


def write_sections(formatter: Any, found: Mapping[str, Sequence[Row]]) -> None:
    """Writes sections, each row's text beside its name or, where that is long, below it. No name is ever cut."""
    width = formatter.width
    for title, rows in found.items():
        formatter.write(f"\n{typer.style(title, bold=True)}\n")
        for name, text in rows:
            lines = textwrap.wrap(text, width - NAMES, break_long_words=False, break_on_hyphens=False)
            beside = len(name) + 4 <= NAMES
            if not beside:
                formatter.write(f"  {name}\n")
            elif lines:
                formatter.write(f"  {name}".ljust(NAMES) + lines.pop(0) + "\n")
            else:
                formatter.write(f"  {name}\n")
            for line in lines:
                formatter.write(" " * NAMES + line + "\n")


def _extra(help: str) -> str:
    """Typer's remark on the default, with the space before it."""
    _, bracket, rest = help.partition("  [")
    return f"{bracket}{rest}"


def _print_version(wanted: bool) -> None:
    if wanted:
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
            rich_help_panel=OTHER,
        ),
    ] = False,
) -> None:
    """Holds the options of a group itself."""
