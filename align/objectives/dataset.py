"""The encoded dataset: latents and prompts encoded once, records as rows of them, and reproducible noise samples.

Noise sample (record, k), k < K, fixes the noise, its level, whether the prompt is dropped and whether the pictures are
mirrored, the same for every picture of the record: it follows from the seed, the record's contents and k alone. The
levels of a record's K noise samples are stratified: one in each K-th of the noise path above `lowest`, in random
order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from align.pairs.read import read_preferences
from align.pairs.records import (
    Pair,
    Preferences,
    Record,
    Single,
    normalize_prompt,
    select_records,
)
from align.settings import Settings
from backbone.adapters.concept import Concept, resolve_placeholder_tokens
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Level, add_noise, generator, target
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.io.console import UserError, progress
from backbone.io.files import content_hash
from backbone.media.pictures import ImageRecord
from backbone.media.transforms import CROPS, CropPosition
from backbone.models.cache import encode_images_cached, encode_prompts_cached
from backbone.models.model import Backbone
from backbone.training.base_predictions import stratified_levels

Value = TypeVar("Value")


@dataclass(frozen=True)
class Item:
    """A record as rows of `PreferenceData`: its pictures (the better one first), its prompt, and what was said of it.

    `preference` of a pair is the probability that its first picture is better, 1 or ½; of a single picture 1 for good
    and 0 for bad. `key` is its contents. `cuts` are the same pictures cut at other places than the centre, each
    place the same for all of them.
    """

    pictures: tuple[int, ...]
    prompt: int
    preference: float
    key: str
    cuts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class PreferenceData:
    """The encoded dataset.

    latents     [P, …], posterior means
    mirrored    the same of the mirror images, or None
    conditions  one row for each prompt; row 0 is the empty prompt
    train       the records to learn from
    held_out    the records to validate on
    """

    latents: Tensor
    mirrored: Tensor | None
    conditions: Conditions
    train: list[Item]
    held_out: list[Item]

    def to(self, device: torch.device) -> PreferenceData:
        """The same on another device."""
        return replace(
            self,
            latents=self.latents.to(device),
            mirrored=None if self.mirrored is None else self.mirrored.to(device),
            conditions=self.conditions.to(device),
        )


def prepare(
    model: Backbone,
    train: Sequence[Record],
    held_out: Sequence[Record],
    settings: Settings,
    concepts: Sequence[Concept] = (),
) -> PreferenceData:
    """Encodes every picture and prompt, remembered on disk, and frees the encoders.

    Posterior means serve as latents: with the same noise in both pictures of a pair, sampling would only add noise
    to their difference.
    """
    records = [record.ordered if isinstance(record, Pair) else record for record in (*train, *held_out)]
    pictures = {_where(picture): picture for record in records for picture in record.pictures}
    hashes = {where: picture.content_hash for where, picture in pictures.items()}
    keys = [_key(record, hashes) for record in records]
    prompts = {"": 0}
    rows: dict[tuple[str, CropPosition], int] = {}
    for record in records:
        prompts.setdefault(_said(record.prompt, concepts), len(prompts))

    def cut(record: Record, place: CropPosition) -> tuple[int, ...]:
        """The rows of a record's pictures at this place."""
        return tuple(rows.setdefault((_where(picture), place), len(rows)) for picture in record.pictures)

    items = [
        Item(
            pictures=cut(record, CROPS["center"]),
            prompt=prompts[_said(record.prompt, concepts)],
            preference=float(record.good) if isinstance(record, Single) else record.label,
            key=key,
            cuts=tuple(cut(record, _place(settings.seed, key, n)) for n in range(settings.random_crop)),
        )
        for record, key in zip(records, keys, strict=True)
    ]
    views = [(pictures[where], place) for where, place in rows]
    latents = _means(model, views, flip=False)
    mirrored = _means(model, views, flip=True) if settings.flip else None
    with processes.main_process_first():
        conditions = encode_prompts_cached(model, list(prompts))
    model.free("autoencoder", "text_encoder")
    return PreferenceData(latents, mirrored, conditions, items[: len(train)], items[len(train) :]).to(
        model.device
    )


def _key(record: Record, hashes: Mapping[str, str]) -> str:
    """A record by its contents."""
    contents = [normalize_prompt(record.prompt), *(hashes[_where(picture)] for picture in record.pictures)]
    return content_hash("\n".join(contents).encode())


def _place(seed: int, key: str, number: int) -> CropPosition:
    """Where a record's pictures are cut for the n-th of its random crops, the same for all of them."""
    across, down = torch.rand(2, generator=generator(seed, "crop", key, number)).tolist()
    return round(across, 4), round(down, 4)


def _where(picture: ImageRecord) -> str:
    """A picture's name: its file's, or its table's, row and column."""
    return str(picture.path)


def _said(prompt: str, concepts: Sequence[Concept]) -> str:
    """The prompt in the model's words; brackets that are no concept's stay as they are."""
    return resolve_placeholder_tokens(prompt, concepts) if concepts else prompt


def _means(model: Backbone, views: Sequence[tuple[ImageRecord, CropPosition]], *, flip: bool) -> Tensor:
    means = []
    processes.warm_cache(lambda view: encode_images_cached(model, [view[0]], flip=flip, crop=view[1]), views)
    with progress(len(views), "encoding" + (" mirrored" if flip else "")) as bar:
        for picture, place in views:
            means.append(encode_images_cached(model, [picture], flip=flip, crop=place)[0].mean.float())
            bar.advance(images=1)
    return torch.cat(means)


# Noise samples ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseSamples:
    """K noise samples of each record. `name` keeps two sets apart: those of training, those of evaluation."""

    name: str
    seed: int
    count: int
    levels: int  # of the noise path
    prompt_dropout: float = 0.0
    flip: bool = False
    crop: bool = False
    lowest: int = 0  # of the levels that are drawn

    def level(self, item: Item, k: int) -> int:
        """The index of noise sample k's level: one in each stratum over the K samples."""
        return _levels(self, item.key)[k]

    def noise(self, item: Item, k: int, shape: Sequence[int]) -> Tensor:
        """ε [C, …] of noise sample k."""
        return torch.randn(tuple(shape), generator=generator(self.seed, self.name, item.key, k, "noise"))

    def drops_prompt(self, item: Item, k: int) -> bool:
        """Whether noise sample k is without a prompt, for every picture of the record."""
        return self._chance(item, k, "prompt") < self.prompt_dropout

    def mirrors(self, item: Item, k: int) -> bool:
        """Whether noise sample k mirrors every picture of the record."""
        return self.flip and self._chance(item, k, "flip") < 0.5

    def rows(self, item: Item, k: int) -> tuple[int, ...]:
        """The rows of the record's pictures as noise sample k cuts them."""
        if not self.crop or not item.cuts:
            return item.pictures
        return item.cuts[int(self._chance(item, k, "crop") * len(item.cuts))]

    def _chance(self, item: Item, k: int, what: str) -> float:
        return float(torch.rand((), generator=generator(self.seed, self.name, item.key, k, what)))


@lru_cache(maxsize=65536)
def _levels(samples: NoiseSamples, key: str) -> list[int]:
    random = generator(samples.seed, samples.name, key, "levels")
    drawn = stratified_levels(samples.count, samples.levels - samples.lowest, random)
    return [samples.lowest + int(level) for level in drawn]


@dataclass(frozen=True, eq=False)
class Batch:
    """B records at one draw each, G pictures a record: rows b, B + b … are record b's first, second … picture.

    noisy, target [G·B, …]   index of the noise level [G·B]   conditions [G·B]   preference [B]
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
        """Only these records."""
        chosen = torch.tensor([g * len(self) + b for g in range(self.group) for b in rows])
        where = chosen.to(self.noisy.device)
        return Batch(
            self.noisy[where],
            self.target[where],
            self.index[chosen],
            self.conditions[chosen],
            self.preference[torch.tensor(list(rows))],
            self.group,
        )


def batch_of(
    model: Backbone, data: PreferenceData, samples: NoiseSamples, items: Sequence[Item], ks: Sequence[int]
) -> Batch:
    """The records at their noise samples: t and ε, the dropped prompt and the mirroring are shared in a record."""
    shape = data.latents.shape[1:]
    group = len(items[0].pictures)
    clean_rows = []
    for g in range(group):
        for item, k in zip(items, ks, strict=True):
            source = data.mirrored if samples.mirrors(item, k) else data.latents
            assert source is not None
            clean_rows.append(source[samples.rows(item, k)[g]])
    clean = torch.stack(clean_rows)
    noise = torch.stack([samples.noise(item, k, shape) for item, k in zip(items, ks, strict=True)])
    noise = torch.cat([send(noise.to(clean.dtype), clean.device)] * group)
    index = torch.tensor([samples.level(item, k) for item, k in zip(items, ks, strict=True)]).repeat(group)
    dropped = torch.tensor([samples.drops_prompt(item, k) for item, k in zip(items, ks, strict=True)])
    conditions = data.conditions[[item.prompt for item in items]].drop(dropped, data.conditions[:1])
    level: Level = model.path.levels[index]
    return Batch(
        noisy=add_noise(clean, noise, level),
        target=target(clean, noise, level, model.path.prediction_type),
        index=index,
        conditions=Conditions.cat([conditions] * group),
        preference=torch.tensor([item.preference for item in items]),
        group=group,
    )


def residuals(model: Backbone, network: torch.nn.Module, batch: Batch) -> Tensor:
    """prediction − target [G, B, …] in float32, in the model's own parameterisation."""
    prediction = model.predict(batch.noisy, batch.index, batch.conditions, denoiser=network)
    residual: Tensor = (prediction - batch.target).unflatten(0, (batch.group, len(batch)))
    return residual


def mean_squares(residual: Tensor) -> Tensor:
    """Errors [G, B]: the mean of residuals' squares over all other dimensions."""
    return residual.square().flatten(2).mean(2)


def _read_again(settings: Settings) -> Preferences:
    """The preferences that a run was trained on."""
    limit, user = settings.limit or None, settings.user or None
    split = None if settings.split == "train" else settings.split
    return read_preferences(settings.pairs, user=user, limit=limit, split=split)


def records_of(found: Preferences, settings: Settings) -> list[Record]:
    """What this loss learns from; `UserError` where the source holds none of it."""
    if settings.by_pairs and not found.pairs:
        raise UserError(
            f"{found.source} judges single pictures, and {settings.loss} compares pairs. Use --loss kto."
        )
    return select_records(found, by_pairs=settings.by_pairs, ties=settings.ties == "model")
