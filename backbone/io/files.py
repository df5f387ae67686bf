"""Atomic file writes, safetensors, JSON and JSON lines, folders, content hashes.

Every writer creates missing parent folders, writes a temporary file beside the destination, fsyncs and renames it: a
reader sees the old content or the new one. An exception leaves nothing behind; the temporary file of a killed writer is
removed by the next writer of the file.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast, overload

from backbone.io.console import UserError, quote, refuse_other_encodings
from backbone.io.records import is_pointer, parse_json, read_as, refuse_pipe

if TYPE_CHECKING:
    import torch

IS_GGUF = (
    "is GGUF, which is not read. Take its .safetensors, in fp16, bf16 or fp8; --vram GIB can hold a model's base in 4 "
    "or 8 bits."
)
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
OTHER_RUNTIMES = {  # suffixes of models that were exported for another runtime
    ".onnx": "ONNX Runtime", ".engine": "TensorRT", ".plan": "TensorRT", ".trt": "TensorRT",
    ".mlpackage": "Core ML", ".mlmodelc": "Core ML", ".tflite": "TensorFlow Lite", ".msgpack": "Flax",
}  # fmt: skip
ABANDONED_SECONDS = 24 * 3600  # older temporary files of other machines are removed
WHOLE = ".whole"  # suffix of a temporary folder that is complete and only has to be moved
Kind = TypeVar("Kind")


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file atomically. An `OSError` (a full disk) names `path`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, newlines unchanged."""
    refuse_other_encodings(text, f"{path} was not written: ")
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically.

    Paths become strings, dataclasses objects, one-element tensors numbers, NaN and infinities null. Raises `TypeError`
    for anything else that JSON does not know.
    """
    write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """The indented JSON that `write_json` writes."""
    return json.dumps(_to_json(value), indent=2, ensure_ascii=False, allow_nan=False)


@overload
def read_json(path: str | Path) -> dict[str, Any]: ...
@overload
def read_json(path: str | Path, kind: type[Kind]) -> Kind: ...
def read_json(path: str | Path, kind: Any = dict[str, Any]) -> Any:
    """Read a JSON file as `kind` (see `backbone.io.records`), an object if left out.

    Raises `UserError`, with the file and the key, if it is damaged, `FileNotFoundError` if it is missing.
    """
    refuse_pipe(path)
    return read_as(kind, parse_json(Path(path).read_bytes(), path), path)


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors and string metadata as safetensors, atomically: equal ones give equal bytes.

    Tensors may share memory and be on any device; each is stored in full and contiguous. (safetensors' writer puts the
    metadata in random order, and leaves a temporary file behind when it is killed.)
    """
    import torch

    # Larger elements first, so that all are aligned
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {}).items()))}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _safetensors_type(str(tensor.dtype).removeprefix("torch."))
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(cast(Any, flat.view(torch.uint8).numpy()))


def _safetensors_type(dtype: str) -> str:
    """safetensors' name of a dtype: `BF16` of bfloat16, `F8_E4M3` of float8_e4m3fn, `I64` of int64."""
    if dtype.startswith("float8"):
        return dtype.upper().replace("FLOAT8_", "F8_").removesuffix("FN")
    return {"bfloat16": "BF16", "bool": "BOOL", "complex64": "C64"}.get(
        dtype, dtype.upper().replace("UINT", "U").replace("INT", "I").replace("FLOAT", "F")
    )


def read_tensors(
    path: str | Path, *, device: str = "cpu", prefix: str = "", names: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read (tensors by name, string metadata) of a safetensors file: the `names`, or all that begin with `prefix`.

    Names are plain (`plain_name`). Raises `UserError` for a damaged file and for any other format (a pickle can run
    code when it is opened, so none is ever read), `FileNotFoundError` if it is missing.
    """
    from safetensors import SafetensorError, safe_open

    path = check_safetensors_path(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            stored = _map_plain_names(file, path)
            if names is None:
                names = [name for name in stored if name.startswith(prefix)]
            tensors = {name: file.get_tensor(stored.get(name, name)) for name in names}
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        _raise_unreadable(path, error)


def open_tensors(path: str | Path) -> Callable[[str], torch.Tensor]:
    """A function that reads one tensor of a safetensors file by its plain name; the header is read only once.

    It raises as `read_tensors` does, and `KeyError` for an unknown name.
    """
    from safetensors import SafetensorError, safe_open

    path = check_safetensors_path(path)
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        stored = _map_plain_names(file, path)
    except SafetensorError as error:
        _raise_unreadable(path, error)

    def read(name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = file.get_tensor(stored[name])
            return tensor
        except SafetensorError as error:
            _raise_unreadable(path, error)

    return read


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the string metadata of a safetensors file; raises as `read_tensors` does."""
    return read_header(path).metadata


class Header(NamedTuple):
    """The header of a safetensors file: shapes and dtypes (`F16`, `I8`) by tensor name, and the string metadata."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    dtypes: Mapping[str, str] = MappingProxyType({})


def read_header(path: str | Path) -> Header:
    """Read a safetensors header without its tensors; raises as `read_tensors` does."""
    from safetensors import SafetensorError, safe_open

    path = check_safetensors_path(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(stored) for name, stored in _map_plain_names(file, path).items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
            dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
            return Header(path, shapes, dict(file.metadata() or {}), dtypes)
    except SafetensorError as error:
        _raise_unreadable(path, error)


# What torch.compile, FSDP and activation checkpointing add to names
WRAPPERS = re.compile(
    r"(?:^|(?<=[._]))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\\?\.|_)"
)


def plain_name(name: str) -> str:
    """The name of a tensor or layer, or a pattern of names, without what wrappers of modules add to it."""
    return WRAPPERS.sub("", name)


def _map_plain_names(file: Any, path: Path) -> dict[str, str]:
    """Each tensor's plain name → its stored name; `UserError` if two have the same plain name."""
    stored: dict[str, str] = {}
    for name in file.keys():  # noqa: SIM118 (no mapping)
        if (other_name := stored.setdefault(plain_name(name), name)) != name:
            raise UserError(f"{path} holds {plain_name(name)} twice ({other_name}, {name}). Export it again.")
    return stored


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, in a single write; values as in `write_json`.

    A line that a crash has cut is terminated first, so that only that line is lost.
    """
    line = json.dumps(_to_json(dict(record)), ensure_ascii=False, allow_nan=False) + "\n"
    refuse_other_encodings(line, f"{path} was not written: ")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


@overload
def read_jsonl(path: str | Path) -> list[dict[str, Any]]: ...
@overload
def read_jsonl(path: str | Path, kind: type[Kind]) -> list[Kind]: ...
def read_jsonl(path: str | Path, kind: Any = dict[str, Any]) -> list[Any]:
    """Read the objects of a JSON-lines file, each as `kind`; lines that a crash has cut are skipped.

    Raises `UserError`, with the file and the key, for an object of another type.
    """
    records = []
    refuse_pipe(path)
    for line in Path(path).read_bytes().splitlines():
        try:
            record = parse_json(line, path)
        except UserError:
            continue
        if isinstance(record, dict):
            records.append(read_as(kind, record, path))
    return records


def make_numbered_folder(path: str | Path) -> Path:
    """Create a new folder: `path`, or `path-2`, `path-3` … if that exists. Returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            number += 1
        else:
            return candidate


def make_empty_folder(path: str | Path) -> Path:
    """Create a folder, or accept an empty one. Raises `UserError` for a file or a folder with contents.

    What a killed writer left there is removed first, or moved into place if it was complete (`fill_folder`).
    """
    path = Path(path)
    refuse_filled(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def refuse_filled(path: Path) -> None:
    """Raise `UserError` for a file, or a folder with contents: nothing is overwritten."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder. Name another folder.")
    if path.is_dir():
        remove_abandoned(path)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty. Name another folder, or remove this one.")


def refuse_gone(folder: Path, result: str) -> None:
    """Raise `UserError` for a folder that was moved or removed meanwhile: a writer would create it again."""
    if not folder.is_dir():
        raise UserError(f"{folder} is gone, so {result} was not kept. Put the folder back.")


@contextmanager
def keep_whole(files: Collection[Path]) -> Iterator[None]:
    """Inside the `with`, files are written together: after a failure all of them are removed."""
    try:
        yield
    except BaseException:
        for file in files:
            with suppress(OSError):
                file.unlink()
        raise


@contextmanager
def fill_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder inside `path`, new or empty; on a clean exit its files are moved up into `path`.

    If the body raises, nothing is left behind. What a killed writer leaves is removed by the next one, or moved up
    if it was complete: so a folder holds nothing or everything. Raises as `make_empty_folder` does.
    """
    folder = Path(path)
    existed = folder.is_dir()
    temporary = make_empty_folder(folder) / f".files.{_make_mark()}.partial"
    _temporaries.add(temporary)
    try:
        temporary.mkdir()
        yield temporary
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"Another process has written {path} meanwhile. Name another folder.")
        finished = temporary.with_suffix(WHOLE)
        temporary.rename(finished)
        _move_up(finished)
    except BaseException as error:
        if isinstance(error, OSError):  # for a copy, filename2 is the one that was not written
            for name in ("filename", "filename2"):
                if str(getattr(error, name)).startswith(os.fspath(temporary)):
                    inside = os.path.relpath(getattr(error, name), temporary)
                    setattr(error, name, os.path.normpath(os.path.join(path, inside)))
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed:
            with suppress(OSError):  # another process writes there
                folder.rmdir()
        raise
    finally:
        _temporaries.discard(temporary)


def _move_up(finished: Path) -> None:
    """Move the contents of a finished folder into its parent folder."""
    for path in sorted(finished.iterdir()):
        os.replace(path, finished.parent / path.name)
    finished.rmdir()
    _flush_folder(finished.parent)


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, including those of linked folders (which `Path.rglob` skips)."""
    return sorted(_walk(folder, ()))


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    if (resolved := os.path.realpath(folder)) in above:  # a link to a folder that holds it
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, (*above, resolved))
        elif path.is_file():
            yield path


def content_hash(content: bytes | str | Path) -> str:
    """SHA-256 (64 hex digits) of bytes, or of the file at a path."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    with Path(content).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_temporaries: set[Path] = set()  # the temporary files of this process
_reserved: set[Path] = set()  # files that did not exist when this process began to make them


def refuse_existing(path: Path) -> None:
    """Raise `UserError` for a file that exists.

    `atomic_write` will also refuse it if another process writes it before this one has finished.
    """
    if path.exists():
        # Left by a writer that was killed after it had linked the file
        remove_abandoned(path.parent, _start_name(path))
        raise UserError(
            f"{path} exists already and is not overwritten. Name another file, or remove this one."
        )
    _reserved.add(Path(os.path.realpath(path)))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is fsynced and renamed to `path`.

    If the body raises, the temporary file is removed and `path` is unchanged; the temporary file of a killed writer is
    removed first. A symbolic link is followed. For the temporary file of another `atomic_write` that file is yielded.
    Raises `UserError` if `path` is a folder.
    """
    destination = Path(os.path.realpath(path))
    if destination in _temporaries:
        yield destination
        return
    if destination.is_dir():
        raise UserError(f"{path} is a folder, so no file can be written there. Name a file in it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    start = _start_name(destination)
    remove_abandoned(destination.parent, start)
    temporary = destination.with_name(f"{start}{_make_mark()}.partial")
    _temporaries.add(temporary)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        permissions = temporary.stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, permissions)  # a writer may have replaced it
        _flush(temporary)
        _move_into_place(temporary, destination)
        _flush_folder(destination.parent)
    except OSError as error:
        if error.filename is None or error.filename == os.fspath(temporary):
            error.filename = os.fspath(path)
        raise
    finally:
        with suppress(OSError):  # the disk has become read-only
            temporary.unlink()
        _temporaries.discard(temporary)


def _move_into_place(temporary: Path, destination: Path) -> None:
    """Move a finished file to its place; `UserError` if it had to be new (`refuse_existing`) and is not."""
    if destination in _reserved:
        _reserved.discard(destination)
        try:
            os.link(temporary, destination)
            return
        except FileExistsError as error:
            raise UserError(
                f"{destination} was written by another process meanwhile and is not overwritten. Name another file."
            ) from error
        except OSError:  # a file system without links
            pass
    os.replace(temporary, destination)


@contextmanager
def raise_os_errors(path: str | Path) -> Iterator[None]:
    """Inside the `with`, a system error (a full disk) that a Rust library raises as its own type becomes `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), os.fspath(path)) from error


def remove_abandoned(folder: Path, start: str = ".") -> None:
    """Remove a folder's temporary files whose names begin with `start` and whose writer was killed.

    The writer's machine and process are in the name. Files of other machines, on a shared disk, are removed when they
    are a day old. A folder that was complete is moved into place (`fill_folder`).
    """
    for path in (path for end in (".partial", WHOLE) for path in folder.glob(f"{glob.escape(start)}*{end}")):
        host, _, process = path.stem.rpartition(".")[2].rpartition("-")[0].partition("-")
        if path in _temporaries or not process.isdecimal():
            continue
        try:
            if host == _hash_host():
                abandoned = int(process) == os.getpid() or not _is_running(int(process))
            else:
                abandoned = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            if abandoned and path.suffix == WHOLE:
                _move_up(path)
            elif abandoned and path.is_dir():
                shutil.rmtree(path)
            elif abandoned:
                path.unlink(missing_ok=True)
        except OSError:  # not ours to remove, or gone
            continue


def _start_name(path: Path) -> str:
    """The start of the names of a file's temporary files: 100 bytes of its name, since a name has at most 255."""
    return f".{path.name.encode('utf-8', 'surrogateescape')[:100].decode('utf-8', 'ignore')}."


def _make_mark() -> str:
    """Part of a temporary file's name: the writer's machine and process, and a random number."""
    return f"{_hash_host()}-{os.getpid()}-{secrets.token_hex(6)}"


@cache
def _hash_host() -> str:
    """Six hex digits that identify this machine or container."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "item") and getattr(value, "size", None) is not None:  # a tensor or a numpy scalar
        return _to_json(value.item())
    return value


def explain_unread_format(path: Path) -> str:
    """Why weights with this file name's suffix are not read, and what to take instead; "" for any other suffix."""
    suffix = path.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        return (
            f"{path} is a pickle by its name, which can run code when it is opened, so it is not read. "
            "Convert it to safetensors where you trust it, or take the model's safetensors version."
        )
    if suffix in OTHER_RUNTIMES:
        runtime = OTHER_RUNTIMES[suffix]
        return (
            f"{path} is a model for {runtime}, which is not read. Use the safetensors that it was made from."
        )
    return f"{path} {IS_GGUF}" if suffix == ".gguf" else ""


def check_safetensors_path(path: str | Path) -> Path:
    """The path; `UserError` if its name or its kind says that it is no safetensors file, without opening it."""
    path = Path(path)
    is_pickle = path.suffix.lower() in PICKLE_SUFFIXES  # refused by the name alone
    if (reason := explain_unread_format(path)) and (is_pickle or path.exists()):
        raise UserError(reason)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a safetensors file. Name the file in it.")
    if not path.exists():
        raise FileNotFoundError(2, os.strerror(2), str(path))
    if not path.is_file():
        raise UserError(f"{path} is a pipe or a device, not a safetensors file. Name a file.")
    with path.open("rb"):  # safetensors would say of an unreadable file that there is none, without its name
        return path


def _raise_unreadable(path: Path, error: Exception) -> NoReturn:
    """Raise a `UserError` that says what kind of file this is instead of safetensors."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"GGUF"):
        raise UserError(f"{path} {IS_GGUF}") from error
    if is_pointer(start):
        raise UserError(
            f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` beside it."
        ) from error
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise UserError(
            f"{path} holds a pickle, not safetensors, so it is not read. "
            "Convert it to safetensors where you trust it, or take the model's safetensors version."
        ) from error
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")):
        raise UserError(f"{path} is a picture, not weights. Name a .safetensors file.") from error
    if path.suffix.lower() == ".json":
        raise UserError(
            f"{path} is a record, not weights. Name its folder, {quote(path.parent)}, or a .safetensors file."
        ) from error
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b'{"')):
        raise UserError(
            f"{path} is a web page or a site's error message, not weights. "
            "Log in where it came from, and download it again."
        ) from error
    if unknown := re.search(r"unknown variant `(\w+)`|Dtype not understood: (\w+)", str(error)):
        kind = unknown[1] or unknown[2]
        raise UserError(
            f"{path} holds {kind} tensors, which are not read. Take its version in fp16, bf16 or fp32."
        ) from error
    raise UserError(
        f"{path} is not a whole safetensors file ({error}). Download or write it again."
    ) from error
