"""`--help` in panels, without rich, whose import takes longer than all the rest of an answer.

Every option is shown by its first name, whole at any width; other spellings of it are understood and not shown. A
command or a group asks for it by its class: `typer.Typer(cls=Group, rich_markup_mode=None)` and
`app.command(cls=Command)`.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from backbone.cli.options import hyphenate
from backbone.cli.other_names import describe_flag, find_command
from backbone.io.console import UserError, quote, quote_text, refuse_address, refuse_other_encodings
from backbone.io.written import written_path

WIDEST = 100  # columns; longer lines are hard to read
NARROWEST = 40  # below, a terminal breaks lines itself
NAMES = 34  # columns for an option's name and what it takes; a longer one has its text on the lines below
TEXT = 30  # columns that are left for the texts at least; in a narrower terminal all stand below the names
INDENT = 4  # columns that they stand in there
SHORT_CHOICES = 16  # characters of choices that stand behind the name; more are listed in the text
KINDS = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER"}
# Panels that stand first or last; the others as they come
ENDS = {"Arguments": -1, "Model": 1, "Output": 2, "Other": 3}
UsageError: Any = typer.BadParameter.__base__  # click's, which typer has within
DASHES = "–—―−"
LONG_DASH = re.compile(rf"[{DASHES}]+-?[a-z]", re.IGNORECASE)
OPENING = tuple("“”„‘«")
SAID_DEFAULT = re.compile(r"\[default: \(([^()]*)\)")  # as typer writes a default that is said in words


class Command(TyperCommand):
    """A command whose help comes in panels."""

    def get_help_option(self, ctx: Any) -> Any:
        """The flag `--help`, off where it is not given."""
        return _off(super().get_help_option(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the command in its usage: arguments as they are called, without typer's braces."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; `UserError` for mistyped ones, and for an option that takes one value and is given twice."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        words = list(args)
        for word in words:
            refuse_other_encodings(word)
            refuse_address(word)
        refuse_typography(words)
        try:
            values, extra, order = self.make_parser(ctx).parse_args(list(words))
        except UsageError as error:
            if meant := _describe_flag(self, ctx, getattr(error, "option_name", "")):
                raise UserError(meant) from error
            if hasattr(error, "possibilities"):  # a flag that there is none of
                options = [one for one in self.get_params(ctx) if one.param_type_name == "option"]
                known = {name.lstrip("-"): one.opts[0].lstrip("-") for one in options for name in one.opts}
                if meant := describe_flag(error.option_name, ctx.command_path, known):
                    raise UserError(meant) from error
                if others := _find_commands_with(error.option_name, ctx):
                    raise UserError(
                        f"{error.option_name} is a flag of {' and of '.join(others)}, and not of {ctx.command_path}. "
                        "Leave it out."
                    ) from error
            if path := next((word for word in words if word[:1] == "-" and _is_there(word)), None):
                raise UserError(
                    f"{path} begins as flags do. For the file or folder of that name write ./{path}."
                ) from error
            return super().parse_args(ctx, args)  # which says the same of an option that there is none of
        if extra and not ctx.allow_extra_args and not _asks_for_help(ctx, words):
            raise UserError(_describe_extra_words(self, ctx, values, [str(word) for word in extra]))
        try:
            rest = super().parse_args(ctx, args)
        except UsageError as error:
            # Pydantic's, before what it has to say
            error.message = error.message.replace("Value error, ", "")
            raise
        refuse_repeats(order)
        for name, value in ctx.params.items():
            if isinstance(value, Path):
                ctx.params[name] = expand_path(value, values.get(name), name)
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx))


class ReadLater(Command):
    """A command whose options are read from `read()`, a function with a signature, when they are first looked at.

    A group's help shows names and first lines alone, and a command needs its own options, not those of all others.
    """

    def __init__(self, read: Callable[[], Callable[..., None]], **settings: Any) -> None:
        self._read = read
        super().__init__(**settings)

    @cached_property
    def _whole(self) -> Any:
        info = typer.models.CommandInfo(callback=self._read())
        return typer.main.get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)

    @property
    def params(self) -> list[Any]:
        known: list[Any] = self._whole.params
        return known

    @params.setter
    def params(self, none: list[Any]) -> None: ...

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; beside `--config` what stands without a flag may be in the file, as all else."""
        if any(str(word).partition("=")[0] == "--config" for word in args):
            for param in self.params:
                param.required = param.required and param.param_type_name != "argument"
        return super().parse_args(ctx, args)

    @property
    def callback(self) -> Callable[..., Any] | None:
        called: Callable[..., Any] | None = self._whole.callback
        return called

    @callback.setter
    def callback(self, none: Callable[..., Any] | None) -> None: ...


class Group(TyperGroup):
    """Several commands; their help comes in the same form."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; `help`, `help COMMAND` and `version` are read as the flags of these names."""
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        elif args == ["version"]:
            args = ["--version"]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is named; what other programs call it, and an image in its place, is answered with it."""
        if args and args[0] not in (known := self.list_commands(ctx)):
            if meant := find_command(args[0], known):
                ctx.fail(f"No such command '{args[0]}'. Did you mean '{meant}'?")
            if " " in args[0] or os.path.lexists(args[0]):
                ctx.fail(f"No such command '{args[0]}'. Name a command first: {ctx.command_path} COMMAND …")
        return super().resolve_command(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """The flags of the group itself (`--help`, completion), off where they are not given."""
        return [_off(param) for param in super().get_params(ctx)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx))


def _off(flag: Any) -> Any:
    """A flag with False in place of nothing: typer imports pydantic, slow, to say that nothing is no bool."""
    if flag is not None and flag.default is None:
        flag.default = False
    return flag


def expand_path(path: Path, typed: Any, name: str) -> Path:
    """A path as `written_path` has it: a shell leaves ~ alone in quotation marks and behind `--out=`.

    Raises `UserError` for one that was typed as nothing (a variable of the shell that was never set), which would be
    the working folder.
    """
    if typed == "":
        raise UserError(f"{name.upper()} is empty. Name one.")
    return written_path(path)


def refuse_typography(words: Iterable[str]) -> None:
    """`UserError` for words with the dashes and quotation marks that text programs put in place of the typed ones.

    They would be plain words: by `sample "a dog" —count 4` an image of “—count” would be drawn, and one of “4”.
    """
    for word in words:
        if LONG_DASH.match(word):
            raise UserError(f"{word} begins with a long dash. Type two hyphens: --{word.lstrip(DASHES)}")
        if word[:1] in OPENING and " " not in word:  # with spaces, straight ones are around it
            raise UserError(
                f"{word} has quotation marks that a shell does not read. Type straight ones: \" or '."
            )


# Flags that elsewhere name what a command takes as a plain word
PLAIN = (
    "input",
    "file",
    "path",
    "folder",
    "dir",
    "run",
    "image",
    "picture",
    "pairs",
    "out",
    "output",
    "data",
    "dataset",
)
# What a plain word may have been meant for, the first that a command has: of pictures, and of words
PICTURE_FLAGS = ("--images", "--image")
WORD_FLAGS = ("--prompts", "--prompt", "--instruction")


YES_OR_NO = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0"})


def _is_given(flag: str, options: Sequence[Any], values: Mapping[str, Any]) -> bool:
    """Whether the option of this flag has a value."""
    return any(values.get(one.name) for one in options if flag in one.opts)


def _asks_for_help(ctx: Any, words: Sequence[str]) -> bool:
    return bool(set(words) & set(ctx.help_option_names))


def _describe_extra_words(command: Any, ctx: Any, values: dict[str, Any], extra: Sequence[str]) -> str:
    """The sentence about words without a flag, of which a command takes none or fewer: the flag that they want."""
    arguments = [one for one in command.get_params(ctx) if one.param_type_name == "argument"]
    options = [one for one in command.get_params(ctx) if one.param_type_name == "option"]
    flags = {flag: one.opts[0] for one in options for flag in one.opts}  # as each is called in the help
    taken = [str(values[one.name]) for one in arguments if values.get(one.name)]
    plain = [word for word in (*taken, *extra) if not _is_path(word)]
    words = next((flags[flag] for flag in WORD_FLAGS if flag in flags), None)
    pictures = next((flags[flag] for flag in PICTURE_FLAGS if flag in flags), None)
    if words and plain:
        meant = plain[0] if " " in plain[0] else " ".join(plain)
        what = "an instruction" if words == "--instruction" else "a prompt"
        remedy = f"For {what}, write {words} {quote_text(meant)}."
    elif {word.lower() for word in extra} <= YES_OR_NO:
        remedy = "A switch stands alone, without a value: --flip, and --no-flip for the contrary."
    elif pictures and _is_given(pictures, options, values):
        folders = {str(Path(word).parent) for word in extra if Path(word).is_file()}
        remedy = "Put a text of several words in quotation marks, or leave it out."
        if len(folders) == 1:
            remedy = f"For several images name their folder: {pictures} {quote(folders.pop())}."
    elif pictures:
        remedy = f"For the images, write {pictures} {quote(extra[0])}."
    else:
        remedy = f"Leave {'it' if len(extra) == 1 else 'them'} out, or put one text in quotation marks."
    shown = " ".join(extra)
    if not arguments:
        return f"{ctx.command_path} reads nothing without a flag, and “{shown}” has none. {remedy}"
    names = " and ".join((one.metavar or one.name.upper()) for one in arguments)
    return f"{ctx.command_path} takes {names} without a flag, and “{shown}” is too much. {remedy}"


def _describe_flag(command: Any, ctx: Any, flag: str) -> str:
    """The sentence about a flag that there is none of, where what it calls is taken without one; "" elsewhere."""
    arguments = [one for one in command.get_params(ctx) if one.param_type_name == "argument"]
    called = [name for one in arguments for name in (one.name, one.metavar or "")]
    if flag.strip("-").lower().rstrip("s") not in {name.lower().rstrip("s") for name in (*called, *PLAIN)}:
        return ""
    names = [one.metavar or one.name.upper() for one in arguments]
    if not names:
        return ""
    call = " ".join([ctx.command_path, *names])
    return f"{flag} is no flag here, for {' and '.join(names)} is read without one. Write: {call}"


def _find_commands_with(flag: str, ctx: Any) -> list[str]:
    """The other commands of the program that have a flag of this name, the first two."""
    program = getattr(ctx.parent, "command", None)
    found = [
        f"{ctx.parent.command_path} {name}"
        for name, command in getattr(program, "commands", {}).items()
        if any(hyphenate(flag) in map(hyphenate, one.opts) for one in command.params)
    ]
    return found[:2]


def _is_there(word: str) -> bool:
    """Whether a word, without a strength behind a colon, is a file or folder that is there."""
    return any(os.path.lexists(one) for one in (word, word.rpartition(":")[0]) if one)


def _is_path(word: str) -> bool:
    return Path(word).exists() or "/" in word or bool(re.fullmatch(r"\.\w{2,12}", Path(word).suffix))


def refuse_repeats(order: Sequence[Any]) -> None:
    """`UserError` where an option that takes one value stands twice among what was read, one entry for each time.

    Of two values the last would be taken, and the first without a word not.
    """
    single = [one for one in order if one.param_type_name == "option" and not one.multiple]
    for parameter, times in Counter(single).items():
        if times > 1:
            raise UserError(f"{parameter.opts[0]} is given {times} times and counts once. Leave one.")


def page(command: Any, ctx: Any) -> str:
    """The help of a command or a group: usage, what it is for, then a panel after the other."""
    columns = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    about = [_fill(part, columns) for part in (command.help or "").split("\n\n")]
    panels: dict[str, list[tuple[str, str]]] = {}
    for name in command.list_commands(ctx) if isinstance(command, TyperGroup) else ():
        if name in getattr(command, "elsewhere", ()):
            panels.setdefault("Commands", []).append((name, command.elsewhere[name].help))
            continue
        inner = command.get_command(ctx, name)
        if inner is not None and not inner.hidden:
            panel = getattr(inner, "rich_help_panel", None) or "Commands"
            panels.setdefault(panel, []).append((name, inner.get_short_help_str(limit=200)))
    parameters = command.get_params(ctx)
    named = any(getattr(parameter, "rich_help_panel", None) for parameter in parameters)
    for parameter in parameters:
        row = row_of(parameter, ctx)
        if row is not None:
            usual = (
                "Arguments" if parameter.param_type_name == "argument" else "Other" if named else "Options"
            )
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(row)
    ordered = sorted(panels.items(), key=lambda panel: ENDS.get(panel[0], 0))
    shown = [panel_of(title, rows, columns) for title, rows in ordered]
    return "\n".join([f"Usage: {usage}\n", *(f"{part}\n" for part in about if part), *shown])


def _fill(paragraph: str, columns: int) -> str:
    """A paragraph in lines of this width; indented lines, as of a command, stay."""
    return paragraph if paragraph.startswith("    ") else textwrap.fill(" ".join(paragraph.split()), columns)


def row_of(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """An option's or an argument's first name with what it takes, and its text; None for a hidden one."""
    record = parameter.get_help_record(ctx)  # all names with typer's `<int>` behind them, and the text
    if record is None or parameter.hidden:
        return None
    text = SAID_DEFAULT.sub(r"[default: \1", record[1])
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper(), text
    first = next((name for name in parameter.opts if name.startswith("--")), parameter.opts[0])
    names = "/".join([first, *parameter.secondary_opts[:1]])
    if parameter.is_flag:
        return names, text
    if parameter.metavar:
        return f"{names} {parameter.metavar}", text
    takes = record[0][len(", ".join(parameter.opts)) :].strip(" <>").removesuffix(" range")
    takes = takes.removeprefix("list[").removesuffix("]")
    if "|" not in takes:
        return f"{names} {KINDS.get(takes, takes.upper())}", text
    if len(takes) <= SHORT_CHOICES:
        return f"{names} {takes}", text
    text, bracket, more = text.partition("  [")
    return f"{names} NAME", f"{text} One of {takes.replace('|', ', ')}.{bracket}{more}"


def panel_of(title: str, rows: Iterable[tuple[str, str]], columns: int) -> str:
    """A heading, then a row each: the name in the left column, the text in the right one."""
    rule = "─" * max(0, columns - len(title) - 4)
    lines = [f"{typer.style(f'── {title}', bold=True)} {rule}"]
    left = NAMES if columns >= NAMES + TEXT else INDENT
    for name, text in rows:
        wrapped = textwrap.wrap(text, columns - left, break_on_hyphens=False) or [""]
        if len(name) + 2 >= left:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{left - 2}}{wrapped.pop(0)}".rstrip())
        lines += [" " * left + line for line in wrapped]
    return "\n".join(lines) + "\n"
