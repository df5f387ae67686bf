"""Preparing pairs for training: tables instead of images, bit for bit the same runs, and everything that goes wrong."""

from __future__ import annotations

import errno
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from align.objectives.dataset import PreferenceData, make_preference_data, make_records, reread_preferences
from align.objectives.preference import PreferenceTraining
from align.pairs.prepared import IMAGES, Prepared
from align.pairs.read import read_preferences, stream_preferences
from align.pairs.records import check_preferences
from align.settings import Settings
from align.training.prepare import prepare_pairs
from backbone.conditions.conditions import Conditions
from backbone.data import table as tables
from backbone.data.table import Table
from backbone.io.console import UserError
from backbone.io.files import read_json, write_bytes
from backbone.io.run_folder import hold_folder
from backbone.media.sources import stream as streams
from backbone.media.sources.stream import HubDataset, find_stream
from backbone.models import encode
from backbone.models.model import Backbone
from backbone.training import prepared as folders
from backbone.training.prepared import RECORDS, Cropping
from backbone.training.run import take_steps
from tests.align.conftest import TRAIN, align, encoded, picture, refused, write_lines
from tests.align.objectives.test_preference import opened, settings, weights
from tests.shards import served, write_rows

PLACE = ("--precision", "fp32", "--device", "cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of each test's own: what another one has encoded in other batches is rounded otherwise."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two records, each written at once."""
    monkeypatch.setattr(folders, "MIN_CHUNK", 2)
    monkeypatch.setattr(encode, "BATCH_PIXELS", 1)
    monkeypatch.setattr(encode, "SHARD_SECONDS", 0.0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of an encoder got."""
    calls: list[int] = []
    whole = Backbone.encode

    def count(self: Backbone, pictures: Tensor) -> Any:
        calls.append(len(pictures))
        return whole(self, pictures)

    monkeypatch.setattr(Backbone, "encode", count)
    return calls


def prepared(folder: Path, source: Path, out: Path, **changes: Any) -> Prepared:
    cropping = {field.name: changes.pop(field.name) for field in fields(Cropping) if field.name in changes}
    return prepare_pairs(
        read_preferences(source), opened(folder), out, cropping=Cropping(**cropping), **changes
    )


def data_of(folder: Path, source: Path, asked: Settings) -> tuple[Backbone, PreferenceData]:
    """What a run would learn from."""
    asked, model = replace(asked, pairs=str(source)), opened(folder)
    train, out = make_records(reread_preferences(asked, skip_bad=False), asked).split(
        share=asked.held_out, seed=asked.seed
    )
    return model, make_preference_data(model, train, out, asked)


def learned(model: Backbone, data: PreferenceData, asked: Settings) -> dict[str, Tensor]:
    run = PreferenceTraining(model, data, asked)
    for _ in take_steps(run):
        pass
    return weights(run)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# The same run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"flip": True, "random_crop": 2}, pytest.param({"loss": "kto"}, marks=pytest.mark.slow)],
    ids=["pairs, flip, crops", "kto"],
)
def test_a_run_from_a_prepared_folder_is_the_run_from_its_source_bit_for_bit(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, changes: dict[str, Any], small_shards: None
) -> None:
    """As it is from tensors in memory, as every run had them before there were tables."""
    for number in range(8):  # of four pairs, so that crops show other parts
        picture(number, (96, 64)).save(pairs_file.parent / f"{number}.png")
    asked = settings(steps=2, batch=2, evaluation_draws=1, **changes)
    cut = {name: changes[name] for name in ("flip", "random_crop") if name in changes}
    folder = prepared(tiny_folder, pairs_file, tmp_path / "out", **cut).folder
    model, there = data_of(tiny_folder, folder, asked)
    other, here = data_of(tiny_folder, pairs_file, asked)
    for one, two in ((there.train, here.train), (there.held_out, here.held_out)):
        assert [one.key(row) for row in range(len(one))] == [two.key(row) for row in range(len(two))]
        assert torch.equal(there.latents[one.pictures], here.latents[two.pictures])
        assert torch.equal(one.preference, two.preference)
    from_folder = learned(model, there, asked)
    hidden = {name: column[:] for name, column in here.conditions.columns.items()}  # type: ignore[union-attr]
    memory = replace(
        here,
        latents=here.latents[:],
        mirrored=None if here.mirrored is None else here.mirrored[:],
        conditions=Conditions(hidden),
    )
    assert_equal(from_folder, learned(other, memory, asked))


def test_batches_made_ahead_are_the_same(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    asked = settings(steps=3, batch=2, evaluation_draws=1, flip=True)
    alone = learned(*data_of(tiny_folder, pairs_file, asked), asked)
    ahead = replace(asked, workers=2)
    assert_equal(alone, learned(*data_of(tiny_folder, pairs_file, ahead), ahead))


@pytest.mark.slow
def test_a_run_from_a_prepared_folder_is_resumed_in_the_middle_of_a_pass_bit_for_bit(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    asked = settings(steps=5, batch=3, evaluation_draws=1)
    folder = prepared(tiny_folder, pairs_file, tmp_path / "out").folder
    whole = learned(*data_of(tiny_folder, folder, asked), asked)
    first = PreferenceTraining(*data_of(tiny_folder, folder, asked), asked)
    for report in take_steps(first):
        if report.step == 2:
            first.save(tmp_path)
            break
    second = PreferenceTraining(*data_of(tiny_folder, folder, replace(asked, workers=1)), asked)
    second.resume(tmp_path)
    for _ in take_steps(second):
        pass
    assert_equal(whole, weights(second))


def test_the_commands_prepare_train_and_go_on(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "prepared", tmp_path / "run"
    said = align(
        "prepare", pairs_file, "--out", out, "--model", tiny_folder, "--num-proc", 1, "--json", *PLACE
    )
    assert json.loads(said) == {"folder": str(out), "records": 8, "bad": 0, "without_label": 0}
    shutil.rmtree(pairs_file.parent)  # nothing of the source is looked at any more
    align("train", out, "--out", run, "--model", tiny_folder, "--held-out", 0.3, *PLACE, *TRAIN)
    summary = read_json(run / "summary.json")
    assert summary["data"]["training_records"] + summary["data"]["held_out_records"] == 8
    assert "pairs of" in summary["data"]["training"]
    align("train", "--resume", run)
    align("evaluate", run, "--draws", 1)
    for name, option in (("skip-bad", ["--skip-bad"]), ("split", ["--split", "test"])):
        assert f"--{name} has no effect" in refused("train", out, "--model", tiny_folder, *option, *PLACE)
    assert "holds no images" in refused("check", out)


def test_datasets_opens_what_is_prepared(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = prepared(tiny_folder, pairs_file, tmp_path / "out").folder
    found = datasets.load_from_disk(str(folder))
    assert {name: len(found[name]) for name in found} == {"images": 16, "prompts": 5, "records": 8}
    first = Table(folder / IMAGES).column("mean")[0]
    assert torch.allclose(torch.tensor(found["images"][0]["mean"]), first.flatten())
    assert found["records"][0]["prompt"] == "a red dog"


# Going on ---------------------------------------------------------------------------------------------------


def test_a_preparation_that_was_killed_goes_on_and_encodes_nothing_twice(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, small_shards: None, counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = Backbone.encode

    def killed(self: Backbone, pictures: Tensor) -> Any:
        if sum(counted) >= 9:
            raise KeyboardInterrupt
        return whole(self, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(tiny_folder, pairs_file, tmp_path / "out")
    assert sum(counted) == 9
    kept = Table(tmp_path / "out" / IMAGES)
    assert len(kept) == 8, "two chunks of two pairs"
    with pytest.raises(UserError, match=r"not prepared to its end\. Run `align prepare`"):
        Prepared(tmp_path / "out")
    counted.clear()
    prepared(tiny_folder, pairs_file, tmp_path / "out")
    assert sum(counted) == 8
    counted.clear()
    assert prepared(tiny_folder, pairs_file, tmp_path / "out").describe() == "8 pairs of 4 prompts"
    assert not counted


def test_a_silent_preparation_encodes_only_what_is_new(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(held_out=0.0)
    _, first = data_of(tiny_folder, pairs_file, asked)
    assert sum(counted) == 16 and len(counted) < 16, "in batches"
    lines = pairs_file.read_text().splitlines()
    picture(99).save(pairs_file.parent / "99.png")
    new = json.dumps({"prompt": "the cat", "chosen": "99.png", "rejected": "1.png"})
    pairs_file.write_text("\n".join([new, *lines]) + "\n")
    counted.clear()
    _, second = data_of(tiny_folder, pairs_file, asked)
    assert counted == [1]
    assert torch.equal(second.latents[second.train.pictures[1:]], first.latents[first.train.pictures])
    files = list((tmp_path / "cache").rglob("*.arrow"))
    assert len(files) == 3, "two shards of images, one of prompts"


# What goes wrong --------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_listed_and_left_out_only_when_asked(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, counted: list[int]
) -> None:
    (pairs_file.parent / "4.png").write_bytes(b"no picture")
    (pairs_file.parent / "9.png").unlink()
    with pytest.raises(UserError, match="2 problems in 8 records") as caught:
        prepared(tiny_folder, pairs_file, tmp_path / "out")
    said = str(caught.value)
    assert "line 3 of" in said and "line 5 of" in said and "--skip-bad finishes it at once" in said
    counted.clear()
    found = prepared(tiny_folder, pairs_file, tmp_path / "out", skip_bad=True)
    assert not counted and found.facts.bad == 2
    assert found.describe() == "6 pairs of 4 prompts"
    said = "2 records that cannot be used"  # which training says once more
    assert found.describe_left_out(by_pairs=True, ties=False) == f"Left out of {found.folder}: {said}."
    _, data = data_of(tiny_folder, found.folder, settings(held_out=0.0))
    assert len(data.train) == 6


def test_ties_of_a_prepared_folder_that_a_loss_does_not_learn_from_are_said(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    lines[0]["tie"] = lines[3]["tie"] = True
    pairs_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = prepared(tiny_folder, pairs_file, tmp_path / "out")
    for by_pairs, ties, said in ((True, False, True), (True, True, False), (False, False, True)):
        assert ("2 ties" in found.describe_left_out(by_pairs=by_pairs, ties=ties)) == said


def test_rows_without_a_label_are_said_wherever_what_was_prepared_of_them_is_used(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    tables = [{"prompt": one["prompt"], "jpg_0": one["chosen"], "jpg_1": one["rejected"]} for one in lines]
    rows = [{**row, "label_0": 1.0, "label_1": 0.0} for row in tables]
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    for row in rows[1:3]:
        row["has_label"] = False
    source = write_lines(pairs_file.parent / "some.jsonl", rows)
    said = "2 records without a label and 1 tie."
    raw = check_preferences(read_preferences(source))
    assert raw.describe_left_out(by_pairs=True, ties=False) == f"Left out of {source}: {said}"
    found = prepared(tiny_folder, source, tmp_path / "out")
    for again in (found, Prepared(found.folder), prepared(tiny_folder, source, tmp_path / "out")):
        assert again.describe_left_out(by_pairs=True, ties=False) == f"Left out of {found.folder}: {said}"
    one = found.describe_left_out(by_pairs=True, ties=False, limit=0)
    assert "tie" not in one and "2 records without a label" in one


def test_a_choice_that_has_changed_since_is_not_taken_for_prepared(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    prepared(tiny_folder, pairs_file, tmp_path / "out")
    line, *rest = pairs_file.read_text().splitlines()
    row = json.loads(line)
    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    pairs_file.write_text("\n".join([json.dumps(row), *rest]))
    with pytest.raises(UserError, match=r"is not what it was when .* was begun"):
        prepared(tiny_folder, pairs_file, tmp_path / "out")


def test_a_source_of_which_nothing_can_be_used_is_refused(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    for path in pairs_file.parent.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no usable pair"):
        prepared(tiny_folder, pairs_file, tmp_path / "out", skip_bad=True)


def test_a_folder_for_another_model_size_or_precision_is_refused_by_name(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    found = prepared(tiny_folder, pairs_file, tmp_path / "out", random_crop=2)
    side = opened(tiny_folder).resolution
    for name, precision, resolution, said in (
        ("moji", "fp32", 0, "this would be moji at"),
        (str(tiny_folder), "bf16", 0, f"at {side} px in bfloat16"),
        (str(tiny_folder), "fp32", 2 * side, f"at {2 * side} px"),
    ):
        model = Backbone.open(name, device="cpu", precision=precision, resolution=resolution)
        with pytest.raises(UserError, match="was prepared for") as caught:
            found.refuse_other_use(model, flip=False, crops=0, seed=0)
        assert said in str(caught.value)
    model = opened(tiny_folder)
    with pytest.raises(UserError, match=r"holds no mirrored images\. Prepare with --flip"):
        found.refuse_other_use(model, flip=True, crops=0, seed=0)
    for crops, seed in ((3, 0), (2, 1)):
        with pytest.raises(UserError, match=f"Prepare with --random-crop {crops} --seed {seed}"):
            found.refuse_other_use(model, flip=False, crops=crops, seed=seed)
    found.refuse_other_use(model, flip=False, crops=2, seed=0)
    with pytest.raises(UserError, match=r"begun with another --random-crop \(2, now 0\)"):
        prepared(tiny_folder, pairs_file, tmp_path / "out")


@pytest.mark.parametrize("how", ["gone", "cut off"])
@pytest.mark.parametrize("what", [IMAGES, RECORDS])
def test_a_shard_that_is_gone_or_damaged_is_named_and_made_anew(
    tiny_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    small_shards: None,
    counted: list[int],
    how: str,
    what: str,
) -> None:
    folder = prepared(tiny_folder, pairs_file, tmp_path / "out").folder
    _, before = data_of(tiny_folder, folder, settings())
    shard = sorted((folder / what).glob("*.arrow"))[1]
    if how == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-400])
    with pytest.raises(UserError, match=rf"{shard.name}.* (is gone|is damaged)"):
        data_of(tiny_folder, folder, settings())
    counted.clear()
    prepared(tiny_folder, pairs_file, folder)
    assert sum(counted) == (4 if what == IMAGES else 0), "only what the shard held"
    _, after = data_of(tiny_folder, folder, settings())
    assert torch.equal(before.latents[before.train.pictures], after.latents[after.train.pictures])


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, small_shards: None, counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    written: list[Path] = []

    def write(path: Path, content: bytes) -> None:
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_bytes", write)
        with pytest.raises(UserError, match=r"is full\. What is prepared so far is kept"):
            prepared(tiny_folder, pairs_file, tmp_path / "out")
    assert len(Table(tmp_path / "out" / IMAGES)) == 12
    counted.clear()
    prepared(tiny_folder, pairs_file, tmp_path / "out")
    assert sum(counted) == 4


def test_a_full_cache_disk_costs_a_run_nothing_but_the_memory(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(steps=2, batch=2, evaluation_draws=1)
    whole = learned(*data_of(tiny_folder, pairs_file, asked), asked)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(tables, "write_bytes", full)
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "full"))
    assert_equal(whole, learned(*data_of(tiny_folder, pairs_file, asked), asked))


def test_of_two_that_prepare_one_folder_the_second_is_refused(
    tiny_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    with hold_folder(tmp_path / "out"), pytest.raises(UserError, match="Another process is writing"):
        prepared(tiny_folder, pairs_file, tmp_path / "out")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        prepared(tiny_folder, pairs_file, tmp_path / "own")


# Sources ----------------------------------------------------------------------------------------------------


def to_tar(folder: Path) -> Path:
    """Four pairs in two webdataset shards."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(2 * shard, 2 * shard + 2):
                prompt = json.dumps({"prompt": f"a dog number {number}", "user": "ann"}).encode()
                for name, content in (
                    ("chosen.png", encoded(2 * number)),
                    ("rejected.png", encoded(2 * number + 1)),
                    ("json", prompt),
                ):
                    info = tarfile.TarInfo(f"{number:04d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def to_parquet(folder: Path) -> Path:
    """Four pairs in Pick-a-Pic's columns."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "jpg_0": encoded(2 * number + 1), "jpg_1": encoded(2 * number), "label_0": 0.0, "label_1": 1.0,
            "caption": f"a dog number {number}", "user_id": 7,
        }
        for number in range(4)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=2)
    return folder / "pairs.parquet"


@pytest.mark.parametrize("write", [to_tar, to_parquet])
def test_tar_shards_and_parquet_are_prepared_as_folders_are(
    tiny_folder: Path, tmp_path: Path, write: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    (tmp_path / "source").mkdir()
    source = write(tmp_path / "source")
    rows: list[dict[str, object]] = []
    (tmp_path / "plain").mkdir()
    for number in range(4):
        for side in range(2):
            name = f"{2 * number + side}.png"
            (tmp_path / "plain" / name).write_bytes(encoded(2 * number + side))
        rows.append(
            {
                "prompt": f"a dog number {number}",
                "chosen": f"{2 * number}.png",
                "rejected": f"{2 * number + 1}.png",
            }
        )
    plain = write_lines(tmp_path / "plain" / "pairs.jsonl", rows)
    asked = settings(held_out=0.0)
    _, one = data_of(tiny_folder, prepared(tiny_folder, source, tmp_path / "out", workers=2).folder, asked)
    _, other = data_of(tiny_folder, plain, asked)
    assert torch.equal(one.latents[one.train.pictures], other.latents[other.train.pictures])
    assert (one.train.keys == other.train.keys).all()
    assert len(check_preferences(read_preferences(source)).pairs) == 4
    assert Image.open(tmp_path / "plain" / "0.png").size == (64, 64)


# A dataset of the hub, streamed ----------------------------------------------------------------------------------


@pytest.fixture
def pairs_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Serves six of Pick-a-Pic's rows in two shards as `somebody/pairs`, one of them unlabelled; gives their folder."""
    rows = [
        {
            "jpg_0": encoded(2 * number), "jpg_1": encoded(2 * number + 1),
            "label_0": float(number % 2), "label_1": 1 - float(number % 2),
            "caption": f"a dog number {number}", "user_id": number % 2, "has_label": number != 1,
        }
        for number in range(6)
    ]  # fmt: skip
    files = write_rows(tmp_path / "shards", (4, 2), rows)
    monkeypatch.setattr(streams, "stream_from_hub", served("parquet", files))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shards"


def streamed(folder: Path, out: Path, *, user: str | None = None, limit: int = 0, **changes: Any) -> Prepared:
    stream = find_stream(HubDataset("somebody/pairs"), out=out, limit=limit)
    assert stream is not None
    return prepare_pairs(stream_preferences(stream, user=user), opened(folder), out, **changes)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streamed_dataset_is_prepared_as_its_files_are(
    tiny_folder: Path, pairs_hub: Path, tmp_path: Path, workers: int, small_shards: None
) -> None:
    asked = settings(held_out=0.0)
    there = streamed(tiny_folder, tmp_path / "out", workers=workers)
    assert there.facts.records == 5, "one has no label"
    _, one = data_of(tiny_folder, there.folder, asked)
    _, other = data_of(tiny_folder, prepared(tiny_folder, pairs_hub, tmp_path / "listed").folder, asked)
    assert torch.equal(one.latents[one.train.pictures], other.latents[other.train.pictures])
    assert (one.train.keys == other.train.keys).all()
    assert torch.equal(one.train.preference, other.train.preference)


def test_prompts_that_name_a_side_are_said_beside_flip(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "jpg_0": encoded(2 * number), "jpg_1": encoded(2 * number + 1), "label_0": 1.0, "label_1": 0.0,
            "caption": text, "user_id": 0, "has_label": True,
        }
        for number, text in enumerate(("a dog looks to the left", "a dog on grass", "a dog with a logo"))
    ]  # fmt: skip
    monkeypatch.setattr(
        streams, "stream_from_hub", served("parquet", write_rows(tmp_path / "shards", (2, 1), rows))
    )
    monkeypatch.chdir(tmp_path)
    named = "“left” stands in the prompt “a dog looks to the left” and 1 other text, and --flip teaches"
    for flip in (False, True):
        streamed(tiny_folder, tmp_path / f"out{flip}", cropping=Cropping(flip=flip))
        assert (named in " ".join(capsys.readouterr().err.split())) == flip


def test_a_stream_is_of_one_user_or_of_its_first_rows(
    tiny_folder: Path, pairs_hub: Path, tmp_path: Path
) -> None:
    assert streamed(tiny_folder, tmp_path / "first", limit=5).prompts == [
        f"a dog number {n}" for n in (0, 2, 3, 4)
    ]
    odd = streamed(tiny_folder, tmp_path / "user", user="1")
    assert odd.prompts == ["a dog number 3", "a dog number 5"]
    with pytest.raises(UserError, match=r"somebody/pairs has no choices by 9\. Ask"):
        streamed(tiny_folder, tmp_path / "none", user="9")


def test_rows_of_a_stream_that_are_no_pairs_are_listed_and_its_columns_are_looked_at_first(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = [
        {"chosen": encoded(0), "rejected": encoded(1), "prompt": "a dog"},
        {"chosen": encoded(2), "rejected": b"text", "prompt": "a dog"},
        {"chosen": encoded(2), "rejected": None, "prompt": "a dog"},
    ]
    monkeypatch.setattr(
        streams, "stream_from_hub", served("parquet", write_rows(tmp_path / "pairs", (3,), rows))
    )
    with pytest.raises(
        UserError, match=r"2 problems in 3 records:\n.*row 1 of shard 0 (.|\n)*row 2 of shard 0 "
    ):
        streamed(tiny_folder, tmp_path / "out")
    assert streamed(tiny_folder, tmp_path / "out", skip_bad=True).facts.bad == 2
    assert sum(counted) == 2
    other = write_rows(tmp_path / "other", (3,), [{"picture": b"", "text": ""}] * 3)
    monkeypatch.setattr(streams, "stream_from_hub", served("parquet", other))
    with pytest.raises(UserError, match=r"somebody/pairs has the columns picture, text\. Pairs need"):
        streamed(tiny_folder, tmp_path / "columns")


def test_rankings_are_streamed_as_their_files_are_read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    monkeypatch.chdir(tmp_path)
    orders = ([0, 1], [1, 0, 0], [0, 0], None)
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"a dog number {number}",
            "image": [{"bytes": encoded(4 * number + n), "path": None} for n in range(len(order or "ab"))],
            "human_preference": order,
        }
        for number, order in enumerate(orders)
    ]
    files = write_rows(tmp_path / "shards", (3, 1), rows)
    monkeypatch.setattr(streams, "stream_from_hub", served("parquet", files))
    there = streamed(tiny_folder, tmp_path / "out")
    listed = read_preferences(tmp_path / "shards")
    assert there.facts.records == len(listed.pairs) == 4
    asked = settings(held_out=0.0)
    _, one = data_of(tiny_folder, there.folder, asked)
    _, other = data_of(
        tiny_folder, prepared(tiny_folder, tmp_path / "shards", tmp_path / "listed").folder, asked
    )
    assert torch.equal(one.latents[one.train.pictures], other.latents[other.train.pictures])
    assert torch.equal(one.train.preference, other.train.preference)
    again = streamed(tiny_folder, tmp_path / "out")
    assert again.facts.records == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image_path": ["a.png", "b.png"], "rank": [1, 2]}, "names its images in image_path"),
        ({"chosen": "a.png", "rejected": "b.png"}, "names its images in (chosen|rejected)"),
        ({"image": {"bytes": b"", "path": None}, "rank": 1}, "a row for each image of a prompt"),
    ],
)
def test_a_stream_that_cannot_be_read_row_by_row_is_said_to_be_downloaded(
    row: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(0).save("a.png")  # of this folder, and none of the dataset
    files = write_rows(tmp_path / "shards", (1,), [{"prompt": "a dog", **row}])
    monkeypatch.setattr(streams, "stream_from_hub", served("parquet", files))
    stream = find_stream(HubDataset("somebody/pairs"), out=tmp_path / "out")
    assert stream is not None
    with pytest.raises(UserError, match=rf"somebody/pairs (has )?{said}.* Download it, and give its folder"):
        stream_preferences(stream)
