"""How many tokens of padded prompts are given to a network that reads them without their padding.

Up to the longest prompt's end; inside of `in_buckets` up to the next multiple of `BUCKET`, which changes no prediction.
Compiled blocks are compiled for every length, so prompts of similar lengths share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.conditions.conditions import Text

BUCKET = 64  # tokens
_bucketed: ContextVar[bool] = ContextVar("_bucketed", default=False)


@contextmanager
def in_buckets() -> Iterator[None]:
    """Inside the `with`, prompts are cut to multiples of `BUCKET`."""
    token = _bucketed.set(True)
    try:
        yield
    finally:
        _bucketed.reset(token)


@dataclass(frozen=True)
class PromptLengths:
    """The shortest and the longest length of padded prompts, and the padded one; on `meta` all three are the last."""

    shortest: int
    longest: int
    padded: int

    @classmethod
    def of(cls, mask: Tensor) -> PromptLengths:
        """From the mask [B, T] of prompts whose padding stands after them."""
        if mask.is_meta:
            return cls(*[mask.shape[1]] * 3)
        lengths = mask.sum(1)
        return cls(int(lengths.min()), int(lengths.max()), mask.shape[1])

    def count_tokens(self) -> tuple[int, bool]:
        """How many tokens of each prompt the network is given, and whether some of them may be padding.

        In training, prompts of one length are given without padding inside of `in_buckets` too: attention with a mask
        is slower, and the same prompts come again and again.
        """
        equal = self.shortest == self.longest
        if not _bucketed.get() or (equal and (torch.is_grad_enabled() or self.longest == self.padded)):
            return self.longest, not equal
        return min(-(-self.longest // BUCKET) * BUCKET, self.padded), True


def cut_padding(text: Text) -> tuple[Tensor, Tensor | None]:
    """hidden [B, T, …] cut to `PromptLengths.count_tokens`, and its mask [B, T], None where no token is padding."""
    tokens, is_padded = PromptLengths.of(text["mask"]).count_tokens()
    return text["hidden"][:, :tokens], text["mask"][:, :tokens].bool() if is_padded else None
