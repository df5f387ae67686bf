"""Convert one value of a setting to its field's type, and check its range and choices."""

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
PAIR = re.compile(r"[1-9]\d*\s*[,x×*]\s*[1-9]\d*", re.IGNORECASE)  # of a width and a height
QUOTED = (bool, int, float, date, time)  # types that values without quotes in a file may get


def convert_value(field: Field, value: Any, name: str, file: str | Path | None = None) -> Any:
    """A value converted to the field's type. Raises `UserError`, with the flag or the file and its key, for another."""
    label = f"{name} in {file}" if file else name
    if type(value) is type(field.default) and value == field.default:
        return value  # even outside the range, as 0 that stands for all
    if field.many:
        values = _as_list(value)
        fits = (int, float, str) if field.kind in (int, float) else (str, Path)
        if values is None or not all(isinstance(part, fits) for part in values):
            raise UserError(f"{label} is not a list of texts ({SHORT.repr(value)}). Put each in quotes.")
        return tuple(_convert_one(field, part, label) for part in values)
    return _convert_one(field, value, label)


def _as_list(value: Any) -> list[Any] | None:
    """The values of a field that holds many: one value, several, or a dict's as key=value; None for anything else."""
    value = _unwrap(value)
    if isinstance(value, (str, int, float, Path)):
        return [value]
    if isinstance(value, Mapping):
        return [f"{key}={_unwrap(part)}" for key, part in value.items()]
    return list(map(_unwrap, value)) if isinstance(value, Iterable) and not isinstance(value, bytes) else None


def _unwrap(value: Any) -> Any:
    """A plain value in place of a scalar of numpy or torch, a path-like object, or a torch.device or dtype."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, os.PathLike) and not isinstance(value, Path):
        return os.fsdecode(value)
    if type(value).__module__ == "torch" and type(value).__name__ in ("device", "dtype"):
        return str(value).removeprefix("torch.")
    return value


def _convert_one(field: Field, value: Any, label: str) -> Any:
    """Convert one value; `label` names it in messages."""
    value = _unwrap(value)
    if field.kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{label} is {SHORT.repr(value)}. Write true or false.")
        return value
    if field.kind in (int, float):
        return _convert_number(field, value, label)
    if not isinstance(value, (str, Path)):
        raise _explain_no_text(field, value, label)
    refuse_other_encodings(str(value), f"{label} is ")
    if field.option.choices:
        return _convert_choice(field, str(value), label)
    if field.option.convert:
        return field.option.convert(str(value))
    # A shell leaves ~ alone behind `--out=` and in files
    return written_path(value) if field.kind is Path else field.kind(value)


def _explain_no_text(field: Field, value: Any, label: str) -> UserError:
    """The error for a value that is not text; a list may be a text in brackets without quotes, as [V]."""
    if not isinstance(value, (list, tuple)):
        remedy = "Put it in quotes." if isinstance(value, QUOTED) else "Give text."
        if field.option.is_place(field.kind) and remedy == "Give text.":
            remedy = "Give a name or a path; what is in memory is saved first."
        return UserError(f"{label} is {SHORT.repr(value)}, which is no text. {remedy}")
    start = f"{label} is a list ({SHORT.repr(value)})"
    if len(value) == 1 and not isinstance(value[0], (str, Path)):
        return _explain_no_text(field, value[0], f"{label} is a list, and what is in it")
    if len(value) == 1 and not field.option.is_place(field.kind):
        return UserError(f'{start}. If it is a text in brackets, put it in quotes: "[{value[0]}]".')
    if len(value) == 1:
        return UserError(f"{start}, and one is taken. Write it without brackets.")
    return UserError(f"{start}, and one is taken. {field.option.several or 'Give one.'}")


def _convert_number(field: Field, value: Any, label: str) -> Any:
    option, is_whole = field.option, field.kind is int
    try:
        if isinstance(value, bool) or (is_whole and not isinstance(value, str) and value != int(value)):
            raise ValueError
        number = field.kind(value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        words = "".join(f" or {word}" for word in option.words)
        kind = "a whole number" if is_whole else "a number"
        text = value if isinstance(value, str) and len(value) <= SHORT.maxstring else SHORT.repr(value)
        is_pair = is_whole and option.several and PAIR.fullmatch(text.strip("()[] "))
        remedy = option.several if is_pair else _suggest_number(text, is_whole)
        raise UserError(f"{label} is {text}, which is not {kind}{words}. {remedy}") from error
    below = option.min is not None and number < option.min
    above = option.max is not None and number > option.max
    if (below or above) and option.min is not None and option.max is not None:
        raise UserError(f"{label} is {value} and must lie between {option.min:g} and {option.max:g}.")
    if option.min is not None and below:
        raise UserError(f"{label} is {value}; it is at least {option.min:g}.")
    if option.max is not None and above:
        raise UserError(f"{label} is {value}; it is at most {option.max:g}.")
    if field.name == "seed" and number == -1:  # elsewhere that means another each time
        notify_once(f"{label} is -1, which is a seed like any other here: the same again gives the same.")
    return number


def _suggest_number(text: str, is_whole: bool) -> str:
    """The remedy for a text that is not a number; 0,5 and 1.000 are numbers as other countries write them."""
    if is_whole and re.fullmatch(r"\d{1,3}([.,]\d{3})+", text):
        return f"Write it without marks: {re.sub('[.,]', '', text)}."
    if not is_whole and re.fullmatch(r"[+-]?\d*,\d+", text):
        return f"Write it with a point: {text.replace(',', '.')}."
    return "Give one."


_OFF_WORDS = ("off", "none", "no")
# Other tools' words for a choice → what they may be here
_SYNONYMS = {
    **dict.fromkeys(("false", "no", "none", "off", "0", "disabled"), _OFF_WORDS),
    **dict.fromkeys(("float16", "half", "16"), ("fp16",)),
    **dict.fromkeys(("bfloat16", "bf-16"), ("bf16",)),
    **dict.fromkeys(("float32", "float", "full", "32"), ("fp32",)),
    "sigmoid": ("dpo",),  # of TRL, and of diffusers' script
    **dict.fromkeys(("4bit", "4-bit", "4", "int4", "fp4"), ("nf4",)),
    **dict.fromkeys(("8-bit", "8", "int8"), ("8bit",)),
}


def _convert_choice(field: Field, value: str, label: str) -> str:
    choice = field.option.convert(value) if field.option.convert else value
    for word in field.option.choices:
        if choice.lower().replace("_", "-") == word:
            return word
    synonyms = _SYNONYMS.get(value.lower(), ())
    synonym = next((word for word in synonyms if word in field.option.choices), "")
    if synonyms == _OFF_WORDS and not synonym and field.default == "":
        raise UserError(f"{label} is {value}, which is the default. Leave it out.")
    hint = f" That is {synonym} here." if synonym else find_nearest(value, field.option.choices)
    raise UserError(f"{label} is {value}, which is none of {', '.join(field.option.choices)}.{hint}")


def is_code(value: Any) -> bool:
    """Whether a value is the name of a Python file."""
    return isinstance(value, str) and Path(value).suffix == ".py"
