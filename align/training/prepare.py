"""`align prepare`: a source of pairs through the encoders once, into a folder that `align train` maps into memory.

The source is split into chunks of records. Every process takes its share of the missing chunks: workers decode ahead
and check every image, the chunk's new images are encoded in batches, and shards of images and of records are written,
each completely or not at all. A kill loses only what was not written; the same command resumes. Records that cannot be
used are saved with the reason, so that they are listed without opening their images again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.objectives.dataset import draw_crop, is_square, say_unmoved
from align.pairs.prepared import IMAGES, MIRRORED, Prepared
from align.pairs.read import PairStream
from align.pairs.records import (
    PROBLEMS_SHOWN,
    Pair,
    Preferences,
    Record,
    find_general_problems,
    format_problems,
    open_record,
    record_key,
    refuse_another_model,
)
from backbone.data.prefetch import map_in_workers
from backbone.data.table import KEY, Table, parse_keys
from backbone.distributed import processes
from backbone.io.console import UserError, notify
from backbone.io.files import content_hash
from backbone.io.progress import progress
from backbone.io.prompts import describe_mirrored
from backbone.media.transforms import CROPS, crop_and_resize
from backbone.models.encode import (
    Encoding,
    ShardWriter,
    View,
    add_encoded,
    as_bytes,
    count_images_at_once,
    describe_encoder,
    encode_texts,
    open_image_table,
)
from backbone.models.model import Backbone
from backbone.training import prepared as folders
from backbone.training.prepared import (
    CENTRED,
    NO_IMAGE,
    PROMPTS,
    RECORDS,
    Cropping,
    PreparedFacts,
    find_usable_rows,
    finish,
    hash_listing,
    hold_prepared,
    list_bad,
)
from backbone.training.sources import Listed, Source, Streamed, write_shards


@dataclass(frozen=True)
class Plan:
    """The plan of a preparation: the records, and how their images are cropped."""

    records: Source[Record | str]
    size: tuple[int, int]
    random_crop: int
    seed: int

    def read(self, chunk: Any) -> Chunk:
        """The records of a chunk, their images decoded and cropped."""
        pixels: dict[str, Tensor] = {}
        rows = [self._scan(number, record, pixels) for number, record in self.records.open(chunk)]
        images = torch.stack(list(pixels.values())) if pixels else torch.empty(0, 3, *self.size[::-1])
        return Chunk(rows, list(pixels), images)

    def _scan(self, number: int, record: Record | str, pixels: dict[str, Tensor]) -> ScannedRecord:
        if isinstance(record, str):  # the problem of a row without a record
            return ScannedRecord(number, RecordFacts(), record)
        record = record.ordered if isinstance(record, Pair) else record  # the better one first
        images, problems = open_record(record, at_least=max(self.size))
        facts = RecordFacts.of(record)
        if problems:
            return ScannedRecord(number, facts, "; ".join(problems))
        hashes = [picture.content_hash for picture in record.pictures]
        key = record_key(record.prompt, hashes)
        crops = [CROPS["center"], *(draw_crop(self.seed, key, n) for n in range(self.random_crop))]
        views = [
            [
                View(picture, self.size, CROPS["center"] if is_square(image.size) else crop)
                for picture, image in zip(record.pictures, images, strict=True)
            ]
            for crop in crops
        ]
        for crop in views:
            for view, image in zip(crop, images, strict=True):
                if view.key not in pixels:
                    pixels[view.key] = as_bytes(crop_and_resize(image, view.size, crop=view.crop))
        return ScannedRecord(number, facts, "", key, hashes, [[view.key for view in crop] for crop in views])


class RecordFacts(NamedTuple):
    """A record's fields other than its images."""

    label: float = 0.0
    pair: bool = True
    both_bad: bool = False
    prompt: str = ""
    user: str = ""
    name: str = ""

    @staticmethod
    def of(record: Record) -> RecordFacts:
        """The fields of this record."""
        if isinstance(record, Pair):
            return RecordFacts(record.label, True, record.both_bad, record.prompt, record.user, record.name)
        return RecordFacts(float(record.good), False, False, record.prompt, record.user, record.name)


class ScannedRecord(NamedTuple):
    """A scanned record: its problem, or its key and those of its images at each crop."""

    number: int
    facts: RecordFacts
    problem: str
    key: str = NO_IMAGE
    hashes: Sequence[str] = ()
    views: Sequence[Sequence[str]] = ()


class Chunk(NamedTuple):
    """Some records, and their distinct cropped images: keys, and bytes [N, 3, H, W]."""

    rows: list[ScannedRecord]
    keys: list[str]
    pixels: Tensor


def prepare_pairs(
    source_records: Preferences | PairStream,
    model: Backbone,
    out: Path,
    *,
    cropping: Cropping = CENTRED,
    any_model: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
    rows: dict[str, object] | None = None,
) -> Prepared:
    """Prepare the records of a source for a model in the folder `out`, or resume it; returns the finished folder.

    A dataset of the hub is a stream; each process reads its share of the shards and keeps none. `rows` says which rows
    of the source are read; resuming needs the same ones. Raises `UserError` for records that cannot be used, with their
    number, unless `skip_bad`; for a folder that is another preparation's, or another process's.
    """
    source, problems, records = _open_source(source_records, out)
    if isinstance(source_records, Preferences) and not any_model:
        refuse_another_model(source_records, model)
    count = records.count + len(problems) if records.count else 0
    facts = PreparedFacts(
        "pairs", source, model.location.name, model.resolution, count, encoder=describe_encoder(model),
        dataset=records.facts, rows=dict(rows or {}), **asdict(cropping),
        listing=_hash_records(source_records) if isinstance(source_records, Preferences) else "",
    )  # fmt: skip
    plan = Plan(records, (model.resolution, model.resolution), cropping.random_crop, cropping.seed)
    with hold_prepared(out, facts, model):
        _encode_records(model, plan, out, flip=cropping.flip, workers=workers)
        # Records that cannot be used
        table = Table(out / RECORDS)
        bad = [*problems, *(" ".join(filter(None, fields)) for fields in list_bad(table, column="name"))]
        if bad and not skip_bad:
            listing = format_problems(
                source, facts.records or len(table), bad[:PROBLEMS_SHOWN], total=len(bad)
            )
            raise UserError(
                f"{listing}\nWhat can be used is prepared in {out}; --skip-bad finishes it at once."
            )
        if isinstance(source_records, PairStream):
            source_records.refuse_none(len(table))
        _refuse_useless(table, source, records.passed_over)
        # Prompts of usable records, encoded after the images
        prompts = table.strings("prompt").take(find_usable_rows(table)).unique().to_pylist()
        if cropping.random_crop:
            used = find_usable_rows(table)
            views = table.numbers("images")[used].reshape(len(used), 2, -1)
            say_unmoved(views, table.numbers("cuts")[used].reshape(len(used), -1, *views.shape[1:]))
        if cropping.flip and (
            warning := describe_mirrored((text, f"the prompt “{text}”") for text in prompts)
        ):
            notify(warning)
        encode_texts(model, ["", *prompts], folder=out / PROMPTS)
        model.free("autoencoder", "text_encoder")
        if processes.is_main_process():
            finish(out, replace(facts, bad=len(bad), unlabelled=records.passed_over))
        processes.barrier()
    return Prepared(out)


def _hash_records(preferences: Preferences) -> str:
    """The hash of a source's records, and of its files' names and sizes."""
    return hash_listing((repr(RecordFacts.of(record)), record.pictures) for record in preferences.records)


def _open_source(
    preferences: Preferences | PairStream, out: Path
) -> tuple[str, list[str], Source[Record | str]]:
    """A source's name, its known problems, and its records."""
    if isinstance(preferences, Preferences):
        return preferences.source, preferences.problems, Listed(preferences.records, preferences.skipped)
    return preferences.stream.source, [], Streamed(preferences, out)


def _encode_records(model: Backbone, plan: Plan, out: Path, *, flip: bool, workers: int) -> None:
    """Encode this process's share of the missing chunks."""
    flips = {False: IMAGES, **({True: MIRRORED} if flip else {})}
    images = {
        mirrored: open_image_table(model, plan.size, Encoding(mirrored), out / name)
        for mirrored, name in flips.items()
    }
    table = Table(out / RECORDS, repair=True)
    length = max(folders.MIN_CHUNK, count_images_at_once(model, plan.size) // 2)
    chunks = plan.records.chunks(_find_finished(table, images), length, out)
    writers, record_writer = (
        {mirrored: ShardWriter(latents_table) for mirrored, latents_table in images.items()},
        ShardWriter(table),
    )
    with progress(sum(map(len, chunks)) if isinstance(chunks, list) else None, "preparing") as bar:
        for chunk in map_in_workers(plan.read, chunks, workers=workers):
            _add_images(model, chunk, writers)
            if chunk.rows:
                record_writer.add(_make_columns(chunk.rows, plan.random_crop))
            plan.records.mark_collected()
            write_shards([*writers.values()], record_writer, plan.records, due=True)
            bar.advance(len(chunk.rows), images=sum(len(row.hashes) for row in chunk.rows))
    write_shards([*writers.values()], record_writer, plan.records)
    processes.barrier()


def _find_finished(table: Table, images: dict[bool, Table]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Numbers of the records whose images are all present: a shard may have been lost."""
    if not len(table):
        return np.zeros(0, np.int64)
    finished = np.ones(len(table), bool)
    usable = ~table.numbers("bad").astype(bool)
    names = [name for name in ("images", "cuts") if name in table.shards[0].fields]
    for name in names:
        keys = table.numbers(name).reshape(len(table), -1, 32)
        for index in range(keys.shape[1]):
            is_absent = (keys[:, index] == 0).all(1)  # of a single image's second
            for latents_table in images.values():
                finished &= ~usable | is_absent | (latents_table.find(keys[:, index]) >= 0)
    return np.unique(table.numbers("number")[finished])


def _add_images(model: Backbone, chunk: Chunk, writers: dict[bool, ShardWriter]) -> None:
    """Encode a chunk's images that no shard holds yet, in batches within the chunk."""
    if not chunk.keys:
        return
    keys = parse_keys(chunk.keys)
    height, width = chunk.pixels.shape[-2:]
    batch = count_images_at_once(model, (width, height))
    for first in range(0, len(keys), batch):
        add_encoded(
            model, keys[first : first + batch], chunk.pixels[first : first + batch], writers, std=False
        )


def _make_columns(rows: Sequence[ScannedRecord], random_crop: int) -> dict[str, Tensor | list[str]]:
    """Make the columns of these rows in the table of records."""
    size = 1 + random_crop

    def keys(of_row: Iterator[Sequence[str]] | Sequence[Sequence[str]], *shape: int) -> Tensor:
        flat = [key for row in of_row for key in row]
        return torch.from_numpy(parse_keys(flat).copy()).view(len(rows), *shape, 32)

    two = [(NO_IMAGE, NO_IMAGE)]
    views = [[[*crop, NO_IMAGE][:2] for crop in row.views] or two * size for row in rows]
    facts = [row.facts for row in rows]
    single_keys = [
        [*(record_key(row.facts.prompt, [image]) for image in row.hashes), NO_IMAGE, NO_IMAGE][:2]
        for row in rows
    ]
    columns: dict[str, Tensor | list[str]] = {
        KEY: keys([[content_hash(f"{row.number}/{row.key}".encode())] for row in rows]),
        "number": torch.tensor([row.number for row in rows]),
        "content": keys([[row.key] for row in rows]),
        "contents": keys(single_keys, 2),
        "images": keys([crop[0] for crop in views], 2),
        "label": torch.tensor([record.label for record in facts]),
        "pair": torch.tensor([record.pair for record in facts]),
        "both_bad": torch.tensor([record.both_bad for record in facts]),
        "bad": torch.tensor([bool(row.problem) for row in rows]),
        "prompt": [record.prompt for record in facts],
        "user": [record.user for record in facts],
        "name": [record.name for record in facts],
        "problem": [row.problem for row in rows],
    }
    if random_crop:
        columns["cuts"] = keys([[key for crop in row[1:] for key in crop] for row in views], random_crop, 2)
    return columns


def _refuse_useless(table: Table, source: str, waiting: int) -> None:
    """`UserError` if no usable record is left."""
    rows = find_usable_rows(table) if len(table) else np.zeros(0, np.int64)
    label = table.numbers("label")[rows] if len(rows) else np.zeros(0)
    pair = table.numbers("pair")[rows].astype(bool) if len(rows) else np.zeros(0, bool)
    counts = (int(pair.sum()), int((label[pair] == 0.5).sum()), int((~pair).sum()))
    good = int((label[~pair] > 0).sum())
    for problem in find_general_problems(source, *counts, good, waiting=waiting):
        raise UserError(problem)
