"""`--help` in panels, without rich, whose import takes longer than everything else.

Every option is shown by its first name, unbroken at any width; its other spellings are accepted and not shown. Commands
and groups get it by their class: `typer.Typer(cls=Group, rich_markup_mode=None)` and `app.command(cls=Command)`.
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
from backbone.cli.other_names import IMAGE_FLAGS, SDEDIT, describe_flag, find_command
from backbone.io.console import UserError, quote, quote_text, refuse_address, refuse_other_encodings
from backbone.io.written import written_path

WIDEST = 100  # columns; longer lines are hard to read
NARROWEST = 40  # below, a terminal breaks lines itself
NAME_COLUMNS = 34  # for an option's name and metavar; the text of a longer one starts on the next line
TEXT_COLUMNS = 30  # least for the texts; in a narrower terminal they stand below the names
INDENT = 4  # columns, of texts below the names
SHORT_CHOICES = 16  # characters of choices that are shown behind the name; longer ones go into the text
KINDS = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER"}
# Panels that come first (-1) or last; the others keep their order
PANEL_ORDER = {"Arguments": -1, "Model": 1, "Output": 2, "Other": 3}
UsageError: Any = typer.BadParameter.__base__  # click's
MissingParameter: Any = next(
    kind for kind in typer.BadParameter.__subclasses__() if kind.__name__ == "MissingParameter"
)
DASHES = "–—―−"
FLAG_WORD = re.compile(r"--[a-z]", re.IGNORECASE)
LONG_DASH = re.compile(rf"[{DASHES}]+-?[a-z]", re.IGNORECASE)
OPENING = tuple("“”„‘«")
DEFAULT_IN_WORDS = re.compile(r"\[default: \(([^()]*)\)")  # as typer writes a default in words


class Command(TyperCommand):
    """A command whose help comes in panels.

    remedies    parameter → what to do for several values, where the option takes one
    """

    remedies: Mapping[str, str] = {}

    def get_help_option(self, ctx: Any) -> Any:
        """The flag `--help`, with False as its default."""
        return _default_to_off(super().get_help_option(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The metavars behind the command in its usage, without typer's braces."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words; `UserError` for mistyped ones, and for an option that takes one value and is given twice."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        words = list(args)
        for word in words:
            refuse_other_encodings(word)
            refuse_address(word)
        refuse_typography(words)
        _refuse_lost_values(self, ctx, words)
        try:
            values, extra, params = self.make_parser(ctx).parse_args(list(words))
        except UsageError as error:
            if message := _describe_usage_error(self, ctx, words, error):
                raise UserError(message) from error
            return super().parse_args(ctx, args)  # raises the same error again
        if extra and not ctx.allow_extra_args and not _asks_for_help(ctx, words):
            raise UserError(_describe_extra_words(self, ctx, values, [str(word) for word in extra]))
        try:
            remaining = super().parse_args(ctx, args)
        except UsageError as error:
            if isinstance(error, MissingParameter):
                raise UsageError(_describe_missing(error.param), ctx) from error
            error.message = error.message.replace("Value error, ", "")  # pydantic's prefix
            raise
        refuse_repeats(params, self.remedies)
        for name, value in ctx.params.items():
            if isinstance(value, Path):
                ctx.params[name] = expand_path(value, values.get(name), name)
        return remaining

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(format_page(self, ctx))


class LazyCommand(Command):
    """A command whose options come from the signature of `build()`'s function, which is called when they are needed.

    A group's help needs only names and first lines, and a command only its own options.
    """

    def __init__(self, build: Callable[[], Callable[..., None]], **settings: Any) -> None:
        self._build = build
        super().__init__(**settings)

    @cached_property
    def _command(self) -> Any:
        function = self._build()
        self.remedies = getattr(function, "remedies", {})
        info = typer.models.CommandInfo(callback=function)
        return typer.main.get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)

    @property
    def params(self) -> list[Any]:
        params: list[Any] = self._command.params
        return params

    @params.setter
    def params(self, value: list[Any]) -> None: ...

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words; beside `--config` arguments are not required, since the file may hold them."""
        if any(str(word).partition("=")[0] == "--config" for word in args):
            for param in self.params:
                param.required = param.required and param.param_type_name != "argument"
        return super().parse_args(ctx, args)

    @property
    def callback(self) -> Callable[..., Any] | None:
        callback: Callable[..., Any] | None = self._command.callback
        return callback

    @callback.setter
    def callback(self, value: Callable[..., Any] | None) -> None: ...


class Group(TyperGroup):
    """Several commands, whose help comes in panels too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words; `help`, `help COMMAND` and `version` are read as the flags of these names."""
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        elif args == ["version"]:
            args = ["--version"]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The named command. Another program's name for it, and a file in its place, get a suggestion."""
        if args and args[0] not in (names := self.list_commands(ctx)):
            if match := find_command(args[0], names):
                ctx.fail(f"No such command '{args[0]}'. Did you mean '{match}'?")
            if " " in args[0] or os.path.lexists(args[0]):
                ctx.fail(f"No such command '{args[0]}'. Name a command first: {ctx.command_path} COMMAND …")
        return super().resolve_command(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """The flags of the group itself (`--help`, completion), with False as their default."""
        return [_default_to_off(param) for param in super().get_params(ctx)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(format_page(self, ctx))


def _default_to_off(flag: Any) -> Any:
    """Set a flag's default to False if it is None: typer imports pydantic, which is slow, to check a None."""
    if flag is not None and flag.default is None:
        flag.default = False
    return flag


def expand_path(path: Path, typed: Any, name: str) -> Path:
    """The path by `written_path`, since a shell does not expand ~ in quotation marks and behind `--out=`.

    Raises `UserError` for one that was typed as "" (a shell variable that was never set), which would be the working
    folder.
    """
    if typed == "":
        raise UserError(f"{name.upper()} is empty. Name one.")
    return written_path(path)


def refuse_typography(words: Iterable[str]) -> None:
    """Raise `UserError` for dashes and quotation marks that text programs put in place of the typed ones.

    They would be read as arguments: `sample "a dog" —count 4` would draw an image of “—count” and one of “4”.
    """
    for word in words:
        if LONG_DASH.match(word):
            raise UserError(f"{word} begins with a long dash. Type two hyphens: --{word.lstrip(DASHES)}")
        if word[:1] in OPENING and " " not in word:  # a word with spaces stands in straight ones
            raise UserError(
                f"{word} has quotation marks that a shell does not read. Type straight ones: \" or '."
            )


def _refuse_lost_values(command: Any, ctx: Any, words: Sequence[str]) -> None:
    """Raise `UserError` for an option without its value, as a shell leaves `--out $NAME` if NAME was never set.

    The flag behind it would be read as the value: `sample "a dog" --out --steps 3` would draw “3” into a folder
    --steps.
    """
    params = [param for param in command.get_params(ctx) if param.param_type_name == "option"]
    valued = {hyphenate(name): param for param in params if not param.is_flag for name in param.opts}
    remaining = list(words)
    while remaining and (word := remaining.pop(0)) != "--":
        param = valued.get(hyphenate(word))
        if param is None:
            continue
        if not remaining:
            kind = (param.help or "").partition(" [")[0]
            raise UserError(f"{word} has no value behind it. Give one: {kind}")
        value = remaining.pop(0)
        if FLAG_WORD.match(value):
            remedy = f"Give it one (or write {word}={value}, if that is the value)."
            raise UserError(f"{word} has no value: {value} follows it. {remedy}")


# Flags of other programs for a file or folder that a command here takes as an argument
POSITIONAL_NAMES = (
    *("input", "file", "path", "folder", "dir", "run", "pairs", "out", "output", "data", "dataset"),
    *("image", "picture", "img", "init-image", "init-img", "input-image", "image-path", "source-image"),
)
# Flags that an extra word may belong to, the first that a command has: for pictures, and for words
PICTURE_FLAGS = ("--images", "--image")
WORD_FLAGS = {
    "--remove": "a word to remove",
    "--prompts": "a prompt",
    "--prompt": "a prompt",
    "--instruction": "an instruction",
}  # → what it takes


YES_OR_NO = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0"})


def _is_given(flag: str, options: Sequence[Any], values: Mapping[str, Any]) -> bool:
    """Whether the option of this flag has a value."""
    return any(values.get(option.name) for option in options if flag in option.opts)


def _asks_for_help(ctx: Any, words: Sequence[str]) -> bool:
    return bool(set(words) & set(ctx.help_option_names))


def _describe_extra_words(command: Any, ctx: Any, values: dict[str, Any], extra: Sequence[str]) -> str:
    """The message about extra words without a flag, with the flag that they probably belong to."""
    positional = [param for param in command.get_params(ctx) if param.param_type_name == "argument"]
    options = [param for param in command.get_params(ctx) if param.param_type_name == "option"]
    # Each spelling → the one in the help
    flags = {flag: param.opts[0] for param in options for flag in param.opts}
    words_read = [str(values[param.name]) for param in positional if values.get(param.name)]
    plain = [word for word in (*words_read, *extra) if not _is_path(word)]
    word_flag = next((flags[flag] for flag in WORD_FLAGS if flag in flags), None)
    picture_flag = next((flags[flag] for flag in PICTURE_FLAGS if flag in flags), None)
    if word_flag and plain:
        prompt = plain[0] if " " in plain[0] else " ".join(plain)
        remedy = f"For {WORD_FLAGS.get(word_flag, 'a prompt')}, write {word_flag} {quote_text(prompt)}."
    elif {word.lower() for word in extra} <= YES_OR_NO:
        remedy = "A switch stands alone, without a value: --flip, and --no-flip for the contrary."
    elif picture_flag and _is_given(picture_flag, options, values):
        folders = {str(Path(word).parent) for word in extra if Path(word).is_file()}
        remedy = "Put a text of several words in quotation marks, or leave it out."
        if len(folders) == 1:
            remedy = f"For several images name their folder: {picture_flag} {quote(folders.pop())}."
    elif picture_flag:
        remedy = f"For the images, write {picture_flag} {quote(extra[0])}."
    else:
        remedy = f"Leave {'it' if len(extra) == 1 else 'them'} out, or put one text in quotation marks."
    words_text = " ".join(extra)
    if not positional:
        return f"{ctx.command_path} reads nothing without a flag, and “{words_text}” has none. {remedy}"
    names = " and ".join((param.metavar or param.name.upper()) for param in positional)
    return f"{ctx.command_path} takes {names} without a flag, and “{words_text}” is too much. {remedy}"


def _describe_usage_error(command: Any, ctx: Any, words: Sequence[str], error: Any) -> str:
    """The message about a flag that cannot be parsed; "" if typer's own says enough."""
    flag = getattr(error, "option_name", "")
    options = [param for param in command.get_params(ctx) if param.param_type_name == "option"]
    if hasattr(error, "possibilities"):  # an unknown flag
        names = {name.lstrip("-"): param.opts[0].lstrip("-") for param in options for name in param.opts}
        if message := (
            describe_flag(flag, ctx.command_path, names)
            or _describe_positional_flag(command, ctx, flag)
            or _describe_image_flag(command, ctx, flag)
        ):
            return message
        if commands := _find_commands_with(flag, ctx):
            return f"{flag} is a flag of {' and of '.join(commands)}, and not of {ctx.command_path}. Leave it out."
    path = next((word for word in words if word[:1] == "-" and _exists(word)), None)
    return f"{path} begins as flags do. For the file or folder of that name write ./{path}." if path else ""


def _describe_missing(param: Any) -> str:
    """The message about an argument or an option that must be given."""
    is_argument = param.param_type_name == "argument"
    name = (param.metavar or param.name.upper()) if is_argument else param.opts[0]
    kind = (param.help or "").partition(" [")[0]
    return f"{name} is missing. Give it: {kind}" if kind else f"{name} is missing."


def _describe_positional_flag(command: Any, ctx: Any, flag: str) -> str:
    """The message about an unknown flag whose value is taken as an argument; "" for other flags."""
    positional = [param for param in command.get_params(ctx) if param.param_type_name == "argument"]
    names = [param.metavar or param.name.upper() for param in positional]
    known = [
        *names,
        *(param.name for param in positional),
        *(() if _reads_words(names) else POSITIONAL_NAMES),
    ]
    if not names or hyphenate(flag.strip("-")).lower().rstrip("s") not in {
        name.lower().rstrip("s") for name in known
    }:
        return ""
    call = " ".join([ctx.command_path, *names])
    verb = "is" if len(names) == 1 else "are"
    return f"{flag} is no flag here; {' and '.join(names)} {verb} written without one. Write: {call}"


def _describe_image_flag(command: Any, ctx: Any, flag: str) -> str:
    """The message about an unknown flag that changes an image, where a command draws from words; "" for others."""
    names = [param.metavar for param in command.get_params(ctx) if param.param_type_name == "argument"]
    if not names or not _reads_words(names) or hyphenate(flag.strip("-")).lower() not in IMAGE_FLAGS:
        return ""
    return f"{flag} is no flag of {ctx.command_path}, which draws from words. To change an image: {SDEDIT}"


def _reads_words(names: Sequence[str]) -> bool:
    """Whether arguments of these names are words alone, and no files of images or runs."""
    return set(names) <= {"PROMPT", "PROMPTS"}


def _find_commands_with(flag: str, ctx: Any) -> list[str]:
    """The first two other commands of the program that have a flag of this name."""
    program = getattr(ctx.parent, "command", None)
    paths = [
        f"{ctx.parent.command_path} {name}"
        for name, command in getattr(program, "commands", {}).items()
        if any(hyphenate(flag) in map(hyphenate, param.opts) for param in command.params)
    ]
    return paths[:2]


def _exists(word: str) -> bool:
    """Whether a word, with or without a strength behind a colon, is an existing file or folder."""
    return any(os.path.lexists(path) for path in (word, word.rpartition(":")[0]) if path)


def _is_path(word: str) -> bool:
    return Path(word).exists() or "/" in word or bool(re.fullmatch(r"\.\w{2,12}", Path(word).suffix))


def refuse_repeats(params: Sequence[Any], remedies: Mapping[str, str]) -> None:
    """Raise `UserError` if an option that takes one value was given twice; `params` has an entry for each time.

    `remedies` say how to give several values of a parameter. Otherwise the first value would be dropped in silence.
    """
    single = [param for param in params if param.param_type_name == "option" and not param.multiple]
    for option, times in Counter(single).items():
        if times > 1:
            remedy = remedies.get(option.name, "Leave one.")
            raise UserError(f"{option.opts[0]} is given {times} times and counts once. {remedy}")


def format_page(command: Any, ctx: Any) -> str:
    """The help of a command or a group: usage, description, then the panels."""
    columns = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    paragraphs = [_fill(part, columns) for part in (command.help or "").split("\n\n")]
    panels: dict[str, list[tuple[str, str]]] = {}
    for name in command.list_commands(ctx) if isinstance(command, TyperGroup) else ():
        if name in getattr(command, "programs", ()):
            panels.setdefault("Commands", []).append((name, command.programs[name].help))
            continue
        subcommand = command.get_command(ctx, name)
        if subcommand is not None and not subcommand.hidden:
            panel = getattr(subcommand, "rich_help_panel", None) or "Commands"
            panels.setdefault(panel, []).append((name, subcommand.get_short_help_str(limit=200)))
    parameters = command.get_params(ctx)
    has_panels = any(getattr(param, "rich_help_panel", None) for param in parameters)
    for param in parameters:
        row = format_row(param, ctx)
        if row is not None:
            default_panel = (
                "Arguments" if param.param_type_name == "argument" else "Other" if has_panels else "Options"
            )
            panels.setdefault(getattr(param, "rich_help_panel", None) or default_panel, []).append(row)
    ordered = sorted(panels.items(), key=lambda panel: PANEL_ORDER.get(panel[0], 0))
    panel_texts = [format_panel(title, rows, columns) for title, rows in ordered]
    return "\n".join([f"Usage: {usage}\n", *(f"{part}\n" for part in paragraphs if part), *panel_texts])


def _fill(paragraph: str, columns: int) -> str:
    """A paragraph wrapped to this width; an indented one, such as a command, is unchanged."""
    return paragraph if paragraph.startswith("    ") else textwrap.fill(" ".join(paragraph.split()), columns)


def format_row(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """An option's or an argument's first name with its metavar, and its help text; None for a hidden one."""
    record = parameter.get_help_record(ctx)  # all names with typer's `<int>`, and the text
    if record is None or parameter.hidden:
        return None
    text = DEFAULT_IN_WORDS.sub(r"[default: \1", record[1])
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper(), text
    first = next((name for name in parameter.opts if name.startswith("--")), parameter.opts[0])
    names = "/".join([first, *parameter.secondary_opts[:1]])
    if parameter.is_flag:
        return names, text
    if parameter.metavar:
        return f"{names} {parameter.metavar}", text
    value_text = record[0][len(", ".join(parameter.opts)) :].strip(" <>").removesuffix(" range")
    value_text = value_text.removeprefix("list[").removesuffix("]")
    if "|" not in value_text:
        return f"{names} {KINDS.get(value_text, value_text.upper())}", text
    if len(value_text) <= SHORT_CHOICES:
        return f"{names} {value_text}", text
    text, bracket, note = text.partition("  [")
    return f"{names} NAME", f"{text} One of {value_text.replace('|', ', ')}.{bracket}{note}"


def format_panel(title: str, rows: Iterable[tuple[str, str]], columns: int) -> str:
    """A heading, then the rows: names in the left column, texts in the right one."""
    rule = "─" * max(0, columns - len(title) - 4)
    lines = [f"{typer.style(f'── {title}', bold=True)} {rule}"]
    text_column = NAME_COLUMNS if columns >= NAME_COLUMNS + TEXT_COLUMNS else INDENT
    for name, text in rows:
        wrapped = textwrap.wrap(text, columns - text_column, break_on_hyphens=False) or [""]
        if len(name) + 2 >= text_column:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{text_column - 2}}{wrapped.pop(0)}".rstrip())
        lines += [" " * text_column + line for line in wrapped]
    return "\n".join(lines) + "\n"
