"""Fingerprints of models by their contents, whatever they are called and wherever they are stored.

Every tensor has a share in it: a merge may change the layers in the middle of a file alone, and leave its size and both
of its ends as they were. So does every setting of a part. What lies beside the parts (a scorer, a card, the settings
that work well) is not the model, nor are the files into which its weights were cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import overload

from backbone.families.location import Location
from backbone.families.single_file.checkpoint import CONFIG_FILES
from backbone.io.files import content_hash, list_files, read_header, read_json
from backbone.io.weights import INDEX
from backbone.models.few_step.adapter import hash_few_step

SAMPLE = 1 << 12  # bytes that are read of the beginning, the middle and the end of every tensor
SETTINGS = (".json", ".txt", ".jinja", ".model")
ENDS = 1 << 18  # bytes, of a file, in fingerprints from before
WINDOWS, WINDOW = 64, 1 << 14  # the same in those of single files


def fingerprint_of(location: Location) -> str:
    """SHA-256 (64 hex digits) of a model's weights, sampled, and of its settings."""
    if location.file is not None:
        files = [Path(location.source), *location.parts.values()]
        return _with_few_step(
            location, [*map(hash_weights, ([file] for file in files)), *_settings_of(location)]
        )
    if location.folder is None:
        return _with_few_step(location, [location.source])
    hashes = []
    weights: dict[Path, list[Path]] = {}
    for path in _own_files(location.folder, location):
        if path.suffix == ".safetensors":
            weights.setdefault(path.parent, []).append(path)
        elif path.suffix in SETTINGS and INDEX.removesuffix("json") not in path.name:
            hashes.append(f"{path.relative_to(location.folder)}:{content_hash(path)}")
    hashes += [
        f"{part.relative_to(location.folder)}:{hash_weights(files)}" for part, files in weights.items()
    ]
    return _with_few_step(location, sorted(hashes))


def hash_weights(files: Iterable[Path]) -> str:
    """A hash of the names, types, shapes and samples of all tensors in safetensors files, the same for one or many.

    Raises as `read_header` does.
    """
    found = []
    for path in files:
        read_header(path)  # which refuses what is damaged
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                samples = b""
                for place in sorted(
                    {begin, max(begin, (begin + end - SAMPLE) // 2), max(begin, end - SAMPLE)}
                ):
                    file.seek(8 + length + place)
                    samples += file.read(min(SAMPLE, end - place))
                found.append(f"{name}:{entry['dtype']}:{entry['shape']}:{content_hash(samples)}")
    return content_hash("\n".join(sorted(found)).encode())


def earlier_fingerprint(location: Location) -> str:
    """The fingerprint of records from before every tensor had a share: sizes of files, and samples of them.

    A model and what a merge made of it may have the same one.
    """
    if location.file is not None:
        files = [Path(location.source), *location.parts.values()]
        return _with_few_step(location, [*map(_hash_windows, files), *_settings_of(location)])
    if location.folder is None:
        return fingerprint_of(location)
    found = []
    for path in _own_files(location.folder, location):
        if path.suffix in (".json", ".txt", ".jinja", ".safetensors"):
            size = path.stat().st_size
            ends = b"".join(_read_at(path, place, ENDS) for place in (0, max(0, size - ENDS)))
            found.append(f"{path.relative_to(location.folder)}:{size}:{content_hash(ends)}")
    return _with_few_step(location, found)


class Fingerprints(Sequence[str]):
    """Under which fingerprints records know something: the one that is written now, and behind it those from before.

    Each of these is computed where the ones in front of it did not fit.
    """

    def __init__(self, now: str, *before: Callable[[], str]) -> None:
        self._each: tuple[Callable[[], str], ...] = (lambda: now, *map(cache, before))

    def __len__(self) -> int:
        return len(self._each)

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[str]: ...
    def __getitem__(self, which: int | slice) -> str | Sequence[str]:
        return self._each[which]() if isinstance(which, int) else [one() for one in self._each[which]]


def fingerprints_of(location: Location) -> Fingerprints:
    """Under which fingerprints records know a model."""
    return Fingerprints(fingerprint_of(location), partial(earlier_fingerprint, location))


def _own_files(folder: Path, location: Location) -> list[Path]:
    """The files of a model's parts, and the index of them."""
    own = {"model_index.json", *location.index}
    return [path for path in list_files(folder) if path.relative_to(folder).parts[0] in own]


def _settings_of(location: Location) -> list[str]:
    """The settings with which a single file is loaded."""
    found = []
    for name in CONFIG_FILES:
        if (path := location.local(name)) is not None:
            is_json = path.suffix == ".json"
            found.append(
                f"{name}:{json.dumps(read_json(path), sort_keys=True) if is_json else content_hash(path)}"
            )
    return found


def _hash_windows(path: Path) -> str:
    size = path.stat().st_size
    places = (max(0, size - WINDOW) * number // (WINDOWS - 1) for number in range(WINDOWS))
    return f"{size}:{content_hash(b''.join(_read_at(path, place, WINDOW) for place in places))}"


def _read_at(path: Path, place: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(place)
        return file.read(length)


def _with_few_step(location: Location, found: list[str]) -> str:
    """The hash of what was found, and of the adapter that makes a base a few-step model."""
    own, few = content_hash("\n".join(found).encode()), location.few_step
    return own if few is None else content_hash(f"{own}\n{hash_few_step(few)}".encode())
