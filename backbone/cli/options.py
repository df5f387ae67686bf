"""Settings declared once: a dataclass gives the command line, `--help`, config-file keys, and the repeating command.

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        steps: Annotated[int, Option("Optimiser steps.", "Training", aliases=("max-train-steps",), min=1)] = 400

An `Option` says what a field takes; `list_fields` finds the fields of a dataclass that have one. A subclass that
gives a field another default keeps its parent's Option, and its `NEEDS` say when inherited fields have an effect. The
commands of such dataclasses are made in `command_line`; their values are read and checked in `values`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

PLACES = ("FOLDER", "FILE", "RUN", "MODEL", "IMAGE", "PICTURE", "PATH", "ADAPTER", "CLIP", "CLIPS", "PAIRS")


@dataclass(frozen=True)
class Option:
    """The metadata of one setting: help text, spellings, allowed values, and when it has an effect.

    flag          the name on the command line, if it differs from the field's
    aliases       other spellings, accepted but not shown
    default_text  the default in words, if the value itself says little
    by_model      the default depends on the model, so the repeating command always names the value
    choices       the allowed values
    convert       converts a value: another tool's word into one of the choices (unknown words are unchanged), a file
                  with a prompt into its words
    needs         the other settings without which this one has no effect, each with the values that it needs (none:
                  any that is set); a tuple of such mappings for alternatives
    implies       other settings that this one sets, unless they are given
    switches      flags that set this one to a fixed value, as --use-dora sets --adapter dora
    words         values that set other settings instead, as --steps auto sets --patience
    argument      a positional argument
    off           the value that switches a feature off, allowed if the feature is off already
    packages      the optional package that a value needs, by value
    code          a value may name a Python file, which is run; refused if only a config file names it
    joined        other options, with their help, whose values are appended to this one's with a +
    several       the remedy if several values are given and one is taken
    """

    help: str
    panel: str
    flag: str = ""
    aliases: tuple[str, ...] = ()
    default_text: str = ""
    by_model: bool = False
    choices: tuple[str, ...] = ()
    convert: Callable[[str], str] | None = None
    min: float | None = None
    max: float | None = None
    needs: Mapping[str, tuple[Any, ...]] | tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    implies: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    words: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    off: Any = None
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    argument: bool = False
    hidden: bool = False
    code: bool = False
    joined: Mapping[str, str] = dataclasses.field(default_factory=dict)
    several: str = ""
    metavar: str = ""

    def is_place(self, kind: type) -> bool:
        """Whether its values are paths, or names in place of one."""
        return kind is Path or self.metavar in PLACES


@dataclass(frozen=True)
class Field:
    """A dataclass field with its Option, the type of one value, whether it holds many, and its default."""

    name: str
    kind: type
    many: bool
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """Its name on the command line: `--learning-rate`."""
        return "--" + (self.option.flag or self.name).replace("_", "-")

    @property
    def spellings(self) -> tuple[str, ...]:
        """All its names in a config file, with underscores."""
        names = (self.name, self.flag[2:], *self.option.aliases)
        return tuple(dict.fromkeys(name.replace("-", "_") for name in names))


def list_fields(declared: type) -> dict[str, Field]:
    """The fields of a dataclass that have an Option, by name."""
    return _find_fields(declared)


@cache
def _find_fields(declared: Hashable) -> dict[str, Field]:
    assert isinstance(declared, type)
    options: dict[str, Option] = {}
    hints: dict[str, Any] = {}
    for parent in reversed([kind for kind in declared.__mro__ if dataclasses.is_dataclass(kind)]):
        own_hints = _own_hints(parent)
        hints |= own_hints
        for name, hint in own_hints.items():
            for metadata in getattr(hint, "__metadata__", ()):
                if isinstance(metadata, Option):
                    options[name] = metadata
        for name, needs in parent.__dict__.get("NEEDS", {}).items():
            options[name] = dataclasses.replace(options[name], needs=needs)
    defaults = {entry.name: entry.default for entry in dataclasses.fields(declared)}
    return {
        name: Field(name, *find_kind(hints[name]), default, options[name])
        for name, default in defaults.items()
        if name in options
    }


@cache
def _own_hints(declared: Hashable) -> dict[str, Any]:
    """The evaluated types of the fields that a class itself declares, cached for its subclasses."""
    assert isinstance(declared, type)
    names = vars(import_module(declared.__module__))
    fields = {entry.name for entry in dataclasses.fields(declared)}
    annotations = inspect.get_annotations(declared)
    namespace = SimpleNamespace(
        __annotations__={name: annotations[name] for name in annotations if name in fields}
    )
    return get_type_hints(namespace, names, include_extras=True)


def find_kind(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether a hint holds many: `tuple[str, ...]` does, `Path | None` does not."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        return find_kind(get_args(hint)[0])[0], True
    if get_origin(hint) is Literal:
        return str, False
    inner = next((kind for kind in get_args(hint) if kind is not type(None)), None)
    return (hint, False) if inner is None else find_kind(inner)


def can_be_on(field: Field) -> bool:
    """Whether a boolean option is or may be on by default, so that `--no-…` is shown."""
    return field.option.by_model or field.default is True


def list_switches(field: Field) -> dict[str, Any]:
    """The hidden flags that set this field to a value, with `--no-…` of an option that is off by default."""
    is_plain_switch = field.kind is bool and not can_be_on(field)
    return {**field.option.switches, **({"no-" + field.flag[2:]: False} if is_plain_switch else {})}


def name_switch(field: Field, switch: str) -> str:
    """The name of typer's parameter for a switch of this field."""
    return f"{field.name}_as_{switch}".replace("-", "_")


def hyphenate(name: str) -> str:
    """An option's name with hyphens in place of underscores."""
    return name.replace("_", "-")
