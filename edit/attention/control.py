"""Attention control for one call of the denoiser: the data that the attention processors read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.diffusion.transfer import send
from backbone.families.base import AttentionLayout

SelfAttention = Literal["own", "layout", "contents"]
"""Whose self-attention a target has: its own; the source's queries and keys; the source's keys and values."""


Reach = Literal["prompted", "all"]
"""Which rows of a target take the source's self-attention: the conditional one, or the unconditional one too."""


MAP_TOKENS = 256  # maps are read at the resolution nearest to 16 × 16, where words are localised best


UNET = AttentionLayout()
CPU = torch.device("cpu")
OVER_TIME = ".motion_modules."  # in the names of temporal attention layers
Call = TypeVar("Call", bound=Callable[..., Any])


def never_traced(call: Call) -> Call:
    """Exclude a processor's call from compilation: its control changes from step to step."""
    return cast(Call, torch.compiler.disable(call))


@dataclass(frozen=True, eq=False)
class Cross:
    """The targets' cross-attention maps, P = P_source·(M·diag c) + P_target·diag d.

    from_source  M·diag(c) [N, T_source, T_target]
    from_target          d [N, T_target]; None where it is zero everywhere
    """

    from_source: Tensor
    from_target: Tensor | None

    def changed(self) -> list[bool]:
        """Which of the targets [N] have other maps than their own; this synchronises with a GPU."""
        rows = len(self.from_source)
        from_target = torch.zeros(rows, 1) if self.from_target is None else self.from_target
        return cast("list[bool]", (self.from_source.flatten(1).any(1) | (from_target != 1).any(1)).tolist())

    def to(self, device: torch.device) -> Cross:
        """The same maps on another device."""
        return Cross(
            send(self.from_source, device),
            None if self.from_target is None else send(self.from_target, device),
        )


@dataclass
class AttentionControl:
    """The data that the processors read: set it before a call of the denoiser.

    The rows of a call are the source, its N `targets`, and the unconditional rows: the source's own, if there is one,
    and the targets'.

    cross                None leaves cross-attention as it is
    self_attention       changed only in layers of at most `self_tokens` queries (None: of any number), whose names
                         begin with one of `layers`
    reach                for which rows of a target
    controlled_targets   for which targets [N]; all if None
    features             whose residual features the targets have in the block that `find_feature_layer` finds
    maps                 collects attention maps, or None
    hidden               mask [H, W] of the latent, 1 where keys are hidden from all queries of self-attention; in CPU
                         memory
    clips                how many clips the rows of the call are, where they are clips' frames; 0: pictures
    temporal             whether the targets' layers over time have the source's queries and keys
    across_frames        whether a frame attends only to its clip's first frame and the one before it
    """

    targets: int
    cross: Cross | None = None
    self_attention: SelfAttention = "own"
    self_tokens: int | None = UNET.max_map_queries
    layers: tuple[str, ...] = ("",)
    reach: Reach = "prompted"
    controlled_targets: Sequence[bool] | None = None
    features: Literal["own", "source"] = "own"
    maps: Maps | None = None
    hidden: Tensor | None = None
    clips: int = 0
    temporal: bool = False
    across_frames: bool = False
    _visible: dict[tuple[int, torch.device], Tensor | None] = field(
        default_factory=dict, init=False, repr=False
    )

    def visible_keys(self, tokens: int, device: torch.device = CPU) -> Tensor | None:
        """Indices of the keys that a layer with `tokens` keys may attend to; None for all, or if none are left."""
        if (tokens, device) not in self._visible:
            indices = self._find_visible_keys(tokens)
            self._visible[tokens, device] = None if indices is None else send(indices, device)
        return self._visible[tokens, device]

    def _find_visible_keys(self, tokens: int) -> Tensor | None:
        size = None if self.hidden is None else grid((self.hidden.shape[0], self.hidden.shape[1]), tokens)
        if self.hidden is None or size is None:
            return None
        # A key is hidden if any part of its region is
        covered = F.adaptive_max_pool2d(self.hidden[None, None].float(), size).flatten() > 0
        return None if covered.all() or not covered.any() else (~covered).nonzero()[:, 0]

    def reaches(self, name: str, tokens: int) -> bool:
        """Whether self-attention is changed in a layer of this name and number of queries."""
        if OVER_TIME in name:
            return self.temporal
        coarse = self.self_tokens is None or tokens <= self.self_tokens
        return self.self_attention != "own" and coarse and name.startswith(self.layers)

    def rows_each(self, rows: int) -> int:
        """How many of a layer's rows belong to one sample: a clip's frames, or in temporal layers its positions."""
        return rows // self.clips if self.clips else 1

    def source_index_map(
        self, rows: int, controlled_targets: Sequence[bool] | None = None
    ) -> tuple[list[int], list[int]]:
        """Which of the B = `rows` rows are read, and the gather index [B] from every row to the one that it reads.

        A row reads queries, keys, values or features; rows of targets that are not controlled read their own.
        """
        # Each target reads the source's row, every other row itself
        reads = [0] * (1 + self.targets) + list(range(1 + self.targets, rows))
        unconditional = rows - 1 - self.targets
        if self.reach == "all" and unconditional >= self.targets > 0:
            # The targets' unconditional rows, the last ones, read the source's unconditional row if there is one
            source = 0 if unconditional == self.targets else 1 + self.targets
            reads[-self.targets :] = [source] * self.targets
        for n, controlled in enumerate(controlled_targets or ()):
            if not controlled:
                reads[1 + n] = 1 + n
                if unconditional:
                    reads[n - self.targets] = rows + n - self.targets
        needed = sorted(set(reads))
        return needed, [needed.index(row) for row in reads]


def make_cross(mapping: Tensor, from_source: Tensor, weight: Tensor, window: Tensor) -> Cross | None:
    """One step's cross-attention from M [N, T_source, T_target], a, e and α [N, T_target]; None if it is the targets'.

    c = α·a·e        d = α·(1 − a)·e + 1 − α
    """
    c = window * from_source * weight
    d = window * (1 - from_source) * weight + 1 - window
    if not c.any() and bool((d == 1).all()):
        return None
    return Cross(mapping * c[:, None], d if d.any() else None)


class Maps:
    """Attention maps of chosen words, summed over layers, heads and calls, at one resolution.

    columns      [1 + N, W, T]: for the source and each target, the token positions of each of W words
    latent       (H, W) of the latent, which tells how a layer's queries lie in the plane
    max_queries  the most queries of a layer that is read; None for any number
    """

    def __init__(
        self, columns: Tensor, latent: tuple[int, int], *, max_queries: int | None = UNET.max_map_queries
    ) -> None:
        self.columns = columns
        self.latent = latent
        self.max_queries = max_queries
        self.tokens: int | None = None
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def reads(self, tokens: int) -> bool:
        """Whether a layer of this many queries is read: all small ones in the first call, one resolution afterwards."""
        if self.tokens is not None:
            return tokens == self.tokens
        return (self.max_queries is None or tokens <= self.max_queries) and grid(
            self.latent, tokens
        ) is not None

    def add(self, maps: Tensor) -> None:
        """Add a layer's maps [1 + N, queries, W]."""
        tokens = maps.shape[1]
        summed = maps.detach().float().transpose(1, 2)
        self._sums[tokens] = self._sums[tokens] + summed if tokens in self._sums else summed
        self._counts[tokens] = self._counts.get(tokens, 0) + 1

    def settle(self) -> None:
        """After a call: keep the resolution nearest to 16 × 16 and drop the others."""
        if self.tokens is None and self._sums:
            self.tokens = min(self._sums, key=lambda tokens: abs(math.log(tokens / MAP_TOKENS)))
            self._sums = {self.tokens: self._sums[self.tokens]}

    def read(self) -> Tensor:
        """The mean maps [1 + N, W, h, w]: the word's share of each position's attention."""
        self.settle()
        assert self.tokens is not None, "no call was made, or no layer is small enough"
        size = grid(self.latent, self.tokens)
        assert size is not None
        return cast(Tensor, (self._sums[self.tokens] / self._counts[self.tokens]).unflatten(-1, size))


def grid(latent: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """(h, w) of a layer with this many queries in a denoiser that halves the latent at every level, rounding up."""
    height, width = latent
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == tokens else None


def read_columns(attend: Callable[[Tensor], Tensor], query: Tensor, columns: Tensor) -> Tensor:
    """The maps [R, queries, W] of chosen words: the share of a query's attention at the keys of `columns` [R, W, keys].

    A map times a one-hot value is a column of the map, so attention itself reads it: `attend` is the map's product
    with values [R, heads, keys, D]. As many words at a time as a head of the queries [B, heads, queries, D] has
    features, padded to that width, since narrower values would make some devices materialise the whole map. Mean over
    heads.
    """
    heads, width = query.shape[1], query.shape[-1]
    maps = []
    for part in columns.to(query).split(width, dim=1):
        one_hot = F.pad(part.transpose(1, 2), (0, width - part.shape[1]))[:, None]
        maps.append(attend(one_hot.expand(-1, heads, -1, -1))[..., : part.shape[1]].mean(1))
    return torch.cat(maps, -1)
