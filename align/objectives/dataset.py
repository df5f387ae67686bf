"""The encoded dataset: latents and prompts as rows of tables on disk, records as columns, reproducible noise samples.

Noise sample (record, k), k < K, fixes the noise, its level, whether the prompt is dropped and whether the pictures are
mirrored, the same for every picture of the record: it follows from the seed, the record's contents and k alone. The
levels of a record's K noise samples are stratified: one in each K-th of the noise path above `lowest`, in random
order. A step's batches follow from its number, so that other processes can make them ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from align.pairs.prepared import Prepared, PreparedRecords
from align.pairs.read import read_preferences
from align.pairs.records import (
    Pair,
    Preferences,
    Record,
    Records,
    Single,
    check_preferences,
    record_key,
    select_records,
)
from align.settings import Settings
from backbone.adapters.concept import Concept, expand_tokens
from backbone.conditions.conditions import Conditions
from backbone.data.prefetch import Movable
from backbone.data.table import Column
from backbone.diffusion.noise import Level, add_noise, generator, target
from backbone.distributed import processes
from backbone.families.base import NoisePath
from backbone.io.console import UserError, notify
from backbone.io.run_folder import is_prepared
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import CROPS, CropPosition
from backbone.models.encode import Prompts, View, encode_texts, encode_views
from backbone.models.model import Backbone
from backbone.training.base_predictions import draw_stratified_levels

UNMOVED = (
    "--random-crop has no effect: all images are square, and a cut of each is the whole image. Leave it out."
)
KEY = "S64"  # numpy's type of a record's key, a hash in hexadecimal digits
Latents: TypeAlias = Tensor | Column
"""[P, …] in memory or on disk: an index takes rows out of either."""


@dataclass(frozen=True)
class Item:
    """A record as rows of `PreferenceData`: its pictures (the better one first), its prompt, and its preference.

    `preference` of a pair is the probability that its first picture is better, 1 or ½; of a single picture 1 for good
    and 0 for bad. `key` is the hash of its contents. `crops` are the same pictures cropped off-centre, each crop at the
    same position for all of them.
    """

    pictures: tuple[int, ...]
    prompt: int
    preference: float
    key: str
    crops: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Items(Sequence[Item]):
    """N records as columns; indexing with an integer returns an `Item`, with other rows `Items`.

    pictures [N, G]   crops [N, R, G], of R random crops   prompt [N]   preference [N]   keys [N]
    """

    pictures: Tensor
    prompt: Tensor
    preference: Tensor
    keys: np.ndarray[Any, Any]
    crops: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    @overload
    def __getitem__(self, rows: int) -> Item: ...
    @overload
    def __getitem__(self, rows: Tensor | slice | list[int]) -> Items: ...
    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, int):
            return Item(
                tuple(self.pictures[rows].tolist()),
                int(self.prompt[rows]),
                float(self.preference[rows]),
                self.key(rows),
                tuple(map(tuple, self.crops[rows].tolist())),
            )
        rows = torch.tensor(rows, dtype=torch.long) if isinstance(rows, list) else rows
        keys = self.keys[rows if isinstance(rows, slice) else rows.numpy()]
        return Items(self.pictures[rows], self.prompt[rows], self.preference[rows], keys, self.crops[rows])

    def key(self, row: int) -> str:
        """The hash of a record's contents."""
        return str(self.keys[row], "ascii")

    @property
    def group(self) -> int:
        """The number of pictures per record."""
        return self.pictures.shape[1] if len(self) else 1

    @property
    def judged(self) -> Tensor:
        """Rows of the records that are not ties."""
        return (self.preference != 0.5).nonzero().flatten()

    def select(self, limit: int) -> Items:
        """At most `limit` records, selected by their contents, in their order."""
        if len(self) <= limit:
            return self
        return self[torch.from_numpy(np.sort(np.argsort(self.keys, kind="stable")[:limit]))]

    @staticmethod
    def of(items: Sequence[Item]) -> Items:
        """These records as columns."""
        if isinstance(items, Items):
            return items
        group = len(items[0].pictures) if items else 1
        crop_count = len(items[0].crops) if items else 0
        return Items(
            torch.tensor([item.pictures for item in items], dtype=torch.long).view(len(items), group),
            torch.tensor([item.prompt for item in items], dtype=torch.long),
            torch.tensor([item.preference for item in items]),
            np.array([item.key for item in items], dtype=KEY),
            torch.tensor([item.crops for item in items], dtype=torch.long).view(
                len(items), crop_count, group
            ),
        )


@dataclass(frozen=True, eq=False)
class PreferenceData:
    """The encoded dataset.

    latents     [P, …], posterior means
    mirrored    posterior means of the mirror images, or None
    conditions  one row for each prompt; row 0 is the empty prompt
    train       the records to learn from
    held_out    the records to validate on
    """

    latents: Latents
    mirrored: Latents | None
    conditions: Conditions | Prompts
    train: Items
    held_out: Items

    @staticmethod
    def empty(model: Backbone) -> PreferenceData:
        """A dataset without records."""
        return PreferenceData(
            torch.empty(0, *model.latent_shape), None, Conditions({}), Items.of([]), Items.of([])
        )


def make_preference_data(
    model: Backbone,
    train: Sequence[Record] | PreparedRecords,
    held_out: Sequence[Record] | PreparedRecords,
    settings: Settings,
    concepts: Sequence[Concept] = (),
) -> PreferenceData:
    """Encode all pictures and prompts that are not encoded yet, and free the encoders.

    Posterior means serve as latents: with the same noise in both pictures of a pair, sampling would only add noise
    to their difference. Pictures that `align prepare` has prepared are not opened.
    """
    if isinstance(train, PreparedRecords):
        assert isinstance(held_out, PreparedRecords)
        data = _open_prepared(model, train, held_out, settings, concepts)
    else:
        assert not isinstance(held_out, PreparedRecords)
        data = _encode(model, train, held_out, settings, concepts)
    model.free("autoencoder", "text_encoder")
    if settings.random_crop:
        say_unmoved(data.train.pictures, data.train.crops)
    return data


def say_unmoved(centred: Any, crops: Any) -> None:
    """Print if no crop of N records [N, R, …] differs from the centred one [N, …]."""
    if len(centred) and not bool((crops != centred[:, None]).any()):
        notify(UNMOVED)


def _encode(
    model: Backbone,
    train: Sequence[Record],
    held_out: Sequence[Record],
    settings: Settings,
    concepts: Sequence[Concept],
) -> PreferenceData:
    records = [record.ordered if isinstance(record, Pair) else record for record in (*train, *held_out)]
    # Each image and each prompt once; records refer to them by row
    pictures = {_name_image(picture): picture for record in records for picture in record.pictures}
    hashes = {name: picture.content_hash for name, picture in pictures.items()}
    keys = [
        record_key(record.prompt, [hashes[_name_image(picture)] for picture in record.pictures])
        for record in records
    ]
    prompts = {"": 0}
    rows: dict[tuple[str, CropPosition], int] = {}
    for record in records:
        prompts.setdefault(expand_tokens(record.prompt, concepts), len(prompts))

    # Crops of an image that is not square: the centre, and others by the record's key
    square = {
        name: settings.random_crop > 0 and is_square(picture.read_size())
        for name, picture in pictures.items()
    }

    def find_rows(record: Record, crop: CropPosition) -> tuple[int, ...]:
        """The rows of a record's pictures at this crop; every crop of a square one is the whole image."""
        names = [_name_image(picture) for picture in record.pictures]
        views = [(name, CROPS["center"] if square[name] else crop) for name in names]
        return tuple(rows.setdefault(view, len(rows)) for view in views)

    items = [
        Item(
            pictures=find_rows(record, CROPS["center"]),
            prompt=prompts[expand_tokens(record.prompt, concepts)],
            preference=float(record.good) if isinstance(record, Single) else record.label,
            key=key,
            crops=tuple(
                find_rows(record, draw_crop(settings.seed, key, n)) for n in range(settings.random_crop)
            ),
        )
        for record, key in zip(records, keys, strict=True)
    ]

    # To latents, original and mirrored
    size = (model.resolution, model.resolution)
    views = [View(pictures[name], size, crop) for name, crop in rows]
    flips = (False, True) if settings.flip else (False,)
    encoded_views = encode_views(model, views, flips)
    latents = {flip: encoded.column("mean") for flip, encoded in encoded_views.items()}
    return PreferenceData(
        latents[False],
        latents.get(True),
        encode_texts(model, list(prompts)),
        Items.of(items[: len(train)]),
        Items.of(items[len(train) :]),
    )


def _open_prepared(
    model: Backbone,
    train: PreparedRecords,
    held_out: PreparedRecords,
    settings: Settings,
    concepts: Sequence[Concept],
) -> PreferenceData:
    """Like `_encode`, from a folder of `align prepare`, mapped into memory."""
    folder = train.folder
    folder.refuse_other_use(model, flip=settings.flip, crops=settings.random_crop, seed=settings.seed)
    tables = folder.image_tables(flip=settings.flip)
    texts = [expand_tokens(prompt, concepts) for prompt in folder.prompts]
    unique = dict.fromkeys(["", *texts])
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    prompt_rows = torch.tensor([row_of[prompt] for prompt in texts], dtype=torch.long)
    conditions = folder.conditions(model, list(unique))
    items = [
        Items(
            torch.from_numpy(records.find_rows(tables[False])),
            prompt_rows[torch.from_numpy(records.prompt).long()],
            torch.from_numpy(records.preference),
            records.keys,
            torch.from_numpy(records.crop_rows(tables[False])),
        )
        for records in (train, held_out)
    ]
    columns = {flip: Column(table, "mean") for flip, table in tables.items()}
    return PreferenceData(columns[False], columns.get(True), conditions, *items)


def is_square(size: tuple[int, int]) -> bool:
    """Whether an image of this size (width, height) is square, so that its only crop is the whole."""
    return size[0] == size[1]


def draw_crop(seed: int, key: str, number: int) -> CropPosition:
    """The position of a record's n-th random crop, the same for all its pictures."""
    across, down = torch.rand(2, generator=generator(seed, "crop", key, number)).tolist()
    return CropPosition(round(across, 4), round(down, 4))


def _name_image(picture: ImageRecord) -> str:
    """A picture's name: its file, or its table, row and column."""
    return str(picture.path)


# Noise samples ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseSamples:
    """K noise samples of each record. `name` distinguishes the sets of training and of evaluation."""

    name: str
    seed: int
    count: int
    levels: int  # of the noise path
    prompt_dropout: float = 0.0
    flip: bool = False
    crop: bool = False
    lowest: int = 0  # of the levels that are drawn

    def find_levels(self, items: Items, ks: Sequence[int]) -> Tensor:
        """The index of each noise sample's level [B]: one in each stratum over a record's K samples."""
        return torch.tensor([_draw_levels(self, items.key(row))[k] for row, k in enumerate(ks)])

    def noise(self, items: Items, ks: Sequence[int], shape: Sequence[int]) -> Tensor:
        """ε [B, C, …] of the noise samples."""
        randoms = [self._make_generator(items, row, k, "noise") for row, k in enumerate(ks)]
        return torch.stack([torch.randn(tuple(shape), generator=random) for random in randoms])

    def drops_prompt(self, items: Items, ks: Sequence[int]) -> Tensor:
        """Whether noise samples drop the prompt [B], for every picture of the record."""
        return self._draw_chances(items, ks, "prompt") < self.prompt_dropout

    def mirrors(self, items: Items, ks: Sequence[int]) -> Tensor:
        """Whether noise samples mirror every picture of the record [B]."""
        if not self.flip:
            return torch.zeros(len(ks), dtype=torch.bool)
        return self._draw_chances(items, ks, "flip") < 0.5

    def rows(self, items: Items, ks: Sequence[int]) -> Tensor:
        """The rows of the records' pictures [B, G], at each noise sample's crop."""
        count = items.crops.shape[1]
        if not self.crop or not count:
            return items.pictures
        crop = (self._draw_chances(items, ks, "crop") * count).long()
        return items.crops[torch.arange(len(ks)), crop]

    def _draw_chances(self, items: Items, ks: Sequence[int], purpose: str) -> Tensor:
        randoms = [self._make_generator(items, row, k, purpose) for row, k in enumerate(ks)]
        return torch.stack([torch.rand((), generator=random) for random in randoms]).double()

    def _make_generator(self, items: Items, row: int, k: int, purpose: str) -> torch.Generator:
        return generator(self.seed, self.name, items.key(row), k, purpose)


@lru_cache(maxsize=4096)
def _draw_levels(samples: NoiseSamples, key: str) -> list[int]:
    random = generator(samples.seed, samples.name, key, "levels")
    levels = draw_stratified_levels(samples.count, samples.levels - samples.lowest, random)
    return [samples.lowest + int(level) for level in levels]


@dataclass(frozen=True, eq=False)
class CleanBatch(Movable):
    """The data of a `Batch` before noise is added: B records at one noise sample each, G pictures per record.

    clean [G·B, …]   noise [B, …]   index of the noise level [B]   conditions [B]   preference [B]

    Rows b, B + b … of `clean` are record b's first, second … picture.
    """

    on_host: ClassVar[tuple[str, ...]] = ("index", "preference")

    clean: Tensor
    noise: Tensor
    index: Tensor
    conditions: Conditions
    preference: Tensor

    def add_noise(self, path: NoisePath) -> Batch:
        """The training batch: noisy latents and the network's targets."""
        group = len(self.clean) // len(self.index)
        clean, noise = self.clean.float(), torch.cat([self.noise] * group)
        index = self.index.repeat(group)
        level: Level = path.levels[index]
        return Batch(
            noisy=add_noise(clean, noise, level),
            target=target(clean, noise, level, path.prediction_type),
            index=index,
            conditions=Conditions.cat([self.conditions] * group),
            preference=self.preference,
            group=group,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """B records at one noise sample each, G pictures per record: the data of a training step.

    noisy, target [G·B, …]   index of the noise level [G·B]   conditions [G·B]   preference [B]

    Rows b, B + b … are record b's first, second … picture.
    """

    noisy: Tensor
    target: Tensor
    index: Tensor
    conditions: Conditions
    preference: Tensor
    group: int

    def __len__(self) -> int:
        return len(self.preference)

    def part(self, rows: Sequence[int]) -> Batch:
        """The batch of these records alone."""
        picture_rows = torch.tensor([g * len(self) + b for g in range(self.group) for b in rows])
        index = picture_rows.to(self.noisy.device)
        return Batch(
            self.noisy[index],
            self.target[index],
            self.index[picture_rows],
            self.conditions[picture_rows],
            self.preference[torch.tensor(list(rows))],
            self.group,
        )


def make_clean_batch(
    data: PreferenceData, samples: NoiseSamples, items: Items, ks: Sequence[int]
) -> CleanBatch:
    """The records at their noise samples; all pictures of a record share the noise sample."""
    rows = samples.rows(items, ks).T.flatten()  # all first pictures, then all second ones
    clean = data.latents[rows]
    mirrored = samples.mirrors(items, ks).repeat(items.group)
    if mirrored.any():
        assert data.mirrored is not None
        clean[mirrored] = data.mirrored[rows[mirrored]]
    prompt = items.prompt.masked_fill(samples.drops_prompt(items, ks), 0)
    noise = samples.noise(items, ks, data.latents.shape[1:])
    return CleanBatch(clean, noise, samples.find_levels(items, ks), data.conditions[prompt], items.preference)


def make_batch(
    model: Backbone, data: PreferenceData, samples: NoiseSamples, items: Sequence[Item], ks: Sequence[int]
) -> Batch:
    """The records at their noise samples, noised, on the model's device."""
    return make_clean_batch(data, samples, Items.of(items), ks).to(model.device).add_noise(model.path)


@dataclass(frozen=True, eq=False)
class StepBatches:
    """The (record, noise sample) indices of each step, for all processes or for this one."""

    data: PreferenceData
    samples: NoiseSamples
    settings: Settings
    share: processes.Share
    _pass: dict[int, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, step: int) -> list[CleanBatch]:
        """This process's micro-batches of a step, counted from 1."""
        return [self.read(part) for part in self.list_micro_batches(step)]

    def read(self, samples: Sequence[tuple[int, int]]) -> CleanBatch:
        """The records at these (record, noise index)."""
        rows = torch.tensor([row for row, _ in samples])
        return make_clean_batch(self.data, self.samples, self.data.train[rows], [k for _, k in samples])

    def list_samples(self, step: int) -> list[tuple[int, int]]:
        """The (record, noise index) of a step: pass after pass, each in a random order of its own.

        Pass p takes every record once, at its noise sample p mod K.
        """
        count, size = len(self.data.train), self.settings.batch
        numbers = range((step - 1) * size, step * size)
        return [
            (int(self._draw_order(n // count)[n % count]), (n // count) % self.settings.draws)
            for n in numbers
        ]

    def list_micro_batches(self, step: int) -> list[list[tuple[int, int]]]:
        """This process's share of a step, in micro-batches."""
        parts = split_micro_batches(self.list_samples(step), self.settings)[self.share.micros]
        return [part[self.share.rows] for part in parts]

    def _draw_order(self, number: int) -> Tensor:
        """The order of a pass over the records."""
        if number not in self._pass:
            random = generator(self.settings.seed, "pass", number)
            self._pass.clear()
            self._pass[number] = torch.randperm(len(self.data.train), generator=random)
        return self._pass[number]


def split_micro_batches(
    samples: Sequence[tuple[int, int]], settings: Settings
) -> list[list[tuple[int, int]]]:
    """A step's samples, split into micro-batches that fit into memory."""
    size = settings.micro_batch or len(samples)
    return [list(samples[first : first + size]) for first in range(0, len(samples), size)]


def residuals(model: Backbone, network: torch.nn.Module, batch: Batch) -> Tensor:
    """prediction − target [G, B, …] in float32, in the model's own parameterisation."""
    prediction = model.predict(batch.noisy, batch.index, batch.conditions, denoiser=network)
    residual: Tensor = (prediction - batch.target).unflatten(0, (batch.group, len(batch)))
    return residual


def mean_squares(residual: Tensor) -> Tensor:
    """Errors [G, B]: the mean of residuals' squares over all other dimensions."""
    return residual.square().flatten(2).mean(2)


def reread_preferences(settings: Settings, *, skip_bad: bool) -> Preferences | Prepared:
    """The preferences that a run was trained on, checked."""
    if is_prepared(settings.pairs):
        return Prepared(Path(settings.pairs))
    limit, user = settings.limit or None, settings.user or None
    split = None if settings.split == "train" else settings.split
    preferences = read_preferences(settings.pairs, user=user, limit=limit, split=split)
    return check_preferences(preferences, skip_bad=skip_bad)


def make_records(source: Preferences | Prepared, settings: Settings) -> Records | PreparedRecords:
    """The records that this loss learns from; `UserError` if the source has none."""
    if isinstance(source, Prepared):
        return source.select(
            by_pairs=settings.by_pairs,
            ties=settings.ties == "model",
            user=settings.user or None,
            limit=settings.limit or None,
        )
    if settings.by_pairs and not source.pairs:
        raise UserError(
            f"{source.source} judges single pictures, and {settings.loss} compares pairs. Use --loss kto."
        )
    return Records(select_records(source, by_pairs=settings.by_pairs, ties=settings.ties == "model"))
