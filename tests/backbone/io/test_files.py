"""A file is whole or not there; a pickle is never read; what was written is read back."""

from __future__ import annotations

import errno
import json
import os
import pickle  # noqa: TID251  (to make the files that must be refused)
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from backbone.io.console import UserError
from backbone.io.files import (
    _hash_host,
    append_jsonl,
    atomic_write,
    content_hash,
    fill_folder,
    make_empty_folder,
    make_numbered_folder,
    open_tensors,
    raise_os_errors,
    read_header,
    read_json,
    read_jsonl,
    read_metadata,
    read_tensors,
    refuse_existing,
    remove_abandoned,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)

ROOT = Path(__file__).parents[3]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_back_and_nothing_else_remains(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b.bin", b"\0\1")
    write_text(tmp_path / "a" / "t.txt", "naïve\n€")
    write_json(tmp_path / "a" / "j.json", {"x": [1, 2.5, None, "é"]})
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\0\1"
    assert (tmp_path / "a" / "t.txt").read_bytes() == "naïve\n€".encode()
    assert read_json(tmp_path / "a" / "j.json") == {"x": [1, 2.5, None, "é"]}
    assert names(tmp_path / "a") == ["b.bin", "j.json", "t.txt"]


def test_a_name_in_another_encoding_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    odd = "/home/caf\udce9/dog"
    with pytest.raises(UserError, match=r"a\.json was not written: /home/caf\ufffd/dog is no text in UTF-8"):
        write_json(tmp_path / "a.json", {"images": [Path(odd)]})
    with pytest.raises(UserError, match=r"a\.jsonl was not written: /home/caf\ufffd/dog is no text in UTF-8"):
        append_jsonl(tmp_path / "a.jsonl", {"image": odd})
    assert names(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    write_text(path, "old")

    def interrupted() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["weights.txt"]


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path: Path) -> None:
    def full() -> None:
        with atomic_write(tmp_path / "x.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        full()
    assert caught.value.filename == str(tmp_path / "x.txt")
    assert names(tmp_path) == []


def test_a_disk_that_became_read_only_is_said_of_the_file_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str | Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # which such a disk refuses of what is not there too
    with pytest.raises(OSError, match="Read-only") as caught:
        write_text(tmp_path / "a.txt", "a")
    assert caught.value.filename == str(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["狗" * 85, "é" * 127, "a" * 255])
def test_a_file_may_be_called_as_long_as_the_system_has_it(tmp_path: Path, name: str) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / name, text)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "two"


def test_a_folder_is_not_overwritten_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write_text(tmp_path, "x")


@pytest.mark.skipif(os.name != "posix", reason="POSIX links and permissions")
def test_links_keep_pointing_and_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link.txt", "x")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "x"
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(2)})
    for name in ("real.txt", "t.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == usual


def test_tensors_return_with_type_shape_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {
        "half": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "count": torch.arange(5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(path, tensors, {"family": "sd", "note": "é"})
    back, metadata = read_tensors(path)
    assert metadata == {"family": "sd", "note": "é"} == read_metadata(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


@pytest.mark.parametrize(
    ("compiled", "plain"),
    [
        ("_orig_mod.down.0.weight", "down.0.weight"),
        ("unet._orig_mod.down.0._orig_mod.to_q.lora_A.weight", "unet.down.0.to_q.lora_A.weight"),
        ("lora_unet__orig_mod_down_0_to_q.alpha", "lora_unet_down_0_to_q.alpha"),
        ("lora_unet_blocks_0__orig_mod_attn_q.alpha", "lora_unet_blocks_0_attn_q.alpha"),
        ("_fsdp_wrapped_module.down.0._fsdp_wrapped_module.q.weight", "down.0.q.weight"),
        ("unet.down.0._checkpoint_wrapped_module.q.lora_A.weight", "unet.down.0.q.lora_A.weight"),
        ("lora_unet_down_0__checkpoint_wrapped_module_q.alpha", "lora_unet_down_0_q.alpha"),
        ("my_orig_model.weight", "my_orig_model.weight"),
    ],
)
def test_a_compiled_network_s_names_are_those_of_the_network(
    compiled: str, plain: str, tmp_path: Path
) -> None:
    tensors = {compiled: torch.arange(3.0), "other": torch.zeros(2)}
    write_tensors(path := tmp_path / "t.safetensors", tensors)
    assert read_header(path).shapes == {plain: (3,), "other": (2,)}
    for asked in ({}, {"prefix": plain[:6]}, {"names": {plain}}):
        assert torch.equal(read_tensors(path, **asked)[0][plain], torch.arange(3.0))
    assert torch.equal(open_tensors(path)(plain), torch.arange(3.0))
    if compiled != plain:
        write_tensors(path, {**tensors, plain: torch.zeros(3)})
        for read in (read_header, read_tensors, open_tensors):
            with pytest.raises(UserError, match="twice"):
                read(path)


def test_views_of_one_memory_are_stored_each_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    views = {
        "whole": whole,
        "again": whole,
        "turned": whole.T,
        "row": whole[1],
        "spread": whole[0, 0].expand(5),
    }
    write_tensors(path, views)
    back, metadata = read_tensors(path)
    assert metadata == {}
    for name, tensor in views.items():
        assert torch.equal(back[name], tensor)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04nothing", b"\xff" * 64])
def test_a_damaged_tensor_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_metadata):
        with pytest.raises(UserError, match=r"broken\.safetensors"):
            read(path)


@pytest.mark.parametrize("kind", ["U4", "F6_E2M3"])
def test_a_file_of_a_type_that_is_not_read_is_whole_and_said_to_be_of_that_type(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "small.safetensors"
    header = json.dumps({"a": {"dtype": kind, "shape": [4], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(
        UserError, match=rf"holds {kind} tensors, which are not read\. Take its version in fp16"
    ):
        read_tensors(path)


def test_a_cut_off_tensor_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    write_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_tensors(path)


@pytest.mark.parametrize(
    "name", ["model.bin", "model.CKPT", "model.pt", "model.pth", "disguised.safetensors"]
)
def test_a_pickle_is_refused_and_not_opened(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"pickle.*safetensors"):
        read_tensors(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_gguf_is_told_by_its_name_and_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"GGUF\x03" + bytes(60))
    for read in (read_header, read_tensors):
        with pytest.raises(UserError, match=r"is GGUF, which is not read\. Take its \.safetensors"):
            read(path)


@pytest.mark.parametrize("start", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF"])
def test_a_picture_is_told_to_be_no_weights(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "dog.png"
    path.write_bytes(start + bytes(60))
    with pytest.raises(UserError, match=r"dog\.png is a picture, not weights"):
        read_header(path)


def test_the_record_beside_weights_is_told_to_be_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  "_class_name": "T2IAdapter"\n}\n')
    with pytest.raises(UserError, match=r"config\.json is a record, not weights\. Name its folder, "):
        read_header(path)


def test_a_missing_tensor_file_is_missing_and_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read_tensors(tmp_path / "m.safetensors")
    assert caught.value.filename == str(tmp_path / "m.safetensors")


@dataclass(frozen=True)
class Settings:
    rate: float
    images: Path


def test_json_takes_what_our_settings_hold(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    value = {
        "settings": Settings(1e-4, Path("dog")),
        "loss": torch.tensor(0.5),
        "nan": float("nan"),
        "inf": torch.tensor(float("inf")),
        "pair": (1, True),
        2: "two",
    }
    write_json(path, value)
    assert json.loads(path.read_text()) == {
        "settings": {"rate": 1e-4, "images": "dog"},
        "loss": 0.5,
        "nan": None,
        "inf": None,
        "pair": [1, True],
        "2": "two",
    }
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path)["loss"] == 0.5


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(b'{"a": 1')
    with pytest.raises(UserError, match=r"s\.json is not JSON"):
        read_json(tmp_path / "s.json")


def test_a_line_that_a_crash_cut_off_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "log.jsonl"
    append_jsonl(path, {"step": 1, "loss": 0.5})
    with path.open("ab") as file:
        file.write('{"step": 2, "note": "é'.encode()[:-1])
    append_jsonl(path, {"step": 3, "note": "two\nlines\u2028"})
    assert read_jsonl(path) == [{"step": 1, "loss": 0.5}, {"step": 3, "note": "two\nlines\u2028"}]


def test_fresh_folders_never_collide(tmp_path: Path) -> None:
    made = [make_numbered_folder(tmp_path / "runs" / "dog") for _ in range(3)]
    assert [folder.name for folder in made] == ["dog", "dog-2", "dog-3"]
    assert all(folder.is_dir() for folder in made)


def test_a_folder_that_the_user_names_must_be_empty(tmp_path: Path) -> None:
    assert make_empty_folder(tmp_path / "new" / "run").is_dir()
    assert make_empty_folder(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    with pytest.raises(UserError, match="not empty"):
        make_empty_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        make_empty_folder(tmp_path / "file")


def test_the_hash_is_that_of_the_content_not_of_the_name(tmp_path: Path) -> None:
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1: "abc"
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"abc")
        assert content_hash(tmp_path / name) == content_hash(str(tmp_path / name)) == known
    assert content_hash(b"abc") == known


# Kills ------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys, signal
from backbone.io.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_behind_is_removed_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].endswith(".partial")
    write_bytes(tmp_path / "other.bin", b"other")
    assert len(names(tmp_path)) == 2  # of another file
    write_bytes(path, b"whole")
    assert names(tmp_path) == ["other.bin", "w.bin"]


def test_a_folder_is_swept_of_what_no_writer_is_at_work_on(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "w")], cwd=ROOT, check=False)
    assert done.returncode == -9
    (tmp_path / ".ours.abcdef-1-aaaa.partial").touch()  # of another machine, and new
    old = tmp_path / ".theirs.abcdef-1-bbbb.partial"
    old.touch()
    os.utime(old, (1, 1))
    with atomic_write(tmp_path / "now") as temporary:
        remove_abandoned(tmp_path)
        assert names(tmp_path) == sorted([".ours.abcdef-1-aaaa.partial", temporary.name])


FILLED = """
import os, sys, signal
from pathlib import Path
from typing import Any
from backbone.io import files
from backbone.io.files import fill_folder, write_bytes
if sys.argv[2] == "moving":
    replace = files.os.replace
    def once(old, new):
        if Path(new).name == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
    files.os.replace = once
with fill_folder(sys.argv[1]) as folder:
    (folder / "a").write_bytes(b"a")
    (folder / "parts").mkdir()
    (folder / "parts" / "c").write_bytes(b"c")
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "b").write_bytes(b"b")
"""


def test_a_folder_whose_writer_was_killed_holds_nothing_or_everything(tmp_path: Path) -> None:
    for moment, left in (("writing", []), ("moving", ["a", "b", "parts"])):
        folder = tmp_path / moment
        done = subprocess.run([sys.executable, "-c", FILLED, str(folder), moment], cwd=ROOT, check=False)
        assert done.returncode == -9
        remove_abandoned(folder)
        assert names(folder) == left
    with pytest.raises(UserError, match="not empty"), fill_folder(tmp_path / "moving"):
        raise AssertionError
    assert (tmp_path / "moving" / "parts" / "c").read_bytes() == b"c"
    with fill_folder(tmp_path / "writing") as folder:
        (folder / "x").touch()
    assert names(tmp_path / "writing") == ["x"]


def test_a_folder_that_could_not_be_filled_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()

    def fail(folder: Path) -> None:
        with fill_folder(folder) as unfinished:
            (unfinished / "half").touch()
            raise KeyError

    for name in ("new", "there"):
        with pytest.raises(KeyError):
            fail(tmp_path / name)
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == []


def test_a_write_inside_a_write_goes_into_the_same_temporary_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "w") as outer, atomic_write(outer) as inner:
        assert inner == outer
        inner.write_text("x")
    assert names(tmp_path) == ["w"]


def test_what_another_process_has_written_meanwhile_is_not_mixed_with_what_is_moved_up(
    tmp_path: Path,
) -> None:
    def fill(name: str) -> None:
        with fill_folder(tmp_path / "new") as unfinished:
            (unfinished / "a.txt").write_text("slow")
            (tmp_path / "new" / name).write_text("quick")
            if name.startswith("."):
                raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fill(".another-s.partial")
    (tmp_path / "new" / ".another-s.partial").unlink()
    with pytest.raises(UserError, match="Another process has written"):
        fill("b.txt")
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [("b.txt", "quick")]


@pytest.mark.parametrize("read", [read_header, read_tensors, read_metadata])
def test_a_file_that_may_not_be_read_is_no_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    """Other libraries write weights that their owner alone may read, and models are shared."""
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(2)})

    def closed(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        read(path)


def test_equal_tensors_and_metadata_give_equal_bytes_that_safetensors_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.int8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.complex64,
    )
    tensors = {f"{number:02d} {kind}": torch.ones(3, 2).to(kind) for number, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.rand(4, 3).T}
    metadata = dict.fromkeys("zyxwvutsrqponm", "é\n\x7f\u2028/")
    write_tensors(tmp_path / "a", tensors, metadata)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = load_file(tmp_path / "a")
    assert set(found) == set(tensors) and read_metadata(tmp_path / "a") == metadata
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].to(torch.complex128), tensor.to(torch.complex128))


def test_a_file_that_another_process_writes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    refuse_existing(path)
    path.write_text("theirs")
    with pytest.raises(UserError, match=r"new\.txt was written by another process meanwhile"):
        write_text(path, "ours")
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]
    write_text(path, "ours")  # which was not asked to be new
    assert path.read_text() == "ours"
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        refuse_existing(path)


def test_a_device_is_no_file_of_weights() -> None:
    with pytest.raises(UserError, match="/dev/null is a pipe or a device, not a safetensors file"):
        read_tensors("/dev/null")


def test_what_a_killed_writer_left_beside_a_finished_file_goes_with_the_next_command(tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    path.touch()
    left = tmp_path / f".dog.safetensors.{_hash_host()}-{2**22 + 1}-abcdef012345.partial"
    left.touch()
    with pytest.raises(UserError, match="exists already"):
        refuse_existing(path)
    assert not left.exists()


def test_a_full_disk_is_said_of_the_file_that_was_asked_for(tmp_path: Path) -> None:
    def fill(place: Path) -> None:
        with fill_folder(place) as unfinished:
            raise OSError(errno.ENOSPC, "No space left on device", str(unfinished / "unet" / "config.json"))

    with pytest.raises(OSError, match="No space") as raised:
        fill(tmp_path / "out")
    assert raised.value.filename == str(tmp_path / "out" / "unet" / "config.json")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_to_libraries_in_rust_too(tmp_path: Path) -> None:
    def save() -> None:
        with raise_os_errors(tmp_path / "tokenizer"):
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(OSError, match="tokenizer") as raised:
        save()
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="of its own"), raise_os_errors(tmp_path):
        raise ValueError("of its own")


def test_a_disk_that_is_full_during_a_copy_is_said_of_the_copy(tmp_path: Path) -> None:
    def copy(place: Path) -> None:
        with fill_folder(place) as unfinished:
            raise OSError(
                errno.ENOSPC, "No space left", "model.safetensors", None, str(unfinished / "vae" / "a")
            )

    with pytest.raises(OSError, match="No space") as raised:
        copy(tmp_path / "out")
    assert raised.value.filename == "model.safetensors"
    assert raised.value.filename2 == str(tmp_path / "out" / "vae" / "a")


def test_a_page_with_large_images_on_one_line_is_written_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    write_text(tmp_path / "report.html", "a" * 3_000_000)
    assert time.perf_counter() - began < 2
