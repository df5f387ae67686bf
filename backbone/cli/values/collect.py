"""Collect values by field from flags, a file or keywords; two that contradict each other are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from backbone.cli.options import Field, hyphenate, list_fields, list_switches, name_switch
from backbone.cli.other_names import find_setting, suggest_setting
from backbone.cli.values.config_file import read_mapping
from backbone.cli.values.convert import convert_value, is_code
from backbone.cli.values.effects import find_unmet
from backbone.io.console import UserError, refuse_address

MOST_LISTED = 12  # unknown keys of a file that a message lists


class _FieldValues(dict[str, Any]):
    """Values by field. Setting one twice to different values is an error."""

    def __init__(
        self, fields: Mapping[str, Field], file: Path | None = None, *, is_record: bool = False
    ) -> None:
        self.fields, self.file, self.is_record = fields, file, is_record
        self.sources: dict[str, str] = {}  # the flag or key that each value comes from

    def put(self, name: str, value: Any, source: str) -> None:
        """Set a value that comes from this flag or key; `UserError` if another one has set a different value."""
        if name in self and self[name] != value:
            place = f" in {self.file}" if self.file else ""
            raise UserError(
                f"{self.sources[name]} and {source}{place} say different things. Leave out one of the two."
            )
        self[name], self.sources[name] = value, source

    def read(self, field: Field, value: Any, name: str) -> None:
        """Convert and set a value of this flag or key, or the settings that it stands for."""
        if isinstance(value, str) and value in field.option.words:
            for other, setting in field.option.words[value].items():
                self.put(other, setting, f"{name} {value}")
            return
        values = value if field.many and isinstance(value, (list, tuple)) else [value]
        for part in values:
            if isinstance(part, str) and field.option.is_place(field.kind):
                refuse_address(part)
        is_empty = any(isinstance(part, str) and not part.strip() for part in values)
        label = f"{name} in {self.file}" if self.file else name
        is_explicit = not self.is_record and (self.file is None or value != field.default)
        if is_explicit and is_empty and field.option.is_place(field.kind):
            # An empty path would be the working folder; a shell variable that was never set is empty
            raise UserError(f"{label} is empty. Name one, or leave it out.")
        if value is None and not self.is_record and field.default is not None:
            raise UserError(f"{label} is empty. Give a value, or leave it out.")
        self.put(field.name, convert_value(field, value, name, self.file), name)

    def add_implied(self) -> _FieldValues:
        """Add the values that others imply, if they are not set."""
        for name in list(self):
            for other, value in self.fields[name].option.implies.items() if self[name] else ():
                if other not in self:
                    self.put(other, value, self.sources[name])
        return self


def values_from_flags(parsed: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The values by field from typer's parameters, without None and switches that are off.

    Raises `UserError` for a value that does not fit, and for two flags that contradict each other.
    """
    values = _FieldValues(fields)
    for field in fields.values():
        value = parsed.get(field.name)
        if value is not None:
            values.read(field, value, field.option.metavar if field.option.argument else field.flag)
        for switch, setting in list_switches(field).items():
            if parsed.get(name_switch(field, switch)):
                values.put(field.name, setting, "--" + hyphenate(switch))
    return dict(values.add_implied())


def join_values(
    requested: Mapping[str, Any], parsed: Mapping[str, Any], fields: Mapping[str, Field]
) -> dict[str, Any]:
    """The requested values, each with the values of its joined options appended.

    Raises `UserError` for a joined option without the value that it belongs to.
    """
    joined = dict(requested)
    for field in fields.values():
        for flag in field.option.joined:
            value = parsed.get(name_switch(field, flag))
            if value is not None and field.name not in joined:
                raise UserError(f"--{flag} belongs to the file that {field.flag} names. Give both.")
            if value is not None:
                joined[field.name] = f"{joined[field.name]}+{value}"
    return joined


def values_from_file(path: Path, fields: Mapping[str, Field], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values by field from a settings file, or from a run's `settings.json`.

    Values of a run's record that have no effect beside the flags are left out; those that a person wrote stay, to be
    refused. Raises `UserError`, with the file and the key, for unknown keys and values that do not fit.
    """
    data = read_mapping(path)
    is_record = isinstance(data.get("settings"), dict) and "command" in data
    values = _FieldValues(fields, path, is_record=is_record)
    names = {name: field for field in fields.values() for name in field.spellings}
    switches = {
        hyphenate(name): (field, setting)
        for field in fields.values()
        for name, setting in field.option.switches.items()
    }
    unknown: list[str] = []
    for key, value in (data["settings"] if is_record else _join_sections(data, names, path)).items():
        field = names.get(str(key).replace("-", "_"))
        if field is not None:
            if field.option.code:
                _refuse_code(field, value, path, flags)
            values.read(field, value, str(key))
        elif hyphenate(str(key)) in switches and isinstance(value, bool):
            field, setting = switches[hyphenate(str(key))]
            if value:
                values.put(field.name, setting, str(key))
        else:
            unknown.append(str(key))
    if unknown:
        _refuse_unknown(path, unknown, [*names, *switches])
    if not is_record:
        return dict(values.add_implied())
    all_values = {**{field.name: field.default for field in fields.values()}, **values, **flags}
    return {name: value for name, value in values.items() if find_unmet(fields[name], all_values) is None}


def _join_sections(data: Mapping[str, Any], names: Mapping[str, Field], path: Path) -> dict[str, Any]:
    """The keys of a TOML file and of its sections in one; sections' names mean nothing, as in kohya's trainers."""
    if path.suffix.lower() != ".toml":
        return dict(data)
    joined: dict[str, Any] = {}
    for name, value in data.items():
        field = names.get(name.replace("-", "_"))  # [rank_pattern] is one, of many values; [model] is none
        is_section = isinstance(value, dict) and not (field is not None and field.many)
        for key, inner in value.items() if is_section else ((name, value),):
            if key in joined:
                raise UserError(f"{path} says {key} in two sections. Keep one.")
            joined[key] = inner
    return joined


def _refuse_unknown(path: Path, keys: Sequence[str], names: Sequence[str]) -> NoReturn:
    """Raise `UserError` for the unknown keys of a file, with suggestions."""
    if len(keys) == 1:
        raise UserError(f"{path} has an unknown key {keys[0]}.{suggest_setting(keys[0], names)}")
    key_list = ", ".join(keys[:MOST_LISTED]) + (" …" if len(keys) > MOST_LISTED else "")
    translations = [f"{key} is {name} here" for key in keys if (name := find_setting(key, names)[0])]
    remedy = "Leave them out."
    if translations:
        remedy = (
            f"{', '.join(translations)}.{' Leave the others out.' if len(translations) < len(keys) else ''}"
        )
    raise UserError(f"{path} has {len(keys)} unknown keys ({key_list}), which would have no effect. {remedy}")


def values_from_keywords(declared: type, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The values from keywords, read as flags are: without None, with the settings that words stand for and imply.

    Unknown keywords stay, to be refused. Raises `UserError`, naming the argument, for a value that does not fit its
    field, and for two that contradict each other.
    """
    fields = list_fields(declared)
    remaining = {name: value for name, value in keywords.items() if value is not None}
    values = _FieldValues(fields)
    for name in [name for name in fields if name in remaining]:
        value = remaining.pop(name)
        if isinstance(value, str) and value == fields[name].default:
            values.put(name, value, name)  # even an empty one
        else:
            values.read(fields[name], value, name)
    return {**values.add_implied(), **remaining}


def _refuse_code(field: Field, value: Any, path: Path, flags: Mapping[str, Any]) -> None:
    """Raise `UserError` for a Python file that is named in a settings file but not on the command line."""
    flag_value = flags.get(field.name, ())
    allowed = (flag_value,) if isinstance(flag_value, str) else flag_value
    for word in value if isinstance(value, (list, tuple)) else [value]:
        if is_code(word) and word not in allowed:
            raise UserError(
                f"{path} names the Python file {word}, which would be run. If you trust it, name it yourself: "
                f"{field.flag} {word}"
            )
