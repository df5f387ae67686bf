"""The command that repeats settings."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

from backbone.cli.options import Field, hyphenate, list_fields
from backbone.cli.values.effects import find_unmet
from backbone.io.console import quote


def as_command(program: str, settings: Any, **options: Any) -> str:
    """The command that repeats these settings; `options` are further ones, by name.

    Values without effect and defaults are left out; a default that depends on the model is written out.
    """
    fields = list_fields(type(settings))
    values = {name: getattr(settings, name) for name in fields}
    words = [program]
    for field in sorted(
        fields.values(), key=lambda field: (not field.option.argument, field.default is not MISSING)
    ):
        value = values[field.name]
        is_default = not field.option.by_model and value == field.default
        if is_default or find_unmet(field, values) is not None or (field.option.argument and not value):
            continue
        words += _write_option(field, value)
    for name, value in options.items():
        words += [f"--{hyphenate(name)} {quote(str(value))}"]
    return " ".join(words)


def _write_option(field: Field, value: Any) -> list[str]:
    if field.option.argument:
        return [quote(str(part)) for part in (value if field.many else [value])]
    if field.kind is bool:
        return [field.flag if value else "--no-" + field.flag[2:]]
    return [f"{field.flag} {quote(str(part))}" for part in (value if field.many else [value])]
