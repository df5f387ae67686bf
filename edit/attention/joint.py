"""Attention over text and picture jointly, as a `Control` says: transformers that hold both in one sequence.

A row of the map P holds the picture's columns and the words', under one softmax, and its queries are the picture's
places (p) and the words (w). Every change is made on the sides of Q, K and V, so no map is materialised:

    layout     queries and keys [q_s,p; q_t,w], [k_s,p; k_t,w], values the target's own
    contents   keys and values [k_s,p; k_t,w], [v_s,p; v_t,w], queries the target's own
    words      for the picture's queries  SDPA(q, k, [V_p; diag(d)·V_w]) + SDPA(q_s, k_s, [0; (M·diag c)·V_w])
               with the q and k that the target has after the line above; M, c, d as in `edit.attention.install`

The layout is "Exploring Multimodal Diffusion Transformers for Enhanced Prompt-based Image Editing" (Shin et al. 2025):
the picture's queries and keys alone are taken, since with the whole map the words no longer meet their own values.

Exact are both ways of taking the source's self-attention, the columns of the words, which are those that
prompt-to-prompt writes, and the maps that are read. Prompt-to-prompt itself is an approximation here, in two places:
its rows are not renormalised (the words' columns from the source and the picture's columns of the target sum to
1 + the source's share of words − the target's, as a reweighted row of cross-attention does not sum to 1 either), and
the queries of the words, which cross-attention does not have, are left to the target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.families.base import JointAttentionInputs
from edit.attention.control import read_columns

if TYPE_CHECKING:
    from edit.attention.control import Control, Cross


class JointProcessor:
    """Computes one layer over text and picture jointly as `control` says, and as before where it says nothing.

    `read` is the family's: a call of the layer → `JointAttentionInputs`. The second layer of a block that has two,
    over the picture alone, comes here too.
    """

    def __init__(
        self, control: Control, plain: Any, name: str, read: Callable[..., JointAttentionInputs]
    ) -> None:
        self.control = control
        self.plain = plain
        self.name = name
        self.read = read

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *told: Any,
    ) -> Any:
        control = self.control
        call = (hidden_states, encoder_hidden_states, attention_mask, *told)
        if control.self_attention == "own" and control.cross is None and control.maps is None:
            return self.plain(attn, *call)
        streams = self.read(attn, *call)
        query, key, value = streams.query, streams.key, streams.value
        picture, words = streams.image, streams.text.stop > streams.text.start
        places = picture.stop - picture.start
        if control.reaches(self.name, places):
            asked, taken = control.origins(len(query), control.obeying)
            source = [asked[row] for row in taken]
            key = _taken(key, picture, source)
            if control.self_attention == "layout":
                query = _taken(query, picture, source)
            else:
                value = _taken(value, picture, source)
        if control.maps is not None and words and control.maps.wants(places):
            rows = slice(1 + control.targets)
            look = partial(streams.attend, query[rows, :, picture], key[rows])
            columns = F.pad(control.maps.columns, _around(streams))
            control.maps.add(read_columns(look, query, columns))
        if control.cross is None or not words:
            return streams.project_output(streams.attend(query, key, value))
        return streams.project_output(_with_words(streams, query, key, value, control.targets, control.cross))


def _with_words(
    streams: JointAttentionInputs, query: Tensor, key: Tensor, value: Tensor, targets: int, cross: Cross
) -> Tensor:
    """What is attended to [B, heads, tokens, D], the targets' pictures looking at words as `cross` says."""
    some, picture, text = slice(1, 1 + targets), streams.image, streams.text
    others = [0, *range(1 + targets, len(query))]
    out = torch.empty_like(query)
    out[others] = streams.attend(query[others], key[others], value[others])
    out[some, :, text] = streams.attend(query[some, :, text], key[some], value[some])
    said = value[some, :, text]
    own = value[some].clone()
    own[:, :, text] = 0 if cross.own is None else cross.own.to(value.dtype)[:, None, :, None] * said
    taken = torch.zeros_like(own)
    taken[:, :, text] = cross.taken.to(value.dtype)[:, None] @ said
    lead_query, lead_key = (x[:1].expand(targets, *x.shape[1:]) for x in (query[:, :, picture], key))
    out[some, :, picture] = streams.attend(query[some, :, picture], key[some], own) + streams.attend(
        lead_query, lead_key, taken
    )
    return out


def _taken(x: Tensor, picture: slice, source: list[int]) -> Tensor:
    """[B, heads, tokens, D] with the picture's part of each row from the row that `source` names for it."""
    changed = x.clone()
    changed[:, :, picture] = x[source][:, :, picture]
    return changed


def _around(streams: JointAttentionInputs) -> tuple[int, int]:
    """How many keys stand before the words, and how many behind them."""
    return streams.text.start, streams.key.shape[2] - streams.text.stop
