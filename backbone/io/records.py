"""Read JSON from any source: parse it, then check the type of every value.

    facts = read_as(dict[str, str], parse_json(text, "concept.json"), "concept.json")

Every fault of the text or of a value is a `UserError` that names the file and the key.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from backbone.io.console import UserError, shorten

DEEPEST = 64  # levels of nested lists and objects
# NULs and surrogates, or their escapes, in a JSON text
ODD = re.compile(r"[\0\ud800-\udfff]|\\u(0000|[dD][89a-fA-F])")
# In messages of the JSON, TOML and YAML parsers about a bad escape
_ESCAPE = re.compile(r"escape|hex value|Unescaped", re.IGNORECASE)
POINTER = b"version https://git-lfs"
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
UTF32 = b"\xff\xfe\0\0"
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes
LONGEST_SHOWN = 60  # characters of a value in a message
Kind = TypeVar("Kind")
NAMES = {
    str: "a text", int: "a whole number", float: "a finite number", bool: "true or false", list: "a list",
    dict: "an object", Path: "a path", NoneType: "null",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run's `settings.json`: the resolved settings, and the command that repeats the run."""

    settings: dict[str, Any]
    command: str = ""


def parse_json(
    text: str | bytes, source: str | Path, *, join: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value of a JSON text in UTF-8, with or without its byte order mark.

    `join` makes an object of its keys and values; by default a dict, in which the last of equal keys counts.

    `source` names the text in messages. Raises `UserError` for a text that is not JSON, for surrogates and NULs, which
    files and tokenizers do not take, and for more than DEEPEST levels.
    """
    if isinstance(text, bytes) and text.startswith(UTF16):
        raise UserError(f"{source} is not JSON (it is UTF-16 and not UTF-8 text). Save it as UTF-8.")
    refuse_pointer(text, source)
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=join)
    except (ValueError, RecursionError) as error:  # also not UTF-8, a number of thousands of digits, too deep
        reason = _reason(error)
        raise UserError(
            f"{source} is not JSON ({reason}). {suggest_repair(reason, 'Repair or delete it.')}"
        ) from error
    # Not always: a tokenizer has a hundred thousand texts.
    return check_parsed(value, f"{source} is not JSON") if ODD.search(decoded) or _is_deep(value) else value


def is_pointer(text: str | bytes) -> bool:
    """Whether a file's start is that of a Git LFS pointer, which git leaves in a clone without LFS."""
    return text.startswith(POINTER) if isinstance(text, bytes) else text.startswith(POINTER.decode())


def refuse_pointer(text: str | bytes, source: str | Path) -> None:
    """Raise `UserError` for a Git LFS pointer in place of a text or a table."""
    if is_pointer(text):
        raise UserError(f"{source} is a Git LFS pointer, not the file itself. Run `git lfs pull` beside it.")


def suggest_repair(reason: str, default: str = "Repair it.") -> str:
    """The remedy for a text that a parser refused with this message, which may be about a Windows path."""
    return "Write \\ in paths twice, or as /." if _ESCAPE.search(reason) else default


def refuse_pipe(path: str | Path) -> None:
    """Raise `UserError` for a pipe or a device, since reading it may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a pipe or a device, not a file. Name a file.")


def read_text(path: str | Path) -> str:
    """Read a text file: UTF-8 with or without a byte order mark, or UTF-16 with one, as Excel's “Unicode Text”.

    Raises `UserError` for another encoding, and for a pipe.
    """
    refuse_pipe(path)
    with open(path, "rb") as file:
        encoding = _detect_encoding(file.read(4))
    try:
        text = Path(path).read_text(encoding=encoding)
    except UnicodeError as error:
        expected = "UTF-8 text" if encoding != "utf-16" else "whole UTF-16 text"
        raise UserError(f"{path} is not {expected}. Save it as UTF-8.") from error
    refuse_pointer(text, path)
    return text


def _detect_encoding(start: bytes) -> str:
    """The encoding, by a text's first four bytes; UTF-32, whose mark begins with that of UTF-16, is not read."""
    return "utf-16" if start.startswith(UTF16) and not start.startswith(UTF32) else "utf-8-sig"


def join_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A `join` for files of users: the dict of keys and values; `ValueError` for a repeated key."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = next(key for key in mapping if sum(key == other_key for other_key, _ in pairs) > 1)
        raise ValueError(f"the key {twice[:LONGEST_SHOWN]} stands there twice")
    return mapping


def iterate_entries(text: str | bytes, path: str | Path) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines or of a JSON array, each with its source: `Line 3 of PATH`.

    For a line that is not JSON, or has a repeated key, the value is a `UserError`. Raises `UserError` for an incomplete
    array, for incomplete UTF-16, and for one object over several lines.
    """
    if isinstance(text, bytes) and _detect_encoding(text[:4]) == "utf-16":
        try:
            text = text.decode("utf-16")
        except UnicodeError as error:
            raise UserError(f"{path} is not whole UTF-16 text. Save it as UTF-8.") from error

    # The first line says whether this is one array over several lines
    lines: list[Any] = text.split(b"\n") if isinstance(text, bytes) else text.split("\n")
    nonempty = [line for line in lines if line.strip()]
    head = text[:256]
    start = (head if isinstance(head, str) else head.removeprefix(b"\xef\xbb\xbf").decode("latin-1")).lstrip()
    if start[:1] == "[" and not (nonempty[1:] and _is_json(nonempty[0])):
        values = cast(list[Any], parse_json(text, path, join=join_once))
        if str(path).lower().endswith(".json") or any(isinstance(value, dict) for value in values):
            for number, value in enumerate(values, start=1):
                yield f"Entry {number} of {path}", value
            return
    if start[:1] == "{" and not _is_json(nonempty[0]) and _is_json(text):
        raise UserError(
            f"{path} is one object, and a list is wanted. Write [{{…}}, {{…}}], or an object on each line."
        )
    for number, line in enumerate(lines, start=1):
        if line.strip():
            source = f"Line {number} of {path}"
            try:
                yield source, parse_json(line, source, join=join_once)
            except UserError as error:
                yield source, error


def iterate_rows(text: str, path: str | Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The rows of a table (.csv, .tsv) by the names of its first line, each with its source: `Line 3 of PATH`.

    Missing cells of a short row are None. Raises `UserError` for a row with more cells than names, as from a text with
    commas without quotation marks, and for quotation marks that are not closed.
    """
    if match := _SEPARATOR.match(text):  # Excel's own line
        separator, text = match["mark"], "\n" + text[match.end() :]  # lines keep their numbers
    else:
        heading = text.lstrip("\n").partition("\n")[0]
        # Spreadsheets write semicolons where the comma is decimal
        separator = next((mark for mark in ",;\t" if mark in heading), ",")
    lines = io.StringIO(text, newline="")
    rows = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=separator != "\t")
    names: list[str] = []
    while True:
        source = f"Line {rows.line_num + 1} of {path}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(
                f"{source}: its quotation marks do not close a cell ({error}). Close them, and write those inside of a "
                "text twice."
            ) from error
        if row is None:
            return
        if not names:
            names = row
            if twice := next((name for name in names if name and names.count(name) > 1), ""):
                raise UserError(f"{path} has two columns {twice!r}. Rename or remove one.")
            continue
        if not any(cell.strip() for cell in row):
            continue
        if any(cell.strip() for cell in row[len(names) :]):
            raise UserError(
                f"{source} has {len(row)} cells, and the first line names {len(names)}. Put a text that holds "
                f'“{separator}” in quotation marks: "…".'
            )
        # An unclosed quotation mark takes the next lines into its cell
        if swallowed := next((cell for cell in row if _BEGINS_ROW.search(cell)), ""):
            line = swallowed.split("\n", 1)[1].split("\n", 1)[0]
            raise UserError(
                f"{source} has a text that goes on over the line “{shorten(line, 60)}”. Close its quotation marks."
            )
        cells = [*row, *[None] * len(names)]
        yield source, {name: cell for name, cell in zip(names, cells, strict=False) if name}


_SEPARATOR = re.compile(r"\s*\"?sep=(?P<mark>[^\n\r])\"?[^\n\S]*\r?\n", re.IGNORECASE)

# The start of a row in a table of files, which no text has
_BEGINS_ROW = re.compile(
    r"\n\s*\"?[^\s,;]+\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif|mp4|webm|mov)\"?[,;\t]", re.IGNORECASE
)


def is_json_list(path: Path) -> bool:
    """Whether a file is a JSON array, by its first bytes."""
    refuse_pipe(path)
    with path.open("rb") as file:
        start = file.read(64)
    return start.decode(_detect_encoding(start), "replace").lstrip().startswith("[")


def _is_json(text: str | bytes) -> bool:
    try:
        parse_json(text, "")
    except UserError:
        return False
    return True


def check_parsed(value: Kind, complaint: str) -> Kind:
    """The parsed value; `UserError`, beginning with `complaint`, for NULs, surrogates and too many levels."""
    for part, depth in _iterate_parts(value):
        if depth > DEEPEST:
            raise UserError(f"{complaint} (nested too deeply). Repair or delete it.")
        if isinstance(part, str) and re.search("[\0\ud800-\udfff]", part):
            raise UserError(f"{complaint} ({part[:LONGEST_SHOWN]!r} is no text). Repair or delete it.")
    return value


def read_as(kind: type[Kind], value: Any, source: str | Path, key: str = "") -> Kind:
    """A parsed value as `kind`; `UserError`, with the source and the key, if it is of another type.

    `kind` is made of str, int, float (finite), bool, Path, None, Any, Literal, list, tuple, dict[str, …], unions and
    dataclasses. Keys that a dataclass does not have are ignored.
    """
    return cast(Kind, _read(kind, value, str(source), key))


def resolve_inside(folder: Path, name: str, source: str | Path) -> Path:
    """The path of a file that a record names; `UserError` for one outside the record's folder.

    An absolute path into the folder is allowed. Addresses are refused, since nothing is fetched, and so is text that
    cannot be a file name, such as an image in base64.
    """
    if name.startswith("data:") or _is_too_long(name):
        raise UserError(
            f"{source} has {shorten(name, LONGEST_SHOWN)} for the name of a file, which is none. Write what it holds, "
            "as an image in base64, into a file, and name that."
        )
    if re.match(r"[A-Za-z]{2,}://", name):
        raise UserError(f"{source} names {shorten(name, 80)}, an address. Download it, and name the file.")
    path = os.path.normpath(name.replace("\\", "/"))
    for resolve in (os.path.abspath, os.path.realpath):  # a link may give the folder another name
        root = os.path.join(resolve(folder), "")
        if os.path.isabs(path) and "\0" not in path and resolve(path).startswith(root):
            path = os.path.relpath(resolve(path), root)
    if not name or "\0" in name or os.path.isabs(path) or re.match(r"\.\.(/|$)|[A-Za-z]:", path):
        raise UserError(
            f"{source} names {shorten(name, 200) or 'no file'}, which lies outside the folder. Use names inside "
            f"{folder.absolute()}."
        )
    return folder / path


def _is_too_long(name: str) -> bool:
    """Whether a name is too long for a file on the usual systems."""
    parts = [len(part.encode("utf-8", "replace")) for part in name.split("/")]
    return max(parts) > LONGEST_NAME or sum(parts) > LONGEST_PATH


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested DEEPEST levels deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        inner = [part.values() if isinstance(part, dict) else part for part in level]
        level = [child for part in inner for child in part if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _iterate_parts(value: Any) -> Iterator[tuple[Any, int]]:
    """A value and all keys and values in it, with their depths; YAML's aliases are visited once."""
    stack, visited = [(value, 0)], set[int]()
    while stack:
        part, depth = stack.pop()
        if isinstance(part, (dict, list)):
            if id(part) in visited:
                continue
            visited.add(id(part))
        yield part, depth
        if isinstance(part, dict):
            stack += [(child, depth + 1) for pair in part.items() for child in pair]
        elif isinstance(part, list):
            stack += [(child, depth + 1) for child in part]


def _read(kind: Any, value: Any, source: str, key: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _read(arguments[0], value, source, key)
    if origin in (Union, UnionType):
        return _read_union(arguments, value, source, key)
    if origin is Literal:
        if isinstance(value, (str, int)) and value in arguments:
            return value
        raise _explain_wrong_type(value, " or ".join(map(str, arguments)), source, key)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, source, key)
    if origin in (list, tuple):
        return _read_list(origin, arguments, value, source, key)
    if origin is dict:
        if not isinstance(value, dict):
            raise _explain_wrong_type(value, NAMES[dict], source, key)
        return {name: _read(arguments[1], item, source, _join_key(key, name)) for name, item in value.items()}
    return _read_scalar(kind, value, source, key)


def _read_scalar(kind: Any, value: Any, source: str, key: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is not float and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise _explain_wrong_type(value, NAMES[kind], source, key)


def _read_list(origin: Any, arguments: tuple[Any, ...], value: Any, source: str, key: str) -> Any:
    is_fixed = origin is tuple and arguments[1:] != (Ellipsis,)
    if not isinstance(value, (list, tuple)) or (is_fixed and len(value) != len(arguments)):
        raise _explain_wrong_type(
            value, f"a list of {len(arguments)}" if is_fixed else NAMES[list], source, key
        )
    kinds = arguments if is_fixed else arguments[:1] * len(value)
    return origin(
        _read(kind, item, source, f"{key}[{number}]")
        for number, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _read_union(kinds: tuple[Any, ...], value: Any, source: str, key: str) -> Any:
    records = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and len(records) == 1:  # so that the error names the key
        return _read(records[0], value, source, key)
    for kind in kinds:
        try:
            return _read(kind, value, source, key)
        except UserError:
            continue
    names = [NAMES.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind))) for kind in kinds]
    raise _explain_wrong_type(value, " or ".join(names), source, key)


def _read_dataclass(kind: Any, value: Any, source: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise _explain_wrong_type(value, NAMES[dict], source, key)
    hints, values = get_type_hints(kind, include_extras=True), {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            values[field.name] = _read(
                hints[field.name], value[field.name], source, _join_key(key, field.name)
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(
                f"{source} is damaged: it has no {_join_key(key, field.name)}. Restore it, or write it again."
            )
    return kind(**values)


def _explain_wrong_type(value: Any, expected: str, source: str, key: str) -> UserError:
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
    description = f"{key} is {text}" if key else f"it is {text}"
    return UserError(
        f"{source} is damaged: {description}, and {expected} is wanted. Restore it, or write it again."
    )


def _join_key(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]
