"""Settings as keywords: a Python function takes the fields of a dataclass one by one, as a command takes options.

    @takes(SDEditSettings)
    def sdedit(model: Backbone, image: ImageLike, prompt: str, **settings: Any) -> Result:
        asked = build(SDEditSettings, settings)

`help()` and a notebook's Tab show every field with its type and default.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from backbone.cli.values.build import build
from backbone.cli.values.effects import refuse_idle
from backbone.io.console import UserError
from backbone.io.written import written_path

Function = TypeVar("Function", bound=Callable[..., Any])
Made = TypeVar("Made")


def takes(*kinds: type, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Show the fields of these dataclasses in the place of a function's `**settings`, those `without` left out."""

    def show(function: Function) -> Function:
        own = inspect.signature(function)
        *named, rest = own.parameters.values()
        assert rest.kind is inspect.Parameter.VAR_KEYWORD
        found = {one.name: one for one in named}
        for kind in kinds:
            hints = get_type_hints(kind)
            for one in dataclasses.fields(kind):
                if one.name not in found and one.name not in without:
                    found[one.name] = _parameter(one, hints[one.name])
        function.__signature__ = own.replace(parameters=list(found.values()))  # type: ignore[attr-defined]
        function.taken = kinds  # type: ignore[attr-defined]
        return function

    return show


def build_drawing(kind: Callable[..., Made], settings: Mapping[str, Any], concepts: Sequence[Any]) -> Made:
    """The settings of drawing with these concepts (run folders), where None is as good as left out.

    Raises `UserError`, naming the argument, for what is not known, does not fit, or has no effect.
    """
    if "concepts" in settings:
        raise UserError("There is no setting concepts. Give the run folders as concept.")
    known = {name: value for name, value in settings.items() if value is not None}
    runs = tuple(Path(str(one)) for one in concepts)
    made = build(kind, {"concepts": runs, **known})
    refuse_idle(made, known)
    return made


def folder_of(out: object) -> Path | None:
    """A folder to write, None for none; `UserError` for what is no path. An empty one is no working folder."""
    if out is None:
        return None
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise UserError(f"out is {str(out)[:60]!r}, which names no folder. Name one, or leave it out.")
    return written_path(os.fsdecode(out))


def side_of(model: object, name: str) -> str:
    """A model or a run by its name or path; `UserError`, which names the argument, for what is neither."""
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise UserError(
            f"{name} is {str(model)[:80]!r}, which is no model and no run. Give its name or path."
        )
    return os.fsdecode(model)


def folders_of(runs: object) -> tuple[Path, ...]:
    """Run folders that were given as one, as several, or not at all; `UserError` for what is no path and no run."""
    given = () if runs is None else as_several(runs)
    for one in given:
        if not isinstance(one, (str, os.PathLike)):
            raise UserError(f"concept is {type(one).__name__}, which is no run folder. Give its path.")
        if not os.fspath(one):
            raise UserError("concept is empty. Name a run folder, or leave it out.")
    return tuple(Path(os.fsdecode(one)) for one in given)


def as_several(given: Any) -> tuple[Any, ...]:
    """What was given as one or several, as several; a text or a path is one."""
    alone = isinstance(given, (str, bytes, os.PathLike)) or not isinstance(given, Iterable)
    return (given,) if alone else tuple(given)


def memory_of(vram: object) -> float | None:
    """A device's memory in GiB, None for what is not planned; `UserError` for what is no number above 0."""
    if vram is None:
        return None
    if isinstance(vram, bool) or not isinstance(vram, Real) or not 0 < float(vram) < math.inf:
        raise UserError(f"vram is {vram!r}, which is no number of GiB. Give one above 0.")
    return float(vram)


def _parameter(one: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    default = one.default_factory() if one.default_factory is not MISSING else one.default
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=hint,
    )
