"""Reading JSON that anybody may have written: parse it, then check that every value is of the type that is wanted.

    facts = read_as(dict[str, str], parse_json(text, "concept.json"), "concept.json")

Whatever is wrong with the text or with a value is a `UserError` that names the file and the key.
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

DEEPEST = 64  # levels of lists and objects in each other
# What a JSON text has that stands for a NUL or for half of a surrogate pair, or for both halves
ODD = re.compile(r"[\0\ud800-\udfff]|\\u(0000|[dD][89a-fA-F])")
# How parsers of JSON, TOML and YAML say that what follows a \\ is no escape
_ESCAPE = re.compile(r"escape|hex value|Unescaped", re.IGNORECASE)
POINTER = b"version https://git-lfs"
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how a text in it begins
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
    """A run's `settings.json`: what was resolved, and the command that repeats it."""

    settings: dict[str, Any]
    command: str = ""


def parse_json(
    text: str | bytes, where: str | Path, *, join: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value of a JSON text in UTF-8, with or without its byte order mark.

    `join` makes an object of its keys and values; left out, a dict in which the last of equal keys counts.

    Raises `UserError` for any text that is none, for halves of surrogate pairs and NULs, which no file and no tokenizer
    takes, and for more than DEEPEST levels.
    """
    if isinstance(text, bytes) and text.startswith(UTF16):
        raise UserError(f"{where} is not JSON (it is UTF-16 and not UTF-8 text). Save it as UTF-8.")
    refuse_pointer(text, where)
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=join)
    except (
        ValueError,
        RecursionError,
    ) as error:  # no JSON, no UTF-8, a number of thousands of digits, a deep nest
        reason = _reason(error)
        raise UserError(
            f"{where} is not JSON ({reason}). {repair(reason, 'Repair or delete it.')}"
        ) from error
    # A tokenizer's hundred thousand texts need not be looked at one by one.
    return plain(value, f"{where} is not JSON") if ODD.search(decoded) or _is_deep(value) else value


def is_pointer(text: str | bytes) -> bool:
    """Whether a file begins as what git leaves in its place where it was cloned without LFS."""
    return text.startswith(POINTER) if isinstance(text, bytes) else text.startswith(POINTER.decode())


def refuse_pointer(text: str | bytes, where: str | Path) -> None:
    """`UserError` for such a pointer in the place of a text or a table."""
    if is_pointer(text):
        raise UserError(f"{where} is a Git LFS pointer, not the file itself. Run `git lfs pull` beside it.")


def repair(reason: str, otherwise: str = "Repair it.") -> str:
    """What to do about a text that a parser refuses for this reason: a path of Windows has what begins an escape."""
    return "Write \\ in paths twice, or as /." if _ESCAPE.search(reason) else otherwise


def refuse_pipe(path: str | Path) -> None:
    """`UserError` for what is neither a file nor a folder: to read a pipe or a device may never end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a pipe or a device, not a file. Name a file.")


def read_text(path: str | Path) -> str:
    """What a person wrote: UTF-8 with or without its mark, or UTF-16 that begins with one, as Excel's “Unicode Text”.

    Raises `UserError` for another encoding, and for a pipe.
    """
    refuse_pipe(path)
    with open(path, "rb") as file:
        encoding = _encoding_of(file.read(4))
    try:
        text = Path(path).read_text(encoding=encoding)
    except UnicodeError as error:
        what = "UTF-8 text" if encoding != "utf-16" else "whole UTF-16 text"
        raise UserError(f"{path} is not {what}. Save it as UTF-8.") from error
    refuse_pointer(text, path)
    return text


def _encoding_of(start: bytes) -> str:
    """By a text's first four bytes; UTF-32, whose mark begins with that of UTF-16, is not read."""
    return "utf-16" if start.startswith(UTF16) and not start.startswith(UTF32) else "utf-8-sig"


def join_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """`join` of what users write: the object of keys and values; `ValueError` for a key that stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice[:LONGEST_SHOWN]} stands there twice")
    return found


def iterate_entries(text: str | bytes, path: str | Path) -> Iterator[tuple[str, Any]]:
    """The values of JSON lines, or of the JSON array that a text is, each with where it stands: `Line 3 of PATH`.

    What is no JSON in a line, or has a key twice, is given as the `UserError` that says so. Raises `UserError` for an
    array that is not whole, for UTF-16 that is not whole, and for one object over several lines.
    """
    if isinstance(text, bytes) and _encoding_of(text[:4]) == "utf-16":
        try:
            text = text.decode("utf-16")
        except UnicodeError as error:
            raise UserError(f"{path} is not whole UTF-16 text. Save it as UTF-8.") from error

    # The first line says whether this is one array over several lines
    lines: list[Any] = text.split(b"\n") if isinstance(text, bytes) else text.split("\n")
    written = [line for line in lines if line.strip()]
    head = text[:256]
    start = (head if isinstance(head, str) else head.removeprefix(b"\xef\xbb\xbf").decode("latin-1")).lstrip()
    if start[:1] == "[" and not (written[1:] and _is_json(written[0])):
        values = cast(list[Any], parse_json(text, path, join=join_once))
        if str(path).lower().endswith(".json") or any(isinstance(value, dict) for value in values):
            for number, value in enumerate(values, start=1):
                yield f"Entry {number} of {path}", value
            return
    if start[:1] == "{" and not _is_json(written[0]) and _is_json(text):
        raise UserError(
            f"{path} is one object, and a list is wanted. Write [{{…}}, {{…}}], or an object on each line."
        )
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"Line {number} of {path}"
            try:
                yield where, parse_json(line, where, join=join_once)
            except UserError as error:
                yield where, error


def iterate_rows(text: str, path: str | Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The rows of a table (.csv, .tsv) by the names of its first line, each with where it begins: `Line 3 of PATH`.

    A cell that a short row lacks is None. Raises `UserError` for a row with more cells than there are names, as a text
    with commas has that stands in no quotation marks, and for marks that are not closed.
    """
    if said := _SEPARATOR.match(text):  # Excel's own line
        separator, text = said["mark"], "\n" + text[said.end() :]  # lines keep their numbers
    else:
        heading = text.lstrip("\n").partition("\n")[0]
        # Spreadsheets write semicolons where the comma is decimal
        separator = next((mark for mark in ",;\t" if mark in heading), ",")
    lines = io.StringIO(text, newline="")
    rows = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=separator != "\t")
    names: list[str] = []
    while True:
        where = f"Line {rows.line_num + 1} of {path}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(
                f"{where}: its quotation marks do not close a cell ({error}). Close them, and write those inside of a "
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
                f"{where} has {len(row)} cells, and the first line names {len(names)}. Put a text that holds "
                f'“{separator}” in quotation marks: "…".'
            )
        # A mark that is not closed takes the next lines into its cell
        if swallowed := next((cell for cell in row if _BEGINS_ROW.search(cell)), ""):
            line = swallowed.split("\n", 1)[1].split("\n", 1)[0]
            raise UserError(
                f"{where} has a text that goes on over the line “{shorten(line, 60)}”. Close its quotation marks."
            )
        cells = [*row, *[None] * len(names)]
        yield where, {name: cell for name, cell in zip(names, cells, strict=False) if name}


_SEPARATOR = re.compile(r"\s*\"?sep=(?P<mark>[^\n\r])\"?[^\n\S]*\r?\n", re.IGNORECASE)

# What stands at the begin of a line in a table of files, and in no text
_BEGINS_ROW = re.compile(
    r"\n\s*\"?[^\s,;]+\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif|mp4|webm|mov)\"?[,;\t]", re.IGNORECASE
)


def is_json_list(path: Path) -> bool:
    """Whether a file is a JSON array, by its first bytes."""
    refuse_pipe(path)
    with path.open("rb") as file:
        start = file.read(64)
    return start.decode(_encoding_of(start), "replace").lstrip().startswith("[")


def _is_json(text: str | bytes) -> bool:
    try:
        parse_json(text, "")
    except UserError:
        return False
    return True


def plain(value: Kind, complaint: str) -> Kind:
    """The same parsed value; `UserError`, which begins with the complaint, for what no file and no tokenizer takes."""
    for part, depth in _parts(value):
        if depth > DEEPEST:
            raise UserError(f"{complaint} (nested too deeply). Repair or delete it.")
        if isinstance(part, str) and re.search("[\0\ud800-\udfff]", part):
            raise UserError(f"{complaint} ({part[:LONGEST_SHOWN]!r} is no text). Repair or delete it.")
    return value


def read_as(kind: type[Kind], value: Any, where: str | Path, key: str = "") -> Kind:
    """A parsed value as `kind`; `UserError`, with the file and the key, where it is of another type.

    `kind` is made of str, int, float (finite), bool, Path, None, Any, Literal, list, tuple, dict[str, …], unions and
    dataclasses. Keys that a dataclass does not know are passed over.
    """
    return cast(Kind, _read(kind, value, str(where), key))


def resolve_inside(folder: Path, name: str, where: str | Path) -> Path:
    """The path of a file that a record names; `UserError` for one outside the record's own folder.

    A whole path serves too, where it leads into the folder. So is an address refused: nothing is fetched. And what no
    file can be called, as an image that is written there itself, in base64.
    """
    if name.startswith("data:") or _is_too_long(name):
        raise UserError(
            f"{where} has {shorten(name, LONGEST_SHOWN)} for the name of a file, which is none. Write what it holds, "
            "as an image in base64, into a file, and name that."
        )
    if re.match(r"[A-Za-z]{2,}://", name):
        raise UserError(f"{where} names {shorten(name, 80)}, an address. Download it, and name the file.")
    plain = os.path.normpath(name.replace("\\", "/"))
    for find in (os.path.abspath, os.path.realpath):  # a link may give the folder another name
        home = os.path.join(find(folder), "")
        if os.path.isabs(plain) and "\0" not in plain and find(plain).startswith(home):
            plain = os.path.relpath(find(plain), home)
    if not name or "\0" in name or os.path.isabs(plain) or re.match(r"\.\.(/|$)|[A-Za-z]:", plain):
        raise UserError(
            f"{where} names {shorten(name, 200) or 'no file'}, which lies outside the folder. Use names inside "
            f"{folder.absolute()}."
        )
    return folder / plain


def _is_too_long(name: str) -> bool:
    """Whether no file can be called so, on any system that is usual."""
    parts = [len(part.encode("utf-8", "replace")) for part in name.split("/")]
    return max(parts) > LONGEST_NAME or sum(parts) > LONGEST_PATH


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other DEEPEST levels deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        inner = [part.values() if isinstance(part, dict) else part for part in level]
        level = [one for part in inner for one in part if isinstance(one, (dict, list))]
        if not level:
            return False
    return True


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """A value, its keys and everything in it, with their depths; what YAML names twice once."""
    waiting, seen = [(value, 0)], set[int]()
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, (dict, list)):
            if id(part) in seen:
                continue
            seen.add(id(part))
        yield part, depth
        if isinstance(part, dict):
            waiting += [(one, depth + 1) for pair in part.items() for one in pair]
        elif isinstance(part, list):
            waiting += [(one, depth + 1) for one in part]


def _read(kind: Any, value: Any, where: str, key: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _read(inner[0], value, where, key)
    if origin in (Union, UnionType):
        return _read_union(inner, value, where, key)
    if origin is Literal:
        if isinstance(value, (str, int)) and value in inner:
            return value
        raise _wrong(value, " or ".join(map(str, inner)), where, key)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where, key)
    if origin in (list, tuple):
        return _read_list(origin, inner, value, where, key)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(value, NAMES[dict], where, key)
        return {name: _read(inner[1], one, where, _join(key, name)) for name, one in value.items()}
    return _read_plain(kind, value, where, key)


def _read_plain(kind: Any, value: Any, where: str, key: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number:
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is not float and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise _wrong(value, NAMES[kind], where, key)


def _read_list(origin: Any, inner: tuple[Any, ...], value: Any, where: str, key: str) -> Any:
    fixed = origin is tuple and inner[1:] != (Ellipsis,)
    if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(inner)):
        raise _wrong(value, f"a list of {len(inner)}" if fixed else NAMES[list], where, key)
    kinds = inner if fixed else inner[:1] * len(value)
    return origin(
        _read(kind, one, where, f"{key}[{number}]")
        for number, (kind, one) in enumerate(zip(kinds, value, strict=True))
    )


def _read_union(kinds: tuple[Any, ...], value: Any, where: str, key: str) -> Any:
    records = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and len(records) == 1:  # so that what is wrong in it is named
        return _read(records[0], value, where, key)
    for kind in kinds:
        try:
            return _read(kind, value, where, key)
        except UserError:
            continue
    names = [NAMES.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind))) for kind in kinds]
    raise _wrong(value, " or ".join(names), where, key)


def _read_dataclass(kind: Any, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(value, NAMES[dict], where, key)
    hints, known = get_type_hints(kind, include_extras=True), {}
    for one in dataclasses.fields(kind):
        if one.name in value:
            known[one.name] = _read(hints[one.name], value[one.name], where, _join(key, one.name))
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise UserError(
                f"{where} is damaged: it has no {_join(key, one.name)}. Restore it, or write it again."
            )
    return kind(**known)


def _wrong(value: Any, wanted: str, where: str, key: str) -> UserError:
    shown = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}…"
    what = f"{key} is {shown}" if key else f"it is {shown}"
    return UserError(f"{where} is damaged: {what}, and {wanted} is wanted. Restore it, or write it again.")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]
