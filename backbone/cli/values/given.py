"""The values given by flags, in a file or by keyword, by field; two that contradict each other are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from backbone.cli.options import Field, fields_of, hyphenate, name_switch, switches_of
from backbone.cli.other_names import find_meant, find_setting
from backbone.cli.values.config_file import read_mapping
from backbone.cli.values.convert import convert_value, is_code
from backbone.cli.values.effects import find_unmet
from backbone.io.console import UserError, refuse_address

SHOWN = 12  # unknown keys of a file that a message lists


class _Given(dict[str, Any]):
    """Values by field, none of them said twice in different ways."""

    def __init__(self, known: Mapping[str, Field], file: Path | None = None, *, record: bool = False) -> None:
        self.known, self.file, self.record, self.by = known, file, record, dict[str, str]()

    def put(self, name: str, value: Any, by: str) -> None:
        if name in self and self[name] != value:
            where = f" in {self.file}" if self.file else ""
            raise UserError(
                f"{self.by[name]} and {by}{where} say different things. Leave out one of the two."
            )
        self[name], self.by[name] = value, by

    def read(self, one: Field, value: Any, name: str) -> None:
        """Put a value as it was written, or what it stands for."""
        if isinstance(value, str) and value in one.option.words:
            for other, meant in one.option.words[value].items():
                self.put(other, meant, f"{name} {value}")
            return
        values = value if one.many and isinstance(value, (list, tuple)) else [value]
        for part in values:
            if isinstance(part, str) and one.option.is_place(one.kind):
                refuse_address(part)
        empty = any(isinstance(part, str) and not part.strip() for part in values)
        where = f"{name} in {self.file}" if self.file else name
        said = not self.record and (self.file is None or value != one.default)
        if said and empty and one.option.is_place(one.kind):
            # An empty path is the working folder, and a variable of the shell that was never set is empty
            raise UserError(f"{where} is empty. Name one, or leave it out.")
        if value is None and not self.record and one.default is not None:
            raise UserError(f"{where} is empty. Give a value, or leave it out.")
        self.put(one.name, convert_value(one, value, name, self.file), name)

    def with_implied(self) -> _Given:
        """With what follows from what was said."""
        for name in list(self):
            for other, value in self.known[name].option.implies.items() if self[name] else ():
                if other not in self:
                    self.put(other, value, self.by[name])
        return self


def values_from_flags(given: Mapping[str, Any], known: Mapping[str, Field]) -> dict[str, Any]:
    """The values by field from what typer read, None and switches that are off left out.

    Raises `UserError` for a value that does not fit, and for two flags that contradict each other.
    """
    said = _Given(known)
    for one in known.values():
        value = given.get(one.name)
        if value is not None:
            said.read(one, value, one.option.metavar if one.option.argument else one.flag)
        for switch, meant in switches_of(one).items():
            if given.get(name_switch(one, switch)):
                said.put(one.name, meant, "--" + hyphenate(switch))
    return dict(said.with_implied())


def join_values(
    asked: Mapping[str, Any], given: Mapping[str, Any], known: Mapping[str, Field]
) -> dict[str, Any]:
    """What was asked with the values of joined options behind those that they belong to.

    Raises `UserError` for one without a value to follow.
    """
    joined = dict(asked)
    for one in known.values():
        for flag in one.option.joined:
            value = given.get(name_switch(one, flag))
            if value is not None and one.name not in joined:
                raise UserError(f"--{flag} belongs to the file that {one.flag} names. Give both.")
            if value is not None:
                joined[one.name] = f"{joined[one.name]}+{value}"
    return joined


def values_from_file(path: Path, known: Mapping[str, Field], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values by field from a settings file, or from a run's `settings.json`.

    Of a run's record what has no effect beside the flags is left out; what a person wrote stays, to be refused.
    Raises `UserError`, with the file and the key, for keys that are not known and values that do not fit.
    """
    data = read_mapping(path)
    record = isinstance(data.get("settings"), dict) and "command" in data
    said = _Given(known, path, record=record)
    names = {name: one for one in known.values() for name in one.spellings}
    switches = {
        hyphenate(name): (one, meant) for one in known.values() for name, meant in one.option.switches.items()
    }
    unknown: list[str] = []
    for key, value in (data["settings"] if record else _join_sections(data, names, path)).items():
        one = names.get(str(key).replace("-", "_"))
        if one is not None:
            if one.option.code:
                _refuse_code(one, value, path, flags)
            said.read(one, value, str(key))
        elif hyphenate(str(key)) in switches and isinstance(value, bool):
            one, meant = switches[hyphenate(str(key))]
            if value:
                said.put(one.name, meant, str(key))
        else:
            unknown.append(str(key))
    if unknown:
        _refuse_unknown(path, unknown, [*names, *switches])
    if not record:
        return dict(said.with_implied())
    every = {**{one.name: one.default for one in known.values()}, **said, **flags}
    return {name: value for name, value in said.items() if find_unmet(known[name], every) is None}


def _join_sections(data: Mapping[str, Any], names: Collection[str], path: Path) -> dict[str, Any]:
    """The keys of a TOML file with those of its sections, whose names say nothing, as kohya's trainers read theirs."""
    if path.suffix.lower() != ".toml":
        return dict(data)
    joined: dict[str, Any] = {}
    for name, value in data.items():
        section = isinstance(value, dict) and name.replace("-", "_") not in names
        for key, inner in value.items() if section else ((name, value),):
            if key in joined:
                raise UserError(f"{path} says {key} in two sections. Keep one.")
            joined[key] = inner
    return joined


def _refuse_unknown(path: Path, keys: Sequence[str], known: Sequence[str]) -> NoReturn:
    """Raise `UserError` for keys of a file that no option has: all of them, and what one alone may have meant."""
    if len(keys) == 1:
        raise UserError(f"{path} has an unknown key {keys[0]}.{find_meant(keys[0], known)}")
    shown = ", ".join(keys[:SHOWN]) + (" …" if len(keys) > SHOWN else "")
    here = [f"{key} is {name} here" for key in keys if (name := find_setting(key, known)[0])]
    remedy = "Leave them out."
    if here:
        remedy = f"{', '.join(here)}.{' Leave the others out.' if len(here) < len(keys) else ''}"
    raise UserError(f"{path} has {len(keys)} unknown keys ({shown}), which would have no effect. {remedy}")


def fit_given(declared: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given by keyword, as flags are read: None left out, words and implied settings put in.

    What no field has stays, to be refused. Raises `UserError`, naming the argument, for what does not fit its field,
    and for two that contradict each other.
    """
    known = fields_of(declared)
    asked = {name: value for name, value in given.items() if value is not None}
    said = _Given(known)
    for name in [name for name in known if name in asked]:
        value = asked.pop(name)
        if isinstance(value, str) and value == known[name].default:
            said.put(name, value, name)  # also where it is empty
        else:
            said.read(known[name], value, name)
    return {**said.with_implied(), **asked}


def _refuse_code(one: Field, value: Any, path: Path, flags: Mapping[str, Any]) -> None:
    """`UserError` for a Python file that a file of settings names, and the command line does not."""
    given = flags.get(one.name, ())
    named = (given,) if isinstance(given, str) else given
    for word in value if isinstance(value, (list, tuple)) else [value]:
        if is_code(word) and word not in named:
            raise UserError(
                f"{path} names the Python file {word}, which would be run. If you trust it, name it yourself: "
                f"{one.flag} {word}"
            )
