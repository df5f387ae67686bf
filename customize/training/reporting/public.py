"""A run folder to publish: without the files that only resuming needs, and without paths of this disk in any file."""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backbone.io.console import UserError
from backbone.io.files import read_json, read_metadata, read_tensors, write_tensors, write_text
from backbone.models.locate import split_files
from customize.settings import FILE, read_subject

PRIVATE = ("checkpoint.safetensors", "tensorboard", ".*")  # of use to nobody else
TEXTS = (".md", ".json", ".jsonl", ".html", ".txt")


def copy_without_paths(run: Path, copy: Path) -> None:
    """Copy a run folder to `copy`, which is new. Paths of this disk are replaced by their last component."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(*PRIVATE))
    replacements = _list_paths(run)
    for path in sorted(copy.rglob("*")):
        if path.suffix in TEXTS:
            text = path.read_text(encoding="utf-8")
            if (replaced := _replace_paths(text, replacements)) != text:
                write_text(path, replaced)
        elif path.suffix == ".safetensors" and path.stat().st_size > 8:
            metadata = read_metadata(path)
            replaced_metadata = {
                name: _replace_paths(value, replacements) for name, value in metadata.items()
            }
            if replaced_metadata != metadata:
                write_tensors(path, read_tensors(path)[0], replaced_metadata)


def _list_paths(run: Path) -> list[tuple[str, str]]:
    """Paths that a run's files may name, each with its replacement, the longest first."""
    record = read_json(run / FILE) if (run / FILE).is_file() else {}
    texts = [part for text in _iterate_texts(record.get("settings", {})) for part in split_files(text)]
    paths = [text for text in texts if os.path.isabs(text)]
    replacements = {path: Path(path).name for path in [*paths, str(run.absolute()), str(run.resolve())]}
    for folder, name in ((Path.cwd(), ""), (Path.home(), "~/")):
        if folder != Path(folder.anchor):
            replacements[f"{folder}{os.sep}"] = name
    return sorted(replacements.items(), key=lambda pair: -len(pair[0]))


def _iterate_texts(value: Any) -> Iterator[str]:
    """The texts in a record's settings; only the folder of FOLDER:TOKEN:CLASS."""
    if isinstance(value, str):
        try:
            yield read_subject(value).images
        except UserError:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _iterate_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iterate_texts(item)


def _replace_paths(text: str, replacements: Sequence[tuple[str, str]]) -> str:
    """The text with the paths replaced by the names, also where JSON or HTML escapes them."""
    for path, name in replacements:
        for written in (path, json.dumps(path)[1:-1], html.escape(path)):
            text = text.replace(written, name)
    return text
