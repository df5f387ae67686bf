"""`customize prepare`: a source of images through the autoencoder once, into a folder that `customize train` maps.

As `align prepare` does it (`align.training.prepare`): chunks shared by processes, decoded ahead, written in shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from backbone.data.ahead import work_ahead
from backbone.data.table import KEY, Numbers, Table, keys_of
from backbone.distributed import processes
from backbone.io.console import UserError, progress
from backbone.io.files import content_hash, write_bytes
from backbone.media.decode import BadImageError
from backbone.media.pictures import ImageRecord, refuse_bad_images
from backbone.media.transforms import bucket_sizes, crop_and_resize, nearest_bucket
from backbone.models.encode import (
    Encoding,
    ShardWriter,
    View,
    add_encoded,
    as_bytes,
    encoder_facts,
    image_table,
    images_at_once,
)
from backbone.models.model import Backbone
from backbone.training import prepared as folders
from backbone.training.prepared import (
    CENTRED,
    RECORDS,
    Cuts,
    PreparedFacts,
    chunks_left,
    finish,
    hold_prepared,
    usable_rows,
    write_shards,
)
from customize.data.prepared import KEPT, PICTURES, PreparedImages, table_name

NOTHING = "00" * 32  # the key of an image that cannot be used


class Seen(NamedTuple):
    """What was seen of an image: what is wrong with it, or its hash, its key and its bytes [3, H, W] as it is cut."""

    number: int
    problem: str
    hash: str = ""
    key: str = NOTHING
    size: tuple[int, int] = (0, 0)
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How a source is prepared: which images, at which of these sizes (W, H)."""

    pictures: Sequence[ImageRecord]
    sizes: Sequence[tuple[int, int]]

    def read(self, numbers: Sequence[int]) -> list[Seen]:
        """The images of these numbers, decoded and cut."""
        return [self._see(number) for number in numbers]

    def _see(self, number: int) -> Seen:
        picture = self.pictures[number]
        try:
            several = len(self.sizes) > 1  # then the image's own shape says which
            size = nearest_bucket(picture.open().size, self.sizes) if several else self.sizes[0]
            image = picture.open(at_least=max(size))
        except BadImageError as error:
            return Seen(number, error.reason)
        except (OSError, UserError) as error:
            return Seen(number, f"cannot be read ({error})")
        view = View(picture, size)
        pixels = as_bytes(crop_and_resize(image, view.size, crop=view.crop))
        return Seen(number, "", picture.content_hash, view.key, view.size, pixels)


def prepare_images(
    pictures: Sequence[ImageRecord],
    source: str,
    model: Backbone,
    out: Path,
    *,
    cuts: Cuts = CENTRED,
    skip_bad: bool = False,
    workers: int = 0,
    rows: dict[str, object] | None = None,
) -> PreparedImages:
    """Prepares the images of a source for a model in the folder `out`, or goes on with it; gives what is there then.

    Raises `UserError` for images that cannot be used, all of them counted, unless `skip_bad`; for masks, which are not
    kept; and for a folder that is another preparation's, or another process's.
    """
    if masked := [one for one in pictures if one.mask is not None]:
        raise UserError(
            f"{masked[0].mask} is a mask, and a prepared folder holds none. Train from {source} itself, or take the "
            "masks away."
        )
    facts = PreparedFacts(
        "images", source, model.location.name, model.resolution, len(pictures), encoder=encoder_facts(model),
        rows=dict(rows or {}), **asdict(cuts),
    )  # fmt: skip
    sizes = bucket_sizes(model.resolution) if cuts.aspect_buckets else [(model.resolution, model.resolution)]
    with hold_prepared(out, facts):
        _encode(model, Plan(pictures, sizes), out, flip=cuts.flip, workers=workers)
        table = Table(out / RECORDS)
        bad = _list_bad(table)
        try:
            refuse_bad_images([] if skip_bad and len(bad) < len(pictures) else bad, len(pictures))
        except UserError as error:
            raise UserError(
                f"{error} What can be used is prepared in {out}; --skip-bad finishes it at once."
            ) from error
        model.free("autoencoder")
        if processes.is_main_process():
            for row, number in enumerate(table.numbers("number")[usable_rows(table)[:KEPT]]):
                write_bytes(out / PICTURES / f"{row:06d}", pictures[int(number)].read())
            finish(out, replace(facts, bad=len(bad), finished=True))
        processes.barrier()
    return PreparedImages(out)


def _encode(model: Backbone, plan: Plan, out: Path, *, flip: bool, workers: int) -> None:
    """This process's share of the chunks that are not there yet."""
    flips = (False, True) if flip else (False,)
    tables = {
        (size, mirrored): image_table(
            model, size, Encoding(mirrored, std=True), out / table_name(size, flip=mirrored)
        )
        for size in plan.sizes
        for mirrored in flips
    }
    records = Table(out / RECORDS, repair=True)
    length = max(folders.LEAST, images_at_once(model, plan.sizes[0]))
    own = chunks_left(_finished_numbers(records, tables, flips), len(plan.pictures), length, out)
    writers = {place: ShardWriter(table) for place, table in tables.items()}
    written = ShardWriter(records)
    with progress(sum(map(len, own)), "preparing") as bar:
        for chunk in work_ahead(plan.read, own, workers=workers):
            for size in sorted({one.size for one in chunk if not one.problem}):
                of_size = {mirrored: writers[size, mirrored] for mirrored in flips}
                _add_images(model, [one for one in chunk if one.size == size], of_size)
            written.add(_columns(chunk, plan))
            write_shards([*writers.values()], written, due=True)
            bar.advance_images(len(chunk))
    write_shards([*writers.values()], written)
    processes.barrier()


def _add_images(model: Backbone, seen: Sequence[Seen], writers: dict[bool, ShardWriter]) -> None:
    """Encodes images of one size that no shard holds yet, in batches of the chunk's own."""
    at_once = images_at_once(model, seen[0].size)
    for first in range(0, len(seen), at_once):
        some = seen[first : first + at_once]
        pixels = torch.stack([one.pixels for one in some if one.pixels is not None])
        add_encoded(model, keys_of([one.key for one in some]), pixels, writers, std=True)


def _columns(seen: Sequence[Seen], plan: Plan) -> dict[str, Tensor | list[str]]:
    """The rows of the table of records."""
    pictures = [plan.pictures[one.number] for one in seen]
    own = [content_hash(f"{one.number}/{one.key}".encode()) for one in seen]
    return {
        KEY: torch.from_numpy(keys_of(own).copy()),
        "number": torch.tensor([one.number for one in seen]),
        "image": torch.from_numpy(keys_of([one.key for one in seen]).copy()),
        "size": torch.tensor([one.size for one in seen]),
        "bad": torch.tensor([bool(one.problem) for one in seen]),
        "hash": [one.hash for one in seen],
        "path": [str(picture.path.absolute()) for picture in pictures],
        "caption": [picture.caption or "" for picture in pictures],
        "problem": [one.problem for one in seen],
    }


def _finished_numbers(
    records: Table, tables: dict[tuple[tuple[int, int], bool], Table], flips: Sequence[bool]
) -> Numbers:
    """Numbers of the images that are there, and in every table that they belong to: a shard may have vanished."""
    if not len(records):
        return np.zeros(0, np.int64)
    whole = records.numbers("bad").astype(bool)
    keys, sizes = records.numbers("image"), records.numbers("size")
    for size in {size for size, _ in tables}:
        here = np.flatnonzero((sizes == size).all(1))
        found = [tables[size, flip].find(keys[here]) >= 0 for flip in flips]
        whole[here] |= np.all(found, axis=0)
    return np.unique(records.numbers("number")[whole])


def _list_bad(records: Table) -> list[tuple[str, str]]:
    """The images that cannot be used, with the reasons, in the order of the source."""
    bad = np.flatnonzero(records.numbers("bad"))
    paths, problems = (records.strings(name).take(bad).to_pylist() for name in ("path", "problem"))
    found = dict(zip(records.numbers("number")[bad].tolist(), zip(paths, problems, strict=True), strict=True))
    return [found[number] for number in sorted(found)]
