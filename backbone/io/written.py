"""Paths as people write them."""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from pathlib import Path

from backbone.io.console import UserError

VARIABLE = re.compile(r"\$(\w+|\{\w+\})(?=/|$)|%(\w+)%(?=[/\\]|$)")  # at the start of a path
DRIVE = re.compile(r"[A-Za-z]:\\")


def written_path(text: str | Path) -> Path:
    """The path on the disk for a written one: with ~ expanded, and é as one character or two, as the disk has it.

    Keyboards write one character, and folders from a Mac have two. A path that does not exist, or that several names
    match, is unchanged. Raises `UserError` for a dead link, which would look like a missing file, and for a path that
    another shell or system would have read (`$HOME/dog`, `C:\\dog`).
    """
    path = Path(text).expanduser()
    refuse_dead_link(path)
    _refuse_unread(path)
    if str(path).isascii() or os.path.lexists(path):
        return path
    resolved = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if os.path.lexists(resolved / part):
            resolved /= part
            continue
        try:
            matches = [name for name in os.listdir(resolved) if _compose(name) == _compose(part)]
        except OSError:
            return path
        if len(matches) != 1:
            return path
        resolved /= matches[0]
    return resolved


def refuse_dead_link(path: Path) -> None:
    """Raise `UserError` for a path that is, or goes through, a dead link, as to a disk that is not mounted."""
    if (link := find_dead_link(path)) is not None:
        raise UserError(f"{link} {describe_link(link)}. Replace or remove it, or name another place.")


def find_dead_link(path: Path) -> Path | None:
    """The dead link that a path is, or goes through; None for other paths."""
    if os.path.exists(path):
        return None
    parts = (*reversed(path.parents), path)
    return next((part for part in parts if os.path.islink(part) and not os.path.exists(part)), None)


def describe_link(path: Path) -> str:
    """What is wrong with a dead link, as the predicate of a sentence."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads to itself"
    return f"is a link to {os.readlink(path)}, which is not there"


def _refuse_unread(path: Path) -> None:
    """Raise `UserError` for a missing path that begins with a variable, or is written as on Windows elsewhere."""
    text = str(path)
    if not ("\\" in text or text[:1] in "$%") or os.path.lexists(path):
        return
    if found := VARIABLE.match(text):
        name = (found[1] or found[2]).strip("{}")
        value = os.environ.get(name)
        if value is None and found.end() == len(text):  # a word, as of a prompt
            return
        unset = f"{name} is not set here: write the folder itself."
        remedy = unset if value is None else f"Write {value}{text[found.end() :]}."
        raise UserError(
            f"{text} begins with a variable, which only a shell replaces, and not within '…'. {remedy}"
        )
    if os.sep == "/" and DRIVE.match(text):
        under_wsl = f"/mnt/{text[0].lower()}/" + text[3:].replace("\\", "/")
        raise UserError(
            f"{text} is a path of Windows. Name it as this system does: under WSL it is {under_wsl}."
        )
    if os.sep == "/" and os.path.exists(slashed := text.replace("\\", "/")):
        raise UserError(f"{text} does not exist: here \\ separates no folders. Write {slashed}.")


def _compose(name: str) -> str:
    return unicodedata.normalize("NFC", name)
