"""JSON that anybody may have written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from backbone.cli.values.config_file import read_mapping
from backbone.io.console import UserError
from backbone.io.files import read_json, read_jsonl
from backbone.io.prompts import load_prompts
from backbone.io.records import DEEPEST, iterate_entries, parse_json, read_as, resolve_inside

MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"a": ',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "closed but deep": b"[" * 500 + b"]" * 500,
    "6,000 digits": b'{"a": ' + b"9" * 6000 + b"}",
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "half a surrogate pair as a key": b'{"\\udfff": 1}',
    "NUL in a text": b'{"a": "b\\u0000.png"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-32": '{"a": 1}'.encode("utf-32"),
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "NUL bytes": b"\0" * 64,
    "a web page": b"<!doctype html>",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_malformed_text_is_one_sentence_with_the_file(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "settings.json").write_bytes(text)
    with pytest.raises(UserError, match=r"settings\.json is not JSON") as caught:
        read_json(tmp_path / "settings.json", Any)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed


def test_a_list_that_says_one_key_twice_is_no_list_of_one_of_them() -> None:
    twice = '{"chosen": "a.png", "chosen": "b.png"}'
    _, (where, found) = iterate_entries(f'{{"chosen": "c.png"}}\n{twice}', "p.jsonl")
    assert str(found).startswith(f"{where} is not JSON (the key chosen stands there twice)")
    with pytest.raises(UserError, match=r"p\.json is not JSON \(the key chosen stands there twice\)"):
        list(iterate_entries(f"[{twice}]", "p.json"))


def test_a_byte_order_mark_and_any_character_are_fine() -> None:
    assert parse_json('\ufeff{"a": "é 😀 \\u00e9"}'.encode(), "x") == {"a": "é 😀 é"}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x")


@dataclass(frozen=True)
class Inner:
    words: list[str]
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    inner: Inner
    pairs: list[tuple[str, float]] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    note: str | None = None
    flag: bool = False


WHOLE = {"name": "n", "count": 2, "inner": {"words": ["w"], "share": 1}, "pairs": [["p", 2]], "other": [1]}


def test_a_record_is_read_with_its_types_and_others_keys_are_passed_over() -> None:
    assert read_as(Outer, WHOLE, "x") == Outer("n", 2, Inner(["w"], 1.0), [("p", 2.0)])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"name": 3}, "name is 3"),
        ({"name": None}, "name is null"),
        ({"count": "2"}, "count is '2'"),
        ({"count": 2.5}, "count is 2.5"),
        ({"count": True}, "count is true"),
        ({"inner": []}, r"inner is \[\]"),
        ({"inner": {"words": "w"}}, r"inner\.words is 'w'"),
        ({"inner": {"words": [1]}}, r"inner\.words\[0\] is 1"),
        ({"inner": {"words": [], "share": float("nan")}}, r"inner\.share is NaN"),
        ({"inner": {"words": [], "share": 10**400}}, r"inner\.share is 1000"),
        ({"inner": {}}, r"it has no inner\.words"),
        ({"pairs": [["p"]]}, r"pairs\[0\] is"),
        ({"table": {"k": "v"}}, r"table\.k is 'v'"),
        ({"kind": "c"}, "kind is 'c'"),
        ({"kind": ["a"]}, "kind is"),
        ({"note": 1}, "note is 1, and a text or null is wanted"),
        ({"flag": 1}, "flag is 1"),
    ],
)
def test_a_wrong_type_is_named_with_file_and_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"^run\.json is damaged: {key}"):
        read_as(Outer, WHOLE | change, "run.json")


def test_a_long_value_is_shown_by_its_beginning() -> None:
    with pytest.raises(UserError) as caught:
        read_as(int, json.loads("[" + "1," * 5000 + "1]"), "x", "k")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "name", ["a.png", "sub/a.png", "a b/./c.png", "..a/b.png", "sub\\a.png", "x/../a.png"]
)
def test_names_inside_the_folder_are_taken(tmp_path: Path, name: str) -> None:
    assert resolve_inside(tmp_path, name, "x").is_relative_to(tmp_path)
    assert ".." not in resolve_inside(tmp_path, name, "x").parts


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../a.png",
        "a/../../b.png",
        "..\\a.png",
        "/etc/passwd",
        "\\\\host\\a",
        "C:\\a.png",
        "C:a.png",
        "a\0.png",
    ],
)
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="outside the folder"):
        resolve_inside(tmp_path, name, "x")


def test_a_whole_path_serves_where_it_leads_into_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "list"
    assert resolve_inside(folder, str(folder / "a" / "1.png"), "x") == folder / "a" / "1.png"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    assert resolve_inside(folder, str(tmp_path / "link" / "1.png"), "x") == folder / "1.png"
    assert resolve_inside(tmp_path / "link", str(folder / "1.png"), "x") == tmp_path / "link" / "1.png"
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(UserError, match="outside the folder"):
        resolve_inside(tmp_path / "link", str(folder / "out" / "1.png"), "x")
    for name in (folder, folder / "..", folder / ".." / "1.png", tmp_path / "list-2" / "1.png"):
        with pytest.raises(UserError, match="outside the folder"):
            resolve_inside(folder, str(name), "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_json, "settings.json"),
        (read_jsonl, "log.jsonl"),
        (read_mapping, "train.yaml"),
        (lambda path: load_prompts(str(path)), "prompts.txt"),
        (lambda path: load_prompts(str(path)), "63"),  # as a shell calls <(cat prompts.txt)
    ],
)
def test_a_pipe_is_waited_for_by_nobody(tmp_path: Path, read: Callable[[Path], Any], name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is a pipe or a device, not a file"):
        read(tmp_path / name)
