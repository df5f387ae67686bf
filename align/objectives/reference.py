"""The reference of preference losses: what the model said before training, at the draws that training visits.

Three ways to the same errors. Live: the network with the new adapter off, asked anew at every visit. Copy: a frozen
second network, where full weights are trained. Bank: asked at a draw's first visit, 4 bytes a picture kept, and read
afterwards, so its cost falls by the number of visits a draw gets; a single pass over the data gains nothing. For full
weights the bank is filled before training begins, and no second network is ever held.
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
from backbone.distributed import processes
from backbone.io.console import UserError
from backbone.io.files import content_hash, read_tensors, write_tensors
from backbone.models.cache import cache_folder
from backbone.models.model import Backbone

Cells = Sequence[tuple[int, int]]
"""Which draw of which training record each record of a batch is: (record's row, k)."""


class Reference(Protocol):
    """What the training asks for the reference's errors."""

    def errors(self, batch: Batch, cells: Cells) -> Tensor:
        """Errors [G, B] of the reference on a batch of training draws."""
        ...


@dataclass
class Live:
    """The network itself, made the reference again by a context (the new adapter off), or a frozen copy of it."""

    model: Backbone
    network: nn.Module
    as_reference: Callable[[], AbstractContextManager[None]]
    asked: int = 0  # rows that the network was asked for, of all pictures

    @torch.no_grad()
    def residuals(self, batch: Batch) -> Tensor:
        """prediction − target [G, B, C, H, W] of the reference."""
        self.asked += len(batch.noisy)
        with self.as_reference():
            return residuals(self.model, self.network, batch)

    def errors(self, batch: Batch, cells: Cells) -> Tensor:
        """Errors [G, B], whatever the cells."""
        return mean_squares(self.residuals(batch))


@dataclass
class Bank:
    """The reference's errors at K draws of N records, float32 [N, K, G]; NaN where nobody has been yet."""

    live: Live
    key: str
    values: Tensor
    new: int = field(default=0, init=False)  # cells computed since the last `save`

    def errors(self, batch: Batch, cells: Cells) -> Tensor:
        """Errors [G, B]; those of unvisited cells are computed now, in one batch."""
        rows, ks = (torch.tensor(part) for part in zip(*cells, strict=True))
        missing = torch.isnan(self.values[rows, ks, 0]).nonzero().flatten().tolist()
        together = processes.is_sharded() and processes.any_process(bool(missing))
        asked = missing or ([0] if together else [])  # a model that is cut up is asked by all or none
        if asked:
            found = self.live.errors(batch if len(asked) == len(batch) else batch.part(asked), cells)
        if missing:
            self.values[rows[missing], ks[missing]] = found.T.float().cpu()
            self.new += len(missing)
        return self.values[rows, ks].T.to(batch.noisy.device)

    @property
    def filled(self) -> int:
        """Cells that have been visited."""
        return int((~torch.isnan(self.values[..., 0])).sum())

    def merge(self) -> None:
        """Takes over what the other processes of this run have found; each visits cells of its own."""
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
            write_tensors(bank_path(self.key), {"errors": self.values}, {"kind": "reference errors"})
        except OSError:
            return
        self.new = 0


def bank_path(key: str) -> Path:
    """Where the bank of this key lies."""
    return cache_folder() / "reference" / key[:2] / f"{key}.safetensors"


def open_bank(live: Live, key: str, shape: tuple[int, int, int]) -> Bank:
    """The bank of this key [N, K, G], with what earlier runs of the same key have found; a damaged one begins anew."""
    empty = torch.full(shape, float("nan"))
    path = bank_path(key)
    if path.is_file():
        try:
            values = read_tensors(path)[0]["errors"]
        except (UserError, KeyError):
            values = empty
        if values.shape == empty.shape:
            return Bank(live, key, values.clone())
    return Bank(live, key, empty)


def bank_key(*facts: object) -> str:
    """One key of all that the reference's errors depend on: a change of any gives another bank."""
    return content_hash("\n".join(map(str, facts)).encode())
