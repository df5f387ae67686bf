"""The files of .tar archives, sorted into samples: webdataset's shards, and packed folders of images.

The part of a path before the first dot of the file's name is its sample, and the rest is a column: `0001.chosen.jpg` is
`chosen` of 0001. The files of a sample may lie anywhere in their archive, and samples need not have the same columns.
Files of the system (`._1.jpg`, `__MACOSX/`) are skipped.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, format_count, notify_once, show_text
from backbone.io.records import check_parsed
from backbone.media.sources.names import CAPTION_SUFFIXES, IMAGE_SUFFIXES, SYSTEM_FILES

TAR_COLUMNS = {
    "txt": "text",
    "cls": "label",
    **dict.fromkeys((suffix[1:] for suffix in IMAGE_SUFFIXES), "image"),
}
TEXTS = frozenset({"txt", "text", "transcript", "caption"})  # these three are webdataset's own names
NUMBERS = frozenset({"cls", "cls2", "index", "inx", "id"})


@dataclass(frozen=True)
class StoredFile:
    """A file that is not read yet: the place of its bytes in an archive."""

    offset: int
    size: int


@dataclass
class Sample:
    """The files of a sample by their endings; texts, numbers and JSON are already read."""

    archive: Path
    name: str
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def has_image(self) -> bool:
        """Whether one of its files is an image."""
        return any(is_image(ending) for ending in self.files)


@dataclass(frozen=True)
class Tars:
    """The samples of archives as rows of columns.

    columns  their names here, in the order of their first use; True for columns of images
    samples  each one's archive, and its values by column
    """

    columns: Mapping[str, bool]
    samples: Sequence[tuple[Path, Mapping[str, Any]]]

    def values(self, column: str) -> list[Any]:
        """A column; its files are not read."""
        return [values.get(column) for _, values in self.samples]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows, with bytes for files, and images as `datasets` stores them."""
        for archive, samples in groupby(self.samples, key=lambda sample: sample[0]):
            with tarfile.open(archive) as tar:
                for _, values in samples:
                    yield {name: self._read_cell(tar, name, values.get(name)) for name in self.columns}

    def _read_cell(self, tar: tarfile.TarFile, column: str, value: Any) -> Any:
        if not isinstance(value, StoredFile):
            return value
        assert tar.fileobj is not None  # it is open
        tar.fileobj.seek(value.offset)
        content = tar.fileobj.read(value.size)
        return {"bytes": content, "path": None} if self.columns[column] else content


def is_image(ending: str) -> bool:
    """Whether a file of this ending is an image."""
    return f".{ending.rsplit('.')[-1].lower()}" in IMAGE_SUFFIXES


def read_tars(files: Sequence[Path]) -> Tars:
    """The samples of archives, in their order; the bytes of images are not read.

    If there are images, samples without one are left out, and a line is printed. Raises `UserError` for archives that
    cannot be read, files that are no text, names with dots, and captions in a list of a packed folder.
    """
    samples = [sample for file in files for sample in _read_tar(file)]
    if any(sample.has_image for sample in samples):
        with_image = [sample for sample in samples if sample.has_image]
        without_image = [sample for sample in samples if not sample.has_image]
        _refuse_caption_lists(without_image, with_image)
        _say_unused(without_image)
        samples = with_image
    if not samples:
        raise UserError(
            f"{files[0]} is no readable tar file of samples (it holds none). Pack images, and captions as .txt."
        )
    endings = {ending: is_image(ending) for sample in samples for ending in sample.files}
    refuse_dots(list(endings))
    column_names = _name_columns(endings, samples)
    rows: list[tuple[Path, Mapping[str, Any]]] = []
    for sample in samples:
        row: dict[str, Any] = {}
        for ending, value in sample.files.items():
            if isinstance(value, dict):  # a .json's keys
                row |= {
                    key if key not in column_names.values() else f"json.{key}": item
                    for key, item in value.items()
                }
            else:
                row[column_names[ending]] = value
        rows.append((sample.archive, row))
    columns = {name: False for _, row in rows for name in row}
    return Tars(columns | {column_names[ending]: True for ending, image in endings.items() if image}, rows)


def _name_columns(endings: Mapping[str, bool], samples: Sequence[Sample]) -> dict[str, str]:
    """The columns of endings: two endings of one sample are always two columns, others may share one."""
    names = {ending: name_column(ending) for ending in endings}
    clashing: set[str] = set()
    for sample in samples:
        columns: set[str] = set()
        for ending in sample.files:
            if names[ending] in columns:
                clashing.add(ending)
            columns.add(names[ending])
    return {ending: ending if ending in clashing else column for ending, column in names.items()}


def name_column(ending: str) -> str:
    """The column of an ending: "jpg" is an image, "txt" a text, "jpg.txt" too (1.jpg.txt beside 1.jpg)."""
    parts = ending.split(".")
    first, last = parts[0], parts[-1]
    if len(parts) > 1 and f".{last.lower()}" in CAPTION_SUFFIXES and f".{first.lower()}" in IMAGE_SUFFIXES:
        first = last  # 1.jpg.txt, the caption of 1.jpg
    return TAR_COLUMNS.get(first.lower(), first)


def refuse_dots(endings: Sequence[str]) -> None:
    """`UserError` for files of one sample that differ only by numbers, or words with blanks, behind a dot."""
    patterns = [
        re.sub(r"\d+", "#", ending)
        for ending in endings
        if re.search(r"\d.*\..*\.|\..*\d.*\.|\s.*\.", ending)
    ]
    if patterns := [pattern for pattern in patterns if patterns.count(pattern) > 1 or " " in pattern]:
        raise UserError(
            f"A tar's samples are called by what stands before the first dot of their names, and here so many of one "
            f"sample are called like {patterns[0]}: names have dots. Pack them without, as 0001.jpg and 0001.txt."
        )


def _refuse_caption_lists(without_image: Sequence[Sample], samples: Sequence[Sample]) -> None:
    """`UserError` for a list of captions if no sample with an image has a caption of its own."""
    has_captions = any(
        name_column(ending) in ("text", "caption") or isinstance(value, dict)
        for sample in samples
        for ending, value in sample.files.items()
    )
    names = [f"{sample.name}.{ending}" for sample in without_image for ending in sample.files]
    lists = [name for name in names if posixpath.basename(name).lower().startswith("metadata.")]
    if lists and not has_captions:
        raise UserError(
            f"{without_image[0].archive} holds {lists[0]}, and captions of a tar are read beside its images, as 1.txt "
            "beside 1.jpg. Unpack it, and give that folder."
        )


def _say_unused(without_image: Sequence[Sample]) -> None:
    """Say that samples without an image are not used."""
    if names := [f"{sample.name}.{ending}" for sample in without_image for ending in sample.files]:
        others = f" and {format_count(len(names) - 3, 'other file')}" if names[3:] else ""
        notify_once(
            f"Not used in {without_image[0].archive}, without an image of that name: {', '.join(names[:3])}{others}."
        )


def _read_tar(file: Path) -> list[Sample]:
    """The samples of an archive."""
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(file) as tar:
            for name, member in _list_members(tar).items():
                if match := re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name, re.DOTALL):
                    sample = samples.setdefault(match[1], Sample(file, show_text(match[1])))
                    sample.files[show_text(match[2])] = _read_member(
                        tar, member, match[2], f"{name} in {file}"
                    )
    except (OSError, EOFError, tarfile.TarError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is no readable tar file of samples ({reason}). Pack it again.") from error
    return list(samples.values())


def _list_members(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """An archive's files by their names, the last of each name; a hard link as its file."""
    files: dict[str, tarfile.TarInfo] = {}
    by_name: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        name = posixpath.normpath(member.name)
        member = by_name.get(posixpath.normpath(member.linkname), member) if member.islnk() else member
        by_name[name] = member
        parts = name.split("/")
        if member.isreg() and not any(
            part[0] == "." or part.lower() in SYSTEM_FILES for part in parts if part
        ):
            files[name] = member
    return files


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, location: str) -> Any:
    """The content of a text, number or JSON file; for any other file the place of its bytes."""
    kind = ending.rsplit(".")[-1].lower()
    if kind not in (*TEXTS, *NUMBERS, "json"):
        return StoredFile(member.offset_data, member.size)
    opened = tar.extractfile(member)
    assert opened is not None  # it is a file
    try:
        text = check_parsed(opened.read().decode("utf-8-sig"), f"{location} is not UTF-8 text")
        return text if kind in TEXTS else int(text) if kind in NUMBERS else json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{location} is not UTF-8 text. Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        expected = "JSON" if kind == "json" else "a whole number"
        raise UserError(f"{location} is not {expected}. Mend it, or leave it out.") from error
