"""Which settings have an effect beside the others; one that was asked for and has none is refused."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from backbone.cli.options import Field, fields_of
from backbone.io.console import UserError


def drop_ineffective(declared: type, values: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that nobody asked for and that have no effect, so that their defaults stand."""
    known = fields_of(declared)
    every = {**{name: one.default for name, one in known.items()}, **values}
    return {
        name: value
        for name, value in values.items()
        if name in asked or name not in known or find_unmet(known[name], every) is None
    }


def refuse_idle(settings: Any, asked: Mapping[str, Any]) -> None:
    """`UserError` for something that was asked for and has no effect beside the other settings, be it the default.

    What switches a thing off (no, or an option's `off`) has the effect that was asked for.
    """
    known = fields_of(type(settings))
    every = {name: getattr(settings, name) for name in known}
    for name, value in asked.items():
        if name not in known or _asks_nothing(known[name], value):
            continue
        condition = find_unmet(known[name], every)
        if condition is not None:
            raise UserError(_describe_idle(known[name], known[condition[0]], condition[1]))


def _asks_nothing(one: Field, value: Any) -> bool:
    """Whether a value says nothing, or no. A number says something: 0 too, unless it switches the thing off."""
    if isinstance(value, (bool, str, tuple, list)) or value is None:
        return not value or value == one.option.off
    return one.option.off is not None and bool(value == one.option.off)


def require_packages(settings: Any) -> None:
    """`UserError` for a setting whose package is not installed, before any work is done."""
    for one in fields_of(type(settings)).values():
        value = getattr(settings, one.name)
        package = one.option.packages.get(value) if one.option.packages else None
        if package is not None and find_spec(package) is None:
            raise UserError(
                f"{one.flag} {value} needs the package {package}, which is not installed. Run: pip install {package}"
            )


def find_unmet(one: Field, every: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]] | None:
    """The first setting that keeps a field from having an effect, and the values that would do; None if it has one."""
    needs = one.option.needs
    failed = None
    for way in (needs,) if isinstance(needs, Mapping) else needs:
        lacking = next(
            ((name, values) for name, values in way.items() if not _serves(every[name], values)), None
        )
        if lacking is None:
            return None
        failed = failed or lacking
    return failed


def _serves(value: Any, values: tuple[Any, ...]) -> bool:
    return value in values if values else bool(value)


def _describe_idle(one: Field, other: Field, values: tuple[Any, ...]) -> str:
    if values and not any(values):
        return f"{one.flag} has no effect with {other.flag}. Leave out one of the two."
    choices = other.option.choices
    if values and choices and not set(values) & set(choices):
        return f"{one.flag} has no effect here. Leave it out."
    wanted = " or ".join(map(str, values)) if values and values != (True,) else ""
    what = (
        f"{other.option.metavar or other.name}" if other.option.argument else f"{other.flag} {wanted}".strip()
    )
    return f"{one.flag} has no effect without {what}. Add that, or leave out {one.flag}."
