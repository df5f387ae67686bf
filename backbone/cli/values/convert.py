"""One value of a setting as its field wants it: its type, its range, its choices."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

from backbone.cli.options import Field
from backbone.cli.other_names import find_nearest
from backbone.io.console import UserError, notify_once, refuse_other_encodings
from backbone.io.written import written_path

SHORT = reprlib.Repr()  # of a value in a message
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 80
QUOTED = (bool, int, float, date, time)  # as which a file's values are read that have no quotes


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
        return _convert_number(one, value, where)
    if not isinstance(value, (str, Path)):
        raise _explain_no_text(one, value, where)
    refuse_other_encodings(str(value), f"{where} is ")
    if one.option.choices:
        return _convert_choice(one, str(value), where)
    if one.option.understood:
        return one.option.understood(str(value))
    # A shell leaves ~ alone behind `--out=` and in files
    return written_path(value) if one.kind is Path else one.kind(value)


def _explain_no_text(one: Field, value: Any, where: str) -> UserError:
    """What to say of a value that is no text: of a list that one is taken, unless it is a text in brackets, as [V]."""
    if not isinstance(value, (list, tuple)):
        remedy = "Put it in quotes." if isinstance(value, QUOTED) else "Give text."
        if one.option.is_place(one.kind) and remedy == "Give text.":
            remedy = "Give a name or a path; what is in memory is saved first."
        return UserError(f"{where} is {SHORT.repr(value)}, which is no text. {remedy}")
    shown = f"{where} is a list ({SHORT.repr(value)})"
    if len(value) == 1 and not isinstance(value[0], (str, Path)):
        return _explain_no_text(one, value[0], f"{where} is a list, and what is in it")
    if len(value) == 1 and not one.option.is_place(one.kind):
        return UserError(f'{shown}. If it is a text in brackets, put it in quotes: "[{value[0]}]".')
    if len(value) == 1:
        return UserError(f"{shown}, and one is taken. Write it without brackets.")
    return UserError(f"{shown}, and one is taken. {one.option.several or 'Give one.'}")


def _convert_number(one: Field, value: Any, where: str) -> Any:
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
        remedy = _as_written_elsewhere(shown, whole)
        raise UserError(f"{where} is {shown}, which is not {what}{words}. {remedy}") from error
    below = option.min is not None and number < option.min
    above = option.max is not None and number > option.max
    if (below or above) and option.min is not None and option.max is not None:
        raise UserError(f"{where} is {value} and must lie between {option.min:g} and {option.max:g}.")
    if option.min is not None and below:
        raise UserError(f"{where} is {value}; it is at least {option.min:g}.")
    if option.max is not None and above:
        raise UserError(f"{where} is {value}; it is at most {option.max:g}.")
    if one.name == "seed" and number == -1:  # elsewhere that means another each time
        notify_once(f"{where} is -1, which is a seed like any other here: the same again gives the same.")
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


def _convert_choice(one: Field, value: str, where: str) -> str:
    meant = one.option.understood(value) if one.option.understood else value
    for word in one.option.choices:
        if meant.lower().replace("_", "-") == word:
            return word
    known = _SAME.get(value.lower(), ())
    same = next((word for word in known if word in one.option.choices), "")
    if known == _NOTHING and not same and one.default == "":
        raise UserError(f"{where} is {value}, which is the default. Leave it out.")
    meant = f" That is {same} here." if same else find_nearest(value, one.option.choices)
    raise UserError(f"{where} is {value}, which is none of {', '.join(one.option.choices)}.{meant}")


def is_code(value: Any) -> bool:
    """Whether a value is the name of a Python file."""
    return isinstance(value, str) and Path(value).suffix == ".py"
