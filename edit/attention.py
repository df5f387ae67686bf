"""Attention control as data: what an edit changes in a denoiser's attention, without a materialised map.

Rows of a call stand in one order: the source first, then N targets, then rows that nothing is done to (those without
a prompt). Prompt-to-prompt (Hertz et al. 2022) replaces a target's map P_t by one made from the source's, and every
such change is linear in the map, so it can be made on the side of V, where scaled-dot-product attention stays fast:

    self-attention   SDPA(q_s, k_s, V_t)
    cross-attention  SDPA(q_s, k_s, (M·diag c)·V_t) + SDPA(q_t, k_t, diag(d)·V_t)
                     c = α·a·e        d = α·(1 − a)·e + 1 − α

with M, a, e, α as in `edit.words`; a term that is zero is left out, and with it its queries and keys. The contents of
the source in the target's layout (MasaCtrl, Cao et al. 2023, eq. 6) are SDPA(q_t, k_s, V_s). Maps that a mask or a heat
map asks for are read through a V of one-hot columns, padded to the head's width, at one resolution only.

    control = Control(targets=1)
    with controlled(denoiser, control):
        control.cross = cross(mapping, taken, weight, window)   # and predict; None: nothing is changed

Layers over text and picture jointly are in `edit.joint`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from backbone.console import UserError
from backbone.families import Attention
from edit.joint import JointProcessor, read_columns

SelfAttention = Literal["own", "layout", "contents"]
"""Whose self-attention a target has: its own; the source's queries and keys; the source's keys and values."""

Reach = Literal["prompted", "all"]
"""Which rows of a target take the source's self-attention: the one with a prompt, or the one without it too."""

MAP_TOKENS = 256  # maps are read at the resolution nearest to 16 × 16, where words are places
UNET = Attention()


@dataclass(frozen=True, eq=False)
class Cross:
    """What the targets' cross-attention is made of.

    taken  M·diag(c) [N, T_source, T_target]
    own    d [N, T_target]; None where it is zero everywhere
    """

    taken: Tensor
    own: Tensor | None


@dataclass
class Control:
    """What the processors read: set it before a call of the denoiser.

    cross            None leaves cross-attention as it is
    self_attention   changed only in layers of at most `self_tokens` queries (None: of any number), whose names begin
                     with one of `layers`
    reach            which rows of a target that concerns
    obeying          which targets that concerns [N]; all if None
    features         whose residual features the targets have in the block that `controlled` finds for them
    maps             where attention maps are gathered, or None
    """

    targets: int
    cross: Cross | None = None
    self_attention: SelfAttention = "own"
    self_tokens: int | None = UNET.coarse
    layers: tuple[str, ...] = ("",)
    reach: Reach = "prompted"
    obeying: Sequence[bool] | None = None
    features: Literal["own", "source"] = "own"
    maps: Maps | None = None

    def reaches(self, name: str, tokens: int) -> bool:
        """Whether a layer of this name and so many queries has another self-attention than its own."""
        coarse = self.self_tokens is None or tokens <= self.self_tokens
        return self.self_attention != "own" and coarse and name.startswith(self.layers)

    def origins(self, rows: int, obeying: Sequence[bool] | None = None) -> tuple[list[int], list[int]]:
        """Which rows are asked for themselves, and for each row the index of the one among them that it takes.

        Rows of targets that are not `obeying` take themselves.
        """
        taken = [0] * (1 + self.targets) + list(range(1 + self.targets, rows))
        free = rows - 1 - self.targets
        if (
            self.reach == "all" and free >= self.targets > 0
        ):  # the source's own unconditional row comes first, if any
            taken[-self.targets :] = [0 if free == self.targets else 1 + self.targets] * self.targets
        for n, obeys in enumerate(obeying or ()):
            if not obeys:
                taken[1 + n] = 1 + n
                if free:
                    taken[n - self.targets] = rows + n - self.targets
        asked = sorted(set(taken))
        return asked, [asked.index(row) for row in taken]


def cross(mapping: Tensor, taken: Tensor, weight: Tensor, window: Tensor) -> Cross | None:
    """The edit of one step from M [N, T_source, T_target], a, e and α [N, T_target]; None where nothing changes."""
    c = window * taken * weight
    d = window * (1 - taken) * weight + 1 - window
    if not c.any() and bool((d == 1).all()):
        return None
    return Cross(mapping * c[:, None], d if d.any() else None)


@contextmanager
def controlled(denoiser: nn.Module, control: Control, attention: Attention = UNET) -> Iterator[None]:
    """Inside the `with`, the denoiser's attention obeys `control`; afterwards it is what it was, also after an error.

    `attention` is what its family says of it. Raises `UserError` for a denoiser whose attention is computed in another
    way than plainly.
    """
    network = cast(Any, denoiser)
    before = dict(getattr(network, "attn_processors", {}))
    strange = {
        type(p).__name__
        for p in before.values()
        if type(p) not in attention.joint and not isinstance(p, (AttnProcessor, AttnProcessor2_0))
    }
    if strange or not before:
        what = f"is computed by {', '.join(sorted(strange))}" if strange else "cannot be reached"
        raise UserError(
            f"The attention of this model {what}, which cannot be edited. Take the model without it."
        )
    hook = None
    try:
        network.set_attn_processor(
            {
                name: JointProcessor(control, plain, name, attention.joint[type(plain)])
                if type(plain) in attention.joint
                else Processor(control, plain, name)
                for name, plain in before.items()
            }
        )
        convolution = features_of(network)
        if convolution is not None:
            hook = convolution.register_forward_hook(partial(_take_features, control))
        yield
    finally:
        if hook is not None:
            hook.remove()
        network.set_attn_processor(dict(before))


class Processor:
    """Computes one attention layer as `control` says, and as before where it says nothing."""

    def __init__(self, control: Control, plain: Any, name: str = "") -> None:
        self.control = control
        self.plain = plain
        self.name = name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        control = self.control
        layer = _Layer(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is None:
            if control.reaches(self.name, layer.tokens):
                attend = _source_layout if control.self_attention == "layout" else _source_contents
                return layer.finish(attend(layer, *control.origins(len(hidden_states), control.obeying)))
        else:
            maps = control.maps if control.maps is not None and control.maps.wants(layer.tokens) else None
            if control.cross is not None or maps is not None:
                return layer.finish(_cross(layer, control.targets, control.cross, maps))
        return cast(Tensor, self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb))


class Maps:
    """Attention maps of chosen words, summed over layers, heads and calls, at one resolution.

    columns  [1 + N, W, T]: for the source and each target, the token positions of each of W words
    latent   (H, W) of the latent, which tells how a layer's queries lie in the plane
    most     the most queries of a layer that is read; None for any number
    """

    def __init__(self, columns: Tensor, latent: tuple[int, int], *, most: int | None = UNET.coarse) -> None:
        self.columns = columns
        self.latent = latent
        self.most = most
        self.tokens: int | None = None
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def wants(self, tokens: int) -> bool:
        """Whether a layer of so many queries is read: all small ones in the first call, one resolution afterwards."""
        if self.tokens is not None:
            return tokens == self.tokens
        return (self.most is None or tokens <= self.most) and grid(self.latent, tokens) is not None

    def add(self, maps: Tensor) -> None:
        """Adds a layer's maps [1 + N, queries, W]."""
        tokens = maps.shape[1]
        summed = maps.detach().float().transpose(1, 2)
        self._sums[tokens] = self._sums[tokens] + summed if tokens in self._sums else summed
        self._counts[tokens] = self._counts.get(tokens, 0) + 1

    def settle(self) -> None:
        """After a call: keeps the resolution nearest to 16 × 16 and forgets the others."""
        if self.tokens is None and self._sums:
            self.tokens = min(self._sums, key=lambda tokens: abs(math.log(tokens / MAP_TOKENS)))
            self._sums = {self.tokens: self._sums[self.tokens]}

    def read(self) -> Tensor:
        """The mean maps [1 + N, W, h, w]: the share of each place's attention that the word has."""
        self.settle()
        assert self.tokens is not None, "no call was made, or no layer is small enough"
        size = grid(self.latent, self.tokens)
        assert size is not None
        return cast(Tensor, (self._sums[self.tokens] / self._counts[self.tokens]).unflatten(-1, size))


def grid(latent: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """(h, w) of a layer with so many queries in a denoiser that halves the latent at every level, rounding up."""
    height, width = latent
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == tokens else None


# The three kinds of attention -------------------------------------------------------------------------------


def _source_layout(layer: _Layer, asked: list[int], taken: list[int]) -> Tensor:
    """Every target looks where the source looks: SDPA(q_s, k_s, V_t). The targets' queries and keys are not made."""
    lead = layer.hidden[asked]
    query, key = layer.query(lead)[taken], layer.key(lead)[taken]
    return layer.sdpa(query, key, layer.value(layer.hidden), _rows(layer.mask, asked, taken))


def _source_contents(layer: _Layer, asked: list[int], taken: list[int]) -> Tensor:
    """Every target finds the source's contents: SDPA(q_t, k_s, V_s)."""
    lead = layer.hidden[asked]
    key, value = layer.key(lead)[taken], layer.value(lead)[taken]
    return layer.sdpa(layer.query(layer.hidden), key, value, _rows(layer.mask, asked, taken))


def _rows(mask: Tensor | None, asked: list[int], taken: list[int]) -> Tensor | None:
    return None if mask is None else mask[asked][taken]


def features_of(network: Any) -> nn.Module | None:
    """The convolution whose output says what the coarse structure is: at the second coarsest level, on the way up.

    `up_blocks.1.resnets.1` of Tumanyan et al. 2023 (layer 4 of the decoder); None for a denoiser without such blocks.
    """
    blocks = getattr(network, "up_blocks", None)
    if not blocks:
        return None
    inner = getattr(blocks[min(1, len(blocks) - 1)], "resnets", None)
    return cast(nn.Module, inner[min(1, len(inner) - 1)].conv2) if inner else None


def _take_features(control: Control, module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
    """The features of the rows that `control` says, or what they were."""
    if control.features == "own":
        return None
    asked, taken = control.origins(len(output))
    return output[asked][taken]


def _cross(layer: _Layer, targets: int, cross: Cross | None, maps: Maps | None) -> Tensor:
    """The targets' cross-attention from the source's map and their own."""
    text, value = layer.text, layer.value(layer.text)
    some = slice(1, 1 + targets)
    own_needed = cross is None or cross.own is not None or maps is not None
    if own_needed:
        query, key, mask = layer.query(layer.hidden), layer.key(text), layer.mask
        if maps is not None:
            rows = slice(1 + targets)
            look = partial(layer.sdpa, query[rows], key[rows], mask=None if mask is None else mask[rows])
            maps.add(read_columns(look, query, maps.columns))
        if cross is None:
            return layer.sdpa(query, key, value, mask)
        lead_query, lead_key = _lead(query, targets), _lead(key, targets)
    else:
        mask = layer.mask
        lead_query, lead_key = layer.query(_lead(layer.hidden, targets)), layer.key(_lead(text, targets))
    assert cross is not None
    mixed = cross.taken.to(value.dtype)[:, None] @ value[some]
    values = torch.cat([value[:1], mixed, value[1 + targets :]])
    lead_mask = None if mask is None else _spread(_lead(mask, targets), targets)
    out = layer.sdpa(_spread(lead_query, targets), _spread(lead_key, targets), values, lead_mask)
    if cross.own is None:
        return out
    kept = cross.own.to(value.dtype)[:, None, :, None] * value[some]
    own = layer.sdpa(query[some], key[some], kept, None if mask is None else mask[some])
    return torch.cat([out[:1], out[some] + own, out[1 + targets :]])


def _lead(x: Tensor, targets: int) -> Tensor:
    """The rows without the targets'."""
    return torch.cat([x[:1], x[1 + targets :]])


def _spread(x: Tensor, targets: int) -> Tensor:
    """Rows without the targets' → all rows, the targets' being the source's."""
    return torch.cat([x[:1].expand(1 + targets, *x.shape[1:]), x[1:]])


@dataclass
class _Layer:
    """One call of a diffusers `Attention`: what surrounds the product of queries, keys and values."""

    attn: Any
    states: Tensor
    encoder_states: Tensor | None
    attention_mask: Tensor | None
    temb: Tensor | None
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = tuple(self.states.shape)

    @property
    def tokens(self) -> int:
        """How many queries there are."""
        return self.shape[1] if len(self.shape) == 3 else self.shape[2] * self.shape[3]

    @property
    def hidden(self) -> Tensor:
        """What queries are made of [B, queries, C]."""
        if not hasattr(self, "_hidden"):
            x = self.states
            if self.attn.spatial_norm is not None:
                x = self.attn.spatial_norm(x, self.temb)
            if x.ndim == 4:
                x = x.flatten(2).transpose(1, 2)
            if self.attn.group_norm is not None:
                x = self.attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
            self._hidden = x
        return self._hidden

    @property
    def text(self) -> Tensor:
        """What keys and values of cross-attention are made of [B, T, D]."""
        assert self.encoder_states is not None
        if self.attn.norm_cross:
            return cast(Tensor, self.attn.norm_encoder_hidden_states(self.encoder_states))
        return self.encoder_states

    @property
    def mask(self) -> Tensor | None:
        """[B, heads, 1 or queries, keys], or None."""
        if self.attention_mask is None:
            return None
        batch = self.shape[0]
        keys = self.tokens if self.encoder_states is None else self.encoder_states.shape[1]
        mask = self.attn.prepare_attention_mask(self.attention_mask, keys, batch)
        return cast(Tensor, mask.view(batch, self.attn.heads, -1, mask.shape[-1]))

    def query(self, x: Tensor) -> Tensor:
        query = self._heads(self.attn.to_q(x))
        return query if self.attn.norm_q is None else self.attn.norm_q(query)

    def key(self, x: Tensor) -> Tensor:
        key = self._heads(self.attn.to_k(x))
        return key if self.attn.norm_k is None else self.attn.norm_k(key)

    def value(self, x: Tensor) -> Tensor:
        return self._heads(self.attn.to_v(x))

    def sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.attn.scale)

    def finish(self, attended: Tensor) -> Tensor:
        """Heads side by side, the output projection, the residual, and the shape that came in."""
        x = attended.transpose(1, 2).flatten(2)
        x = self.attn.to_out[1](self.attn.to_out[0](x))
        if len(self.shape) == 4:
            x = x.transpose(1, 2).reshape(self.shape)
        if self.attn.residual_connection:
            x = x + self.states
        return cast(Tensor, x / self.attn.rescale_output_factor)

    def _heads(self, x: Tensor) -> Tensor:
        return cast(Tensor, x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2))
