"""Dataclasses of settings built from values: each value fitted to its field and checked against its Option."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from backbone.cli.options import Field, Option, fields_of, kind_of
from backbone.cli.other_names import CHOOSE, find_meant
from backbone.cli.values.convert import convert_value
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.records import RunRecord

Made = TypeVar("Made")


class UnknownSettingError(UserError):
    """A setting that does not exist."""


def build(declared: Callable[..., Made], values: Mapping[str, Any]) -> Made:
    """The dataclass with these values, of which None is as good as left out where nothing else may be.

    Raises `UserError`, naming the argument, for unknown ones, missing ones, and those of another type.
    """
    known = {one.name: one for one in dataclasses.fields(declared)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            spelled = fields_of(declared) if isinstance(declared, type) else {}
            called = [one.name for one in spelled.values() if name.replace("-", "_") in one.spellings]
            meant = f" It is {called[0]} here." if called else find_meant(name, list(known))
            if meant == CHOOSE:
                meant = f" There are {', '.join(known)}."
            raise UnknownSettingError(f"There is no setting {name}.{meant}")
    for name, one in known.items():
        if one.default is MISSING and one.default_factory is MISSING and name not in values:
            raise UserError(f"The setting {name} is missing. Give it.")
    return declared(**_fit_values(declared, values))


def read_settings(declared: Callable[..., Made], path: Path) -> Made:
    """The settings of a run's `settings.json`, each in the range of its Option.

    Raises `UserError`, with the file and the key, for what is of another type, out of range, unknown or missing.
    """
    record = read_json(path, RunRecord)
    known = fields_of(cast(type, declared))
    values = {
        name: convert_value(known[name], value, name, path) if name in known else value
        for name, value in record.settings.items()
    }
    try:
        return build(declared, values)
    except UserError as error:
        raise UserError(
            f"{path} was written by another version: {error} Update Limner, or start the run anew."
        ) from error


def check_values(settings: Any) -> None:
    """`UserError`, naming the argument, for a value in a made dataclass that its Option does not allow.

    A choice in another spelling becomes the choice, and a file with a prompt its words. A default is allowed that
    cannot be asked for: it stands for nothing said.
    """
    for one in fields_of(type(settings)).values():
        if getattr(settings, one.name) != one.default:
            value = convert_value(one, getattr(settings, one.name), one.name)
            if one.option.choices or one.option.understood:
                object.__setattr__(settings, one.name, value)


def fit_made(settings: Any) -> None:
    """Bring what a made dataclass was given to the types of its fields; None where nothing else may be is its default.

    Raises `UserError`, naming the argument, for what does not fit.
    """
    given = {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)}
    usual = {
        one.name: one.default_factory() if one.default_factory is not MISSING else one.default
        for one in dataclasses.fields(settings)
        if given[one.name] is None
    }
    for name, value in {**usual, **_fit_values(type(settings), given)}.items():
        object.__setattr__(settings, name, value)


def _fit_values(declared: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as their fields want them: text and numbers are, what else there may be is left as it is."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        one, optional = _plain_fields(declared)[name]
        if value is None and not optional:
            continue
        if one is not None and isinstance(value, str) and value in one.option.words:
            found |= one.option.words[value]
            continue
        if value is not None and one is not None:
            value = convert_value(one, value, name)
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


@cache
def _plain_fields(declared: Hashable) -> dict[str, tuple[Field | None, bool]]:
    """The fields of a dataclass that hold text, numbers or yes and no, and whether None may stand there."""
    assert isinstance(declared, type)
    known, hints = fields_of(declared), get_type_hints(declared)
    found: dict[str, tuple[Field | None, bool]] = {}
    for one in dataclasses.fields(declared):
        hint = hints[one.name]
        kind, many = kind_of(hint)
        choices = _choices_of(hint)
        plain = known.get(one.name) or Field(
            one.name, kind, many, one.default, Option("", "", choices=choices)
        )
        told = kind in (int, float, str, bool) and (one.name in known or _is_plain(hint))
        found[one.name] = (plain if told else None, type(None) in get_args(hint))
    return found


def _choices_of(hint: Any) -> tuple[str, ...]:
    """The words that a type allows, of a Literal or of one or nothing; none of another."""
    alone = [one for one in get_args(hint) if get_origin(one) is Literal] or [hint]
    return get_args(alone[0]) if get_origin(alone[0]) is Literal else ()


def _is_plain(hint: Any) -> bool:
    """Whether a type is one of a number, of text, of some words or of yes and no, or that or nothing."""
    if get_origin(hint) in (tuple, list, Sequence, Mapping):
        return False
    inner = [one for one in get_args(hint) if one is not type(None)] or [hint]
    return bool(_choices_of(hint)) or (len(inner) == 1 and inner[0] in (int, float, str, bool))


def take_fields(declared: type[Made], settings: Any) -> Made:
    """A dataclass with the values that other settings, which hold its fields among theirs, have for them."""
    return declared(**{one.name: getattr(settings, one.name) for one in dataclasses.fields(declared)})  # type: ignore[arg-type]
