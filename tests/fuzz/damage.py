"""Damage: what happens to a file, a JSON value, a text or a number on its way to us."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any


class Untouched(Random):
    """Draws that damage nothing and choose the first of everything: what a door must accept."""

    def choice(self, seq: Any) -> Any:
        """The first."""
        return seq[0]


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**12, -(10**30), 1e300, float("nan"), float("inf"), 10**400),
    *("", " ", "x", "7", "../a", "/etc/hostname", "a\0b", "é" * 300, "\u202e[V]", "<|endoftext|>", "%s{}"),
    *([], {}, [1], ["a"], [[]], [None], {"a": 1}, {"": ""}, [{}], {"weight_map": 3}),
)
TEXTS = (
    *(
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 6000,
        '{"a": ' + "9" * 6000 + "}",
        '"\\ud800"',
        '{"a": "\\udc00"}',
    ),
    *(
        "null",
        "[]",
        "{}",
        '""',
        "7",
        "NaN",
        "",
        " ",
        "{",
        '{"a"',
        "<html>",
        "version https://git-lfs.github.com/spec",
    ),
)
FILES = (
    *(b"", b"\0", b"\0" * 4096, b"PK\x03\x04" + b"\0" * 60, b"\x80\x04cos\nsystem\n.", b"<!doctype html>"),
    *(
        b"version https://git-lfs.github.com/spec/v1",
        b"\xff\xfe\0\0",
        b"%!PS-Adobe",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
    ),
)
WORDS = (
    *(
        "a dog",
        "[V]",
        "<x>",
        "é",
        "\u202eabc",
        "\0",
        "\x1b[31m",
        "😀",
        "a" * 5000,
        "(",
        "{}",
        "%s",
        "\\",
        "\ufeff",
    ),
    *("\u0301" * 50, "\r\n", "\t", "|", "-", "--", "𝕏" * 10, "\ud800", "[[V]]", "a, b; c"),
)
NUMBERS = (
    "1",
    "nan",
    "inf",
    "-inf",
    "1e30",
    "-1",
    "0",
    "1e-320",
    "9" * 5000,
    "0x10",
    "1_000",
    "",
    " ",
    "½",
    "１",
    "1,5",
    "x",
)


def damaged_json(value: Any, random: Random) -> tuple[bytes, bool]:
    """A JSON text with one thing wrong, perhaps; and whether it is no JSON that can be read."""
    if isinstance(random, Untouched):
        return json.dumps(value).encode(), False
    way = random.random()
    if way < 0.15:
        return random.choice(TEXTS[:6]).encode(), True
    if way < 0.25:
        return random.choice(TEXTS).encode(), False
    text = json.dumps(value).encode()
    if way < 0.35:
        return text[: random.randrange(len(text))], True
    if way < 0.45:
        return damaged_bytes(text, random), False
    if way < 0.5:
        encoding = random.choice(("utf-16", "utf-32"))
        return json.dumps(value).encode(encoding), encoding == "utf-32"  # PowerShell's UTF-16 is read
    changed = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 3))):
        changed = with_another(changed, random)
    return json.dumps(changed).encode(), False


def with_another(value: Any, random: Random) -> Any:
    """A value with one place in it taken out, doubled, or something else."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.15:
            return {name: one for name, one in value.items() if name != key}
        if random.random() < 0.1:
            return {**value, random.choice(("x", "", "folder", key.upper())): random.choice(VALUES)}
        return {**value, key: with_another(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        return [*value[:place], with_another(value[place], random), *value[place + random.randrange(2) :]]
    return random.choice(VALUES)


def damaged_bytes(content: bytes, random: Random) -> bytes:
    """Bytes that were cut, flipped, doubled, or put in."""
    if isinstance(random, Untouched):
        return content
    if not content:
        return random.choice(FILES)
    way, place = random.randrange(5), random.randrange(len(content))
    if way == 0:
        return content[:place]
    if way == 1:
        flipped = bytearray(content)
        for _ in range(random.choice((1, 1, 4, 64))):
            flipped[random.randrange(min(len(flipped), random.choice((64, 10**9))))] ^= 1 << random.randrange(
                8
            )
        return bytes(flipped)
    if way == 2:
        return content[:place] + random.randbytes(random.choice((1, 8, 300))) + content[place:]
    if way == 3:
        return content[:place] + content[place + random.choice((1, 8, 300)) :]
    return content + content[:place]


def damaged_safetensors(content: bytes, random: Random) -> tuple[bytes, bool]:
    """A safetensors file with something wrong, and whether it is surely none any more."""
    if isinstance(random, Untouched):
        return content, False
    way = random.random()
    if way < 0.2:
        return random.choice(FILES), True
    if way < 0.4:
        return content[: random.randrange(len(content))], True
    if way < 0.55:
        size = random.choice((0, 1, 2**63, 2**64 - 1, 100_000_001, len(content)))
        return size.to_bytes(8, "little") + content[8:], True
    if way < 0.65:
        return damaged_bytes(content, random), False
    length = int.from_bytes(content[:8], "little")
    header = with_another(json.loads(content[8 : 8 + length]), random)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :], False


def odd_text(random: Random) -> str:
    """Words that nobody types."""
    return " ".join(random.choice(WORDS) for _ in range(random.choice((1, 0, 3, 20))))
