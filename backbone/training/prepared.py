"""Folders of `customize prepare` and `align prepare`: encoded data sets of any size.

A folder holds tables (`backbone.data.table`) of latents, of conditions, and of the records of the source, and
`prepared.json` with its source, its encoder, and whether it is finished. It is written in shards, so a killed
preparation can be resumed, and `datasets.load_from_disk` opens it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from backbone.data.table import Numbers, Table, from_arrow, to_arrow
from backbone.distributed import processes
from backbone.io.console import UserError, notify, quote
from backbone.io.files import read_json, refuse_filled, write_json
from backbone.io.run_folder import PREPARED as FILE
from backbone.io.run_folder import refuse_among_others
from backbone.io.written import written_path
from backbone.media.sources.record import ImageRecord
from backbone.models.encode import describe_encoder
from backbone.models.model import Backbone

FORMAT = 1
MIN_CHUNK = 16  # records of a chunk, which are decoded and encoded together
PROMPTS, RECORDS = "prompts", "records"
NO_IMAGE = "00" * 32  # the key in place of an unusable or missing image
OTHER_OUT = "Give what it was begun with, or another --out."
FACT_NAMES = {
    "encoder": "encoder or precision",
    "rows": "choice of rows",
    "random_crop": "--random-crop",
    "dataset": "dataset or revision",
}


@dataclass(frozen=True)
class Cropping:
    """How the images of a source are cropped: at random positions (of a seed), in aspect buckets; and mirrored."""

    flip: bool = False
    random_crop: int = 0
    seed: int = 0
    aspect_buckets: bool = False


CENTRED = Cropping()


@dataclass(frozen=True)
class PreparedFacts:
    """`prepared.json`: the source and the model of a prepared folder.

    kind        of the source: pairs or images
    size        of the images, pixels a side
    encoder     what latents depend on (`describe_encoder`)
    dataset     the streamed dataset of the hub: name, config, split, commit, number of shards
    rows        the requested rows of the source
    listing     the hash of the listed records (`hash_listing`), "" for a stream
    records     number in the source, of which `bad` cannot be used; 0: not counted yet
    unlabelled  number of further rows of the source, without a label
    """

    kind: str
    source: str
    model: str
    size: int
    records: int
    format: int = FORMAT
    encoder: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    listing: str = ""
    flip: bool = False
    random_crop: int = 0
    seed: int = 0  # of the random crops
    aspect_buckets: bool = False
    bad: int = 0
    unlabelled: int = 0
    finished: bool = False

    def describe(self) -> str:
        """The model, size and precision that the folder is for."""
        return f"{self.model} at {self.size} px in {self.encoder.get('precision', '?')}"


# Reading -----------------------------------------------------------------------------------------------------


def read_facts(folder: Path, kind: str) -> PreparedFacts:
    """The facts of a prepared folder; `UserError` for one of another kind or version."""
    facts = read_json(folder / FILE, PreparedFacts)
    if facts.format != FORMAT:
        raise UserError(f"{folder} was prepared by another version. Prepare it again, into another folder.")
    if facts.kind != kind:
        raise UserError(f"{folder} was prepared from {facts.kind}, not from {kind}. Name another folder.")
    return facts


class PreparedFolder:
    """A finished folder. Raises `UserError` for an unfinished one, or one with a missing or damaged shard."""

    def __init__(self, folder: Path, kind: str, program: str) -> None:
        self.folder = folder = written_path(folder)
        self.facts = read_facts(folder, kind)
        self.remedy = (
            f"Run `{program} prepare` with --out {quote(folder)} again: only what is missing is done."
        )
        if not self.facts.finished:
            raise UserError(f"{folder} is not prepared to its end. {self.remedy}")
        self.records = self.table(RECORDS)
        if not len(self.records):
            raise UserError(f"{folder / RECORDS} holds nothing. {self.remedy}")
        self.order = find_usable_rows(self.records)  # rows of the table, in the order of the source

    def table(self, name: str) -> Table:
        """A table of the folder."""
        table = Table(self.folder / name)
        table.refuse_incomplete(self.remedy)
        return table

    def numbers(self, name: str) -> Numbers:
        """A column of the records [N, …]."""
        return self.records.numbers(name)[self.order]

    def words(self, name: str) -> tuple[list[str], Numbers]:
        """The distinct texts of a column of the records, and the index of each record's text [N]."""
        encoded = self.records.strings(name).combine_chunks().take(to_arrow(self.order)).dictionary_encode()
        return encoded.dictionary.to_pylist(), from_arrow(encoded.indices)

    def refuse_other_encoder(self, model: Backbone, *, flip: bool) -> None:
        """`UserError` where the folder was prepared for another model, size or precision, or without mirroring."""
        facts, current = self.facts, describe_encoder(model)
        if facts.size != model.resolution or _renew_encoder(facts, model) != current:
            requested = f"{model.location.name} at {model.resolution} px in {current['precision']}"
            difference = "" if facts.describe() != requested else ", with other weights or another placement"
            raise UserError(
                f"{self.folder} was prepared for {facts.describe()}, and this would be {requested}{difference}. "
                "Prepare for it, or train that one."
            )
        if flip and not facts.flip:
            raise UserError(f"{self.folder} holds no mirrored images. Prepare with --flip, or leave it out.")

    def refuse_missing(self, rows: Numbers, table: Table) -> None:
        """`UserError` where rows were not found in a table (−1)."""
        if (rows < 0).any():
            raise UserError(
                f"{table.folder} lacks {int((rows < 0).sum())} of what {self.folder} needs. {self.remedy}"
            )


def find_usable_rows(records: Table) -> Numbers:
    """The rows of the usable records, in the order of the source, without repeats."""
    _, order = np.unique(records.numbers("number"), return_index=True)
    usable: Numbers = order[~records.numbers("bad").astype(bool)[order]]
    return usable


def list_bad(records: Table, *, column: str) -> list[tuple[str, str]]:
    """The unusable records, in the order of the source: their name in `column`, and the problem."""
    if not len(records):
        return []
    bad = np.flatnonzero(records.numbers("bad"))
    names, problems = (records.strings(name).take(bad).to_pylist() for name in (column, "problem"))
    by_number = dict(
        zip(records.numbers("number")[bad].tolist(), zip(names, problems, strict=True), strict=True)
    )
    return [by_number[number] for number in sorted(by_number)]


def hash_listing(records: Iterable[tuple[str, Sequence[ImageRecord]]]) -> str:
    """The hash of listed records, before any is decoded: their texts, and the names and sizes of files."""
    digest = hashlib.sha256()
    for words, images in records:
        digest.update(f"\n{words}".encode())
        for image in images:
            size = os.path.getsize(image.path) if image.row is None and image.path.is_file() else ""
            digest.update(f"\t{image.path.name}\t{size}".encode(errors="surrogateescape"))
    return digest.hexdigest()


# Writing -----------------------------------------------------------------------------------------------------


@contextmanager
def hold_prepared(out: Path, facts: PreparedFacts, model: Backbone) -> Iterator[None]:
    """Begin or resume a folder and hold it for this preparation; call it in all processes of a run.

    Raises `UserError` for a folder of another preparation or process, and for a full disk.
    """
    with processes.hold_folder(out):
        if processes.is_main_process():
            _begin(out, facts, model)
        processes.barrier()
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"The disk of {out} is full. What is prepared so far is kept; free some space and give the same "
                "command again."
            ) from error


def _begin(out: Path, facts: PreparedFacts, model: Backbone) -> None:
    """Write the facts of a new folder, or refuse one that was begun with others."""
    if not (out / FILE).is_file():
        refuse_among_others(out)
        refuse_filled(out)
        write_json(out / FILE, asdict(facts))
        return
    begun = read_facts(out, facts.kind)
    _refuse_other_preparation(replace(begun, encoder=_renew_encoder(begun, model)), facts, out)


def _renew_encoder(facts: PreparedFacts, model: Backbone) -> dict[str, str]:
    """The encoder facts of a folder, with the model's current fingerprint."""
    return {
        name: model.renew_fingerprint(fact) if name == "model" else fact
        for name, fact in facts.encoder.items()
    }


def _refuse_other_preparation(begun: PreparedFacts, current: PreparedFacts, out: Path) -> None:
    """`UserError` where a folder was begun with other settings, or the source has changed."""
    same_listing = bool(current.listing) and current.listing == begun.listing
    ignored = {"bad", "unlabelled", "finished", "records", "listing"}  # the last two are compared below
    if same_listing:
        ignored.add("source")  # moved, or named from another folder
    if current.encoder == begun.encoder:
        ignored.add("model")
    for name in [fact.name for fact in fields(PreparedFacts) if fact.name not in ignored]:
        old, new = getattr(begun, name), getattr(current, name)
        if old != new:
            raise UserError(
                f"{out} was begun with another {FACT_NAMES.get(name, name)} ({old}, now {new}). {OTHER_OUT}"
            )
    if current.records and current.records != begun.records:  # those of a stream are counted at its end
        raise UserError(
            f"{current.source} had {begun.records} records when {out} was begun, and has {current.records}. {OTHER_OUT}"
        )
    if begun.listing and not same_listing:
        raise UserError(
            f"{current.source} is not what it was when {out} was begun: files or their words have changed. Prepare it "
            "anew, into another --out."
        )


def list_remaining_chunks(done: Numbers, count: int, length: int, out: Path) -> list[list[int]]:
    """This process's share of the chunks of the numbers below `count` that are not all done."""
    remaining = np.setdiff1d(np.arange(count), done)
    chunks = [remaining[remaining // length == chunk].tolist() for chunk in np.unique(remaining // length)]
    if len(done) and len(remaining) and processes.is_main_process():
        notify(f"{len(done)} of {count} records are prepared in {out}; {len(remaining)} are left.")
    processes.barrier()  # all processes have seen the same chunks left
    return processes.split_items(chunks, batch=1)


def finish(out: Path, facts: PreparedFacts) -> None:
    """Write the files that `datasets` reads, and the final facts with the number of records."""
    facts = replace(
        facts, records=facts.records or len(find_usable_rows(Table(out / RECORDS))) + facts.bad, finished=True
    )
    names = sorted(path.name for path in out.iterdir() if any(path.glob("data-*.arrow")))
    for name in names:
        Table(out / name).describe()
    write_json(out / "dataset_dict.json", {"splits": names})
    write_json(out / FILE, asdict(facts))
