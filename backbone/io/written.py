"""Paths as people write them."""

from __future__ import annotations

import errno
import os
import unicodedata
from pathlib import Path

from backbone.io.console import UserError


def written_path(text: str | Path) -> Path:
    """The path that is meant: ~ is one's home, and letters are spelled as on the disk, é as one character or two.

    Keyboards write one, and folders that come from a Mac have two. What is not there, or could be several, stays as it
    is written. Raises `UserError` for a link that leads nowhere, which would look like nothing at all.
    """
    path = Path(text).expanduser()
    refuse_dead_link(path)
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if os.path.lexists(found / part):
            found /= part
            continue
        try:
            same = [name for name in os.listdir(found) if _composed(name) == _composed(part)]
        except OSError:
            return path
        if len(same) != 1:
            return path
        found /= same[0]
    return found


def refuse_dead_link(path: Path) -> None:
    """`UserError` for a path that is, or leads through, a link to what is not there, as without its disk."""
    if (link := find_dead_link(path)) is not None:
        raise UserError(f"{link} {describe_link(link)}. Replace or remove it, or name another place.")


def find_dead_link(path: Path) -> Path | None:
    """The link that leads nowhere, of a path that is one or leads through one."""
    if os.path.exists(path):
        return None
    parts = (*reversed(path.parents), path)
    return next((part for part in parts if os.path.islink(part) and not os.path.exists(part)), None)


def describe_link(path: Path) -> str:
    """What is wrong with a link that leads nowhere, as the predicate of a sentence."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself"
    return f"is a link to {os.readlink(path)}, which is not there"


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
