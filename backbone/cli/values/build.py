"""Build dataclasses of settings from values: convert each value to its field's type and check its Option."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from backbone.cli.options import Field, Option, find_kind, list_fields
from backbone.cli.other_names import CHOOSE, suggest_setting
from backbone.cli.values.convert import convert_value
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.records import RunRecord

Dataclass = TypeVar("Dataclass")


class UnknownSettingError(UserError):
    """A setting that does not exist."""


def build(declared: Callable[..., Dataclass], values: Mapping[str, Any]) -> Dataclass:
    """An instance of the dataclass with these values; None stands for the default if a field cannot be None.

    Raises `UserError`, naming the argument, for values that are unknown, missing or of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(declared)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            options = list_fields(declared) if isinstance(declared, type) else {}
            matches = [field.name for field in options.values() if name.replace("-", "_") in field.spellings]
            hint = f" It is {matches[0]} here." if matches else suggest_setting(name, list(fields))
            if hint == CHOOSE:
                hint = f" There are {', '.join(fields)}."
            raise UnknownSettingError(f"There is no setting {name}.{hint}")
    for name, field in fields.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in values:
            raise UserError(f"The setting {name} is missing. Give it.")
    return declared(**_fit_values(declared, values))


def read_settings(declared: Callable[..., Dataclass], path: Path) -> Dataclass:
    """The settings of a run's `settings.json`, each checked against its Option.

    Raises `UserError`, with the file and the key, for a value of another type, out of range, unknown or missing.
    """
    record = read_json(path, RunRecord)
    fields = list_fields(cast(type, declared))
    values = {
        name: convert_value(fields[name], value, name, path) if name in fields else value
        for name, value in record.settings.items()
    }
    try:
        return build(declared, values)
    except UserError as error:
        raise UserError(
            f"{path} was written by another version: {error} Update Limner, or start the run anew."
        ) from error


def check_values(settings: Any) -> None:
    """Raise `UserError`, naming the argument, for a value of an instance that its Option does not allow.

    A choice in another spelling is replaced by the choice, and a file with a prompt by its text. A default may be a
    value that cannot be requested: it means that the setting was not given.
    """
    for field in list_fields(type(settings)).values():
        if getattr(settings, field.name) != field.default:
            value = convert_value(field, getattr(settings, field.name), field.name)
            if field.option.choices or field.option.convert:
                object.__setattr__(settings, field.name, value)


def convert_in_place(settings: Any) -> None:
    """Convert an instance's values to the types of its fields; None becomes the default if a field cannot be None.

    Raises `UserError`, naming the argument, for a value that does not fit.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in dataclasses.fields(settings)
        if values[field.name] is None
    }
    for name, value in {**defaults, **_fit_values(type(settings), values)}.items():
        object.__setattr__(settings, name, value)


def _fit_values(declared: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values converted to their fields' types: text, numbers and booleans; other values are unchanged."""
    fitted: dict[str, Any] = {}
    for name, value in values.items():
        field, optional = _plain_fields(declared)[name]
        if value is None and not optional:
            continue
        if field is not None and isinstance(value, str) and value in field.option.words:
            fitted |= field.option.words[value]
            continue
        if value is not None and field is not None:
            value = convert_value(field, value, name)
        fitted[name] = tuple(value) if isinstance(value, list) else value
    return fitted


@cache
def _plain_fields(declared: Hashable) -> dict[str, tuple[Field | None, bool]]:
    """By name: the field if it holds text, numbers or booleans, else None; and whether its value may be None."""
    assert isinstance(declared, type)
    declared_fields, hints = list_fields(declared), get_type_hints(declared)
    plain_fields: dict[str, tuple[Field | None, bool]] = {}
    for entry in dataclasses.fields(declared):
        hint = hints[entry.name]
        kind, many = find_kind(hint)
        choices = _list_choices(hint)
        field = declared_fields.get(entry.name) or Field(
            entry.name, kind, many, entry.default, Option("", "", choices=choices)
        )
        is_plain = kind in (int, float, str, bool) and (entry.name in declared_fields or _is_plain(hint))
        plain_fields[entry.name] = (field if is_plain else None, type(None) in get_args(hint))
    return plain_fields


def _list_choices(hint: Any) -> tuple[str, ...]:
    """The choices of a Literal, or of `Literal | None`; () for other types."""
    literals = [inner for inner in get_args(hint) if get_origin(inner) is Literal] or [hint]
    return get_args(literals[0]) if get_origin(literals[0]) is Literal else ()


def _is_plain(hint: Any) -> bool:
    """Whether a type is int, float, str, bool or a Literal, or one of these or None."""
    if get_origin(hint) in (tuple, list, Sequence, Mapping):
        return False
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    return bool(_list_choices(hint)) or (len(kinds) == 1 and kinds[0] in (int, float, str, bool))


def take_fields(declared: type[Dataclass], settings: Any) -> Dataclass:
    """An instance of a dataclass with the values of other settings, which have all of its fields."""
    return declared(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(declared)})  # type: ignore[arg-type]
