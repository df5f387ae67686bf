"""Names of files: hidden ones, their natural order, and how file systems spell them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from backbone.io.console import UserError
from backbone.io.records import resolve_inside

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".heic", ".heif"}
)
CAPTION_SUFFIXES = (".txt", ".caption")
SYSTEM_FILES = frozenset(
    {"thumbs.db", "desktop.ini", "__macosx", "lost+found", "$recycle.bin", "system volume information"}
    | {"@eadir", "#recycle", "@recycle", "#snapshot"}  # of network disks: Synology's, QNAP's
)


def list_visible(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, in natural order."""
    return sorted(
        (path for path in folder.iterdir() if not path.name.startswith(".")),
        key=lambda path: natural_sort_key(path.name),
    )


def natural_sort_key(name: str) -> tuple[list[str], str]:
    """A sort key by which 2.jpg comes before 10.jpg."""
    parts = re.split(r"(\d+)", name.casefold())
    # A number by its length and its digits: int() takes no more than some thousands of them
    return [
        f"{len(part.lstrip('0')):09d}{part.lstrip('0')}" if i % 2 else part for i, part in enumerate(parts)
    ], name


def normalize_name(name: str) -> str:
    """A name in NFC: file systems spell é as one character or two."""
    return unicodedata.normalize("NFC", name)


def find_spelled(path: Path) -> Path:
    """The file of a path as its folder spells it: é is one character or two, and Windows ignores case.

    The path itself if there is no such file, or if several match.
    """
    if path.exists() or not path.parent.is_dir():
        return path
    name = normalize_name(path.name)
    candidates = [
        file for file in path.parent.iterdir() if normalize_name(file.name).casefold() == name.casefold()
    ]
    exact = [file for file in candidates if normalize_name(file.name) == name]
    matches = exact or candidates
    return matches[0] if len(matches) == 1 else path


def find_by_name(path: Path, location: str) -> Path:
    """The file that a list names, as its folder spells it, with an image's suffix if the list leaves it out.

    The path itself if there is no such file. Raises `UserError`, which begins with `location`, if there are several.
    """
    spelled = find_spelled(path)
    if spelled.exists() or path.suffix.lower() in IMAGE_SUFFIXES or not path.parent.is_dir():
        return spelled
    name = normalize_name(path.name).casefold()
    files = [
        file
        for file in list_visible(path.parent)
        if file.suffix.lower() in IMAGE_SUFFIXES and normalize_name(file.stem).casefold() == name
    ]
    if len(files) > 1:
        names = " and ".join(file.name for file in files[:2])
        raise UserError(f"{location} names {path.name}, and there are {names}. Write its whole name.")
    return files[0] if files else spelled


def find_in_list(list_file: Path, name: str, location: str) -> Path:
    """The file beside a list that it names, as `find_by_name` finds it; names may begin with the list's own folder.

    The path itself if there is no such file. Raises `UserError` for a name that leads out of the folder.
    """
    folder = list_file.parent
    file = find_by_name(resolve_inside(folder, name, location), location)
    first, *rest = file.relative_to(folder).parts or ("",)
    if rest and not file.exists() and normalize_name(first) == normalize_name(folder.absolute().name):
        shorter = find_by_name(folder.joinpath(*rest), location)
        return shorter if shorter.exists() else file
    return file
