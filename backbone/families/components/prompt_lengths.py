"""How much of padded prompts a network is given that reads them without their padding.

Up to the longest prompt's end. Inside of `in_classes` up to the next multiple of `CLASS`, which changes no prediction:
compiled blocks are compiled for every length, and prompts of a few lengths share theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.conditions.conditions import Text

CLASS = 64  # tokens
_classed: ContextVar[bool] = ContextVar("_classed", default=False)


@contextmanager
def in_classes() -> Iterator[None]:
    """Inside the `with`, prompts are cut to multiples of `CLASS`."""
    before = _classed.set(True)
    try:
        yield
    finally:
        _classed.reset(before)


@dataclass(frozen=True)
class PromptLengths:
    """The tokens of the shortest and the longest of padded prompts, and of their padding's end; on `meta` all are."""

    shortest: int
    longest: int
    padded: int

    @classmethod
    def of(cls, mask: Tensor) -> PromptLengths:
        """Of the mask [B, T] of prompts whose padding stands behind them."""
        if mask.is_meta:
            return cls(*[mask.shape[1]] * 3)
        lengths = mask.sum(1)
        return cls(int(lengths.min()), int(lengths.max()), mask.shape[1])

    def kept(self) -> tuple[int, bool]:
        """How many tokens of each prompt the network is given, and whether some of them may be padding.

        In a training, prompts of one length are given without padding inside of `in_classes` too: attention with a mask
        is slower, and its prompts come again and again.
        """
        same = self.shortest == self.longest
        if not _classed.get() or (same and (torch.is_grad_enabled() or self.longest == self.padded)):
            return self.longest, not same
        return min(-(-self.longest // CLASS) * CLASS, self.padded), True


def cut_padding(text: Text) -> tuple[Tensor, Tensor | None]:
    """hidden [B, T, …] up to where `PromptLengths.kept` says, and its mask [B, T], None where no token is padding."""
    tokens, is_padded = PromptLengths.of(text["mask"]).kept()
    return text["hidden"][:, :tokens], text["mask"][:, :tokens].bool() if is_padded else None
