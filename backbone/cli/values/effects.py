"""Which settings have an effect beside the others; a requested one without effect is refused."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from backbone.cli.options import Field, list_fields
from backbone.io.console import UserError


def drop_idle(declared: type, values: Mapping[str, Any], requested: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out values that have no effect and were not requested, so that their defaults stand."""
    fields = list_fields(declared)
    all_values = {**{name: field.default for name, field in fields.items()}, **values}
    return {
        name: value
        for name, value in values.items()
        if name in requested or name not in fields or find_unmet(fields[name], all_values) is None
    }


def refuse_idle(settings: Any, requested: Mapping[str, Any]) -> None:
    """Raise `UserError` for a requested value without effect beside the other settings, even if it is the default.

    A value that switches a feature off (no, or an option's `off`) always has its effect.
    """
    fields = list_fields(type(settings))
    all_values = {name: getattr(settings, name) for name in fields}
    for name, value in requested.items():
        if name not in fields or _is_off(fields[name], value):
            continue
        condition = find_unmet(fields[name], all_values)
        if condition is not None:
            raise UserError(_describe_idle(fields[name], fields[condition[0]], condition[1]))


def _is_off(field: Field, value: Any) -> bool:
    """Whether a value is empty, or switches the feature off. A number is a value, 0 too, unless it is `off`."""
    if isinstance(value, (bool, str, tuple, list)) or value is None:
        return not value or value == field.option.off
    return field.option.off is not None and bool(value == field.option.off)


def require_packages(settings: Any) -> None:
    """`UserError` for a setting whose package is not installed, before any work is done."""
    for field in list_fields(type(settings)).values():
        value = getattr(settings, field.name)
        package = field.option.packages.get(value) if field.option.packages else None
        if package is not None and find_spec(package) is None:
            raise UserError(
                f"{field.flag} {value} needs the package {package}, which is not installed. Run: pip install {package}"
            )


def find_unmet(field: Field, values: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]] | None:
    """The first setting that keeps a field from having an effect, and the values it would need; None for none."""
    needs = field.option.needs
    first_unmet = None
    for alternative in (needs,) if isinstance(needs, Mapping) else needs:
        unmet = next(
            (
                (name, accepted)
                for name, accepted in alternative.items()
                if not _meets(values[name], accepted)
            ),
            None,
        )
        if unmet is None:
            return None
        first_unmet = first_unmet or unmet
    return first_unmet


def _meets(value: Any, accepted: tuple[Any, ...]) -> bool:
    return value in accepted if accepted else bool(value)


def _describe_idle(field: Field, needed_field: Field, accepted: tuple[Any, ...]) -> str:
    if accepted and not any(accepted):
        return f"{field.flag} has no effect with {needed_field.flag}. Leave out one of the two."
    choices = needed_field.option.choices
    if accepted and choices and not set(accepted) & set(choices):
        return f"{field.flag} has no effect here. Leave it out."
    value_text = " or ".join(map(str, accepted)) if accepted and accepted != (True,) else ""
    needed = (
        f"{needed_field.option.metavar or needed_field.name}"
        if needed_field.option.argument
        else f"{needed_field.flag} {value_text}".strip()
    )
    return f"{field.flag} has no effect without {needed}. Add that, or leave out {field.flag}."
