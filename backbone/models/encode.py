"""Encodes whole data sets once: images to latents, prompts to conditions, as rows of tables on disk.

Images are encoded in batches, shared among processes. A table belongs to one encoder at one size and precision, whose
hash names its folder; a row is keyed by the contents of the image or prompt, so nothing is encoded twice. Batches are
formed before the rows that exist are left out, so that latents do not depend on the number of processes.
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
from backbone.data.table import KEY, Column, Index, Numbers, Table, parse_keys, prefix, to_arrow
from backbone.distributed import processes
from backbone.families.components.latents import first_width
from backbone.families.components.tokenization import collect_cuts
from backbone.io.console import notify_once
from backbone.io.files import content_hash
from backbone.io.progress import progress
from backbone.media.crops import ReadCrop, read_crop
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import CROPS, CropPosition
from backbone.models.cache import TEXT, find_cache_folder
from backbone.models.model import Backbone, Posterior

SHARD_BYTES = 64 << 20  # of rows written together
SHARD_SECONDS = 60.0  # after which fewer rows are written: the most that a kill loses
BATCH_PIXELS = 8 * 128 * 128  # of images that a CPU encodes together; more gain nothing
BATCH_BYTES = 4 << 30  # of a batch on a GPU, less than a training step takes
ACTIVATIONS = 10  # a batch's peak memory in an encoder, in activations of its first layer
PROMPTS_AT_ONCE = 16
CUT = "cut"  # beside a prompt's encoding: the warning about its truncated end
MOST_NAMED = 3  # truncated prompts that are named; the others are counted


class Encoded(NamedTuple):
    """Rows of a table, one for each encoded image or prompt."""

    table: Table
    rows: Numbers

    def column(self, name: str) -> Column:
        """A column of these rows."""
        return Column(self.table, name, self.rows)


class Posteriors(Sequence[Posterior]):
    """The posteriors of images of any sizes, stored in tables."""

    def __init__(
        self, parts: Sequence[Encoded], places: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        """`places` are (part, row in it) of each image; single posteriors are returned on `device`."""
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
        for number in np.unique(part):  # plain and mirrored, of several subjects
            selected = torch.from_numpy(part == number)
            for name, output in (("mean", mean), ("std", std)):
                output[selected] = self.parts[number].column(name)[row[part == number]].float()
        return Posterior(mean, std)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape (C, H, W) of each image's latents."""
        part_shapes = [tuple(part.column("mean").shape[1:]) for part in self.parts]
        return [part_shapes[part] for part in self._part]


class View(NamedTuple):
    """An image cropped to `size` (W, H) at `crop`."""

    picture: ImageRecord
    size: tuple[int, int]
    crop: CropPosition = CROPS["center"]

    @property
    def key(self) -> str:
        """The hash of the image's bytes, size and crop."""
        # Crops of the full side keep the key from before crops had a side
        position = tuple(self.crop) if self.crop.side < 1 else (self.crop.left, self.crop.top)
        return content_hash(f"{self.picture.content_hash}\n{self.size}\n{position}".encode())


@dataclass(frozen=True)
class Encoding:
    """How images are encoded: mirrored or not, with the posteriors' deviations or their means alone."""

    flip: bool = False
    std: bool = False


# Tables ------------------------------------------------------------------------------------------------------


def stored_dtype(model: Backbone) -> torch.dtype:
    """The dtype of stored latents: fp32 where the model works in fp32, else fp16, which is finer than bf16."""
    return torch.float32 if model.dtype is torch.float32 else torch.float16


def describe_encoder(model: Backbone) -> dict[str, str]:
    """What an image's latents depend on besides the image: encoder, precision, stored dtype, tiling."""
    return {
        "model": model.fingerprint,
        "precision": str(model.dtype).removeprefix("torch."),
        "kept": str(stored_dtype(model)).removeprefix("torch."),
        **({"tiles": "yes"} if model.placement.tiling else {}),
    }


def open_image_table(
    model: Backbone, size: tuple[int, int], encoding: Encoding, folder: Path | None = None
) -> Table:
    """The table of images of this size (W, H) in pixels: in `folder`, or in the cache."""
    if folder is None:
        facts = (*describe_encoder(model).items(), size, encoding.flip, encoding.std)
        folder = find_cache_folder() / "images" / content_hash("\n".join(map(str, facts)).encode())[:32]
    return Table(folder, repair=True)


def prompt_table(model: Backbone, folder: Path | None = None) -> Table:
    """The table of prompts: in `folder`, or in the cache."""
    if folder is None:
        facts = (model.fingerprint, model.dtype, TEXT)
        folder = find_cache_folder() / "prompts" / content_hash("\n".join(map(str, facts)).encode())[:32]
    return Table(folder, repair=True)


# Images ------------------------------------------------------------------------------------------------------


def count_images_at_once(model: Backbone, size: tuple[int, int]) -> int:
    """The number of images of this size (W, H) that are encoded together, limited by memory."""
    pixels = size[0] * size[1]
    if model.placement.tiling or model.placement.one_by_one:
        return 1
    if model.device.type != "cuda":
        return max(1, min(32, BATCH_PIXELS // pixels))
    channels = first_width(model.autoencoder_config)
    memory = min(BATCH_BYTES, torch.cuda.get_device_properties(model.device).total_memory // 4)
    return max(1, min(64, memory // (pixels * channels * 4 * ACTIVATIONS)))


def encode_views(
    model: Backbone,
    views: Sequence[View],
    flips: Sequence[bool] = (False,),
    *,
    std: bool = False,
    read: ReadCrop = read_crop,
) -> dict[bool, Encoded]:
    """The latents of views of one size, one set for each of `flips` (True: mirrored); each is encoded only once.

    `read` decodes and crops. Call it in all processes of a run.
    """
    size = views[0].size
    tables = {flip: open_image_table(model, size, Encoding(flip, std)) for flip in flips}
    keys = parse_keys([view.key for view in views])
    at_once = count_images_at_once(model, size)
    is_repeat = np.ones(len(views), bool)
    is_repeat[np.unique(prefix(keys), return_index=True)[1]] = False  # not the first row of an image

    def find_unknown() -> list[list[int]]:
        is_known = is_repeat | np.all([table.find(keys) >= 0 for table in tables.values()], axis=0)
        parts = (
            np.arange(first, min(first + at_once, len(views))) for first in range(0, len(views), at_once)
        )
        return [[int(row) for row in part[~is_known[part]]] for part in parts if not is_known[part].all()]

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

    _encode_missing(find_unknown, encode, list(tables.values()))
    return {flip: Encoded(table, table.find(keys)) for flip, table in tables.items()}


def add_encoded(
    model: Backbone, keys: Numbers, images: Tensor, writers: dict[bool, ShardWriter], *, std: bool
) -> None:
    """Encode images [B, 3, H, W] in bytes, plain and mirrored, and add the rows to the writers that lack them."""
    pixels = images.float().div(127.5).sub(1.0)
    dtype = stored_dtype(model)
    for flip, writer in writers.items():
        new = writer.table.find(keys) < 0
        if not new.any():
            continue
        batch = pixels[torch.from_numpy(new)]
        encoded = model.encode(batch.flip(-1) if flip else batch)
        deviation = {"std": encoded.std.to(dtype).cpu()} if std else {}
        writer.add({KEY: torch.from_numpy(keys[new]), "mean": encoded.mean.to(dtype).cpu(), **deviation})


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
        """Add rows: `key` [B, 32] and the other columns."""
        self.parts.append(columns)
        self.size += sum(column.nbytes for column in columns.values() if isinstance(column, Tensor))

    @property
    def due(self) -> bool:
        """Whether the rows are large enough, or waited long enough, to be written."""
        return self.size >= SHARD_BYTES or time.monotonic() - self.began >= SHARD_SECONDS

    def close_if_due(self) -> None:
        """Append the collected rows, if it is time."""
        if self.due:
            self.close()

    def close(self) -> None:
        """Append the collected rows."""
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
    """The conditions of prompts, stored in a table; indexed like `Conditions`."""

    def __init__(self, encoded: Encoded) -> None:
        self.columns = {
            name: encoded.column(name) for name in encoded.table.shards[0].fields if name not in (KEY, CUT)
        }

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: Index) -> Conditions:
        return Conditions({name: column[rows] for name, column in self.columns.items()})


class TextInput(NamedTuple):
    """A prompt and the images that the text encoder reads with it, mirrored or not."""

    prompt: str
    views: tuple[View, ...] = ()
    flip: bool = False

    @property
    def key(self) -> str:
        """The hash of the prompt and its images."""
        if not self.views:
            return content_hash(self.prompt.encode())
        facts = (self.prompt, self.flip, *(view.key for view in self.views))
        return content_hash("\n".join(map(str, facts)).encode())


def as_text_input(prompt: str | TextInput) -> TextInput:
    """A string as a prompt without images; a `TextInput` unchanged."""
    return prompt if isinstance(prompt, TextInput) else TextInput(prompt)


def prompt_keys(prompts: Sequence[str | TextInput]) -> Numbers:
    """The keys of prompts in a table."""
    return parse_keys([as_text_input(prompt).key for prompt in prompts])


def encode_prompt_batch(
    model: Backbone, prompts: Sequence[TextInput], read: ReadCrop
) -> tuple[Conditions, list[str]]:
    """The conditions of a few prompts, encoded together, or one by one where they have images.

    Also returns a warning about each prompt's truncated end, "" where the model sees all of it.
    """
    if any(prompt.views for prompt in prompts) and len(prompts) > 1:
        parts, messages = zip(
            *(encode_prompt_batch(model, [prompt], read) for prompt in prompts), strict=True
        )
        return Conditions.cat(parts), [message for [message] in messages]
    images = [read(*view) for prompt in prompts for view in prompt.views]
    if any(prompt.flip for prompt in prompts):
        images = [ImageOps.mirror(image) for image in images]
    with collect_cuts() as cuts:
        conditions = model.encode_prompts([prompt.prompt for prompt in prompts], images)
    return conditions, [cuts.get(row, "") for row in range(len(prompts))]


def encode_texts(
    model: Backbone,
    prompts: Sequence[str | TextInput],
    *,
    folder: Path | None = None,
    read: ReadCrop = read_crop,
) -> Prompts | Conditions:
    """The conditions of prompts, one row each; each prompt is encoded only once.

    They are stored in a table, in `folder` or in the cache; those of a text encoder that has learned words stay in the
    CPU's memory. `read` decodes and crops the images of prompts. Warns of truncated prompts, also of those that were
    encoded before. Call it in all processes of a run.
    """
    inputs = [as_text_input(prompt) for prompt in prompts]

    # Each prompt once; `row_of_prompt` [prompts] → its row in `unique`
    unique = list({text_input.key: text_input for text_input in inputs}.values())
    row_of_key = {text_input.key: row for row, text_input in enumerate(unique)}
    row_of_prompt = np.array([row_of_key[text_input.key] for text_input in inputs], np.int64)
    # Learned words change during the run, so nothing is stored
    if model.text_learned:
        parts = [
            encode_prompt_batch(model, unique[first : first + PROMPTS_AT_ONCE], read)
            for first in range(0, len(unique), PROMPTS_AT_ONCE)
        ]
        say_cuts([cut for _, cuts in parts for cut in cuts])
        encoded = Conditions.cat([conditions for conditions, _ in parts])
        return encoded.to(torch.device("cpu"))[torch.from_numpy(row_of_prompt)]

    # The rows missing from the table, in batches of PROMPTS_AT_ONCE; each process encodes its share
    table, keys = prompt_table(model, folder), prompt_keys(unique)

    def find_unknown() -> list[list[int]]:
        existing = table.find(keys) >= 0
        starts = range(0, len(unique), PROMPTS_AT_ONCE)
        parts = (np.arange(first, min(first + PROMPTS_AT_ONCE, len(unique))) for first in starts)
        return [[int(row) for row in part[~existing[part]]] for part in parts if not existing[part].all()]

    def encode(batches: Sequence[list[int]]) -> None:
        writer = ShardWriter(table, fallback=folder is None)
        with progress(sum(map(len, batches)), "encoding prompts", brief=True) as bar:
            for rows in batches:
                conditions, cuts = encode_prompt_batch(model, [unique[row] for row in rows], read)
                key = torch.from_numpy(keys[rows].copy())
                writer.add({KEY: key, CUT: cuts, **cast_text(model, conditions.text)})
                writer.close_if_due()
                bar.advance(len(rows))
        writer.close()

    _encode_missing(find_unknown, encode, [table])
    rows = table.find(keys)
    say_cuts(read_cuts(table, rows))
    return Prompts(Encoded(table, rows[row_of_prompt]))


def read_cuts(table: Table, rows: Numbers) -> list[str]:
    """The warnings about truncated prompts in these rows of their table, "" where none is stored."""
    import pyarrow

    null = pyarrow.scalar(None, pyarrow.string())
    columns = [shard.columns.get(CUT, pyarrow.repeat(null, len(shard))) for shard in table.shards]
    cuts = pyarrow.chunked_array(columns, pyarrow.string()).take(to_arrow(rows)).to_pylist()
    return [cut or "" for cut in cuts]


def say_cuts(cuts: Sequence[str]) -> None:
    """Show the first few warnings about truncated prompts and count the others; "" stands for no warning."""
    long = [cut for cut in cuts if cut]
    for cut in long[:MOST_NAMED]:
        notify_once(cut)
    if long[MOST_NAMED:]:
        notify_once(f"The same holds for {len(long) - MOST_NAMED} more of {len(cuts)} prompts.")


def _encode_missing(
    find_unknown: Callable[[], Sequence[list[int]]],
    encode: Callable[[Sequence[list[int]]], None],
    tables: Sequence[Table],
) -> None:
    """Encode the batches of rows that the tables lack; each process takes its share."""
    missing = find_unknown()
    if processes.world_size() > 1:
        processes.barrier()  # all processes have seen the same rows missing
        encode(processes.split_items(missing, batch=1))
        processes.barrier()
        for table in tables:
            table.refresh()
        missing = find_unknown()  # rows that another process could not write
    if missing:
        encode(missing)


def cast_text(model: Backbone, text: Text) -> dict[str, Tensor]:
    """The text encoders' output as it is stored: on the CPU, in the precision in which the network reads it."""
    return {
        name: (value.to(model.dtype) if value.is_floating_point() else value).cpu()
        for name, value in text.items()
    }
