"""`--help` in panels, without rich, whose import takes longer than all the rest of an answer.

Every option is shown by its first name, whole at any width; other spellings of it are understood and not shown. A
command or a group asks for it by its class: `typer.Typer(cls=Group, rich_markup_mode=None)`, `app.command(cls=Command)`.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

WIDEST = 100  # columns; longer lines are hard to read
NAMES = 34  # columns for an option's name and what it takes; a longer one has its text on the lines below


class Command(TyperCommand):
    """A command whose help comes in panels."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx))


class Group(TyperGroup):
    """Several commands; their help comes in the same form."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx))


def page(command: Any, ctx: Any) -> str:
    """The help of a command or a group: usage, what it is for, then a panel after the other."""
    columns = min(int(os.environ.get("COLUMNS") or shutil.get_terminal_size().columns), WIDEST)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    about = [textwrap.fill(" ".join(part.split()), columns) for part in (command.help or "").split("\n\n")]
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        row = row_of(parameter, ctx)
        if row is not None:
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(row)
    for name in command.list_commands(ctx) if isinstance(command, TyperGroup) else ():
        inner = command.get_command(ctx, name)
        if inner is not None and not inner.hidden:
            panel = getattr(inner, "rich_help_panel", None) or "Commands"
            panels.setdefault(panel, []).append((name, inner.get_short_help_str(limit=200)))
    shown = [panel_of(title, rows, columns) for title, rows in panels.items()]
    return "\n".join([f"Usage: {usage}\n", *(f"{part}\n" for part in about if part), *shown])


def row_of(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """An option's or an argument's first name with what it takes, and its text; None for a hidden one."""
    record = parameter.get_help_record(ctx)
    if record is None or parameter.hidden:
        return None
    if parameter.param_type_name == "argument":
        return record
    names = "/".join([parameter.opts[0], *parameter.secondary_opts[:1]])
    takes = "" if parameter.secondary_opts else record[0][len(", ".join(parameter.opts)) :]
    return names + takes, record[1]


def panel_of(title: str, rows: Iterable[tuple[str, str]], columns: int) -> str:
    """A heading, then a row each: the name in the left column, the text in the right one."""
    rule = "─" * max(0, columns - len(title) - 4)
    lines = [f"{typer.style(f'── {title}', bold=True)} {rule}"]
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(20, columns - NAMES)) or [""]
        if len(name) + 2 >= NAMES:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{NAMES - 2}}{wrapped.pop(0)}".rstrip())
        lines += [" " * NAMES + line for line in wrapped]
    return "\n".join(lines) + "\n"
