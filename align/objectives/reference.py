"""The reference of preference losses: the errors of the model before training, at training's own noise samples.

Three ways to the same errors. Live: the network with the new adapter off, evaluated in every step. Copy: a frozen
second network, where full weights are trained. Cached: evaluated when a noise sample is first taken, stored with 4
bytes an image in a file that is mapped into memory, and read afterwards; the more often a sample is taken, the cheaper
it is, and a single pass over the data gains nothing. For full weights the cache is filled before training begins, and
no second network is held.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from align.objectives.dataset import Batch, mean_squares, residuals
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.io.files import atomic_write, content_hash
from backbone.models.cache import find_cache_folder
from backbone.models.model import Backbone

RecordSamples = Sequence[tuple[int, int]]
"""The samples of a batch: (row of the training record, noise index k) each."""


class Reference(Protocol):
    """The interface of a reference: its errors."""

    def errors(self, batch: Batch, samples: RecordSamples) -> Tensor:
        """Errors [G, B] of the reference on a batch of training samples."""
        ...


@dataclass
class LiveReference:
    """The network itself inside a context that restores the reference (the new adapter off), or a frozen copy of it."""

    model: Backbone
    network: nn.Module
    as_reference: Callable[[], AbstractContextManager[None]]
    nfe: int = 0  # samples that the network evaluated

    @torch.no_grad()
    def residuals(self, batch: Batch) -> Tensor:
        """prediction − target [G, B, C, H, W] of the reference."""
        self.nfe += len(batch.noisy)
        with self.as_reference():
            return residuals(self.model, self.network, batch)

    def errors(self, batch: Batch, samples: RecordSamples) -> Tensor:
        """Errors [G, B]."""
        return mean_squares(self.residuals(batch))


@dataclass
class CachedReference:
    """The reference's errors at K noise samples of N records, float32 [N, K, G]; NaN where unknown.

    `values` are a memory-mapped file: the main process's results are in it at once, and survive a kill. Of several
    processes each has its own view, and `merge` exchanges new values. Results stay on the device until `flush`, so that
    no step waits.
    """

    live: LiveReference
    key: str
    values: Tensor
    # (row, k) [n, 2] found since the last `merge`
    new: list[Tensor] = field(default_factory=list, init=False)
    pending: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict, init=False)

    def errors(self, batch: Batch, samples: RecordSamples) -> Tensor:
        """Errors [G, B]; missing ones are computed now, in one batch."""
        if any(sample in self.pending for sample in samples):
            self.flush()
        rows, ks = (torch.tensor(part) for part in zip(*samples, strict=True))

        # Samples that were never visited: computed now, all of them in one batch
        missing = torch.isnan(self.values[rows, ks, 0]).nonzero().flatten().tolist()
        all_evaluate = processes.is_sharded() and processes.any_process(bool(missing))
        computed = missing or ([0] if all_evaluate else [])  # a sharded model is evaluated by all or none
        if computed:
            fresh = self.live.errors(
                batch if len(computed) == len(batch) else batch.part(computed), samples
            ).float()
        for column, row in enumerate(missing):
            self.pending[samples[row]] = (fresh, column)
        if missing and processes.world_size() > 1:
            self.new.append(torch.stack([rows[missing], ks[missing]], dim=1))
        if len(missing) == len(batch):
            return fresh

        # Known errors from the table, new ones in their places
        cached = send(self.values[rows, ks].T, batch.noisy.device)
        return cached.index_copy(1, send(torch.tensor(missing), cached.device), fresh) if missing else cached

    def flush(self) -> None:
        """Copy the results from the device, in one transfer."""
        if not self.pending:
            return
        fetched = torch.stack([errors[:, column] for errors, column in self.pending.values()]).cpu()
        rows, ks = (torch.tensor(part) for part in zip(*self.pending, strict=True))
        self.values[rows, ks] = fetched
        self.pending.clear()

    @property
    def filled(self) -> int:
        """The number of samples with values."""
        self.flush()
        return int((~torch.isnan(self.values[..., 0])).sum())

    def merge(self) -> None:
        """Exchange new values with the other processes of this run; each evaluates its own samples."""
        self.flush()
        if processes.world_size() == 1:
            return
        samples = torch.cat([*self.new, torch.empty(0, 2, dtype=torch.long)])
        self.new = []
        own_rows = torch.cat([samples.double(), self.values[samples[:, 0], samples[:, 1]].double()], dim=1)
        gathered = processes.gather_rows(own_rows)
        rows, ks = gathered[:, :2].long().T
        self.values[rows, ks] = gathered[:, 2:].float()


def reference_path(key: str) -> Path:
    """The cache file of this key."""
    return find_cache_folder() / "reference" / key[:2] / f"{key}.npy"


def open_cached_reference(live: LiveReference, key: str, shape: tuple[int, int, int]) -> CachedReference:
    """The cached errors of this key [N, K, G], with those of earlier runs; a damaged cache is replaced.

    If the cache cannot be written, the errors are kept in memory.
    """
    path = reference_path(key)
    if processes.is_main_process() and not _is_whole(path, shape):
        try:
            # Not sparse: a full disk is detected now
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, np.full(shape, np.nan, np.float32), allow_pickle=False)
        except OSError:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    processes.barrier()
    if not _is_whole(path, shape):
        return CachedReference(live, key, torch.full(shape, float("nan")))
    # c: copy-on-write, so that changes are private to this process
    owned = processes.is_main_process() and os.access(path, os.W_OK)
    mode: Literal["r+", "c"] = "r+" if owned else "c"
    return CachedReference(live, key, torch.from_numpy(np.lib.format.open_memmap(path, mode)))


def _is_whole(path: Path, shape: tuple[int, int, int]) -> bool:
    """Whether a file holds errors of this shape."""
    try:
        stored = np.lib.format.open_memmap(path, "r")
    except (OSError, ValueError):  # missing, or damaged
        return False
    return stored.shape == shape and stored.dtype == np.float32


def reference_key(*facts: object) -> str:
    """A hash of everything that the reference's errors depend on; any change gives another cache."""
    return content_hash("\n".join(map(str, facts)).encode())
