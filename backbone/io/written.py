"""Paths as people write them."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


def written_path(text: str | Path) -> Path:
    """The path that is meant: ~ is one's home, and letters are spelled as on the disk, é as one character or two.

    Keyboards write one, and folders that come from a Mac have two. What is not there, or could be several, stays as it
    is written.
    """
    path = Path(text).expanduser()
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


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
