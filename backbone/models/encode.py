"""Whole data sets through the encoders, once: images to latents, prompts to conditions, as rows of tables on disk.

Images are encoded in batches, of several processes by each a share. A table belongs to one encoder at one size and
precision, which its folder's name is the hash of, and a row to the contents of what was encoded: what is in a table is
never encoded again, whoever asks and in whatever order. Batches are cut from the whole list before what is known is
left out, so that latents do not depend on the number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from backbone.conditions.conditions import Conditions, Text
from backbone.data.table import KEY, Column, Index, Numbers, Table, keys_of, prefix, to_arrow
from backbone.distributed import processes
from backbone.families.components.latents import first_width
from backbone.families.components.tokenization import collect_cuts
from backbone.io.console import notify_once
from backbone.io.files import content_hash
from backbone.io.progress import progress
from backbone.media.crops import ReadCrop, read_crop
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import CROPS, CropPosition
from backbone.models.cache import TEXT, cache_folder
from backbone.models.model import Backbone, Posterior

SHARD_BYTES = 64 << 20  # of rows that are written together
SHARD_SECONDS = 60.0  # after which they are written although they are fewer: what a kill costs
BATCH_PIXELS = 8 * 128 * 128  # of images that a CPU encodes together; more gain nothing there
BATCH_BYTES = 4 << 30  # that a batch may take on a GPU, which is less than a training step takes there
ACTIVATIONS = 10  # a batch's peak memory in an encoder, in activations of its first layer
PROMPTS_AT_ONCE = 16
CUT = "cut"  # beside a prompt's encoding: what there is to say of its end that the model does not see
SAID = 3  # prompts that are cut off of which it is said, at most; the others are counted


class Encoded(NamedTuple):
    """Rows of a table, one for each thing that was to be encoded."""

    table: Table
    rows: Numbers

    def column(self, name: str) -> Column:
        """A column of these rows."""
        return Column(self.table, name, self.rows)


class Posteriors(Sequence[Posterior]):
    """The posteriors of images of any sizes, row for row, in tables."""

    def __init__(
        self, parts: Sequence[Encoded], places: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        """`places` are (which part, row in it) of each image; single posteriors are given on `device`."""
        self.parts, self.device = parts, device
        self._part, self._row = np.array(places, np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        return len(self._part)

    @overload
    def __getitem__(self, row: int) -> Posterior: ...
    @overload
    def __getitem__(self, row: slice) -> list[Posterior]: ...
    def __getitem__(self, row: int | slice) -> Posterior | list[Posterior]:
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        mean, std = self.gather(torch.tensor([range(len(self))[row]]))
        return Posterior(mean.to(self.device), std.to(self.device))

    def gather(self, rows: Tensor) -> Posterior:
        """Images of one size [B, C, H, W], on the CPU."""
        part, row = self._part[rows.numpy()], self._row[rows.numpy()]
        shape = (len(rows), *self.parts[part[0]].column("mean").shape[1:])
        mean, std = torch.empty(shape), torch.empty(shape)
        for number in np.unique(part):  # as they are and mirrored, of one subject and the next
            selected = torch.from_numpy(part == number)
            for name, whole in (("mean", mean), ("std", std)):
                whole[selected] = self.parts[number].column(name)[row[part == number]].float()
        return Posterior(mean, std)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape (C, H, W) of each image's latents."""
        each = [tuple(part.column("mean").shape[1:]) for part in self.parts]
        return [each[part] for part in self._part]


class View(NamedTuple):
    """An image as it is cut: to `size` (W, H) at `crop`."""

    picture: ImageRecord
    size: tuple[int, int]
    crop: CropPosition = CROPS["center"]

    @property
    def key(self) -> str:
        """The hash of the image's bytes and of how it is cut."""
        # What was cached before crops had a side of their own keeps its key
        where = tuple(self.crop) if self.crop.side < 1 else (self.crop.left, self.crop.top)
        return content_hash(f"{self.picture.content_hash}\n{self.size}\n{where}".encode())


@dataclass(frozen=True)
class Encoding:
    """What becomes of images: mirrored or not, with the posteriors' deviations or their means alone."""

    flip: bool = False
    std: bool = False


# Which table -------------------------------------------------------------------------------------------------


def stored_dtype(model: Backbone) -> torch.dtype:
    """Latents are kept as they are where the model works in fp32, else in fp16, which is finer than bf16."""
    return torch.float32 if model.dtype is torch.float32 else torch.float16


def encoder_facts(model: Backbone) -> dict[str, str]:
    """What an image's latents depend on beside the image: the encoder, its precision, how it works, what is kept."""
    return {
        "model": model.fingerprint,
        "precision": str(model.dtype).removeprefix("torch."),
        "kept": str(stored_dtype(model)).removeprefix("torch."),
        **({"tiles": "yes"} if model.placement.tiling else {}),
    }


def image_table(model: Backbone, size: tuple[int, int], how: Encoding, folder: Path | None = None) -> Table:
    """The table of images of this size (W, H) in pixels: in `folder`, or in the cache."""
    if folder is None:
        facts = (*encoder_facts(model).items(), size, how.flip, how.std)
        folder = cache_folder() / "images" / content_hash("\n".join(map(str, facts)).encode())[:32]
    return Table(folder, repair=True)


def prompt_table(model: Backbone, folder: Path | None = None) -> Table:
    """The table of prompts: in `folder`, or in the cache."""
    if folder is None:
        facts = (model.fingerprint, model.dtype, TEXT)
        folder = cache_folder() / "prompts" / content_hash("\n".join(map(str, facts)).encode())[:32]
    return Table(folder, repair=True)


# Images ------------------------------------------------------------------------------------------------------


def images_at_once(model: Backbone, size: tuple[int, int]) -> int:
    """How many images of this size (W, H) are encoded together, by their memory."""
    pixels = size[0] * size[1]
    if model.placement.tiling or model.placement.one_by_one:
        return 1
    if model.device.type != "cuda":
        return max(1, min(32, BATCH_PIXELS // pixels))
    channels = first_width(model.autoencoder_config)
    there = min(BATCH_BYTES, torch.cuda.get_device_properties(model.device).total_memory // 4)
    return max(1, min(64, there // (pixels * channels * 4 * ACTIVATIONS)))


def encode_views(
    model: Backbone,
    views: Sequence[View],
    flips: Sequence[bool] = (False,),
    *,
    std: bool = False,
    read: ReadCrop = read_crop,
) -> dict[bool, Encoded]:
    """The latents of views of one size, as they are and mirrored as `flips` asks; each encoded once, ever.

    `read` decodes and cuts. Call it in all processes of a run.
    """
    size = views[0].size
    tables = {flip: image_table(model, size, Encoding(flip, std)) for flip in flips}
    keys = keys_of([view.key for view in views])
    at_once = images_at_once(model, size)
    again = np.ones(len(views), bool)
    again[np.unique(prefix(keys), return_index=True)[1]] = False  # the same image twice

    def unknown() -> list[list[int]]:
        known = again | np.all([table.find(keys) >= 0 for table in tables.values()], axis=0)
        parts = (
            np.arange(first, min(first + at_once, len(views))) for first in range(0, len(views), at_once)
        )
        return [[int(row) for row in part[~known[part]]] for part in parts if not known[part].all()]

    def encode(batches: Sequence[list[int]]) -> None:
        writers = {flip: ShardWriter(table, fallback=True) for flip, table in tables.items()}
        with progress(sum(map(len, batches)), "encoding", brief=True) as bar:
            for rows in batches:
                images = torch.stack([as_bytes(read(*views[row])) for row in rows])
                add_encoded(model, keys[rows], images, writers, std=std)
                for writer in writers.values():
                    writer.close_if_due()
                bar.advance_images(len(rows))
        for writer in writers.values():
            writer.close()

    _encode_missing(unknown, encode, list(tables.values()))
    return {flip: Encoded(table, table.find(keys)) for flip, table in tables.items()}


def add_encoded(
    model: Backbone, keys: Numbers, images: Tensor, writers: dict[bool, ShardWriter], *, std: bool
) -> None:
    """Encode images [B, 3, H, W] in bytes, as they are and mirrored, and hand the rows to writers that lack them."""
    pixels = images.float().div(127.5).sub(1.0)
    kept = stored_dtype(model)
    for flip, writer in writers.items():
        new = writer.table.find(keys) < 0
        if not new.any():
            continue
        batch = pixels[torch.from_numpy(new)]
        encoded = model.encode(batch.flip(-1) if flip else batch)
        deviation = {"std": encoded.std.to(kept).cpu()} if std else {}
        writer.add({KEY: torch.from_numpy(keys[new]), "mean": encoded.mean.to(kept).cpu(), **deviation})


def as_bytes(image: object) -> Tensor:
    """An RGB image as bytes [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ShardWriter:
    """Collects rows of a table and appends them a shard at a time."""

    def __init__(self, table: Table, *, fallback: bool = False) -> None:
        self.table, self.fallback = table, fallback
        self.parts: list[Mapping[str, Tensor | list[str]]] = []
        self.size, self.began = 0, time.monotonic()

    def add(self, columns: Mapping[str, Tensor | list[str]]) -> None:
        """Add rows: `key` [B, 32] and what belongs to them."""
        self.parts.append(columns)
        self.size += sum(one.nbytes for one in columns.values() if isinstance(one, Tensor))

    @property
    def due(self) -> bool:
        """Whether enough was collected, or long enough."""
        return self.size >= SHARD_BYTES or time.monotonic() - self.began >= SHARD_SECONDS

    def close_if_due(self) -> None:
        """Append what was collected, if it is time."""
        if self.due:
            self.close()

    def close(self) -> None:
        """Append what was collected."""
        if self.parts:
            self.table.append(
                {name: _join([part[name] for part in self.parts]) for name in self.parts[0]},
                fallback=self.fallback,
            )
        self.parts, self.size, self.began = [], 0, time.monotonic()


def _join(parts: Sequence[Tensor | list[str]]) -> Tensor | list[str]:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(tensors) if tensors else [word for part in parts for word in part]


# Prompts -----------------------------------------------------------------------------------------------------


class Prompts:
    """The conditions of prompts, row for row, in a table: an index takes rows out, as out of `Conditions`."""

    def __init__(self, encoded: Encoded) -> None:
        self.columns = {
            name: encoded.column(name) for name in encoded.table.shards[0].fields if name not in (KEY, CUT)
        }

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: Index) -> Conditions:
        return Conditions({name: column[rows] for name, column in self.columns.items()})


class SeenPrompt(NamedTuple):
    """A prompt and the images that the text encoder is shown with it, mirrored or not."""

    prompt: str
    views: tuple[View, ...] = ()
    flip: bool = False

    @property
    def key(self) -> str:
        """The hash of the prompt and of what is seen with it."""
        if not self.views:
            return content_hash(self.prompt.encode())
        facts = (self.prompt, self.flip, *(view.key for view in self.views))
        return content_hash("\n".join(map(str, facts)).encode())


def as_seen(prompt: str | SeenPrompt) -> SeenPrompt:
    """A prompt with which nothing is seen, where it is words alone."""
    return prompt if isinstance(prompt, SeenPrompt) else SeenPrompt(prompt)


def prompt_keys(prompts: Sequence[str | SeenPrompt]) -> Numbers:
    """The keys of prompts in a table."""
    return keys_of([as_seen(prompt).key for prompt in prompts])


def encode_some(
    model: Backbone, prompts: Sequence[SeenPrompt], read: ReadCrop
) -> tuple[Conditions, list[str]]:
    """The conditions of a few prompts: together, or one by one where images are seen with them.

    Beside them what there is to say of each prompt's end that the model does not see, "" where it sees all.
    """
    if any(prompt.views for prompt in prompts) and len(prompts) > 1:
        parts, said = zip(*(encode_some(model, [prompt], read) for prompt in prompts), strict=True)
        return Conditions.cat(parts), [one for [one] in said]
    seen = [read(*view) for prompt in prompts for view in prompt.views]
    if any(prompt.flip for prompt in prompts):
        seen = [ImageOps.mirror(image) for image in seen]
    with collect_cuts() as cuts:
        conditions = model.encode_prompts([prompt.prompt for prompt in prompts], seen)
    return conditions, [cuts.get(row, "") for row in range(len(prompts))]


def encode_texts(
    model: Backbone,
    prompts: Sequence[str | SeenPrompt],
    *,
    folder: Path | None = None,
    read: ReadCrop = read_crop,
) -> Prompts | Conditions:
    """The conditions of prompts, row for row, each encoded once, ever.

    They lie in a table, in `folder` or in the cache; those of a text encoder that has learned words stay in the
    CPU's memory. `read` decodes and cuts the images that are seen with them. Says how many prompts are cut off, also
    of those that were encoded before. Call it in all processes of a run.
    """
    requested = [as_seen(prompt) for prompt in prompts]

    # Each prompt once; `which` [prompts] → its row among the unlike ones
    unlike = list({one.key: one for one in requested}.values())
    place = {one.key: row for row, one in enumerate(unlike)}
    which = np.array([place[one.key] for one in requested], np.int64)
    # Learned words change with the run: encoded now, and not remembered
    if model.text_learned:
        parts = [
            encode_some(model, unlike[first : first + PROMPTS_AT_ONCE], read)
            for first in range(0, len(unlike), PROMPTS_AT_ONCE)
        ]
        say_cuts([cut for _, cuts in parts for cut in cuts])
        encoded = Conditions.cat([conditions for conditions, _ in parts])
        return encoded.to(torch.device("cpu"))[torch.from_numpy(which)]

    # What the table lacks, in batches of PROMPTS_AT_ONCE; each process encodes its share
    table, keys = prompt_table(model, folder), prompt_keys(unlike)

    def unknown() -> list[list[int]]:
        existing = table.find(keys) >= 0
        starts = range(0, len(unlike), PROMPTS_AT_ONCE)
        parts = (np.arange(first, min(first + PROMPTS_AT_ONCE, len(unlike))) for first in starts)
        return [[int(row) for row in part[~existing[part]]] for part in parts if not existing[part].all()]

    def encode(batches: Sequence[list[int]]) -> None:
        writer = ShardWriter(table, fallback=folder is None)
        with progress(sum(map(len, batches)), "encoding prompts", brief=True) as bar:
            for rows in batches:
                conditions, cuts = encode_some(model, [unlike[row] for row in rows], read)
                key = torch.from_numpy(keys[rows].copy())
                writer.add({KEY: key, CUT: cuts, **cast_text(model, conditions.text)})
                writer.close_if_due()
                bar.advance(len(rows))
        writer.close()

    _encode_missing(unknown, encode, [table])
    rows = table.find(keys)
    say_cuts(read_cuts(table, rows))
    return Prompts(Encoded(table, rows[which]))


def read_cuts(table: Table, rows: Numbers) -> list[str]:
    """What there is to say of the ends of prompts in these rows of their table, "" where all is seen or not known."""
    import pyarrow

    none = pyarrow.scalar(None, pyarrow.string())
    columns = [shard.columns.get(CUT, pyarrow.repeat(none, len(shard))) for shard in table.shards]
    cuts = pyarrow.chunked_array(columns, pyarrow.string()).take(to_arrow(rows)).to_pylist()
    return [cut or "" for cut in cuts]


def say_cuts(cuts: Sequence[str]) -> None:
    """Say what a model will not see of prompts, one by one of a few, and how many others there are; "" is nothing."""
    long = [cut for cut in cuts if cut]
    for cut in long[:SAID]:
        notify_once(cut)
    if long[SAID:]:
        notify_once(f"The same holds for {len(long) - SAID} more of {len(cuts)} prompts.")


def _encode_missing(
    unknown: Callable[[], Sequence[list[int]]],
    encode: Callable[[Sequence[list[int]]], None],
    tables: Sequence[Table],
) -> None:
    """Encode the batches of rows that the tables lack, each process its part of them."""
    missing = unknown()
    if processes.world_size() > 1:
        processes.barrier()  # now all know the same to be missing
        encode(processes.split_items(missing, batch=1))
        processes.barrier()
        for table in tables:
            table.refresh()
        missing = unknown()  # what another process could not write
    if missing:
        encode(missing)


def cast_text(model: Backbone, text: Text) -> dict[str, Tensor]:
    """What text encoders gave as it is kept: in the model's precision, in which its network reads it."""
    return {
        name: (value.to(model.dtype) if value.is_floating_point() else value).cpu()
        for name, value in text.items()
    }
