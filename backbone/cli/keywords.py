"""Settings as keywords: a Python function takes the fields of a dataclass as keywords, as a command takes options.

    @takes(SDEditSettings)
    def sdedit(model: Backbone, image: ImageLike, prompt: str, **settings: Any) -> Result:
        options = build(SDEditSettings, settings)

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
Options = TypeVar("Options")


def takes(*kinds: type, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Show the fields of these dataclasses, except those `without`, in place of a function's `**settings`."""

    def show(function: Function) -> Function:
        signature = inspect.signature(function)
        *explicit, var_keyword = signature.parameters.values()
        assert var_keyword.kind is inspect.Parameter.VAR_KEYWORD
        parameters = {field.name: field for field in explicit}
        for kind in kinds:
            hints = get_type_hints(kind)
            for field in dataclasses.fields(kind):
                if field.name not in parameters and field.name not in without:
                    parameters[field.name] = _make_parameter(field, hints[field.name])
        function.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
        function.settings_classes = kinds  # type: ignore[attr-defined]
        return function

    return show


def build_drawing_options(
    kind: Callable[..., Options], settings: Mapping[str, Any], concepts: Sequence[Any]
) -> Options:
    """The settings for drawing with these concepts (run folders); None stands for the default.

    Raises `UserError`, naming the argument, for a value that is unknown, does not fit, or has no effect.
    """
    if "concepts" in settings:
        raise UserError("There is no setting concepts. Give the run folders as concept.")
    keywords = {name: value for name, value in settings.items() if value is not None}
    runs = tuple(Path(str(concept)) for concept in concepts)
    options = build(kind, {"concepts": runs, **keywords})
    refuse_idle(options, keywords)
    return options


def out_folder(out: object) -> Path | None:
    """The path of a folder to write, or None; `UserError` for an empty path, and for anything but a path."""
    if out is None:
        return None
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise UserError(f"out is {str(out)[:60]!r}, which names no folder. Name one, or leave it out.")
    return written_path(os.fsdecode(out))


def model_path(model: object, name: str) -> str:
    """The name or path of a model or a run; `UserError`, which names the argument, for anything else."""
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise UserError(
            f"{name} is {str(model)[:80]!r}, which is no model and no run. Give its name or path."
        )
    return os.fsdecode(model)


def run_folders(runs: object) -> tuple[Path, ...]:
    """The run folders, from None, one or several; `UserError` for anything but paths and runs."""
    values = () if runs is None else as_tuple(runs)
    for value in values:
        if not isinstance(value, (str, os.PathLike)):
            raise UserError(f"concept is {type(value).__name__}, which is no run folder. Give its path.")
        if not os.fspath(value):
            raise UserError("concept is empty. Name a run folder, or leave it out.")
    return tuple(Path(os.fsdecode(value)) for value in values)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple of one value or of several; a text or a path is one."""
    is_single = isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Iterable)
    return (value,) if is_single else tuple(value)


def parse_vram(vram: object) -> float | None:
    """A device's memory in GiB, or None; `UserError` for anything but a number above 0."""
    if vram is None:
        return None
    if isinstance(vram, bool) or not isinstance(vram, Real) or not 0 < float(vram) < math.inf:
        raise UserError(f"vram is {vram!r}, which is no number of GiB. Give one above 0.")
    return float(vram)


def _make_parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=hint,
    )
