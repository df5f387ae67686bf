"""The reference of preference losses: the errors of the model before training, at training's own noise samples.

Three ways to the same errors. Live: the network with the new adapter off, evaluated anew in every step. Copy: a frozen
second network, where full weights are trained. Cached: evaluated when a noise sample is first taken, 4 bytes an image
kept, and read afterwards, so its cost falls with the number of times that a sample is taken; a single pass over the
data gains nothing. For full weights the cache is filled before training begins, and no second network is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from align.objectives.dataset import Batch, mean_squares, residuals
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.io.console import UserError
from backbone.io.files import content_hash, read_tensors, write_tensors
from backbone.models.cache import cache_folder
from backbone.models.model import Backbone

RecordSamples = Sequence[tuple[int, int]]
"""The samples of a batch: (row of the training record, noise index k) each."""


class Reference(Protocol):
    """What the training asks for the reference's errors."""

    def errors(self, batch: Batch, chosen: RecordSamples) -> Tensor:
        """Errors [G, B] of the reference on a batch of training samples."""
        ...


@dataclass
class LiveReference:
    """The network itself, made the reference again by a context (the new adapter off), or a frozen copy of it."""

    model: Backbone
    network: nn.Module
    as_reference: Callable[[], AbstractContextManager[None]]
    nfe: int = 0  # samples that the network was evaluated for

    @torch.no_grad()
    def residuals(self, batch: Batch) -> Tensor:
        """prediction − target [G, B, C, H, W] of the reference."""
        self.nfe += len(batch.noisy)
        with self.as_reference():
            return residuals(self.model, self.network, batch)

    def errors(self, batch: Batch, chosen: RecordSamples) -> Tensor:
        """Errors [G, B]."""
        return mean_squares(self.residuals(batch))


@dataclass
class CachedReference:
    """The reference's errors at K noise samples of N records, float32 [N, K, G]; NaN where unknown.

    They lie in the processor's memory. What is evaluated stays on the device until `land`, so that no step waits.
    """

    live: LiveReference
    key: str
    values: Tensor
    new: int = field(default=0, init=False)  # samples computed since the last `save`
    flying: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict, init=False)

    def errors(self, batch: Batch, chosen: RecordSamples) -> Tensor:
        """Errors [G, B]; unknown ones are computed now, in one batch."""
        if any(sample in self.flying for sample in chosen):
            self.land()
        rows, ks = (torch.tensor(part) for part in zip(*chosen, strict=True))
        missing = torch.isnan(self.values[rows, ks, 0]).nonzero().flatten().tolist()
        together = processes.is_sharded() and processes.any_process(bool(missing))
        asked = missing or ([0] if together else [])  # a sharded model is evaluated by all or none
        if asked:
            found = self.live.errors(batch if len(asked) == len(batch) else batch.part(asked), chosen).float()
        for place, row in enumerate(missing):
            self.flying[chosen[row]] = (found, place)
        self.new += len(missing)
        if len(missing) == len(batch):
            return found
        known = send(self.values[rows, ks].T, batch.noisy.device)
        return known.index_copy(1, send(torch.tensor(missing), known.device), found) if missing else known

    def land(self) -> None:
        """Fetches what was evaluated from the device, in one transfer."""
        if not self.flying:
            return
        found = torch.stack([errors[:, place] for errors, place in self.flying.values()]).cpu()
        rows, ks = (torch.tensor(part) for part in zip(*self.flying, strict=True))
        self.values[rows, ks] = found
        self.flying.clear()

    @property
    def filled(self) -> int:
        """How many samples are known."""
        self.land()
        return int((~torch.isnan(self.values[..., 0])).sum())

    def merge(self) -> None:
        """Takes over what the other processes of this run have found; each takes samples of its own."""
        self.land()
        if processes.world_size() > 1:
            known = self.values.nan_to_num(nan=-1.0, posinf=torch.inf)  # errors are not negative
            known = processes.reduce_max(known)
            self.values = known.where(known >= 0, torch.nan)
            new = int(processes.reduce_sum([self.new])[0])
            self.new = new if processes.is_main_process() else 0

    def save(self) -> None:
        """Keeps what is new, of all processes; a cache that cannot be written is done without."""
        self.merge()
        if not self.new or not processes.is_main_process():
            return
        try:
            write_tensors(reference_path(self.key), {"errors": self.values}, {"kind": "reference errors"})
        except OSError:
            return
        self.new = 0


def reference_path(key: str) -> Path:
    """The cache file of this key."""
    return cache_folder() / "reference" / key[:2] / f"{key}.safetensors"


def open_cached_reference(live: LiveReference, key: str, shape: tuple[int, int, int]) -> CachedReference:
    """The cached errors of this key [N, K, G], with those of earlier runs; a damaged cache begins anew."""
    empty = torch.full(shape, float("nan"))
    path = reference_path(key)
    if path.is_file():
        try:
            values = read_tensors(path)[0]["errors"]
        except (UserError, KeyError):
            values = empty
        if values.shape == empty.shape:
            return CachedReference(live, key, values.clone())
    return CachedReference(live, key, empty)


def reference_key(*facts: object) -> str:
    """One key of all that the reference's errors depend on: a change of any gives another cache."""
    return content_hash("\n".join(map(str, facts)).encode())
