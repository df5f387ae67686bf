"""The command that gives settings again."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

from backbone.cli.options import Field, fields_of, hyphenate
from backbone.cli.values.effects import find_unmet
from backbone.io.console import quote


def as_command(program: str, settings: Any, **more: Any) -> str:
    """The command that gives these settings again; `more` are further options, by name.

    What has no effect is left out, and what is usual; what is usual for the model alone is said.
    """
    known = fields_of(type(settings))
    every = {name: getattr(settings, name) for name in known}
    words = [program]
    for one in sorted(known.values(), key=lambda one: (not one.option.argument, one.default is not MISSING)):
        value = every[one.name]
        usual = not one.option.by_model and value == one.default
        if usual or find_unmet(one, every) is not None or (one.option.argument and not value):
            continue
        words += _words(one, value)
    for name, value in more.items():
        words += [f"--{hyphenate(name)} {quote(str(value))}"]
    return " ".join(words)


def _words(one: Field, value: Any) -> list[str]:
    if one.option.argument:
        return [quote(str(part)) for part in (value if one.many else [value])]
    if one.kind is bool:
        return [one.flag if value else "--no-" + one.flag[2:]]
    return [f"{one.flag} {quote(str(part))}" for part in (value if one.many else [value])]
