"""Settings declared once: a dataclass gives the command line, `--help`, config-file keys, and the repeating command.

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        steps: Annotated[int, Option("Optimiser steps.", "Training", aliases=("max-train-steps",), min=1)] = 400

    @command(app, Settings)
    def train(asked: dict[str, Any]) -> None: ...

`asked` holds the values that the user gave, by field name, and nothing else. A subclass that gives a field another
default keeps its parent's Option, and its `NEEDS` say when inherited fields have an effect. Where no default depends on
the model, the function gets the finished settings:

    @settled_command(app, SampleOptions)
    def sample(asked: SampleOptions) -> None: ...
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import re
import reprlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from datetime import date, time
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

import typer

from backbone.cli.config_file import read_mapping
from backbone.cli.help import ReadLater, hyphens
from backbone.cli.other_names import find_setting
from backbone.io.console import UserError, quote, refuse_address, refuse_other_encodings
from backbone.io.files import read_json
from backbone.io.records import RunRecord
from backbone.io.written import written_path

SHOWN = 12  # unknown keys of a file that a message lists
SHORT_CHOICES = 48  # characters of choices that stand behind an option's name; more are listed in its text
CONFIG_HELP = "Settings from a file: .yaml, .toml or .json; flags win over it."
RUNS_CONFIG_HELP = "Settings from a file: .yaml, .toml or .json, or a run's settings.json; flags win over it."
CHOOSE = " Choose one of them."
SHORT = reprlib.Repr()  # of a value in a message
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 80
Made = TypeVar("Made")


class UnknownSettingError(UserError):
    """A setting that does not exist."""


QUOTED = (bool, int, float, date, time)  # as which a file's values are read that have no quotes
PLACES = ("FOLDER", "FILE", "RUN", "MODEL", "IMAGE", "PICTURE", "PATH", "ADAPTER", "CLIP", "CLIPS", "PAIRS")


@dataclass(frozen=True)
class Option:
    """The metadata of one setting: help text, spellings, allowed values, and when it has an effect.

    flag          its name on the command line, where that is not the field's
    aliases       other spellings, accepted but not shown
    default_text  the default in words, where the value itself says little
    by_model      the default depends on the model, so the repeating command always names the value
    choices       the allowed values
    understood    turns what is said into what is meant: another tool's word into one of the choices (what it does not
                  know it gives back), a file with a prompt into its words
    needs         the other settings without which this one has no effect, each with the values that it needs (none:
                  any that is set); a tuple of such mappings for alternatives
    implies       other settings that this one sets, unless they are given
    switches      flags that set this one to a fixed value, as --use-dora sets --adapter dora
    words         values that set other settings instead, as --steps auto sets --patience
    argument      a positional argument
    off           the value that switches a feature off, allowed where the feature is off already
    packages      the optional package that a value needs, by value
    code          it may name a Python file, which will be run; refused when it comes from a config file alone
    joined        other options, with their help, whose values are appended to this one's with a +
    several       what to do in place of naming several, where one is taken
    """

    help: str
    panel: str
    flag: str = ""
    aliases: tuple[str, ...] = ()
    default_text: str = ""
    by_model: bool = False
    choices: tuple[str, ...] = ()
    understood: Callable[[str], str] | None = None
    min: float | None = None
    max: float | None = None
    needs: Mapping[str, tuple[Any, ...]] | tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    implies: Mapping[str, Any] = field(default_factory=dict)
    switches: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    off: Any = None
    packages: Mapping[str, str] = field(default_factory=dict)
    argument: bool = False
    hidden: bool = False
    code: bool = False
    joined: Mapping[str, str] = field(default_factory=dict)
    several: str = ""
    metavar: str = ""

    def is_place(self, kind: type) -> bool:
        """Whether its values are paths, or names in place of one."""
        return kind is Path or self.metavar in PLACES


@dataclass(frozen=True)
class Field:
    """A field with its Option, its type (of one value, where it holds several) and its default."""

    name: str
    kind: type
    many: bool
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """As it is written on the command line: `--learning-rate`."""
        return "--" + (self.option.flag or self.name).replace("_", "-")

    @property
    def spellings(self) -> tuple[str, ...]:
        """All its names in a config file, with underscores."""
        names = (self.name, self.flag[2:], *self.option.aliases)
        return tuple(dict.fromkeys(name.replace("-", "_") for name in names))


def fields_of(declared: type) -> dict[str, Field]:
    """The fields of a dataclass that have an Option, by name."""
    return _fields_of(declared)


@cache
def _fields_of(declared: Hashable) -> dict[str, Field]:
    assert isinstance(declared, type)
    options: dict[str, Option] = {}
    hints: dict[str, Any] = {}
    for parent in reversed([one for one in declared.__mro__ if dataclasses.is_dataclass(one)]):
        own = _own_hints(parent)
        hints |= own
        for name, hint in own.items():
            for extra in getattr(hint, "__metadata__", ()):
                if isinstance(extra, Option):
                    options[name] = extra
        for name, needs in parent.__dict__.get("NEEDS", {}).items():
            options[name] = dataclasses.replace(options[name], needs=needs)
    defaults = {one.name: one.default for one in dataclasses.fields(declared)}
    return {
        name: Field(name, *_kind_of(hints[name]), default, options[name])
        for name, default in defaults.items()
        if name in options
    }


@cache
def _own_hints(declared: Hashable) -> dict[str, Any]:
    """The types of the fields that a class itself declares, evaluated once for all its subclasses."""
    assert isinstance(declared, type)
    names = vars(import_module(declared.__module__))
    fields = {one.name for one in dataclasses.fields(declared)}
    said = inspect.get_annotations(declared)
    alone = SimpleNamespace(__annotations__={name: said[name] for name in said if name in fields})
    return get_type_hints(alone, names, include_extras=True)


def _kind_of(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether there are many: `tuple[str, ...]` holds many, `Path | None` one or none."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        return _kind_of(get_args(hint)[0])[0], True
    if get_origin(hint) is Literal:
        return str, False
    inner = next((one for one in get_args(hint) if one is not type(None)), None)
    return (hint, False) if inner is None else _kind_of(inner)


# The command line --------------------------------------------------------------------------------------------


def command(
    app: typer.Typer, declared: type, *others: type, panels: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of the app, with the options of these dataclasses and `--config FILE`.

    The function gets the values given for the first one's fields, as a dictionary, and instances of the others.
    `panels` is the order of the sections in `--help`. Raises `UserError`, when called, for values that do not fit.
    """

    def called(function: Callable[..., None], asked: dict[str, Any]) -> None:
        own, *more = (
            {name: value for name, value in asked.items() if name in fields_of(each)}
            for each in (declared, *others)
        )
        function(own, *(each(**values) for each, values in zip(others, more, strict=True)))

    def known() -> dict[str, Field]:
        return {name: one for each in (declared, *others) for name, one in fields_of(each).items()}

    return _register(app, known, panels, called, _parameters)


def settled_command(
    app: typer.Typer, declared: type, *, panels: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that gets an instance of this dataclass.

    Raises `UserError`, when called, for values that do not fit, are missing, or have no effect beside the others.
    """

    def called(function: Callable[..., None], asked: dict[str, Any]) -> None:
        for one in fields_of(declared).values():
            if one.default is MISSING and one.name not in asked:
                name = one.option.metavar if one.option.argument else one.flag
                raise UserError(f"{name} is missing. Give it: {one.option.help}")
        settings = build(declared, asked)
        refuse_idle(settings, asked)
        function(settings)

    def known() -> dict[str, Field]:
        """The command's own options, before those that it shares with others."""
        fields = fields_of(declared)
        own = [name for each in declared.__mro__ for name in inspect.get_annotations(each) if name in fields]
        return {name: fields[name] for name in own}

    return _register(app, known, panels, called, _settled_parameters)


def _register(
    app: typer.Typer,
    fields: Callable[[], Mapping[str, Field]],
    panels: Sequence[str],
    called: Callable[[Callable[..., None], dict[str, Any]], None],
    parameters: Callable[[Sequence[Field]], list[inspect.Parameter]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that makes a function a command with these fields, which are looked up when it is called.

    `called` hands it what was asked of them; `parameters` makes of them what typer reads.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def read() -> Callable[..., None]:
            known = fields()

            def run(config: str | None = None, **given: Any) -> None:
                asked = values_from_flags(given, known)
                if config is not None:
                    asked = {**values_from_file(written_path(config), known, asked), **asked}
                called(function, join_values(asked, given, known))

            run.__name__ = function.__name__
            run.__signature__ = inspect.Signature(parameters(_in_panels(known, panels)))  # type: ignore[attr-defined]
            return run

        def named() -> None: ...

        named.__doc__, named.__name__ = function.__doc__, function.__name__
        settings = {"token_normalize_func": hyphens}
        app.command(cls=cast(Any, partial(ReadLater, read)), context_settings=settings)(named)
        return function

    return register


def _in_panels(known: Mapping[str, Field], panels: Sequence[str]) -> list[Field]:
    """Positional arguments first, then options in the panels' order, the required ones at the top of each."""
    order = {panel: place for place, panel in enumerate(panels)}

    def place(one: Field) -> tuple[bool, int, bool]:
        needed = one.default is MISSING
        return not one.option.argument, order.get(one.option.panel, len(order)), not needed

    return sorted(known.values(), key=place)


def _parameters(fields: Sequence[Field], config_help: str = RUNS_CONFIG_HELP) -> list[inspect.Parameter]:
    """What typer reads: a parameter for every field, one for every switch, and `--config`."""
    parameters = [_parameter(one.name, *_type_field(one)) for one in fields]
    for one in fields:
        for switch in switches_of(one):
            info = typer.Option(
                "--" + hyphens(switch), help=one.option.help, rich_help_panel=one.option.panel, hidden=True
            )
            parameters.append(_parameter(_switch(one, switch), bool | None, info))
        for flag, text in one.option.joined.items():
            info = typer.Option("--" + flag, help=text, metavar="FILE", rich_help_panel=one.option.panel)
            parameters.append(_parameter(_switch(one, flag), str | None, info))
    help_of = typer.Option("--config", help=config_help, metavar="FILE", rich_help_panel="Output")
    return [*parameters, _parameter("config", str | None, help_of)]


def _settled_parameters(fields: Sequence[Field]) -> list[inspect.Parameter]:
    """The same, where what has no default is required: a plain word as such, an option here or in a file."""
    parameters = {one.name: one for one in _parameters(fields, CONFIG_HELP)}
    for one in fields:
        if one.default is MISSING and one.option.argument:
            hint, info = get_args(parameters[one.name].annotation)
            plain = next(part for part in get_args(hint) if part is not type(None))
            parameters[one.name] = parameters[one.name].replace(
                default=inspect.Parameter.empty, annotation=Annotated[plain, info]
            )
        elif one.default is MISSING:
            parameters[one.name].annotation.__metadata__[0].help += " [required]"
    return list(parameters.values())


def _parameter(name: str, hint: Any, info: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[hint, info])


def _type_field(one: Field) -> tuple[Any, Any]:
    """A field's type for typer, which only splits the command line, and its typer.Option."""
    option = one.option
    text = help_text(one)
    if option.argument:
        info = typer.Argument(help=text, metavar=option.metavar, show_default=False)
        return (list[str] | None if one.many else str | None), info
    names = [one.flag, *("--" + hyphens(name) for name in option.aliases)]
    takes = option.metavar or ("NAME" if _many_choices(one) else "|".join(option.choices))
    about: dict[str, Any] = {
        "help": text, "rich_help_panel": option.panel, "hidden": option.hidden, "show_default": False,
    }  # fmt: skip
    if one.kind is bool:
        both = f"{one.flag}/--no-{one.flag[2:]}"
        return bool | None, typer.Option(both if _can_be_on(one) else one.flag, *names[1:], **about)
    about["metavar"] = takes or {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(one.kind, "TEXT")
    if option.choices:
        about["autocompletion"] = lambda incomplete: [
            word for word in option.choices if word.startswith(incomplete)
        ]
    return (list[str] | None if one.many else str | None), typer.Option(*names, **about)


def help_text(one: Field) -> str:
    """An option's help, with its choices where they are many, and its default where it has one."""
    option, default = one.option, one.default
    said = option.default_text or ("by model" if option.by_model else "")
    if not said and not isinstance(default, bool) and default not in (MISSING, None, "", ()):
        values = default if one.many else (default,)
        said = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    text = f"{option.help} One of {', '.join(option.choices)}." if _many_choices(one) else option.help
    return f"{text} [default: {said}]" if said else text


def _many_choices(one: Field) -> bool:
    return len("|".join(one.option.choices)) > SHORT_CHOICES and not one.option.metavar


def _can_be_on(one: Field) -> bool:
    """Whether a yes or no is, or can be, yes where nothing is said, so that `--no-…` is shown."""
    return one.option.by_model or one.default is True


def switches_of(one: Field) -> dict[str, Any]:
    """The hidden flags that stand for a value of this field, `--no-…` of a plain yes among them."""
    plain = one.kind is bool and not _can_be_on(one)
    return {**one.option.switches, **({"no-" + one.flag[2:]: False} if plain else {})}


def _switch(one: Field, switch: str) -> str:
    return f"{one.name}_as_{switch}".replace("-", "_")


# Values ------------------------------------------------------------------------------------------------------


class _Said(dict[str, Any]):
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

    def with_implied(self) -> _Said:
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
    said = _Said(known)
    for one in known.values():
        value = given.get(one.name)
        if value is not None:
            said.read(one, value, one.option.metavar if one.option.argument else one.flag)
        for switch, meant in switches_of(one).items():
            if given.get(_switch(one, switch)):
                said.put(one.name, meant, "--" + hyphens(switch))
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
            value = given.get(_switch(one, flag))
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
    said = _Said(known, path, record=record)
    names = {name: one for one in known.values() for name in one.spellings}
    switches = {
        hyphens(name): (one, meant) for one in known.values() for name, meant in one.option.switches.items()
    }
    unknown: list[str] = []
    for key, value in (data["settings"] if record else _join_sections(data, names, path)).items():
        one = names.get(str(key).replace("-", "_"))
        if one is not None:
            if one.option.code:
                _refuse_code(one, value, path, flags)
            said.read(one, value, str(key))
        elif hyphens(str(key)) in switches and isinstance(value, bool):
            one, meant = switches[hyphens(str(key))]
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


def is_code(value: Any) -> bool:
    """Whether a value is the name of a Python file."""
    return isinstance(value, str) and Path(value).suffix == ".py"


def convert_value(one: Field, value: Any, name: str, file: str | Path | None = None) -> Any:
    """A value as the field wants it; `UserError`, with the flag or with the file and its key, where it does not fit."""
    where = f"{name} in {file}" if file else name
    if type(value) is type(one.default) and value == one.default:
        return value  # also where it stands for something else, as 0 for all
    if one.many:
        values = _as_list(value)
        fits = (int, float, str) if one.kind in (int, float) else (str, Path)
        if values is None or not all(isinstance(part, fits) for part in values):
            raise UserError(f"{where} is not a list of texts ({SHORT.repr(value)}). Put each in quotes.")
        return tuple(_convert_one(one, part, where) for part in values)
    return _convert_one(one, value, where)


def _as_list(value: Any) -> list[Any] | None:
    """The values of a field that holds many: one, several, or a dict's as key=value; None for what is neither."""
    value = _written(value)
    if isinstance(value, (str, int, float, Path)):
        return [value]
    if isinstance(value, Mapping):
        return [f"{key}={_written(part)}" for key, part in value.items()]
    return (
        list(map(_written, value)) if isinstance(value, Iterable) and not isinstance(value, bytes) else None
    )


def _written(value: Any) -> Any:
    """A value from Python as it is written: a scalar of numpy or torch, a run's folder, a torch.device."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, os.PathLike) and not isinstance(value, Path):
        return os.fsdecode(value)
    if type(value).__module__ == "torch" and type(value).__name__ in ("device", "dtype"):
        return str(value).removeprefix("torch.")
    return value


def _convert_one(one: Field, value: Any, where: str) -> Any:
    """One value, also of a field that holds many."""
    value = _written(value)
    if one.kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where} is {SHORT.repr(value)}. Write true or false.")
        return value
    if one.kind in (int, float):
        return _number(one, value, where)
    if not isinstance(value, (str, Path)):
        raise _no_text(one, value, where)
    refuse_other_encodings(str(value), f"{where} is ")
    if one.option.choices:
        return _choice(one, str(value), where)
    if one.option.understood:
        return one.option.understood(str(value))
    # A shell leaves ~ alone behind `--out=` and in files
    return written_path(value) if one.kind is Path else one.kind(value)


def _no_text(one: Field, value: Any, where: str) -> UserError:
    """What to say of a value that is no text: of a list that one is taken, unless it is a text in brackets, as [V]."""
    if not isinstance(value, (list, tuple)):
        remedy = "Put it in quotes." if isinstance(value, QUOTED) else "Give text."
        if one.option.is_place(one.kind) and remedy == "Give text.":
            remedy = "Give a name or a path; what is in memory is saved first."
        return UserError(f"{where} is {SHORT.repr(value)}, which is no text. {remedy}")
    shown = f"{where} is a list ({SHORT.repr(value)})"
    if len(value) == 1 and not isinstance(value[0], (str, Path)):
        return _no_text(one, value[0], f"{where} is a list, and what is in it")
    if len(value) == 1 and not one.option.is_place(one.kind):
        return UserError(f'{shown}. If it is a text in brackets, put it in quotes: "[{value[0]}]".')
    if len(value) == 1:
        return UserError(f"{shown}, and one is taken. Write it without brackets.")
    return UserError(f"{shown}, and one is taken. {one.option.several or 'Give one.'}")


def _number(one: Field, value: Any, where: str) -> Any:
    option, whole = one.option, one.kind is int
    try:
        if isinstance(value, bool) or (whole and not isinstance(value, str) and value != int(value)):
            raise ValueError
        number = one.kind(value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        words = "".join(f" or {word}" for word in option.words)
        what = "a whole number" if whole else "a number"
        shown = value if isinstance(value, str) and len(value) <= SHORT.maxstring else SHORT.repr(value)
        raise UserError(
            f"{where} is {shown}, which is not {what}{words}. {_as_written_elsewhere(shown, whole)}"
        ) from error
    below = option.min is not None and number < option.min
    above = option.max is not None and number > option.max
    if (below or above) and option.min is not None and option.max is not None:
        raise UserError(f"{where} is {value} and must lie between {option.min:g} and {option.max:g}.")
    if option.min is not None and below:
        raise UserError(f"{where} is {value}; it is at least {option.min:g}.")
    if option.max is not None and above:
        raise UserError(f"{where} is {value}; it is at most {option.max:g}.")
    return number


def _as_written_elsewhere(text: str, whole: bool) -> str:
    """What to do about text that is no number: 0,5 and 1.000 are numbers as other countries write them."""
    if whole and re.fullmatch(r"\d{1,3}([.,]\d{3})+", text):
        return f"Write it without marks: {re.sub('[.,]', '', text)}."
    if not whole and re.fullmatch(r"[+-]?\d*,\d+", text):
        return f"Write it with a point: {text.replace(',', '.')}."
    return "Give one."


_NOTHING = ("off", "none", "no")
# Words for a choice elsewhere → what they may be here
_SAME = {
    **dict.fromkeys(("false", "no", "none", "off", "0", "disabled"), _NOTHING),
    **dict.fromkeys(("float16", "half", "16"), ("fp16",)),
    **dict.fromkeys(("bfloat16", "bf-16"), ("bf16",)),
    **dict.fromkeys(("float32", "float", "full", "32"), ("fp32",)),
    **dict.fromkeys(("4bit", "4-bit", "4", "int4", "fp4"), ("nf4",)),
    **dict.fromkeys(("8-bit", "8", "int8"), ("8bit",)),
}


def _choice(one: Field, value: str, where: str) -> str:
    meant = one.option.understood(value) if one.option.understood else value
    for word in one.option.choices:
        if meant.lower().replace("_", "-") == word:
            return word
    known = _SAME.get(value.lower(), ())
    same = next((word for word in known if word in one.option.choices), "")
    if known == _NOTHING and not same and one.default == "":
        raise UserError(f"{where} is {value}, which it is where nothing is said. Leave it out.")
    meant = f" That is {same} here." if same else find_nearest(value, one.option.choices)
    raise UserError(f"{where} is {value}, which is none of {', '.join(one.option.choices)}.{meant}")


def find_meant(key: str, known: Sequence[str]) -> str:
    """What a key that is not known may have meant, as another program's name or misspelt, to follow a sentence."""
    name, more = find_setting(key, known)
    return f" That is {name} here.{more}" if name else find_nearest(key, known)


def find_nearest(word: str, known: Sequence[str]) -> str:
    """“ Did you mean …?”, to follow a sentence; what else there is to say where nothing is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f" Did you mean {near[0]}?" if near else CHOOSE if len(known) < 12 else ""


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


def fit_given(declared: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given by keyword, as flags are read: None left out, words and implied settings put in.

    What no field has stays, to be refused. Raises `UserError`, naming the argument, for what does not fit its field,
    and for two that contradict each other.
    """
    known = fields_of(declared)
    asked = {name: value for name, value in given.items() if value is not None}
    said = _Said(known)
    for name in [name for name in known if name in asked]:
        value = asked.pop(name)
        if isinstance(value, str) and value == known[name].default:
            said.put(name, value, name)  # also where it is empty
        else:
            said.read(known[name], value, name)
    return {**said.with_implied(), **asked}


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
        kind, many = _kind_of(hint)
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


def part(declared: type[Made], settings: Any) -> Made:
    """A dataclass with the values that other settings, which hold its fields among theirs, have for them."""
    return declared(**{one.name: getattr(settings, one.name) for one in dataclasses.fields(declared)})  # type: ignore[arg-type]


# Settings that have no effect --------------------------------------------------------------------------------


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


# Saying them again -------------------------------------------------------------------------------------------


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
        words += [f"--{hyphens(name)} {quote(str(value))}"]
    return " ".join(words)


def _words(one: Field, value: Any) -> list[str]:
    if one.option.argument:
        return [quote(str(part)) for part in (value if one.many else [value])]
    if one.kind is bool:
        return [one.flag if value else "--no-" + one.flag[2:]]
    return [f"{one.flag} {quote(str(part))}" for part in (value if one.many else [value])]
