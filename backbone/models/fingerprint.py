"""Fingerprints of models by their contents, independent of their names and places.

Every tensor contributes, since a merge may change only layers in the middle of a file and keep its size and both ends.
So does every setting of a component. Other files beside the components (a scorer, a card, recommended settings) do
not, nor does the way in which weights are split into files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import overload

from backbone.families.location import Location
from backbone.families.single_file.checkpoint import CONFIG_FILES
from backbone.io.files import content_hash, list_files, read_json
from backbone.io.weights import INDEX, hash_weights
from backbone.models.few_step.adapter import hash_few_step

SETTINGS = (".json", ".txt", ".jinja", ".model")
ENDS = 1 << 18  # bytes at each end of a file, in fingerprints of earlier versions
WINDOWS, WINDOW = 64, 1 << 14  # the same for single files: a number of windows, and their bytes


def compute_fingerprint(location: Location) -> str:
    """SHA-256 (64 hex digits) of a model's weights, sampled, and of its settings."""
    if location.file is not None:
        files = [Path(location.source), *location.parts.values()]
        return _hash_entries(
            location, [*map(hash_weights, ([file] for file in files)), *_describe_settings(location)]
        )
    if location.folder is None:
        return _hash_entries(location, [location.source])
    hashes = []
    weights: dict[Path, list[Path]] = {}
    for path in _list_model_files(location.folder, location):
        if path.suffix == ".safetensors":
            weights.setdefault(path.parent, []).append(path)
        elif path.suffix in SETTINGS and INDEX.removesuffix("json") not in path.name:
            hashes.append(f"{path.relative_to(location.folder)}:{content_hash(path)}")
    hashes += [
        f"{part.relative_to(location.folder)}:{hash_weights(files)}" for part, files in weights.items()
    ]
    return _hash_entries(location, sorted(hashes))


def earlier_fingerprint(location: Location) -> str:
    """The fingerprint in records of earlier versions, from the files' sizes and samples of them.

    A model and a merge of it may share it.
    """
    if location.file is not None:
        files = [Path(location.source), *location.parts.values()]
        return _hash_entries(location, [*map(_hash_windows, files), *_describe_settings(location)])
    if location.folder is None:
        return compute_fingerprint(location)
    entries = []
    for path in _list_model_files(location.folder, location):
        if path.suffix in (".json", ".txt", ".jinja", ".safetensors"):
            size = path.stat().st_size
            ends = b"".join(_read_at(path, offset, ENDS) for offset in (0, max(0, size - ENDS)))
            entries.append(f"{path.relative_to(location.folder)}:{size}:{content_hash(ends)}")
    return _hash_entries(location, entries)


class Fingerprints(Sequence[str]):
    """The fingerprints by which records know something: the current one, then those of earlier versions.

    An earlier one is computed only when the ones before it did not match.
    """

    def __init__(self, current: str, *earlier: Callable[[], str]) -> None:
        self._computations: tuple[Callable[[], str], ...] = (lambda: current, *map(cache, earlier))

    def __len__(self) -> int:
        return len(self._computations)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return (
            self._computations[index]()
            if isinstance(index, int)
            else [compute() for compute in self._computations[index]]
        )


def make_fingerprints(location: Location) -> Fingerprints:
    """The fingerprints by which records know a model."""
    return Fingerprints(compute_fingerprint(location), partial(earlier_fingerprint, location))


def _list_model_files(folder: Path, location: Location) -> list[Path]:
    """The files of a model's components, and their index."""
    names = {"model_index.json", *location.index}
    return [path for path in list_files(folder) if path.relative_to(folder).parts[0] in names]


def _describe_settings(location: Location) -> list[str]:
    """The settings with which a single file is loaded, one entry a file."""
    settings = []
    for name in CONFIG_FILES:
        if (path := location.local(name)) is not None:
            is_json = path.suffix == ".json"
            settings.append(
                f"{name}:{json.dumps(read_json(path), sort_keys=True) if is_json else content_hash(path)}"
            )
    return settings


def _hash_windows(path: Path) -> str:
    size = path.stat().st_size
    places = (max(0, size - WINDOW) * number // (WINDOWS - 1) for number in range(WINDOWS))
    return f"{size}:{content_hash(b''.join(_read_at(path, offset, WINDOW) for offset in places))}"


def _read_at(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _hash_entries(location: Location, entries: list[str]) -> str:
    """The hash of the entries, and of the adapter that makes a base a few-step model."""
    base_hash, adapter = content_hash("\n".join(entries).encode()), location.few_step
    return base_hash if adapter is None else content_hash(f"{base_hash}\n{hash_few_step(adapter)}".encode())
