"""`customize prepare`: a source of images through the autoencoder once, into a folder that `customize train` maps.

As `align prepare` does it (`align.training.prepare`): chunks shared by processes, decoded ahead, written in shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backbone.data.prefetch import map_in_workers
from backbone.data.table import KEY, Numbers, Table, parse_keys
from backbone.distributed import processes
from backbone.io.console import UserError, notify
from backbone.io.files import content_hash, write_bytes
from backbone.io.progress import progress
from backbone.io.prompts import describe_mirrored
from backbone.media.sources.decode import BadImageError
from backbone.media.sources.pictures import refuse_bad_images
from backbone.media.sources.record import ImageRecord
from backbone.media.sources.stream import ImageStream
from backbone.media.transforms import bucket_sizes, crop_and_resize, nearest_bucket
from backbone.models.encode import (
    Encoding,
    ShardWriter,
    View,
    add_encoded,
    as_bytes,
    count_images_at_once,
    describe_encoder,
    open_image_table,
)
from backbone.models.model import Backbone
from backbone.training import prepared as folders
from backbone.training.prepared import (
    CENTRED,
    NO_IMAGE,
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
from customize.data.prepared import KEPT, PICTURES, PreparedImages, table_name


class ScannedImage(NamedTuple):
    """An image as read: the reason why it cannot be used; or its hash, its key, and its cropped bytes [3, H, W]."""

    number: int
    path: str
    caption: str
    problem: str = ""
    hash: str = ""
    key: str = NO_IMAGE
    size: tuple[int, int] = (0, 0)
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What to prepare: the images, and the sizes (W, H) that they may be cropped to."""

    pictures: Source[ImageRecord]
    sizes: Sequence[tuple[int, int]]

    def read(self, chunk: Any) -> list[ScannedImage]:
        """The images of a chunk, decoded and cropped."""
        return [self._scan(number, picture) for number, picture in self.pictures.open(chunk)]

    def _scan(self, number: int, picture: ImageRecord) -> ScannedImage:
        record = ScannedImage(number, str(picture.path.absolute()), picture.caption or "")
        try:
            several = len(self.sizes) > 1  # then the image's aspect ratio decides
            size = nearest_bucket(picture.open().size, self.sizes) if several else self.sizes[0]
            image = picture.open(at_least=max(size))
        except BadImageError as error:
            return record._replace(problem=error.reason)
        except (OSError, UserError) as error:
            return record._replace(problem=f"cannot be read ({error})")
        view = View(picture, size)
        pixels = as_bytes(crop_and_resize(image, view.size, crop=view.crop))
        return record._replace(hash=picture.content_hash, key=view.key, size=view.size, pixels=pixels)


def prepare_images(
    pictures: Sequence[ImageRecord] | ImageStream,
    source: str,
    model: Backbone,
    out: Path,
    *,
    cropping: Cropping = CENTRED,
    skip_bad: bool = False,
    workers: int = 0,
    rows: dict[str, object] | None = None,
) -> PreparedImages:
    """Encode the images of a source with a model's autoencoder into the folder `out`, or resume it; returns it.

    A dataset of the hub is a stream, of which each process reads its share of the shards and keeps none. Raises
    `UserError` for images that cannot be used, all of them counted, unless `skip_bad`; for masks, which are not kept;
    and for a folder that is another preparation's, or another process's.
    """
    listed = [] if isinstance(pictures, ImageStream) else pictures
    if masked := [picture for picture in listed if picture.mask is not None]:
        raise UserError(
            f"{masked[0].mask} is a mask, and a prepared folder holds none. Train from {source} itself, or take the "
            "masks away."
        )
    images: Source[ImageRecord] = (
        Streamed(pictures, out) if isinstance(pictures, ImageStream) else Listed(pictures)
    )
    facts = PreparedFacts(
        "images", source, model.location.name, model.resolution, images.count, encoder=describe_encoder(model),
        dataset=images.facts, rows=dict(rows or {}), **asdict(cropping),
        listing=hash_listing((picture.caption or "", [picture]) for picture in listed) if listed else "",
    )  # fmt: skip
    sizes = (
        bucket_sizes(model.resolution) if cropping.aspect_buckets else [(model.resolution, model.resolution)]
    )
    with hold_prepared(out, facts, model):
        _encode(model, Plan(images, sizes), out, flip=cropping.flip, workers=workers)
        table = Table(out / RECORDS)
        if not len(table):
            raise UserError(f"{source} has no rows. Give another dataset or a folder of images.")
        usable, bad = find_usable_rows(table), list_bad(table, column="path")
        try:
            refuse_bad_images([] if skip_bad and len(usable) else bad, len(usable) + len(bad))
        except UserError as error:
            raise UserError(
                f"{error} What can be used is prepared in {out}; --skip-bad finishes it at once."
            ) from error
        if cropping.flip and (warning := describe_mirrored(_list_captions(table, usable))):
            notify(warning)
        model.free("autoencoder")
        if processes.is_main_process():
            _keep_first(images, table.numbers("number")[usable[:KEPT]].tolist(), out / PICTURES)
            finish(out, replace(facts, bad=len(bad)))
        processes.barrier()
    return PreparedImages(out)


def _list_captions(table: Table, rows: Numbers) -> Iterator[tuple[str, str]]:
    """The captions of these rows, each with its image's name."""
    captions, paths = (table.strings(name).take(rows).to_pylist() for name in ("caption", "path"))
    return ((caption, f"the caption of {path}") for caption, path in zip(captions, paths, strict=True))


def _keep_first(images: Source[ImageRecord], numbers: Sequence[int], folder: Path) -> None:
    """Write the original files of the images with these numbers."""
    names = [folder / f"{row:06d}" for row in range(len(numbers))]
    missing = {number: name for number, name in zip(numbers, names, strict=True) if not name.is_file()}
    for name, picture in zip(missing.values(), images.find([*missing]), strict=True):
        write_bytes(name, picture.read())


def _encode(model: Backbone, plan: Plan, out: Path, *, flip: bool, workers: int) -> None:
    """Encode this process's share of the chunks that are not written yet."""
    flips = (False, True) if flip else (False,)
    tables = {
        (size, mirrored): open_image_table(
            model, size, Encoding(mirrored, std=True), out / table_name(size, flip=mirrored)
        )
        for size in plan.sizes
        for mirrored in flips
    }
    records = Table(out / RECORDS, repair=True)
    length = max(folders.MIN_CHUNK, count_images_at_once(model, plan.sizes[0]))
    chunks = plan.pictures.chunks(_find_finished(records, tables, flips), length, out)
    writers = {key: ShardWriter(table) for key, table in tables.items()}
    record_writer = ShardWriter(records)
    with progress(sum(map(len, chunks)) if isinstance(chunks, list) else None, "preparing") as bar:
        for chunk in map_in_workers(plan.read, chunks, workers=workers):
            for size in sorted({image.size for image in chunk if not image.problem}):
                size_writers = {mirrored: writers[size, mirrored] for mirrored in flips}
                _add_images(model, [image for image in chunk if image.size == size], size_writers)
            if chunk:
                record_writer.add(_make_columns(chunk))
            plan.pictures.mark_collected()
            write_shards([*writers.values()], record_writer, plan.pictures, due=True)
            bar.advance_images(len(chunk))
    write_shards([*writers.values()], record_writer, plan.pictures)
    processes.barrier()


def _add_images(model: Backbone, images: Sequence[ScannedImage], writers: dict[bool, ShardWriter]) -> None:
    """Encode images of one size that no shard holds yet, in batches within the chunk."""
    at_once = count_images_at_once(model, images[0].size)
    for first in range(0, len(images), at_once):
        batch = images[first : first + at_once]
        pixels = torch.stack([image.pixels for image in batch if image.pixels is not None])
        add_encoded(model, parse_keys([image.key for image in batch]), pixels, writers, std=True)


def _make_columns(images: Sequence[ScannedImage]) -> dict[str, Tensor | list[str]]:
    """The rows of the table of records."""
    keys = [content_hash(f"{image.number}/{image.key}".encode()) for image in images]
    return {
        KEY: torch.from_numpy(parse_keys(keys).copy()),
        "number": torch.tensor([image.number for image in images]),
        "image": torch.from_numpy(parse_keys([image.key for image in images]).copy()),
        "size": torch.tensor([image.size for image in images]),
        "bad": torch.tensor([bool(image.problem) for image in images]),
        "hash": [image.hash for image in images],
        "path": [image.path for image in images],
        "caption": [image.caption for image in images],
        "problem": [image.problem for image in images],
    }


def _find_finished(
    records: Table, tables: dict[tuple[tuple[int, int], bool], Table], flips: Sequence[bool]
) -> Numbers:
    """Numbers of the images that all tables hold, even if a shard was lost."""
    if not len(records):
        return np.zeros(0, np.int64)
    finished = records.numbers("bad").astype(bool)
    keys, sizes = records.numbers("image"), records.numbers("size")
    for size in {size for size, _ in tables}:
        rows = np.flatnonzero((sizes == size).all(1))
        finished_by_flip = [tables[size, flip].find(keys[rows]) >= 0 for flip in flips]
        finished[rows] |= np.all(finished_by_flip, axis=0)
    return np.unique(records.numbers("number")[finished])
