"""Preparing a dataset of the hub as it comes: the same tables as of its files, a shard read once, nothing else on disk.

There is no hub here: the one place where a name becomes a dataset gives local shards, read by the same streaming code.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backbone.distributed import processes
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.media.sources import stream as streams
from backbone.media.sources.pictures import list_images
from backbone.media.sources.stream import HubDataset, Stream, find_stream, stream_images
from backbone.models import encode
from backbone.models.model import Backbone
from backbone.training import prepared as folders
from backbone.training.prepared import Cropping
from backbone.training.sources import Streamed
from customize.data.prepared import PreparedImages
from customize.training.prepare import prepare_images
from tests.align.conftest import encoded
from tests.commands import run_here
from tests.shards import served, write_parquet, write_rows, write_tar

NAME = "somebody/dogs"
SIZES = (3, 4, 2)  # rows of the shards


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Serves shards of numbered images as `somebody/dogs`; gives their files."""
    monkeypatch.chdir(tmp_path)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")

    def serve(kind: str = "parquet", sizes: tuple[int, ...] = SIZES, **changes: Any) -> list[Path]:
        write = {"parquet": write_parquet, "webdataset": write_tar}[kind]
        files = write(tmp_path / "files", sizes, **changes)
        monkeypatch.setattr(streams, "stream_from_hub", served(kind, files))
        return files

    return serve


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one image, each written at once."""
    monkeypatch.setattr(folders, "MIN_CHUNK", 1)
    monkeypatch.setattr(encode, "BATCH_PIXELS", 1)
    monkeypatch.setattr(encode, "SHARD_SECONDS", 0.0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shards that were opened, and from which row on."""
    found: list[tuple[int, int]] = []
    whole = Stream.rows

    def rows(self: Stream, shard: int, first: int = 0) -> Iterator[dict[str, Any]]:
        found.append((shard, first))
        return whole(self, shard, first)

    monkeypatch.setattr(Stream, "rows", rows)
    return found


def opened(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def streamed(folder: Path, out: Path, **changes: Any) -> PreparedImages:
    stream = find_stream(HubDataset(NAME), out=out)
    assert stream is not None
    images = stream_images(stream, caption_column=None, image_column=None)
    return prepare_images(images, NAME, opened(folder), out, **changes)


def latents(found: PreparedImages, *, flip: bool = False) -> torch.Tensor:
    """The posteriors' means, in the order of the source."""
    parts, places = found.encoded(flip)
    return torch.stack([parts[part].column("mean")[row] for part, row in places])


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_streamed_dataset_is_prepared_as_its_files_are_bit_for_bit(
    tiny_folder: Path, hub: Callable[..., list[Path]], tmp_path: Path, kind: str, small_chunks: None
) -> None:
    files = hub(kind)
    found = streamed(tiny_folder, tmp_path / "out", cropping=Cropping(flip=True), workers=1)
    assert not list((tmp_path / "hub").rglob("*.arrow")), "no row is kept"
    source = files[0].parent
    shown = list_images(source)
    assert list((tmp_path / "hub").rglob("*.arrow")), "as they are of what is listed"
    other = prepare_images(
        shown, str(source), opened(tiny_folder), tmp_path / "listed", cropping=Cropping(flip=True)
    )
    assert [one.caption for one in found.pictures] == [f"dog {number}" for number in range(sum(SIZES))]
    assert [one.content_hash for one in found.pictures] == [one.content_hash for one in other.pictures]
    for flip in (False, True):
        assert torch.equal(latents(found, flip=flip), latents(other, flip=flip))
    assert [one.read() for one in found.pictures] == [one.read() for one in other.pictures]
    facts = found.facts
    assert (facts.records, facts.bad, facts.size) == (sum(SIZES), 0, 64)
    assert facts.dataset == {
        "dataset": NAME, "config": "", "split": "train", "revision": "commit-1", "shards": len(SIZES),
    }  # fmt: skip


def test_captions_of_a_stream_that_name_a_side_are_said_beside_flip(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("a dog looks to the left", "a dog on grass", "a dog with a logo")
    rows = [
        {"image": {"bytes": encoded(number), "path": f"{number}.png"}, "text": text}
        for number, text in enumerate(texts)
    ]
    files = write_rows(tmp_path / "files", (2, 1), rows, images=["image"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "stream_from_hub", served("parquet", files))
    for flip in (False, True):
        found = streamed(tiny_folder, tmp_path / f"out{flip}", cropping=Cropping(flip=flip))
        said = " ".join(capsys.readouterr().err.split())
        named = (
            f"“left” stands in the caption of {found.pictures[0].path} and 1 other text, and --flip teaches"
        )
        assert (named in said) == flip, said


def test_what_was_killed_goes_on_within_its_shard_and_reads_no_finished_one_again(
    tiny_folder: Path, hub: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    small_chunks: None, read: list[tuple[int, int]],
) -> None:  # fmt: skip
    hub()
    whole, calls = Backbone.encode, [0]

    def encode_some(self: Backbone, pictures: torch.Tensor) -> Any:
        if calls[0] == 5:
            raise KeyboardInterrupt
        calls[0] += len(pictures)
        return whole(self, pictures)

    monkeypatch.setattr(Backbone, "encode", encode_some)
    with pytest.raises(KeyboardInterrupt):
        streamed(tiny_folder, tmp_path / "out")
    assert read == [(0, 0), (1, 0)]
    read.clear()
    calls[0] = 0
    found = streamed(tiny_folder, tmp_path / "out")
    assert read[:2] == [(1, 2), (2, 0)] and calls[0] == 4, "the third row of the second shard is next"
    read.clear()
    streamed(tiny_folder, tmp_path / "out")
    assert read == [] and calls[0] == 4
    next((tmp_path / "out" / "images-64x64").glob("*.arrow")).unlink()
    assert len(latents(streamed(tiny_folder, tmp_path / "out"))) == sum(SIZES)
    assert len(read) == 1 and read[0][1] == 0 and calls[0] == 5, "of the one shard that lacks a row"
    assert len(found.pictures) == sum(SIZES)


def test_bad_rows_are_listed_and_left_out_only_when_asked(
    tiny_folder: Path, hub: Callable[..., list[Path]], tmp_path: Path
) -> None:
    hub(bad={4})
    with pytest.raises(UserError, match=r"1 of 9 images(.|\n)*00001-000001-image is text.*\n.*--skip-bad"):
        streamed(tiny_folder, tmp_path / "out")
    found = streamed(tiny_folder, tmp_path / "out", skip_bad=True)
    assert (found.facts.bad, found.facts.records, len(found.pictures)) == (1, 9, 8)
    assert [one.caption for one in found.pictures][3:5] == ["dog 3", "dog 5"]


def test_processes_share_the_shards(
    hub: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub()
    stream = find_stream(HubDataset(NAME), out=tmp_path / "out")
    assert stream is not None
    images = stream_images(stream, caption_column=None, image_column=None)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        source = Streamed(images, tmp_path / "out")
        chunks = source.chunks(np.zeros(0, np.int64), 16, tmp_path / "out")
        shares.append([[record.caption for _, record in chunk] for chunk in chunks])
    assert shares == [
        [["dog 0", "dog 1", "dog 2"], ["dog 7", "dog 8"]],
        [["dog 3", "dog 4", "dog 5", "dog 6"]],
    ]


def test_a_shard_that_breaks_off_is_one_sentence_and_what_came_before_is_kept(
    tiny_folder: Path, hub: Callable[..., list[Path]], tmp_path: Path, small_chunks: None,
    read: list[tuple[int, int]],
) -> None:  # fmt: skip
    files = hub("webdataset")
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"row \d of shard 1 of somebody/dogs cannot be read .*again to go on"
    ):
        streamed(tiny_folder, tmp_path / "out")
    files[1].write_bytes(whole)
    read.clear()
    assert len(streamed(tiny_folder, tmp_path / "out").pictures) == sum(SIZES)
    assert read[0][0] == 1 and read[0][1] > 0


def test_a_row_may_name_a_file_of_its_own_repository_and_no_other(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from datasets.utils import file_utils

    own = f"hf://datasets/{NAME}@commit-1/dog.png"
    (tmp_path / "here.png").write_bytes(encoded(1))
    names = [
        own,
        str(tmp_path / "here.png"),
        "here.png",
        "hf://datasets/somebody/dogs-of-others@main/dog.png",
    ]
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"image": {"bytes": None, "path": name}} for name in names]
    table = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "stream_from_hub", lambda named: (table, "commit-1"))
    monkeypatch.setattr(
        file_utils, "xopen", lambda name, mode: io.BytesIO(encoded(0)) if name == own else None
    )
    with pytest.raises(
        UserError, match=r"3 of 4 images cannot be used(.|\n)*Row 1 has no image in its column"
    ):
        streamed(tiny_folder, tmp_path / "out")
    (found,) = streamed(tiny_folder, tmp_path / "out", skip_bad=True).pictures
    assert found.read() == encoded(0)

    def lost(name: str, mode: str) -> None:
        raise ConnectionError("the hub went away")

    monkeypatch.setattr(file_utils, "xopen", lost)
    with pytest.raises(UserError, match=r"row 0 of shard 0 .* \(the hub went away\)"):  # it is no bad row
        streamed(tiny_folder, tmp_path / "other", skip_bad=True)


def test_going_on_reads_the_commit_that_it_was_begun_with_and_another_dataset_is_refused(
    tiny_folder: Path, hub: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub()
    streamed(tiny_folder, tmp_path / "out")
    monkeypatch.setattr(streams, "stream_from_hub", served("parquet", files, newest="commit-2"))
    stream = find_stream(HubDataset(NAME), out=tmp_path / "out")
    assert stream is not None and stream.origin.revision == "commit-1"
    stream = find_stream(HubDataset(NAME), out=tmp_path / "new")
    assert stream is not None and stream.origin.revision == "commit-2"
    stream = find_stream(HubDataset("somebody/cats"), out=tmp_path / "out")
    assert stream is not None
    images = stream_images(stream, caption_column=None, image_column=None)
    with pytest.raises(UserError, match="was begun with another"):
        prepare_images(images, NAME, opened(tiny_folder), tmp_path / "out")


def test_the_command_streams_a_dataset_by_diffusers_names_and_refuses_what_has_no_effect(
    tiny_folder: Path, hub: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: object) -> Any:
        where = ("--out", tmp_path / "out", "--model", tiny_folder, "--precision", "fp32", "--device", "cpu")
        return run_here("customize", "prepare", *words, *where, "--json", cwd=tmp_path, check=False)

    files = hub(sizes=(2,), image="picture")
    here = run("--images", files[0].parent, "--split", "test")
    assert here.returncode == 2 and "--split has no effect" in here.stderr
    wrong = run("--dataset_name", NAME, "--image_column", "photo")
    assert wrong.returncode == 2 and "has no column 'photo'; it has 'picture', 'text'" in wrong.stderr
    asked: list[HubDataset] = []

    def resolve(origin: HubDataset) -> tuple[Any, str]:
        asked.append(origin)
        return served("parquet", files)(origin)

    monkeypatch.setattr(streams, "stream_from_hub", resolve)
    done = run("--dataset_name", NAME, "--dataset_config_name", "small", "--split", "train")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 2
    assert asked == [HubDataset(NAME, "small", "train")]
    assert read_json(tmp_path / "out" / "prepared.json")["dataset"]["config"] == "small"


@pytest.mark.parametrize("door", ["customize", "align"])
def test_without_a_connection_a_dataset_is_one_sentence_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    monkeypatch.setattr(streams, "hub_answers", lambda name, kind: False)
    source = ("--dataset-name", NAME) if door == "customize" else (NAME,)
    alone = run_here(door, "prepare", *source, "--out", tmp_path / "out", cwd=tmp_path, check=False)
    assert alone.returncode == 2
    assert "does not answer. Connect to it, or give a folder" in " ".join(alone.stderr.split())
    assert not (tmp_path / "out").exists()


def test_what_the_hub_says_of_a_name_a_config_or_a_split_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "hub_answers", lambda name, kind: True)
    monkeypatch.setattr(streams, "find_revision", lambda name, revision: "commit-1")

    def load(name: str, config: str | None, **options: Any) -> None:
        assert (name, config) == (NAME, None) and options == {
            "split": "train", "revision": "commit-1", "streaming": True,
        }  # fmt: skip
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r"opened \(Config name is missing\. Please pick .*'b'\]\)\. Check the"
    ):
        find_stream(HubDataset(NAME), out=tmp_path / "out")


@pytest.mark.parametrize("marked", [False, True])
def test_a_row_s_list_of_images_is_as_many_images_with_its_caption(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marked: bool, small_chunks: None
) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = [
        {"images": [{"bytes": encoded(n), "path": None} for n in numbers], "text": f"dog {numbers}"}
        for numbers in ([0, 1], [], [2], [3, 4, 5])
    ]
    table = datasets.Dataset.from_list(rows)
    if marked:
        table = table.cast_column("images", datasets.List(datasets.Image()))
    (tmp_path / "shards").mkdir()
    table.to_parquet(str(tmp_path / "shards" / "train.parquet"))
    listed = list_images(tmp_path / "shards")
    captions = ["dog [0, 1]", "dog [0, 1]", "dog [2]", *["dog [3, 4, 5]"] * 3]
    assert [one.caption for one in listed] == captions
    assert [one.read() for one in listed] == [encoded(n) for n in range(6)]
    assert len({one.path for one in listed}) == 6
    monkeypatch.setattr(
        streams, "stream_from_hub", served("parquet", [tmp_path / "shards" / "train.parquet"])
    )
    found = streamed(tiny_folder, tmp_path / "out")
    assert [one.caption for one in found.pictures] == captions
    assert [one.read() for one in found.pictures] == [encoded(n) for n in range(6)]
    assert Streamed(stream_of(tmp_path), tmp_path / "out").passed_over == 1


def stream_of(folder: Path) -> Any:
    """The images of the dataset that is served."""
    stream = find_stream(HubDataset(NAME), out=folder / "out")
    assert stream is not None
    return stream_images(stream, caption_column=None, image_column=None)


def test_a_caption_that_is_no_text_is_refused_in_tables_as_in_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = {"bytes": encoded(0), "path": None}
    (file,) = write_rows(tmp_path / "shards", (1,), [{"image": image, "text": ["a dog", "a red dog"]}])
    with pytest.raises(UserError, match=r"Row 0 of .*has a caption that is not text .*one text for each"):
        list_images(file)
    monkeypatch.setattr(streams, "stream_from_hub", served("parquet", [file]))
    with pytest.raises(UserError, match=r"row 0 of shard 0 .*has a caption that is not text"):
        stream_of(tmp_path).read(next(stream_of(tmp_path).stream.rows(0)), 0, 0)
